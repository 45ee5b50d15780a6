"""Names of the data types that options accept. Imports no torch, so that `--help` stays quick."""

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "int4")
SAVED_DTYPES = DTYPES[:4]
