"""Credentials do not leave the process: what a setting's name gives away, and passwords and signatures inside URLs.

Imports no MLflow: every error message, command line and stored document passes here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

REDACTED = "(redacted)"

_SECRET_WORDS = {"secret", "secrets", "password", "passwd", "pwd", "passphrase", "credential", "credentials", "apikey"}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("account", "key"), ("auth", "header")}
# A setting named `..._token` is a credential, unless it is one of a tokenizer's tokens.
_TEXT_TOKENS = {"image", "pad", "bos", "eos", "unk", "mask", "cls", "sep", "special", "start", "end", "stop"}
_URL_PASSWORD = re.compile(r"(?<=://)[^/\s@]*:[^/\s@]*(?=@)")
_SIGNATURE = re.compile(r"(?i)((?:x-amz-(?:signature|credential|security-token)|sig|signature)=)[^&\s]+")


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name (words joined by `_`, `-`, `.`, `/` or capitals) looks like a credential."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rsplit(".", 1)[-1].rsplit("/", 1)[-1])
    words = [word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word]
    if _SECRET_WORDS & set(words) or any(pair in _SECRET_PAIRS for pair in itertools.pairwise(words)):
        return True
    return bool(words) and words[-1] == "token" and (len(words) == 1 or words[-2] not in _TEXT_TOKENS)


def hide_passwords(text: str) -> str:
    """The text without user:password parts and signatures in its URLs."""
    return _SIGNATURE.sub(rf"\1{REDACTED}", _URL_PASSWORD.sub(REDACTED, text))


def redact(value: Any, name: str = "") -> Any:
    """A copy of plain data (mappings, sequences, dataclasses) whose credentials read `(redacted)`.

    What is judged is the name of a setting, and passwords inside URLs. Numbers, None and empty strings stay.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if is_secret_name(name) and not (value is None or isinstance(value, bool | int | float) or value == ""):
        return REDACTED
    if isinstance(value, Mapping):
        return {hide_passwords(str(key)): redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return hide_passwords(value) if isinstance(value, str) else value
