"""Where the packages with weights lie. Nothing of them is imported: only their files are read."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path


class PartError(ValueError):
    """A part cannot be made, or what is stored of it is damaged; the message says what to do."""


def package_folder(module: str) -> Path:
    """Folder of an installed package, found without importing it. Raises PartError where it is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise PartError(f"the package {module!r} is not installed")
    return Path(spec.origin).parent


def versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Installed version of each distribution.

    Raises:
        PartError: naming those that are not installed.
    """
    found, missing = {}, []
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise PartError(f"packages are not installed: {', '.join(missing)}")
    return found
