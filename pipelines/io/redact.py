"""Secrets do not leave the process: the one redaction that every exit passes.

`redact_text` is for text of any origin (messages, tracebacks, logs), `redact` for plain data (settings, tags,
documents). What is hidden:

1. known      the values of this process's environment variables whose names say that they are secret, and the logins
              inside addresses there, as they are and as URLs and JSON write them, wherever they stand
2. addresses  everything before the `@` of an address, and parameters of a query that sign or log in
3. named      what follows the name of a secret (`password=...`, `"hf_token": "..."`, `Authorization: ...`)
4. shapes     tokens that are known by their form (AWS, Hugging Face, GitHub, JWT, private keys, ...)

Numbers, None and empty values of settings stay, so that a setting which only sounds like a secret is not lost. Imports
nothing but the standard library: every room uses it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus, unquote

REDACTED = "(redacted)"
LEAST_KNOWN = 6
LEAST_KNOWN_WORD = 16
"""Characters of a value of the environment, and of one in small letters alone, that is hidden wherever it stands;
shorter ones are words of any text (a password `meteor` would hide the name of a bucket)."""

_SECRET_WORDS = {
    "secret", "secrets", "password", "passwords", "passwd", "pwd", "passphrase", "credential", "credentials", "apikey",
    "authorization",
}  # fmt: skip
_SECRET_PAIRS = {
    ("api", "key"), ("access", "key"), ("accesskey", "id"), ("private", "key"), ("account", "key"), ("secret", "key"),
    ("auth", "header"), ("connection", "string"), ("signing", "key"), ("encryption", "key"),
}  # fmt: skip
# A setting named `..._token` is a credential, unless it is one of a tokenizer's tokens.
_TEXT_TOKENS = {"image", "pad", "bos", "eos", "unk", "mask", "cls", "sep", "special", "start", "end", "stop", "per"}
_NAMES_OF_PLACES = {"file", "files", "path", "dir", "folder", "provider", "mode", "class", "type"}
"""Last words of names that say where a secret lies and not what it is (AWS_SHARED_CREDENTIALS_FILE)."""
_QUERY_NAMES = {"sig", "signature", "key", "auth", "code", "pass", "pw", "jwt", "sas", "session"}
_LOGINS = (re.compile(r"://([^\s/?#]*)@"), re.compile(r"://([^\s/@:]+:(?!\d+(?:[/?#]|$))\S*)@"))

# Every repetition either is bounded or cannot fail after it: a hostile text of any length takes linear time.
_SHAPES = re.compile(
    r"""
    -----BEGIN\ [A-Z ]{0,40}PRIVATE\ KEY-----.*?(?:-----END\ [A-Z ]{0,40}PRIVATE\ KEY-----|\Z)
    | \b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b
    | \b(?:hf|api_org)_[A-Za-z0-9]{16,}
    | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_\w{20,} | \bglpat-[\w-]{16,}
    | \bsk-[A-Za-z0-9_-]{20,} | \bxox[abeoprs]-[A-Za-z0-9-]{10,} | \bdapi[0-9a-f]{32} | \bAIza[\w-]{35}
    | \beyJ[\w-]{8,512}\.[\w-]{8,8192}\.[\w-]*
    """,
    re.VERBOSE | re.DOTALL,
)
_USERINFO = re.compile(r'(?<=://)[^\s/?#"\\<>]{0,1024}@')
# A password with a slash or a question mark that was not quoted; after a colon and digits alone it is a port.
_ODD_USERINFO = re.compile(r'(?<=://)[^\s/@:"\\<>]{1,256}:(?!\d+(?:[/?#"\\\s]|$))[^\s"\\<>]{0,1024}@')
_BARE_LOGIN = re.compile(r"(?<![\w/.@:%+~-])[\w.%+~-]{1,256}:[^\s/\"'\\]{1,512}@(?=[\w\[])")
_QUERY = re.compile(r"([?&;])([\w.\-%]{1,200})=([^&\s\"'\\<>#;]+)")
_SCHEME = re.compile(r"(?i)\b(authorization[\"']?\s*[:=]\s*[\"']?)(?:(?:basic|bearer|token|digest)\s+)?[^\s\"',;]+")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}")
_NAMED = re.compile(
    r"""
    (?P<name>(?<![\w.-])[\w.-]+)
    (?P<is>\\*["']\s*[:=]\s*|\s*=\s*|:\s*(?=\\*["'])|:\ (?=\S+[ \t]*$))
    (?:(?P<quote>\\*["'])(?P<quoted>(?:(?!(?P=quote)|\n).)*) | (?P<bare>[^\s"']+))
    """,
    re.VERBOSE | re.MULTILINE,
)
_OPTION = re.compile(r"(?<![\w.-])(?P<option>--?[A-Za-z][\w.-]*)(?P<gap>\s+)(?P<value>(?!-)\S+)")


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a setting of this name (words joined by `_`, `-`, `.`, `/` or capitals) looks like a credential."""
    words = _words(name.rsplit(".", 1)[-1].rsplit("/", 1)[-1])
    if not words or words[-1] in _NAMES_OF_PLACES:
        return False
    if _SECRET_WORDS & set(words) or any(pair in _SECRET_PAIRS for pair in itertools.pairwise(words)):
        return True
    return words[-1] == "token" and (len(words) == 1 or words[-2] not in _TEXT_TOKENS)


def _words(name: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return [word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word]


def redact_text(text: str) -> str:
    """The text without what its form, its place, or this process's environment says is a secret."""
    return _redact_text(text, _known(tuple(_values_of_environment())))


def redact(value: Any, name: str = "") -> Any:
    """A copy of plain data (mappings, sequences, dataclasses) whose secrets read `(redacted)`.

    Args:
        value: plain data.
        name: of the setting that it is the value of; a name that sounds like a secret hides the whole value.
    """
    return _redact(value, name, _known(tuple(_values_of_environment())))


def _redact(value: Any, name: str, known: re.Pattern[str] | None) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if is_secret_name(name) and not (value is None or isinstance(value, bool | int | float) or value == ""):
        return REDACTED
    if isinstance(value, Mapping):
        return {_redact_text(str(key), known): _redact(item, str(key), known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(item, "", known) for item in value]
    return _redact_text(value, known) if isinstance(value, str) else value


def _redact_text(text: str, known: re.Pattern[str] | None) -> str:
    if known is not None:
        text = known.sub(REDACTED, text)
    if "://" in text:
        text = _ODD_USERINFO.sub(f"{REDACTED}@", text)
        text = _USERINFO.sub(f"{REDACTED}@", text)
    if "@" in text:
        text = _BARE_LOGIN.sub(f"{REDACTED}@", text)
    if "=" in text or ":" in text:
        text = _SCHEME.sub(rf"\1{REDACTED}", text)
        text = _QUERY.sub(_query, text)
        text = _NAMED.sub(_named, text)
    if "-" in text:
        text = _OPTION.sub(_option, text)
    return _SHAPES.sub(REDACTED, _BEARER.sub(rf"\1{REDACTED}", text))


def _query(found: re.Match[str]) -> str:
    name = unquote(found[2])
    if is_secret_name(name) or (_words(name) or [""])[-1] in _QUERY_NAMES:
        return f"{found[1]}{found[2]}={REDACTED}"
    return found[0]


def _named(found: re.Match[str]) -> str:
    if not is_secret_name(found["name"]) and "=" in (found["bare"] or ""):  # the value is itself NAME=VALUE
        return f"{found['name']}{found['is']}{_NAMED.sub(_named_once, found['bare'])}"
    return _named_once(found)


def _named_once(found: re.Match[str]) -> str:
    value = found["quoted"] if found["quote"] else found["bare"]
    if not is_secret_name(found["name"]) or _is_plain(value):
        return found[0]
    return f"{found['name']}{found['is']}{found['quote'] or ''}{REDACTED}"


def _option(found: re.Match[str]) -> str:
    if not is_secret_name(found["option"].lstrip("-")) or _is_plain(found["value"]):
        return found[0]
    return f"{found['option']}{found['gap']}{REDACTED}"


def _is_plain(value: str) -> bool:
    """Whether a value in a text is none that a secret could have: empty, a short number, a word of a program."""
    return (
        REDACTED in value
        or value.lower() in ("", "none", "null", "true", "false", "...")
        or re.fullmatch(r"-?\d{1,7}(?:\.\d+)?", value) is not None
    )


# ------------------------------------------------------------------------------------------------------- environment


def _values_of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if name != "PWD" and is_secret_name(name):  # that is the working directory
            yield value
        elif "@" in value and "://" in value:
            for login in (match[1] for form in _LOGINS for match in form.finditer(value)):
                yield from (login, login.partition(":")[2])


@lru_cache(maxsize=8)
def _known(values: tuple[str, ...]) -> re.Pattern[str] | None:
    """What finds these values in a text, however they are written there; None where there is none to find."""
    forms: set[str] = set()
    for value in values:
        for plain in {value, unquote(value)}:
            is_word = plain.isdigit() or (plain.isalpha() and plain.islower())
            if len(plain) >= (LEAST_KNOWN_WORD if is_word else LEAST_KNOWN):
                forms |= {plain, quote(plain, safe=""), quote_plus(plain), json.dumps(plain)[1:-1], repr(plain)[1:-1]}
    longest_first = sorted(forms, key=lambda form: (-len(form), form))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
