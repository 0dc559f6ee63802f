"""The extension `_C`, C++ kernels compiled with the package (csrc/); None where it is not there."""

import functools
import importlib
import warnings

try:
    # NOTE: of `from .. import _C` Python would say that the import is circular, where the extension is not there.
    _C = importlib.import_module("nlora_kernels._C")
except ImportError as error:
    _C, _IMPORT_ERROR = None, error


def missing() -> str | None:
    """Why it is not there."""
    if _C is not None:
        return None
    if isinstance(_IMPORT_ERROR, ModuleNotFoundError):
        return f"the package was built without C++ kernels (install it where a C++ compiler is): {_IMPORT_ERROR}"
    return f"the C++ kernels cannot be loaded: {_IMPORT_ERROR}"


@functools.cache
def warn_once() -> None:
    """A word, at the first call on a CPU, on kernels that are not there, and how to get them."""
    warnings.warn(
        f"library calls compute on this CPU, for {missing()}. Install a wheel of nlora_kernels for this Python and "
        "machine, or install it from its sources where g++ or clang++ is; `python -m nlora_kernels doctor` says more",
        stacklevel=2,
    )
