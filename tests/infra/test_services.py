"""What the stack decides before it starts anything: names, ports, credentials, environment, failures."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from infra import processes, services
from infra import stack as stack_module
from infra.local import Stack, down, main, stack_env, status, up
from infra.processes import PortInUseError, StackError

PORTS = {
    name: {role: 20000 + 100 * i + j for j, role in enumerate(services.PORTS[name])}
    for i, name in enumerate(services.NAMES)
}


def _stack(folder: Path, names: tuple[str, ...] = services.NAMES) -> Stack:
    return Stack(folder, names, PORTS, ray_temp_dir=folder / "ray")


def test_credentials_are_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "credentials"
    first = services.ensure_credentials(path)
    path.chmod(0o644)
    assert services.ensure_credentials(path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert services.ensure_credentials(tmp_path / "other") != first


def test_broken_credentials_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "credentials"
    path.write_text("[other]\nx = 1\n")
    with pytest.raises(StackError, match=str(path)):
        services.ensure_credentials(path)


def test_only_the_object_store_sees_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-user")
    stack = _stack(tmp_path)
    _, secret = services.ensure_credentials(stack.credentials_file)
    for name in services.NAMES:
        command, env = services.command_and_env(stack, name)
        assert secret not in " ".join(command)
        assert env.get("AWS_SECRET_ACCESS_KEY") == (secret if name == "s3" else None)
    assert secret not in stack_env(stack).values()


def test_environment_covers_only_the_services_of_the_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://outside")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-user")
    env = services.full_env(_stack(tmp_path, ("mlflow", "ray")))
    assert env["AWS_ENDPOINT_URL"] == "https://outside"
    assert env["AWS_ACCESS_KEY_ID"] == "of-the-user"
    assert env["MLFLOW_TRACKING_URI"] == f"http://127.0.0.1:{PORTS['mlflow']['http']}"
    env = services.full_env(_stack(tmp_path))
    assert env["AWS_ENDPOINT_URL"] == f"http://127.0.0.1:{PORTS['s3']['s3']}"
    assert "AWS_ACCESS_KEY_ID" not in env


def test_a_program_finds_ray_and_its_job_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:1")
    stack = _stack(tmp_path)
    env = services.full_env(stack)
    assert env["RAY_ADDRESS"] == stack.ray_gcs_address
    assert env["RAY_API_SERVER_ADDRESS"] == stack.ray_dashboard


def test_ray_head_does_not_follow_the_users_ray_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")
    _, env = services.command_and_env(_stack(tmp_path), "ray")
    assert "RAY_ADDRESS" not in env
    assert env["RAY_AUTH_MODE"] == "disabled"
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert env["MLFLOW_TRACKING_URI"]


def test_proxy_is_bypassed_for_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "intern")
    assert stack_env(_stack(tmp_path))["no_proxy"] == "intern,127.0.0.1,localhost"


@pytest.mark.parametrize(
    ("flag", "name"), [("--s3-port", "s3"), ("--mlflow-port", "mlflow"), ("--dashboard-port", "ray")]
)
def test_port_in_use_names_port_service_and_owner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, name: str
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", processes.choose_port(set(), 10000)))
        listener.listen()
        port = listener.getsockname()[1]
        assert main(["--state-dir", str(tmp_path), "up", flag, str(port)]) == 2
        error = capsys.readouterr().err
        assert f"{name}: port {port} is in use by pid {os.getpid()}" in error
        with pytest.raises(PortInUseError):
            up(tmp_path, ports={name: port})
    assert list((tmp_path / "logs").iterdir()) == []


def test_remembered_ports_are_kept_unless_taken(tmp_path: Path) -> None:
    free = stack_module._assign_ports(_stack(tmp_path), services.NAMES, {}, {})
    before = Stack(tmp_path, services.NAMES, free)
    assert stack_module._assign_ports(before, services.NAMES, {}, {}) == free
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free["mlflow"]["http"]))
        listener.listen()
        again = stack_module._assign_ports(before, services.NAMES, {}, {})
    assert again["mlflow"] != free["mlflow"]
    assert again["s3"] == free["s3"]
    flat = [port for ports in again.values() for port in ports.values()]
    assert len(flat) == len(set(flat))


def test_service_that_dies_at_the_start_is_named_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print('disk is full'); raise SystemExit(3)"
    monkeypatch.setattr(
        services, "command_and_env", lambda stack, name: ([sys.executable, "-c", code], dict(os.environ))
    )
    with pytest.raises(StackError) as caught:
        up(tmp_path, only=["mlflow"])
    text = str(caught.value)
    assert "MLflow server did not become ready: it ended by itself" in text
    assert "disk is full" in text
    assert "What to do" in text
    assert not (tmp_path / "pids" / "mlflow.json").exists()


def test_service_that_never_answers_is_stopped_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time; time.sleep(60)"
    monkeypatch.setattr(
        services, "command_and_env", lambda stack, name: ([sys.executable, "-c", code], dict(os.environ))
    )
    with pytest.raises(StackError, match="within 1 s: no answer on"):
        up(tmp_path, only=["mlflow"], timeout_s=1.0)
    assert processes.members(stack_module._record(tmp_path, "mlflow")) == []


def test_stale_pid_file_is_cleared_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.Popen([sys.executable, "-c", "pass"])
    done.wait()
    tag = stack_module._tag(tmp_path, "mlflow")
    stale = processes.Record("mlflow", done.pid, 1000.0, processes.boot_id(), tag, dict(PORTS["mlflow"]))
    processes.write_record(tmp_path / "pids" / "mlflow.json", stale)
    monkeypatch.setattr(services, "command_and_env", lambda stack, name: ([sys.executable, "-c", ""], dict(os.environ)))
    said: list[str] = []
    with pytest.raises(StackError):
        up(tmp_path, only=["mlflow"], say=said.append)
    assert any(f"cleaned: pid {done.pid} of an earlier run is gone" in line for line in said)


def test_unknown_service_and_stray_port_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="unknown service 'minio'"):
        up(tmp_path, only=["minio"])
    with pytest.raises(StackError, match="mlflow, which is not among"):
        up(tmp_path, only=["s3"], ports={"mlflow": 20000})


def test_status_and_down_of_a_stack_that_never_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "never"
    assert [row.health for row in status(folder)] == ["stopped"] * 3
    assert main(["--state-dir", str(folder), "status"]) == 1
    assert main(["--state-dir", str(folder), "run", "--", "true"]) == 2
    assert "is not up" in capsys.readouterr().err
    assert main(["--state-dir", str(folder), "down"]) == 0
    assert not folder.exists()


def test_purge_removes_only_what_the_stack_wrote(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    services.ensure_credentials(tmp_path / "credentials")
    down(tmp_path, purge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
