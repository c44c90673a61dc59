"""No secret passes an exit, whatever form it has and wherever it stands, and nothing ordinary is lost to the search."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_param, _validate_param_name

from jobs.recipes import RECIPES, recipe
from pipelines.io.redact import REDACTED, is_secret_name, redact, redact_text
from pipelines.tracking.mlflow_run import MAX_KEY, MAX_VALUE, flatten

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


def test_addresses_lose_login_and_signature_only() -> None:
    assert redact_text("postgresql://me:pw@host:5432/db") == f"postgresql://{REDACTED}@host:5432/db"
    assert redact_text("http://127.0.0.1:5000/a@b") == "http://127.0.0.1:5000/a@b"
    signed = "https://h/b/k?X-Amz-Signature=0a1b&x=2"
    assert redact_text(signed) == f"https://h/b/k?X-Amz-Signature={REDACTED}&x=2"


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


# ------------------------------------------------------------------------------------------------ texts of any origin

URL_SAFE = "ABCDEFabcdef0123456789-._~!$&'()*+,;=%:@"
secret_of_url = st.text(URL_SAFE, min_size=6, max_size=24).map(lambda text: f"Xq{text}7")
odd_secret = st.text(URL_SAFE + "/?#[]|^`{}", min_size=6, max_size=24).map(lambda text: f"Xq{text}7")
token = st.text("ABCDEFabcdef0123456789_-", min_size=12, max_size=40).map(lambda text: f"Xq{text}7")

PLACES = {
    "user and password": (odd_secret, "cannot reach http://me:{}@host:5000/api/2.0: refused"),
    "password, at the end": (secret_of_url, "MLflow at https://me:{}@host"),
    "a token before the host": (secret_of_url, "git clone https://{}@host/repo.git failed"),
    "without a scheme": (secret_of_url.filter(lambda text: "'" not in text), "netloc='me:{}@host:5000'"),
    "in JSON": (secret_of_url, '{{"uri":"http://me:{}@host","other":"x@y"}}'),
    "query: token": (token, "GET https://host/file?x=1&access_token={}&y=2"),
    "query: signature": (token, "https://b.s3.amazonaws.com/k?X-Amz-Signature={}&X-Amz-Expires=9"),
    "query: session": (token, "https://b.s3.amazonaws.com/k?X-Amz-Security-Token={}"),
    "query: key": (token, "https://host/v1?key={}"),
    "query: shared access": (token, "https://a.blob.core.windows.net/c?sv=2&sig={}"),
    "query: key id": (token, "https://b.s3.amazonaws.com/k?AWSAccessKeyId={}&Expires=1"),
    "after a colon": (token, "no runtime environment: AWS_SECRET_ACCESS_KEY={}"),
    "shell": (token, "AWS_SECRET_ACCESS_KEY={} python jobs/x.py"),
    "configuration": (token, "[default]\naws_secret_access_key = {}\nregion = x"),
    "yaml": (token, "storage:\n  password: {}\n  user: me"),
    "a mapping": (token, "settings {{'hf_token': '{}', 'seed': 1}}"),
    "a document": (token, '{{"client_secret": "{}"}}'),
    "a document in a document": (token, r'"{{\"client_secret\": \"{}\"}}"'),
    "a call": (token, "S3FileSystem(access_key='x', secret_key='{}')"),
    "an option": (token, "python jobs/x.py --tracking.password {} --seed 1"),
    "an option with =": (token, "python jobs/x.py --tracking.password={} --seed 1"),
    "a header": (token, "headers: {{'Authorization': 'Bearer {}'}}"),
    "a header, basic": (token, "Authorization: Basic {}"),
    "bearer": (token, "sent bearer {} and got 401"),
}


@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_secret_in_a_text_does_not_survive(place: str, data: st.DataObject) -> None:
    secrets, text = PLACES[place]
    secret = data.draw(secrets)
    shown = redact_text(text.format(secret))
    assert secret not in shown
    assert REDACTED in shown
    assert redact_text(shown) == shown


@pytest.mark.parametrize(
    "secret",
    [
        "AKIA" + "ABCDEFGH12345678",
        "ASIA" + "ABCDEFGH12345678",
        "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567",
        "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8",
        "github_pat_" + "11ABCDEFG0abcdefghijkl_mnop",
        "glpat-" + "abcdefghij0123456789",
        "sk-" + "proj-abcdefghijklmnop1234567890",
        "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiJtZSJ9" + ".c2lnbmF0dXJl",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKC\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_known_shapes_are_hidden_wherever_they_stand(secret: str) -> None:
    assert redact_text(f"downloading with {secret}, which failed") == f"downloading with {REDACTED}, which failed"
    assert redact({"note": [f"<{secret}>"]}) == {"note": [f"<{REDACTED}>"]}


@settings(max_examples=150, deadline=None)
@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6, max_size=30).map(lambda t: f"Xq{t}7"),
    st.sampled_from(["MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"]),
    st.sampled_from([str, repr, json.dumps, lambda t: quote(t, safe=""), lambda t: f"a\n{t}b", lambda t: f"{{'{t}'"]),
)
def test_values_of_the_environment_are_hidden_in_any_form(secret: str, name: str, form: Callable[[str], str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, secret)
        shown = redact_text(f"x{form(secret)}x")
        assert secret not in shown
        assert form(secret).strip("'\"") not in shown
        assert secret not in json.dumps(redact({"note": f"x{secret}x"}))


@settings(max_examples=150, deadline=None)
@given(odd_secret, st.sampled_from([str, lambda text: quote(text, safe="")]))
def test_the_login_of_an_address_in_the_environment_is_hidden_anywhere(secret: str, form: Callable[[str], str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://me:{form(secret)}@host:5000")
        assert secret not in redact_text(f"password {secret} was refused")


UNTOUCHED = [
    "s3://bucket/runs/pretrain-tiny-1a2b3c-001/train/step-000100 of models:/meteor@latest-pretrain",
    "step 1/256  loss 6.1935  lr 2.50e-04  grad 12.06  visual tokens 192 in, 32 kept  dropped 0",
    "http://127.0.0.1:5000/#/experiments/1/runs/ab?tab=x&page=2",
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    "check AWS_SHARED_CREDENTIALS_FILE=/home/me/.aws/credentials and AWS_PROFILE=x",
    "image_token_id=3 pad_token='<pad>' max_new_tokens: 16 token = 5",
    "refused the credentials for the bucket 'meteor'; check AWS_PROFILE",
    "--model models:/meteor/1 --tracking.registered-model meteor --max-tokens 5",
    "12:30:01 worker 3: mail to me@example.org, sha256:0f0f0f, a:b",
    'File "/x/y.py", line 3, in key: value',
]


@pytest.mark.parametrize("text", UNTOUCHED)
def test_ordinary_texts_stay_as_they_are(text: str) -> None:
    assert redact_text(text) == text


def test_the_working_directory_and_short_words_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/home/someone/meteor")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "meteor")
    assert redact_text("/home/someone/meteor s3://meteor/runs") == "/home/someone/meteor s3://meteor/runs"


def test_recipes_have_no_setting_that_looks_like_a_secret() -> None:
    assert RECIPES
    for job, recipes in RECIPES.items():
        for name in recipes:
            plain = json.loads(json.dumps(asdict(recipe(job, name))))
            assert redact(plain) == plain
