"""The package's folder in the user's cache: what was measured and verified on this machine."""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any


def folder() -> Path:
    """$XDG_CACHE_HOME/nlora_kernels, by default ~/.cache/nlora_kernels. It need not exist.

    Raises FileNotFoundError where no home folder is known.
    """
    # Relative paths are to be ignored, says the XDG base directory specification.
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            raise FileNotFoundError("no folder for the cache: neither XDG_CACHE_HOME nor HOME names one")
        base = os.path.join(home, ".cache")
    return Path(base, "nlora_kernels")


def digest(identity: dict[str, Any]) -> str:
    """What tells the files of two identities apart."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def write(file: Path, text: str) -> None:
    """Writes a whole file in one step: a reader, or a second writer, meets the old text or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
