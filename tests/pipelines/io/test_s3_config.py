"""One reading of the environment and of AWS's files: every client goes to the same store, for the same region."""

from __future__ import annotations

import os
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3.session
import botocore.loaders
import botocore.session
import pytest
from pyarrow.fs import FileSelector, FileSystem

from pipelines.io import storage
from pipelines.io.arrow import arrow_filesystem
from pipelines.io.s3_client import s3_client
from pipelines.io.s3_config import s3_config
from pipelines.tracking.server import limit_http_waits

EMPTY = (
    b'<?xml version="1.0"?><ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>'
)
LOADER = botocore.loaders.create_loader()
_CREDENTIAL = re.compile(r"Credential=(?P<key>[^/]+)/\d+/(?P<region>[^/]+)/s3/")


@dataclass
class Recorder:
    """A server that takes every S3 request and notes who signed it for which region."""

    address: str = ""
    seen: list[tuple[str, str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def recorders() -> Iterator[tuple[Recorder, Recorder]]:
    """The store that is meant, and another one that is also named somewhere."""
    running, made = [], []
    for _ in range(2):
        recorder = Recorder()

        class Handler(BaseHTTPRequestHandler):
            note = recorder.seen

            def do_GET(self) -> None:
                found = _CREDENTIAL.search(self.headers.get("Authorization", ""))
                self.note.append((found["key"], found["region"]) if found else ("unsigned", ""))
                self.send_response(200)
                self.send_header("Content-Length", str(len(EMPTY)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(EMPTY)

            do_HEAD = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        recorder.address = f"http://127.0.0.1:{server.server_port}"
        running.append(server)
        made.append(recorder)
    yield made[0], made[1]
    for server in running:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class Row:
    """Variables and files (`{here}`: the store that is meant, `{other}`: another), and the region that follows."""

    env: dict[str, str] = field(default_factory=dict)
    config: str = ""
    credentials: str = "[default]\naws_access_key_id = KEY\naws_secret_access_key = s\n"
    region: str = "us-east-1"
    key: str = "KEY"


ROWS = {
    "variable": Row({"AWS_ENDPOINT_URL": "{here}"}),
    "variable with a slash": Row({"AWS_ENDPOINT_URL": "{here}/"}),
    "variable of the service": Row({"AWS_ENDPOINT_URL_S3": "{here}", "AWS_ENDPOINT_URL": "{other}"}),
    "empty variable of the service": Row({"AWS_ENDPOINT_URL_S3": "", "AWS_ENDPOINT_URL": "{here}"}),
    "default profile": Row(config="[default]\nendpoint_url = {here}\nregion = eu-north-1\n", region="eu-north-1"),
    "variable before file": Row(
        {"AWS_ENDPOINT_URL": "{here}", "AWS_REGION": "eu-west-3"},
        "[default]\nendpoint_url = {other}\nregion = eu-north-1\n",
        region="eu-west-3",
    ),
    "named profile": Row(
        {"AWS_PROFILE": "lab"},
        "[default]\nendpoint_url = {other}\nregion = a-b-1\n[profile lab]\nendpoint_url = {here}\nregion = c-d-2\n",
        "[default]\naws_access_key_id = NO\naws_secret_access_key = s\n"
        "[lab]\naws_access_key_id = LAB\naws_secret_access_key = s\n",
        "c-d-2",
        "LAB",
    ),
    "default profile by its variable": Row(
        {"AWS_DEFAULT_PROFILE": "lab"},
        "[profile lab]\nendpoint_url = {here}\nregion = c-d-2\n",
        "[lab]\naws_access_key_id = LAB\naws_secret_access_key = s\n",
        "c-d-2",
        "LAB",
    ),
    "services section": Row(
        config="[default]\nservices = mine\nendpoint_url = {other}\n[services mine]\ns3 =\n  endpoint_url = {here}\n"
    ),
    "services section of a profile": Row(
        {"AWS_PROFILE": "lab"},
        "[profile lab]\nservices = mine\nregion = c-d-2\n[services mine]\ns3 =\n  endpoint_url = {here}\n"
        "dynamodb =\n  endpoint_url = {other}\n",
        "[lab]\naws_access_key_id = LAB\naws_secret_access_key = s\n",
        "c-d-2",
        "LAB",
    ),
    "variable before services section": Row(
        {"AWS_ENDPOINT_URL": "{here}"},
        "[default]\nservices = mine\n[services mine]\ns3 =\n  endpoint_url = {other}\n",
    ),
    "services section without s3": Row(
        config="[default]\nservices = mine\nendpoint_url = {here}\n"
        "[services mine]\ndynamodb =\n  endpoint_url = {other}\n"
    ),
    "region of the older variable": Row(
        {"AWS_ENDPOINT_URL": "{here}", "AWS_DEFAULT_REGION": "sa-east-1"}, region="sa-east-1"
    ),
    "both region variables": Row(
        {"AWS_ENDPOINT_URL": "{here}", "AWS_REGION": "eu-west-3", "AWS_DEFAULT_REGION": "sa-east-1"},
        region="eu-west-3",
    ),
    "keys in the environment": Row(
        {"AWS_ENDPOINT_URL": "{here}", "AWS_ACCESS_KEY_ID": "ENV", "AWS_SECRET_ACCESS_KEY": "s"}, key="ENV"
    ),
    "keys in the configuration file": Row(
        config="[default]\nendpoint_url = {here}\naws_access_key_id = FILE\naws_secret_access_key = s\n",
        credentials="",
        key="FILE",
    ),
}
CLIENTS: dict[str, Callable[[str], Any]] = {
    "listing": lambda url: storage.list_sizes(url, retry_s=0),
    "small object": lambda url: storage.read_bytes(f"{url}/object", retry_s=0),
    "large object": lambda url: storage.read_bulk(f"{url}/object", retry_s=0),
    "Ray's": lambda url: list_through_arrow(url),
}


def list_through_arrow(url: str) -> object:
    filesystem, path = arrow_filesystem(url)
    again: FileSystem = pickle.loads(pickle.dumps(filesystem))  # as a worker gets it
    return again.get_file_info(FileSelector(path, allow_not_found=True, recursive=True))


def arrange(row: Row, recorders: tuple[Recorder, Recorder], folder: Path, patch: pytest.MonkeyPatch) -> None:
    """This environment and these files, and nothing else of AWS."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "METEOR_S3_"))]:
        patch.delenv(name)
    here, other = (recorder.address for recorder in recorders)
    (folder / ".aws").mkdir(exist_ok=True)
    (folder / ".aws" / "config").write_text(row.config.format(here=here, other=other))
    (folder / ".aws" / "credentials").write_text(row.credentials)
    patch.setenv("HOME", str(folder))
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in row.env.items():
        patch.setenv(name, value.format(here=here, other=other))


@pytest.mark.parametrize("row", ROWS)
def test_every_client_goes_to_one_store(
    row: str, recorders: tuple[Recorder, Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrange(ROWS[row], recorders, tmp_path, monkeypatch)
    here, other = recorders
    config = s3_config()
    assert (config.endpoint, config.region) == (here.address, ROWS[row].region)
    for client, use in CLIENTS.items():
        here.seen.clear()
        other.seen.clear()
        use("s3://bucket/prefix")
        assert other.seen == [], client
        assert set(here.seen) == {(ROWS[row].key, ROWS[row].region)}, client
    # botocore's own reading, which MLflow's client relies on
    session = botocore.session.Session()
    session.register_component("data_loader", LOADER)
    own = session.create_client("s3", region_name=config.region)
    assert own.meta.endpoint_url.rstrip("/") == here.address


IGNORED = {
    "by variable": Row({"AWS_ENDPOINT_URL": "{other}", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}),
    "by profile": Row(config="[default]\nignore_configured_endpoint_urls = true\nendpoint_url = {other}\n"),
    "of another service": Row({"AWS_ENDPOINT_URL_DYNAMODB": "{other}"}),
    "of another profile": Row(config="[profile lab]\nendpoint_url = {other}\n"),
}


@pytest.mark.parametrize("row", IGNORED)
def test_an_endpoint_that_does_not_count_is_not_used(
    row: str, recorders: tuple[Recorder, Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrange(IGNORED[row], recorders, tmp_path, monkeypatch)
    assert s3_config().endpoint is None
    assert s3_client().meta.endpoint_url in ("https://s3.us-east-1.amazonaws.com", "https://s3.amazonaws.com")


def test_a_changed_file_is_read_again(
    recorders: tuple[Recorder, Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrange(ROWS["default profile"], recorders, tmp_path, monkeypatch)
    assert s3_config().region == "eu-north-1"
    (tmp_path / ".aws" / "config").write_text("[default]\nregion = eu-central-2\nendpoint_url = http://other:1\n")
    assert s3_config().region == "eu-central-2"
    assert s3_client().meta.region_name == "eu-central-2"
    (tmp_path / "elsewhere").write_text("[default]\nregion = x-y-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "elsewhere"))
    assert s3_config().region == "x-y-1"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row({"AWS_PROFILE": "nobody"}), r"profile 'nobody', which is in neither .*config nor .*credentials"),
        (Row(config="no section\n"), r"\.aws/config cannot be read"),
        (Row(config="[default]\nendpoint_url = 127.0.0.1:9000\n"), r"endpoint_url of ~/.aws/config=.* has no scheme"),
        (Row({"AWS_PROFILE": "a", "AWS_DEFAULT_PROFILE": "b"}), "AWS_PROFILE is 'a' and AWS_DEFAULT_PROFILE is 'b'"),
        (Row({"METEOR_S3_SSE": "aes"}), "METEOR_S3_SSE='aes' is not one of AES256, aws:kms, aws:kms:dsse"),
        (Row({"METEOR_S3_SSE_KMS_KEY": "k"}), "names a key and METEOR_S3_SSE is None: set it to aws:kms"),
        (Row({"METEOR_S3_ADDRESSING": "host"}), "METEOR_S3_ADDRESSING='host' is not one of path, virtual"),
        (Row({"AWS_ENDPOINT_URL_S3": "store:9000"}), "AWS_ENDPOINT_URL_S3='store:9000' has no scheme"),
    ],
)
@pytest.mark.parametrize("client", CLIENTS)
def test_what_is_wrong_is_named(
    client: str,
    row: Row,
    message: str,
    recorders: tuple[Recorder, Recorder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arrange(row, recorders, tmp_path, monkeypatch)
    with pytest.raises(storage.StorageError, match=message):
        CLIENTS[client]("s3://bucket/prefix")


def test_mlflow_reads_artifacts_in_the_same_region(
    recorders: tuple[Recorder, Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "")  # restored after the test
    arrange(Row({"AWS_REGION": "eu-west-3", "AWS_ENDPOINT_URL": "{here}"}), recorders, tmp_path, monkeypatch)
    limit_http_waits()
    assert boto3.session.Session().region_name == "eu-west-3"
