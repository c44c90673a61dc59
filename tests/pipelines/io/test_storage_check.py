"""What a store refuses, told apart: by its code, by the right that is missing, by the way to it; all at the start."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow.fs import FileSelector

from pipelines.io import storage
from pipelines.io.arrow import arrow_filesystem
from pipelines.io.storage_check import require_access
from tests.pipelines.fake_s3 import BUCKET, FakeS3, running

URL = f"s3://{BUCKET}/team/runs"


def alone(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Nothing of AWS in the environment."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "METEOR_S3_"))]:
        patch.delenv(name)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"):
        patch.delenv(name, raising=False)
    patch.setenv("HOME", str(home))
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_the_check_needs_nothing_of_the_bucket_and_leaves_nothing(fake_s3: FakeS3) -> None:
    require_access(URL)
    assert fake_s3.objects == {}
    assert fake_s3.uploads == {}
    paths = [path for _, path, _ in fake_s3.seen]
    assert all(re.search(r"team(/|%2F)runs(/|%2F)\.meteor-check-", path) for path in paths), paths
    assert "HeadBucket" not in fake_s3.operations()


def test_a_local_folder_is_not_asked(tmp_path: Path) -> None:
    require_access(str(tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == []


RIGHTS: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "write": ({"PutObject"}, ("write (s3:PutObject)",)),
    "read": ({"GetObject"}, ("read (s3:GetObject)",)),
    "list": ({"ListObjectsV2"}, ("list (s3:ListBucket)",)),
    "remove": ({"DeleteObject"}, ("remove (s3:DeleteObject)", ".meteor-check-")),
    "abort": ({"AbortMultipartUpload"}, ("upload in parts (s3:AbortMultipartUpload)",)),
    "two": ({"ListObjectsV2", "DeleteObject"}, ("list (s3:ListBucket)", "remove (s3:DeleteObject)")),
}


@pytest.mark.parametrize("name", RIGHTS)
def test_each_right_that_is_missing_is_named(name: str, fake_s3: FakeS3) -> None:
    fake_s3.denied, texts = RIGHTS[name]
    with pytest.raises(storage.StorageError, match="knows the credentials, but they may not") as caught:
        require_access(URL)
    said = str(caught.value).partition("A policy needs")[0]
    assert all(text in said for text in texts)
    others = {text for _, (_, many) in RIGHTS.items() for text in many if "(" in text} - set(texts)
    assert not any(text in said for text in others)
    assert "refused the credentials" not in said


CODES: dict[str, tuple[int, str]] = {
    "NoSuchBucket": (404, "the bucket 'fake' does not exist"),
    "InvalidAccessKeyId": (403, "refused the credentials .* AWS_SECRET_ACCESS_KEY"),
    "SignatureDoesNotMatch": (403, "refused the credentials .*AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
    "InvalidToken": (400, "refused the credentials"),
    "ExpiredToken": (400, "have expired"),
    "RequestTimeTooSkewed": (403, "the clock of this machine differs .* NTP"),
    "RequestExpired": (403, "the clock of this machine differs"),
    "AuthorizationHeaderMalformed": (400, "set AWS_REGION"),
    "PermanentRedirect": (301, "set AWS_REGION"),
    "KMS.DisabledException": (400, "cannot use the encryption key.* METEOR_S3_SSE_KMS_KEY"),
    "AccessDenied": (403, r"does not allow PutObject .* s3:PutObject .*METEOR_S3_SSE"),
    "NotImplemented": (501, "refused the request.*AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
    "MissingContentLength": (411, "refused the request.*AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
    "XAmzContentSHA256Mismatch": (400, "refused the request.*AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
    "InvalidArgument": (400, "refused the request: InvalidArgument"),
    "KeyTooLongError": (400, "refused the request: KeyTooLongError"),
}
PASSING = {"SlowDown": 503, "InternalError": 500, "BadDigest": 400, "ServiceUnavailable": 503, "RequestTimeout": 400}


@pytest.mark.parametrize("code", CODES)
def test_every_code_says_what_it_is_and_fails_at_once(code: str, fake_s3: FakeS3) -> None:
    status, message = CODES[code]
    fake_s3.denied, fake_s3.error = {"PutObject", "CreateMultipartUpload"}, (status, code)
    start = time.monotonic()
    with pytest.raises(storage.StorageError, match=message) as caught:
        storage.write_bytes(f"{URL}/x", b"x", retry_s=30)
    assert time.monotonic() - start < 20, "without the 30 s of patience"
    assert not isinstance(caught.value, storage.TransientStorageError)
    if code not in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"):
        assert "refused the credentials" not in str(caught.value)


@pytest.mark.parametrize("code", PASSING)
def test_what_may_pass_is_said_to_be_passing(code: str, fake_s3: FakeS3) -> None:
    fake_s3.denied, fake_s3.error = {"PutObject"}, (PASSING[code], code)
    with pytest.raises(storage.TransientStorageError, match=code):
        storage.write_bytes(f"{URL}/x", b"x", retry_s=0)


# ----------------------------------------------------------------------------------------------- every way, all clients


def through_ray(url: str) -> object:
    filesystem, path = arrow_filesystem(url)
    with filesystem.open_output_stream(f"{path}/ray") as stream:
        stream.write(b"snapshot")
    with filesystem.open_input_stream(f"{path}/ray") as stream:
        assert stream.read() == b"snapshot"
    return filesystem.get_file_info(FileSelector(path, recursive=True))


def large(url: str) -> None:
    data = os.urandom(9 * 2**20)
    local = Path(os.environ["HOME"]) / "large.bin"
    local.write_bytes(data)
    storage.write_file(local, f"{url}/large", retry_s=0)
    assert storage.read_bulk(f"{url}/large", retry_s=0) == data


USES: dict[str, Callable[[str], object]] = {"check": require_access, "large": large, "Ray": through_ray}


@pytest.mark.parametrize("use", USES)
def test_a_proxy_is_used(use: str, fake_s3: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch, tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.invalid:9000")
    monkeypatch.setenv("HTTP_PROXY", fake_s3.endpoint)
    USES[use](URL)
    assert all(path.startswith("http://store.invalid:9000/") for _, path, _ in fake_s3.seen)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(storage.TransientStorageError, match=r"the proxy on the way to .* HTTPS_PROXY"):
        storage.read_bytes(f"{URL}/x", retry_s=0)


@pytest.mark.parametrize("use", USES)
def test_a_private_authority_is_trusted_where_it_is_named(
    use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(monkeypatch, tmp_path)
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "ca.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=store"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    with running((certificate, key)) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        with pytest.raises(storage.StorageError, match=r"is not trusted .*AWS_CA_BUNDLE"):
            require_access(URL)
        monkeypatch.setenv("AWS_CA_BUNDLE", certificate)
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")  # bodies in chunks are another test's
        USES[use](URL)
        assert store.seen


@pytest.mark.parametrize("use", USES)
def test_an_assumed_role_and_the_region_of_its_profile_are_used(
    use: str, fake_s3: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(monkeypatch, tmp_path)
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text(
        "[profile lab]\nregion = eu-north-1\nrole_arn = arn:aws:iam::1:role/train\nsource_profile = own\n"
        f"endpoint_url = {fake_s3.endpoint}\n"
    )
    (tmp_path / ".aws" / "credentials").write_text("[own]\naws_access_key_id = OWN\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", fake_s3.endpoint)
    USES[use](URL)
    asked = [headers for operation, _, headers in fake_s3.seen if operation != "AssumeRole"]
    assert asked
    for headers in asked:
        assert re.search(r"Credential=ROLEKEY/\d+/eu-north-1/s3/", headers["authorization"])
        assert headers["x-amz-security-token"] == "TOKEN"


@pytest.mark.parametrize("use", USES)
def test_writes_are_encrypted_where_that_is_set(
    use: str, fake_s3: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fake_s3.demanded = {
        "x-amz-server-side-encryption": "aws:kms",
        "x-amz-server-side-encryption-aws-kms-key-id": "key-1",
    }
    with pytest.raises(storage.StorageError, match=r"s3:PutObject"):
        require_access(URL)
    monkeypatch.setenv("METEOR_S3_SSE", "aws:kms")
    monkeypatch.setenv("METEOR_S3_SSE_KMS_KEY", "key-1")
    USES[use](URL)


@pytest.mark.parametrize("use", USES)
def test_checksums_are_left_out_where_that_is_set(
    use: str, fake_s3: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    writes = ("PutObject", "UploadPart", "CreateMultipartUpload")

    def checksums() -> set[str]:
        heads = [headers for operation, _, headers in fake_s3.seen if operation in writes]
        fake_s3.seen.clear()
        return {name for headers in heads for name in headers if "checksum" in name}

    USES[use](URL)
    assert "x-amz-checksum-crc32" in checksums()
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    USES[use](URL)
    assert checksums() == set()


@pytest.mark.parametrize(("set_to", "address"), [("virtual", "fake.store.invalid"), ("path", "store.invalid")])
def test_the_bucket_may_be_in_the_host_s_name(
    set_to: str, address: str, fake_s3: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(monkeypatch, tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.invalid")
    monkeypatch.setenv("HTTP_PROXY", fake_s3.endpoint)  # it gets the whole address, whatever that resolves to
    monkeypatch.setenv("METEOR_S3_ADDRESSING", set_to)
    fake_s3.denied, fake_s3.error = {"PutObject"}, (503, "SlowDown")
    with pytest.raises(storage.TransientStorageError):
        storage.write_bytes(f"{URL}/x", b"x", retry_s=0)
    assert [path.split("/")[2] for _, path, _ in fake_s3.seen] == [address]
