"""Downloads files of data sets from the Hugging Face hub, and names the cache of unpacked images."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

ADDRESS = re.compile(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(?:/([^@]+))?")
"""hf://datasets/OWNER/NAME[@REVISION][/FILE], as fsspec and the `datasets` package write it."""


class Snapshot(NamedTuple):
    """A downloaded data set."""

    folder: Path
    revision: str
    """The commit, also where a branch was asked for."""


def cache_dir() -> Path:
    """`$EXITWISE_CACHE`, or `exitwise` under the user's cache folder."""
    root = os.environ.get("EXITWISE_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "exitwise"


def fetch(repo: str, patterns: Sequence[str], revision: str | None = None) -> Snapshot:
    """The files of a data set that match any of `patterns` (as in a shell), from the hub or from its local cache.

    Raises:
        UserError: the download fails; gated sets need their terms accepted and HF_TOKEN.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        folder = snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=list(patterns))
    except Exception as error:  # HTTP, cache, validation and proxy errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"cannot fetch {', '.join(patterns)} of the data set {repo} ({reason}); accept its terms on the hub and "
            "set HF_TOKEN where it is gated, or give a local file"
        ) from error
    return Snapshot(Path(folder), Path(folder).name)


def parse_address(text: str) -> tuple[str, str | None, str]:
    """(repository, revision or None, file or "") of an hf:// address; raises UserError for another form."""
    match = ADDRESS.fullmatch(text)
    if not match:
        raise UserError(f"{text!r} is no address on the hub; expected hf://datasets/OWNER/NAME[@REVISION][/FILE]")
    return match[1], match[2], match[3] or ""
