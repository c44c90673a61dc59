"""Names that people give: of runs, sweeps, recipes, registered models and aliases.

A name becomes part of a path in storage, of a command and of an address in MLflow, so all of them take the same
characters: none that a path, a shell, a URL or a registry reads as something else.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import StringConstraints

LONGEST = 100
"""Characters of a name."""
_ADDED = 60
"""Characters that may be added to one: a run's number, the trial of a sweep; file systems take 255."""
NAME_RULE = f"1 to {LONGEST} letters, digits, '.', '_' and '-', a letter or digit first"
ALIAS_RULE = f"1 to {LONGEST} letters, digits, '_' and '-', a letter first, and neither 'latest' nor v and a number"
_FIRST, _OTHERS = "[A-Za-z0-9]", "[A-Za-z0-9._-]"
_ALIAS = rf"[A-Za-z][A-Za-z0-9_-]{{0,{LONGEST - 1}}}"
_VERSION_LIKE = re.compile(r"latest|v\d+", re.IGNORECASE)  # MLflow keeps these for itself

Name = Annotated[str, StringConstraints(pattern=rf"^{_FIRST}{_OTHERS}{{0,{LONGEST - 1}}}$")]
"""A field of settings that is such a name."""


class NamingError(ValueError):
    """Something is named as nothing can be; the message says what a name may be."""


def is_name(name: str) -> bool:
    """Whether it is a name, or one that was made of a name by adding to its end."""
    return re.fullmatch(rf"{_FIRST}{_OTHERS}{{0,{LONGEST + _ADDED - 1}}}", name) is not None


def require_name(name: str, of: str) -> str:
    """The name itself.

    Args:
        name: to be checked.
        of: what is named so, for the error ("run", "--tracking.registered-model").

    Raises:
        NamingError: what is no name.
    """
    if not is_name(name):
        raise NamingError(f"{of} {name[:200]!r} is no name: use {NAME_RULE}")
    return name


def require_alias(alias: str, of: str = "alias") -> str:
    """The alias itself.

    Raises:
        NamingError: what MLflow or the commands would take for something else: a version, a path.
    """
    if not re.fullmatch(_ALIAS, alias) or _VERSION_LIKE.fullmatch(alias):
        raise NamingError(f"{of} {alias[:200]!r} is no alias: use {ALIAS_RULE}")
    return alias
