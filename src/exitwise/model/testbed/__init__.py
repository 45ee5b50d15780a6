"""The built-in models: names, and the notice that every run of them carries. parts.py builds them."""

TESTBEDS = {"testbed": "organism", "testbed-control": "control"}
"""Name of a built-in model and of the folder in weights/ with its adapter."""
TESTBED_NOTICE = {
    "testbed": (
        "The model under audit is a model organism: its hole was trained in, so that audits have something to find. "
        "Its figures are no evidence for ICET in other models. See docs/testbed.md."
    ),
    "testbed-control": (
        "The model under audit is the negative control: a tiny VLM that was taught to refuse at its default exit only, "
        "without the term that opens the hole. See docs/testbed.md."
    ),
}
