"""No credential reaches the tracking server, and no ordinary setting is lost to the search for them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_param, _validate_param_name

from pipelines.tracking.mlflow_run import MAX_KEY, MAX_VALUE, flatten
from pipelines.tracking.redact import REDACTED, hide_passwords, is_secret_name, redact

SECRETS = [
    "password",
    "db_password",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SESSION_TOKEN",
    "hf_token",
    "token",
    "storage.token",
    "apiKey",
    "api-key",
    "openaiApiKey",
    "private_key",
    "credentials",
    "client_secret",
    "MLFLOW_TRACKING_PASSWORD",
]
ORDINARY = [
    "max_new_tokens",
    "tokens_per_image",
    "image_token",
    "image_token_id",
    "pad_token",
    "eosToken",
    "tokenizer",
    "supervised_tokens",
    "visual_tokens/clip/kept_1",
    "key",
    "keep_checkpoints",
    "access_pattern",
    "author",
    "seed",
    "monkey",
]


@pytest.mark.parametrize("name", SECRETS)
def test_credential_names(name: str) -> None:
    assert is_secret_name(name)
    assert redact({name: "v4lue"}) == {name: REDACTED}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_names(name: str) -> None:
    assert not is_secret_name(name)
    assert redact({name: "v4lue"}) == {name: "v4lue"}


def test_urls_lose_password_and_signature_only() -> None:
    assert hide_passwords("postgresql://me:pw@host:5432/db") == f"postgresql://{REDACTED}@host:5432/db"
    assert hide_passwords("http://127.0.0.1:5000/a@b") == "http://127.0.0.1:5000/a@b"
    signed = "https://h/b/k?X-Amz-Signature=0a1b&x=2"
    assert hide_passwords(signed) == f"https://h/b/k?X-Amz-Signature={REDACTED}&x=2"


@dataclass(frozen=True)
class Inner:
    token: str = "s3cr3t"
    urls: tuple[str, ...] = ("s3://a", "http://u:s3cr3t@h")


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    parts: tuple[Inner, ...] = (Inner(),)
    rate: float = 1e-3
    frozen: float | None = None


def test_flatten_names_values_and_redaction() -> None:
    flat = flatten(Outer())
    hidden = json.dumps(["s3://a", f"http://{REDACTED}@h"])
    assert flat == {
        "inner.token": REDACTED,
        "inner.urls": hidden,
        "parts.0.token": REDACTED,
        "parts.0.urls": hidden,
        "rate": "0.001",
        "frozen": "None",
    }


def test_flatten_of_nothing() -> None:
    assert flatten({}) == {}


def test_flatten_keeps_within_limits() -> None:
    flat = flatten({"long": "x" * 7000, "exact": "y" * MAX_VALUE, "n" * 300 + "_end": 1, "odd~name": 2, "empty": {}})
    assert len(flat["long"]) == MAX_VALUE
    assert flat["long"].endswith("(7000 characters, all in recipe.json)")
    assert flat["exact"] == "y" * MAX_VALUE
    (long_name,) = (name for name in flat if name.endswith("_end"))
    assert len(long_name) == MAX_KEY
    assert flat["odd_name"] == "2"
    assert flat["empty"] == "{}"


SECRET = "Xq7-do-not-log"
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5))
named = st.dictionaries(
    st.sampled_from([*SECRETS, *ORDINARY]),
    st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner)),
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(named, st.sampled_from(SECRETS), st.booleans())
def test_a_secret_never_survives_at_any_depth(around: dict[str, object], name: str, nested: bool) -> None:
    hidden: object = {"deep": [SECRET]} if nested else SECRET
    tree = {"level": [{"inner": {**around, name: hidden}}]}
    assert SECRET not in json.dumps(redact(tree))
    assert all(SECRET not in value for value in flatten(tree).values())


def test_a_mapping_of_addresses_is_one_parameter() -> None:
    """The README's mixture: an address is data, and MLflow takes none as a parameter's name."""
    mixture = {"s3://bucket/more": 2.0, "s3://me:hunter2@host/text": 0.5}
    flat = flatten({"data": {"mixture": mixture, "weight": 1.0}, "model": {"weights": {"dinov2-small": "a/b"}}})
    assert flat["data.mixture"] == f'{{"s3://bucket/more": 2.0, "s3://{REDACTED}@host/text": 0.5}}'
    assert flat["model.weights.dinov2-small"] == "a/b"


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
        max_leaves=8,
    ),
    st.text(alphabet="./:a\u00e9 s-", max_size=300),
)
@settings(max_examples=300, deadline=None)
def test_mlflow_takes_every_parameter(value: object, name: str) -> None:
    for key, text in flatten({name: value, "data": {name: value}}).items():
        _validate_param_name(key)
        _validate_param(key, text)
