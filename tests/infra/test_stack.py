"""The whole stack for real: up, used, wounded, healed, down, with nothing left."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest

from infra import processes, services
from infra import stack as stack_module
from infra.local import Stack, down, main, running_stack, stack_env, status, up
from tests.stack_fixture import start_stack, stop_stack

pytestmark = pytest.mark.stack

S3_PROGRAM = """
import boto3
s3 = boto3.client("s3")
s3.put_object(Bucket="meteor", Key="probe/a.bin", Body=b"0123456789" * 1000)
assert s3.get_object(Bucket="meteor", Key="probe/a.bin", Range="bytes=5-8")["Body"].read() == b"5678"
try:
    s3.put_object(Bucket="no-such-bucket", Key="a", Body=b"x")
except s3.exceptions.NoSuchBucket:
    print("missing bucket refused")
"""
MLFLOW_PROGRAM = """
import mlflow
with mlflow.start_run() as run:
    mlflow.log_text("hello artifact", "note.txt")
print(mlflow.artifacts.load_text(run.info.artifact_uri + "/note.txt"))
"""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = start_stack(tmp_path_factory.mktemp("stack"))
    yield stack
    stop_stack(stack)


# ------------------------------------------------------------------------------------------------ pages in a browser

FORM = (
    b'--B\r\nContent-Disposition: form-data; name="key"\r\n\r\nevil.txt\r\n'
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="evil.txt"\r\n\r\nhi\r\n--B--\r\n'
)
FORM_TYPE = "multipart/form-data; boundary=B"
WRITES = {
    "s3": [("PUT", "/meteor/evil.txt"), ("POST", "/meteor"), ("DELETE", "/meteor/own.txt"), ("DELETE", "/meteor")],
    "filer": [
        ("PUT", "/buckets/meteor/evil.txt"), ("POST", "/buckets/meteor/"), ("POST", "/buckets/meteor/evil.txt"),
        ("DELETE", "/buckets/meteor/own.txt"), ("DELETE", "/buckets/meteor?recursive=true"), ("POST", "/.tus/evil.txt"),
    ],
    "master": [
        ("GET", "/dir/assign"), ("POST", "/submit"), ("POST", "/col/delete?collection=meteor"),
        ("GET", "/col/delete?collection=meteor"), ("GET", "/vol/grow?count=1"), ("GET", "/vol/vacuum"),
    ],
    "volume": [("POST", "/1,01637037d6"), ("DELETE", "/1,01637037d6")],
}  # fmt: skip
"""Requests that a page can make and that would change something, by the port's role."""
READS = {
    "s3": ["/meteor/own.txt", "/meteor?list-type=2", "/"],
    "filer": ["/buckets/meteor/own.txt", "/buckets/meteor/", "/"],
}


def _as_page(port: int, method: str, path: str, page: str, body: bytes = b"", kind: str = FORM_TYPE) -> tuple[int, str]:
    """Status and body of a page's request: `rebound` is one whose own name leads to this machine; 0: no answer."""
    host = f"evil.example:{port}" if page == "rebound" else f"127.0.0.1:{port}"
    origin = {"rebound": f"http://evil.example:{port}", "sandbox": "null"}.get(page, "https://evil.example")
    headers = {"Host": host, "Origin": origin, "User-Agent": "Mozilla/5.0", "Content-Type": kind}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body or (FORM if method == "POST" else b""), headers)
        answer = connection.getresponse()
        return answer.status, answer.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return 0, ""
    finally:
        connection.close()


@pytest.mark.parametrize("page", ["elsewhere", "sandbox", "rebound"])
def test_no_web_page_writes_to_the_store_or_reads_from_it(live: Stack, page: str) -> None:
    s3 = _s3_client(live)
    s3.put_object(Bucket="meteor", Key="own.txt", Body=b"mine")
    for role, requests in WRITES.items():
        for method, path in requests:
            status, text = _as_page(live.ports["s3"][role], method, path, page)
            assert not 200 <= status < 400, (role, method, path, status, text)
    for role, paths in READS.items():  # the pages of master and volume that tell their state stay readable
        for path in paths:
            status, text = _as_page(live.ports["s3"][role], "GET", path, page)
            assert not 200 <= status < 400, (role, path, status, text)
            assert "mine" not in text
    assert s3.get_object(Bucket="meteor", Key="own.txt")["Body"].read() == b"mine"
    names = [entry["Key"] for entry in s3.list_objects_v2(Bucket="meteor")["Contents"]]
    assert [name for name in names if "evil" in name] == []


@pytest.mark.parametrize("page", ["elsewhere", "sandbox", "rebound"])
def test_no_web_page_starts_a_ray_job_or_writes_to_mlflow(live: Stack, page: str) -> None:
    submit = b'{"entrypoint": "touch /tmp/evil"}'
    for method, path in (("POST", "/api/jobs/"), ("PUT", "/api/packages/gcs/x.zip"), ("DELETE", "/api/jobs/x")):
        status, _ = _as_page(live.ports["ray"]["dashboard"], method, path, page, submit, "application/json")
        assert status in (403, 405), (method, path, status)
    assert _as_page(live.ports["ray"]["agent"], "GET", "/api/local_raylet_healthz", page)[0] in (403, 405)
    create = b'{"name": "evil"}'
    for kind in ("application/json", "text/plain"):
        path = "/api/2.0/mlflow/experiments/create"
        status, _ = _as_page(live.ports["mlflow"]["http"], "POST", path, page, create, kind)
        assert status == 403
    if page == "rebound":
        assert _as_page(live.ports["mlflow"]["http"], "GET", "/", page)[0] == 403


def _s3_client(stack: Stack) -> Any:
    key, secret = services.ensure_credentials(stack.credentials_file)
    keys = {"aws_access_key_id": key, "aws_secret_access_key": secret}
    return boto3.client("s3", endpoint_url=stack.s3_endpoint, region_name=services.REGION, **keys)


def _records(stack: Stack) -> dict[str, processes.Record]:
    return {name: stack_module._record(stack.state_dir, name) for name in services.NAMES}


def _program(code: str, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_second_up_starts_nothing(live: Stack) -> None:
    before = _records(live)
    again = up(live.state_dir)
    assert again.ports == live.ports
    assert _records(again) == before
    assert [row.health for row in status(live.state_dir)] == ["ok", "ok", "ok"]


def test_everything_listens_on_loopback_only(live: Stack) -> None:
    addresses = set()
    for record in _records(live).values():
        for process in processes.members(record):
            listening = [c for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
            addresses |= {connection.laddr.ip for connection in listening}
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_object_store_with_the_stack_environment(live: Stack) -> None:
    assert "missing bucket refused" in _program(S3_PROGRAM, services.full_env(live))


def test_mlflow_artifact_with_only_the_tracking_uri(live: Stack) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_", "RAY_"))}
    assert "hello artifact" in _program(MLFLOW_PROGRAM, env | {"MLFLOW_TRACKING_URI": live.mlflow_uri})


def test_secret_is_in_no_log_record_or_command_line(live: Stack) -> None:
    _, secret = services.ensure_credentials(live.credentials_file)
    files = [path for folder in ("logs", "pids") for path in (live.state_dir / folder).glob("*.*") if path.is_file()]
    assert len(files) >= 6
    assert [
        path for path in [*files, live.state_dir / "stack.json"] if secret in path.read_text(errors="replace")
    ] == []
    assert secret not in " ".join(stack_env(live).values())
    for record in _records(live).values():
        for process in processes.members(record):
            assert secret not in " ".join(process.cmdline())


def test_run_and_env_commands(live: Stack, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--state-dir", str(live.state_dir), "env"]) == 0
    exported = capfd.readouterr().out
    assert f"export AWS_ENDPOINT_URL={live.s3_endpoint}" in exported
    assert "unset AWS_ACCESS_KEY_ID" in exported
    command = [sys.executable, "-m", "infra.local", "--state-dir", str(live.state_dir), "run", "--"]
    code = "import os, sys; print(os.environ['MLFLOW_TRACKING_URI'], 'AWS_PROFILE' in os.environ); sys.exit(7)"
    done = subprocess.run(
        [*command, sys.executable, "-c", code],
        env={**os.environ, "AWS_PROFILE": "somebody"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (7, f"{live.mlflow_uri} False")


def test_running_service_refuses_another_port(live: Stack) -> None:
    with pytest.raises(processes.StackError, match="already runs on port"):
        up(live.state_dir, ports={"s3": processes.choose_port(set(), 10000)})


def test_ray_job_runs_our_interpreter_with_the_addresses(live: Stack, tmp_path: Path) -> None:
    """Through the dashboard, as `ray job submit` does; the job itself only looks at what it inherited."""
    names = ["AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "METEOR_STORAGE", "AWS_SECRET_ACCESS_KEY"]
    look = f"import os, sys; print(sys.prefix, [os.environ.get(n) for n in {names}], os.nice(0))"
    (tmp_path / "look.py").write_text(look)
    ray = services.executable("ray")
    done = subprocess.run(
        [ray, "job", "submit", "--working-dir", str(tmp_path), "--", "python", "look.py"],
        env=services.full_env(live),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    expected = [live.s3_endpoint, live.mlflow_uri, "s3://meteor", None]
    assert f"{sys.prefix} {expected} {os.nice(0)}" in done.stdout  # a worker is no nicer than this test


@pytest.mark.parametrize("name", ["s3", "mlflow", "ray"])
def test_killed_leader_is_swept_and_started_again(live: Stack, name: str) -> None:
    before = _records(live)
    psutil.Process(before[name].pid).kill()
    deadline = time.monotonic() + 10
    while processes.leader(before[name]) is not None and time.monotonic() < deadline:
        processes.reap(before[name].pid)
        time.sleep(0.05)
    assert main(["--state-dir", str(live.state_dir), "status"]) == 1
    with pytest.raises(processes.StackError, match=name):
        running_stack(live.state_dir)
    said: list[str] = []
    healed = up(live.state_dir, say=said.append)
    after = _records(healed)
    assert any("cleaned" in line and str(before[name].pid) in line for line in said)
    assert after[name].pid != before[name].pid
    assert {other: after[other] for other in after if other != name} == {o: before[o] for o in before if o != name}
    # The addresses that clients hold come back; Ray's inner ports too, unless another program took one meanwhile.
    addresses = ("s3_endpoint", "mlflow_uri", "ray_dashboard", "ray_gcs_address")
    assert [getattr(healed, each) for each in addresses] == [getattr(live, each) for each in addresses]
    assert [row.health for row in status(live.state_dir)] == ["ok", "ok", "ok"]


def test_down_leaves_no_process_and_keeps_the_data(tmp_path: Path) -> None:
    stack = up(tmp_path / "own", only=["s3"])
    write = "import boto3; boto3.client('s3').put_object(Bucket='meteor', Key='kept', Body=b'yes')"
    _program(write, services.full_env(stack))
    record = stack_module._record(stack.state_dir, "s3")
    down(stack.state_dir)
    assert processes.members(record) == []
    assert [row.health for row in status(stack.state_dir)] == ["stopped"] * 3
    port = processes.choose_port(set(), 10000)
    moved = up(stack.state_dir, only=["s3"], ports={"s3": port})
    try:
        assert moved.s3_endpoint.endswith(str(port))
        read = "import boto3; print(boto3.client('s3').get_object(Bucket='meteor', Key='kept')['Body'].read())"
        again = {"AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": "10"}  # a store may answer before it has its data
        assert "b'yes'" in _program(read, services.full_env(moved) | again)
    finally:
        down(stack.state_dir, purge=True)
    assert not stack.state_dir.exists()


def test_two_ups_at_once_start_each_service_once(tmp_path: Path) -> None:
    folder = tmp_path / "raced"
    command = [sys.executable, "-m", "infra.local", "--state-dir", str(folder), "up", "--only", "s3"]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    try:
        outputs = [racer.communicate(timeout=120)[0] for racer in racers]
        assert [racer.returncode for racer in racers] == [0, 0], outputs
        assert sorted("starting" in output for output in outputs) == [False, True]
        assert len(processes.members(stack_module._record(folder, "s3"))) == 1
    finally:
        down(folder, purge=True)


def test_lost_state_folder_and_lost_key_pair_heal(tmp_path: Path) -> None:
    stack = up(tmp_path / "lost", only=["s3"])
    first = stack_module._record(stack.state_dir, "s3")
    try:
        stack.credentials_file.unlink()
        said: list[str] = []
        up(stack.state_dir, say=said.append, only=["s3"])
        assert any("it rejects the key pair" in line for line in said)
        second = stack_module._record(stack.state_dir, "s3")
        assert processes.leader(first) is None
        assert second.pid != first.pid
        (stack.state_dir / "pids" / "s3.json").unlink()
        said.clear()
        up(stack.state_dir, say=said.append, only=["s3"])
        assert any("processes without a pid file" in line and str(second.pid) in line for line in said)
        assert processes.leader(second) is None
    finally:
        down(stack.state_dir, purge=True)
