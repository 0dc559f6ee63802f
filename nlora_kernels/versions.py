"""The version of this package, and those of others that it works with, which its metadata (pyproject.toml) states."""

import importlib.metadata
import warnings

__version__ = "0.1.0"

# Packages whose patched attention and MLP compute LoRA by themselves, from lora_A and lora_B alone.
READ_ONLY_A_AND_B = ("unsloth", "axolotl")


def check(extra: str, *packages: str) -> None:
    """Compares the installed versions of `packages` with the ranges of an extra.

    Raises ImportError, which names what was found and what is needed, where one is older than its range or is not
    there. A newer one than was tried gets a warning, for most things work with it.
    """
    # Every package that an extra is for brings this one.
    from packaging.requirements import Requirement
    from packaging.version import Version

    try:
        stated = importlib.metadata.requires("nlora_kernels") or []
    except importlib.metadata.PackageNotFoundError:
        # Used from its sources, without having been installed.
        return
    for requirement in map(Requirement, stated):
        marker = requirement.marker
        if requirement.name not in packages or (marker and not marker.evaluate({"extra": extra})):
            continue
        found = importlib.metadata.version(requirement.name)
        if requirement.specifier.contains(found, prereleases=True):
            continue
        needed = f"{requirement.name} {requirement.specifier}"
        if all(Version(found) >= Version(s.version) for s in requirement.specifier if s.operator in (">=", "==", "~=")):
            warnings.warn(f"nlora_kernels was tried with {needed}, found {found}", stacklevel=3)
        else:
            raise ImportError(f"nlora_kernels needs {needed}, found {found}: pip install 'nlora_kernels[{extra}]'")
