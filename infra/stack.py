"""Bring the local stack up, look at it, take it down.

up: 1. lock the state folder  2. sweep what a crash has left  3. choose ports (the remembered ones where still free)
    4. restart what was started for addresses that have changed  5. start what is missing, all at once
    6. wait until each answers, or name the one that does not, with the end of its log
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from infra import services
from infra.processes import (
    POLL_S,
    PortInUseError,
    Record,
    StackError,
    choose_port,
    exclusive,
    leader,
    lost_record,
    members,
    port_free,
    port_owner,
    read_record,
    reap,
    spawn,
    stop,
    tail,
    write_private,
    write_record,
)
from infra.services import DEFAULT_NUM_CPUS, DEFAULT_OBJECT_STORE_BYTES, GRPC_OFFSET, NAMES, PORTS, TITLES, Stack

Say = Callable[[str], None]
START_TIMEOUT_S = 180.0
UNHEALTHY_GRACE_S = 10.0
STOP_GRACE_S = 15.0
RAY_LEADER_FIRST_S = 15.0


@dataclass(frozen=True)
class ServiceStatus:
    """One row of `status`; `health` is "ok", "stopped" or what is wrong."""

    name: str
    title: str
    address: str
    pid: int | None
    uptime_s: float | None
    health: str

    @property
    def ok(self) -> bool:
        """Whether the service runs and answers."""
        return self.health == "ok"


def default_state_dir() -> Path:
    """METEOR_STATE_DIR, or `.meteor` in the repository root."""
    return Path(os.environ.get("METEOR_STATE_DIR") or Path(__file__).resolve().parent.parent / ".meteor")


def _silent(_: str) -> None:
    pass


def _record_path(state_dir: Path, name: str) -> Path:
    return state_dir / "pids" / f"{name}.json"


def _record(state_dir: Path, name: str) -> Record:
    """The record of a service; without one, a record that only finds processes by their tag."""
    known = read_record(_record_path(state_dir, name))
    return known or lost_record(name, _tag(state_dir, name))


def _tag(state_dir: Path, name: str) -> str:
    return f"{name}@{state_dir}"


def _remembered(state_dir: Path) -> dict[str, object]:
    try:
        data = json.loads((state_dir / "stack.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        return {}  # an unreadable memory only costs new port numbers
    return data if isinstance(data, dict) else {}


def _save(stack: Stack) -> None:
    data = {
        "services": list(stack.services),
        "ports": stack.ports,
        "ray_temp_dir": str(stack.ray_temp_dir) if stack.ray_temp_dir else None,
        "num_cpus": stack.num_cpus,
        "object_store_bytes": stack.object_store_bytes,
    }
    write_private(stack.state_dir / "stack.json", json.dumps(data, indent=1) + "\n")


def remembered_stack(state_dir: Path) -> Stack:
    """The stack as `up` last left it in `state_dir`, running or not; no services where there never was one."""
    data = _remembered(state_dir)
    temp = data.get("ray_temp_dir")
    names, ports = data.get("services"), data.get("ports")
    cpus, store = data.get("num_cpus"), data.get("object_store_bytes")
    return Stack(
        state_dir=state_dir,
        services=tuple(name for name in NAMES if isinstance(names, list) and name in names),
        ports=ports if isinstance(ports, dict) else {},
        ray_temp_dir=Path(temp) if isinstance(temp, str) else None,
        num_cpus=cpus if isinstance(cpus, int) else DEFAULT_NUM_CPUS,
        object_store_bytes=store if isinstance(store, int) else DEFAULT_OBJECT_STORE_BYTES,
    )


def up(
    state_dir: Path | str | None = None,
    *,
    only: Iterable[str] = NAMES,
    ports: Mapping[str, int] | None = None,
    num_cpus: int | None = None,
    object_store_bytes: int | None = None,
    timeout_s: float = START_TIMEOUT_S,
    say: Say = _silent,
) -> Stack:
    """Start what is missing of the services `only` and return the stack when all of them answer.

    `ports` asks for public ports by service name; `num_cpus` are logical CPUs for Ray's scheduler, `object_store_bytes`
    its shared memory. Running, healthy services are left alone. Raises PortInUseError for a port that was asked for
    and is taken, StackError (naming service, log and what to do) for everything else.
    """
    selected = _checked_names(only)
    asked = dict(ports or {})
    for name in asked:
        if name not in selected:
            raise StackError(f"a port was given for {name}, which is not among the services to start: {selected}")
    folder = Path(state_dir or default_state_dir()).resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    (folder / "logs").mkdir(exist_ok=True, mode=0o700)
    with exclusive(folder / "lock", timeout_s + 60.0, "up"):
        before = remembered_stack(folder)
        wanted = tuple(name for name in NAMES if name in selected or name in before.services)
        running = {name: record for name in wanted if (record := _running(before, name, selected, say)) is not None}
        if "ray" in running:
            _refuse_change(before, num_cpus, object_store_bytes)
        stack = replace(
            before,
            services=wanted,
            ports=_assign_ports(before, wanted, running, asked),
            num_cpus=num_cpus or before.num_cpus,
            object_store_bytes=object_store_bytes or before.object_store_bytes,
        )
        for name in _outdated(stack, running):
            say(f"  {TITLES[name]:<26} restarts: an address that it was started with has changed")
            _stop_service(stack, running.pop(name))
        missing = [name for name in selected if name not in running]
        if "ray" in missing:
            stack = replace(stack, ray_temp_dir=services.prepare_ray_temp_dir(stack.ray_temp_dir))
            _link_ray_logs(stack)
        _save(stack)
        for name in selected:
            if name in running:
                say(f"  {TITLES[name]:<26} already up     {stack.address(name)}")
        if "s3" in running:
            services.ensure_buckets(stack)
        _start(stack, missing, timeout_s, say)
    return stack


def _checked_names(only: Iterable[str]) -> tuple[str, ...]:
    given = list(only)
    for name in given:
        if name not in NAMES:
            raise StackError(f"unknown service {name!r}; the services are {', '.join(NAMES)}")
    return tuple(name for name in NAMES if name in given) or NAMES


def _running(before: Stack, name: str, selected: tuple[str, ...], say: Say) -> Record | None:
    """The record of a healthy running service; else None, and its remains are swept if it is to be started."""
    record = _record(before.state_dir, name)
    head = leader(record)
    if head is not None:
        now = replace(before, ports={**before.ports, name: record.ports})
        deadline = time.monotonic() + UNHEALTHY_GRACE_S
        trouble = services.problem(now, name)
        while trouble and name in selected and time.monotonic() < deadline:
            time.sleep(POLL_S)
            trouble = services.problem(now, name)
        if trouble is None or name not in selected:
            return record
        say(f"  {TITLES[name]:<26} restarts: pid {record.pid} runs, but {trouble}")
        _stop_service(before, record)
        return None
    if name not in selected:
        return None
    ended = stop(record, STOP_GRACE_S)
    if record.pid:
        left = f"; ended what it left: {', '.join(ended)}" if ended else ""
        say(f"  {TITLES[name]:<26} cleaned: pid {record.pid} of an earlier run is gone (crash or restart){left}")
    elif ended:
        say(f"  {TITLES[name]:<26} cleaned: processes without a pid file: {', '.join(ended)}")
    _forget(before, name)
    return None


def _forget(stack: Stack, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        _record_path(stack.state_dir, name).unlink()
    if name in stack.ports:
        services.clear_leftover_sockets(stack, name)


def _refuse_change(before: Stack, num_cpus: int | None, object_store_bytes: int | None) -> None:
    for what, asked, now in (
        ("--num-cpus", num_cpus, before.num_cpus),
        ("--object-store-bytes", object_store_bytes, before.object_store_bytes),
    ):
        if asked is not None and asked != now:
            raise StackError(f"ray: it runs with {what} {now}, not {asked}; run `down` first to change that")


def _assign_ports(
    before: Stack, wanted: tuple[str, ...], running: Mapping[str, Record], asked: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """Ports for every wanted service: what runs keeps its own; then what was asked for, remembered and free, or new."""
    chosen = {name: dict(record.ports) for name, record in running.items()}
    taken = {port for ports in chosen.values() for port in ports.values()}
    for name in wanted:
        role = PORTS[name][0]
        if name in running:
            if name in asked and asked[name] != chosen[name][role]:
                now = chosen[name][role]
                raise StackError(
                    f"{name}: it already runs on port {now}, not {asked[name]}; run `down` first to move it"
                )
            continue
        offset = GRPC_OFFSET if name == "s3" else 0
        known = dict(before.ports.get(name, {}))
        if name in asked:
            _require_free(name, asked[name], offset)
            known[role] = asked[name]
        chosen[name] = {}
        for each in PORTS[name]:
            port = known.get(each)
            needed = {port, port + offset} if port is not None else set()
            if port is None or needed & taken or not all(port_free(number) for number in needed):
                port = choose_port(taken, offset)
            taken |= {port, port + offset}
            chosen[name][each] = port
    return chosen


def _require_free(name: str, port: int, offset: int) -> None:
    for number in sorted({port, port + offset}):
        if not 0 < number < 65536:
            raise StackError(f"{name}: {number} is no port number (needed for --{name}-port {port})")
        if not port_free(number):
            note = f" (the gRPC side of port {port})" if number != port else ""
            raise PortInUseError(
                f"{name}: port {number}{note} is in use by {port_owner(number)}; "
                "choose another, stop that process, or leave the choice to `up`"
            )


def _outdated(stack: Stack, running: Mapping[str, Record]) -> list[str]:
    return [name for name, record in running.items() if record.settings != services.settings(stack, name)]


def _link_ray_logs(stack: Stack) -> None:
    assert stack.ray_temp_dir is not None
    link = stack.state_dir / "logs" / "ray-session"
    with contextlib.suppress(FileNotFoundError):
        link.unlink()
    link.symlink_to(stack.ray_temp_dir / "session_latest" / "logs")


def _start(stack: Stack, missing: list[str], timeout_s: float, say: Say) -> None:
    """Start the services of `missing` side by side and wait for each; StackError describes every one that failed."""
    waiting: dict[str, Record] = {}
    failures: list[str] = []
    began = time.monotonic()
    try:
        for name in missing:
            command, env = services.command_and_env(stack, name)
            pid, record = spawn(name, command, env, stack.log(name), stack.state_dir, _tag(stack.state_dir, name))
            record = replace(record, ports=dict(stack.ports[name]), settings=services.settings(stack, name))
            write_record(_record_path(stack.state_dir, name), record)
            waiting[name] = record
            say(f"  {TITLES[name]:<26} starting       pid {pid}")
        while waiting:
            for name, record in list(waiting.items()):
                trouble = _readiness(stack, record)
                if trouble is None:
                    say(
                        f"  {TITLES[name]:<26} ready          {stack.address(name)}  ({time.monotonic() - began:.1f} s)"
                    )
                    del waiting[name]
                elif leader(record) is None or time.monotonic() - began > timeout_s:
                    ended = leader(record) is None
                    failures.append(_failure(stack, name, "it ended by itself" if ended else trouble, timeout_s))
                    del waiting[name]
                    _stop_service(stack, record)
            time.sleep(POLL_S)
    except BaseException:  # an interrupt too: nothing half-started stays behind
        for record in waiting.values():
            _stop_service(stack, record)
        raise
    if failures:
        raise StackError("\n".join(failures))


def _readiness(stack: Stack, record: Record) -> str | None:
    reap(record.pid)
    trouble = services.problem(stack, record.service)
    if trouble is None and record.service == "s3":
        services.ensure_buckets(stack)
    return trouble


def _failure(stack: Stack, name: str, why: str, timeout_s: float) -> str:
    log = stack.log(name)
    text = tail(log)
    when = "" if why.startswith("it ended") else f" within {timeout_s:.0f} s"
    if "address already in use" in text.lower():
        advice = "a port was taken at the last moment: run `up` again, it chooses another"
    else:
        advice = "mend what the log says and run `up` again; services that are up stay up"
    head = f"{name}: {TITLES[name]} did not become ready{when}: {why}."
    return f"{head}\n  last lines of {log}:\n{text}\n  What to do: {advice}."


def _stop_service(stack: Stack, record: Record) -> list[str]:
    first = RAY_LEADER_FIRST_S if record.service == "ray" else 0.0
    ended = stop(record, STOP_GRACE_S, leader_first_s=first)
    owner = replace(stack, ports={**stack.ports, record.service: record.ports}) if record.ports else stack
    _forget(owner, record.service)
    return ended


def down(state_dir: Path | str | None = None, *, purge: bool = False, say: Say = _silent) -> None:
    """Stop every service with all its processes; data stays unless `purge`, which removes it and the key pair.

    Raises StackError when a process survives.
    """
    folder = Path(state_dir or default_state_dir()).resolve()
    if not folder.exists():
        say(f"  nothing to stop: {folder} does not exist")
        return
    with exclusive(folder / "lock", START_TIMEOUT_S + 60.0, "down"):
        stack = remembered_stack(folder)
        records = [_record(folder, name) for name in reversed(NAMES)]
        with ThreadPoolExecutor(len(records)) as pool:
            outcomes = list(pool.map(lambda record: _stop_service(stack, record), records))
        for record, ended in zip(records, outcomes, strict=True):
            note = f"stopped        {len(ended)} processes" if ended else "was not running"
            say(f"  {TITLES[record.service]:<26} {note}")
        left = [process.pid for record in records for process in members(record)]
        if left:
            raise StackError(f"processes {left} appeared while the stack went down; run `down` again")
        if purge:
            _purge(stack)
            say(f"  data, logs and credentials under {folder} removed")
        elif stack.ports:
            _save(replace(stack, services=()))


def _purge(stack: Stack) -> None:
    """Remove what the stack itself wrote, by name: a state folder that was mistyped loses nothing else."""
    if stack.ray_temp_dir is not None and stack.ray_temp_dir.name.startswith("meteor-ray-"):
        shutil.rmtree(stack.ray_temp_dir, ignore_errors=True)
    for name in ("s3", "mlflow-artifacts", "logs", "pids"):
        if (stack.state_dir / name).is_dir():
            shutil.rmtree(stack.state_dir / name)
    files = [
        *stack.state_dir.glob("mlflow.db*"),
        *(stack.state_dir / name for name in ("credentials", "stack.json", "lock")),
    ]
    for path in files:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        stack.state_dir.rmdir()


def status(state_dir: Path | str | None = None) -> list[ServiceStatus]:
    """One row for each service that the stack should run (all of them where it is down)."""
    folder = Path(state_dir or default_state_dir()).resolve()
    stack = remembered_stack(folder)
    return [_service_status(stack, name) for name in stack.services or NAMES]


def _service_status(stack: Stack, name: str) -> ServiceStatus:
    record = _record(stack.state_dir, name)
    head = leader(record)
    if head is None:
        left = len(members(record))
        health = f"crashed, {left} processes left (run `up`)" if left else "stopped"
        return ServiceStatus(name, TITLES[name], "-", None, None, health)
    now = replace(stack, ports={**stack.ports, name: record.ports})
    uptime = time.time() - record.create_time
    return ServiceStatus(name, TITLES[name], now.address(name), head.pid, uptime, services.problem(now, name) or "ok")


def service_processes(state_dir: Path, name: str) -> list[psutil.Process]:
    """Every live process of a service; none where it does not run."""
    return members(_record(state_dir, name))


def running_stack(state_dir: Path | str | None = None) -> Stack:
    """The stack of `state_dir`, every service of it answering. Raises StackError that names what is not."""
    folder = Path(state_dir or default_state_dir()).resolve()
    rows = status(folder)
    bad = [f"{row.name}: {row.health}" for row in rows if not row.ok]
    if bad:
        raise StackError(f"the stack in {folder} is not up ({'; '.join(bad)}); run `python -m infra.local up`")
    return remembered_stack(folder)


def crash(state_dir: Path | str, name: str) -> list[int]:
    """SIGKILL every process of one service at once, as a crash of its host would; returns their pids.

    The next `up` sweeps up after it and starts the service again, at the same addresses.
    """
    record = _record(Path(state_dir).resolve(), name)
    killed = []
    for process in members(record):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            killed.append(process.pid)
    reap(record.pid)
    return killed
