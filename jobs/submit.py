#!/usr/bin/env python
"""Submit a job to a Ray cluster: `python jobs/submit.py -- python jobs/pretrain.py --recipe tiny`.

This folder goes with the job, and so do the commit and the variables that the job needs (`jobs/environment.py`); plain
`ray job submit` leaves them behind. What is missing or misspelt is said before anything is sent. The exit status is the
job's own. Secrets stay here unless they are asked for: let the cluster's nodes have them (docs/cluster.md).
"""

from __future__ import annotations

import asyncio
import importlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tyro

from jobs.command_line import Job, chosen
from jobs.environment import Carried, carried
from pipelines.io.console import say
from pipelines.io.git import COMMIT_VARIABLE, UNKNOWN_COMMIT, git_commit
from pipelines.io.redact import redact_text
from pipelines.io.retry import retry

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

AGENT_S = 120.0
"""Seconds that a cluster has, after its dashboard answers, until a node can take a job."""
NO_AGENT = "No available agent"
"""How Ray's dashboard says that nobody can take the job yet, or ever, where the agent's port is another's; nothing is
submitted then."""
AWAY_S = 600.0
"""Seconds for which the cluster may be away while its job is followed."""
POLL_S = 2.0
TELL_S = 60.0
NEEDS = {
    "pretrain": {"METEOR_STORAGE": "--run.storage", "MLFLOW_TRACKING_URI": "--tracking.uri"},
    "finetune": {"METEOR_STORAGE": "--run.storage", "MLFLOW_TRACKING_URI": "--tracking.uri"},
    "sweep": {"METEOR_STORAGE": "--storage", "MLFLOW_TRACKING_URI": "--tracking.uri"},
}
"""What a job cannot do without: variables, and the setting that takes the place of each."""


@dataclass(frozen=True)
class Submit:
    """Where a job runs, and what goes with it."""

    command: tyro.conf.Positional[tuple[str, ...]] = ()
    """The job, after `--`: python jobs/NAME.py and its settings."""
    address: str = field(default_factory=lambda: os.environ.get("RAY_API_SERVER_ADDRESS", ""))
    """Address of the cluster's dashboard, http://HOST:8265; by default the environment's RAY_API_SERVER_ADDRESS."""
    env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Name of a further variable that goes with the job, such as NCCL_SOCKET_IFNAME; may be given several times."""
    send_secrets: bool = False
    """Send secrets of this environment, too. Everybody who sees the cluster's jobs can read them."""
    nodes_have_the_rest: bool = False
    """What is not set here is set on the nodes of the cluster: nothing is asked for."""
    submission_id: str = ""
    """Name of the job in Ray; by default Ray makes one."""
    wait: bool = True
    """Show what the job prints, and end as it ends; else only say its name."""
    driver_cpus: float = 0.0
    """Ray CPUs that the job's driver reserves. With any reservation it runs on a node that has the room, else on the
    head."""
    driver_memory_gb: float = 0.0
    """Memory (GB) that it reserves."""
    driver_gpus: float = 0.0
    """Ray GPUs that it reserves."""


def check(settings: Submit) -> None:
    """What can be wrong before Ray is asked. Raises ValueError."""
    if not settings.command:
        raise ValueError("there is no command to submit: write it after `--`, as `-- python jobs/pretrain.py`")
    if not settings.address:
        raise ValueError("address is not set: give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS")
    if not settings.send_secrets and redact_text(line := shlex.join(settings.command)) != line:
        raise ValueError(
            f"the command holds a secret, which Ray shows to everybody who sees its jobs: {line}. Give the nodes a "
            "variable instead (docs/cluster.md), or say --send-secrets"
        )
    carried(os.environ, settings.env)
    _check_job(settings)


def _check_job(settings: Submit) -> None:
    """Refuse settings that the job would refuse, and variables that it lacks. Raises ValueError."""
    name, arguments = _job_of(settings.command)
    if name is None:
        return
    importlib.import_module(f"jobs.{name}").JOB.parse(arguments)
    needs = dict(NEEDS.get(name, {}))
    if any(word.startswith("models:") or "=models:" in word for word in arguments):
        needs["MLFLOW_TRACKING_URI"] = "--tracking.uri"
    missing = [
        f"{variable} (or {option})"
        for variable, option in needs.items()
        if not os.environ.get(variable) and not chosen(arguments, option, "")
    ]
    if missing and not settings.nodes_have_the_rest:
        raise ValueError(
            f"{name} needs what is not set here: {', '.join(missing)}. Set it; if the nodes of the cluster have it, "
            "say --nodes-have-the-rest"
        )


def _job_of(command: Sequence[str]) -> tuple[str | None, list[str]]:
    """Name and arguments of a job of this folder; no name for any other command."""
    for place, word in enumerate(command[:3]):
        path = Path(word)
        if path.parent.name == "jobs" and path.suffix == ".py" and (ROOT / "jobs" / path.name).is_file():
            return path.stem, list(command[place + 1 :])
    return None, []


def run(settings: Submit) -> int:
    """Submit the job and follow it; its exit status."""
    # Ray reads these as it is imported. Its own list of what to leave out would be warned about; .rayignore says it.
    os.environ.setdefault("RAY_LOGGER_LEVEL", "warning")
    os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
    from ray.job_submission import JobSubmissionClient  # here: a second, which --help does not need

    goes = carried(os.environ, settings.env, settings.send_secrets)
    commit = git_commit(ROOT)
    _tell(goes, commit)
    try:
        client = JobSubmissionClient(settings.address)
    except ConnectionError as error:
        raise ValueError(
            f"no dashboard of Ray answers at {settings.address}: is the cluster up, and can it be reached from here?"
        ) from error

    def submit() -> str:
        return client.submit_job(
            entrypoint=shlex.join(settings.command),
            submission_id=settings.submission_id or None,
            runtime_env={"working_dir": str(ROOT), "env_vars": {**goes.variables, COMMIT_VARIABLE: commit}},
            metadata={"commit": commit},
            entrypoint_num_cpus=settings.driver_cpus or None,
            entrypoint_num_gpus=settings.driver_gpus or None,
            entrypoint_memory=int(settings.driver_memory_gb * 1e9) or None,
        )

    job = retry(submit, f"submission to {settings.address}", retry_s=AGENT_S, transient=_has_no_agent_yet)
    say(f"  {'job':<14} {job} at {client.get_address()}")
    if not settings.wait:
        return 0
    try:
        return follow(client, job)
    except KeyboardInterrupt:
        say(f"\nthe job goes on: `ray job logs --follow {job}` shows it, `ray job stop {job}` ends it")
        raise


def _has_no_agent_yet(error: Exception) -> bool:
    """A new cluster's dashboard answers some seconds before a node can take jobs."""
    return isinstance(error, RuntimeError) and NO_AGENT in str(error)


def _tell(goes: Carried, commit: str) -> None:
    """Say what a person may not expect."""
    if goes.withheld:
        _warn(
            f"{', '.join(goes.withheld)} stays here, since everybody who sees the cluster's jobs could read it: the "
            "nodes must have it (docs/cluster.md), or say --send-secrets"
        )
    if goes.secrets:
        _warn(f"{', '.join(goes.secrets)} can be read by everybody who sees the cluster's jobs, in dashboard and API")
    if commit == UNKNOWN_COMMIT:
        _warn(f"the commit of {ROOT} is not known (no git, no checkout): set {COMMIT_VARIABLE} to keep it with the run")


def _warn(text: str) -> None:
    say(f"  warning: {text}")


def follow(client: JobSubmissionClient, job: str) -> int:
    """Print what a job prints until it has ended; its exit status.

    Raises:
        ValueError: the cluster was away for longer than AWAY_S.
    """
    import aiohttp  # here: Ray brings it

    log, away, told = _Log(client, job), 0.0, time.monotonic()
    while True:
        try:
            asyncio.run(log.show())
            info = client.get_job_info(job)
        except (RuntimeError, OSError, aiohttp.ClientError) as error:  # those of requests are OSErrors
            now = time.monotonic()
            away = away or now
            if now - away > AWAY_S:
                raise ValueError(
                    f"{client.get_address()} is away for {AWAY_S:.0f} s, and job {job} may go on: {error}"
                ) from error
            if now - told > TELL_S:
                told = now
                _warn(f"{client.get_address()} is away for {now - away:.0f} s; it is asked again: {error}")
        else:
            away = 0.0
            if info.status.is_terminal():
                return _status(info)
        time.sleep(POLL_S)


@dataclass
class _Log:
    """What a job prints, of which every character is shown once."""

    client: JobSubmissionClient
    job: str
    shown: int = 0

    async def show(self) -> None:
        """Print what is new, until the job has ended or the connection has."""
        seen = 0
        async for text in self.client.tail_job_logs(self.job):  # from the beginning, each time
            sys.stdout.write(text[max(0, self.shown - seen) :])
            sys.stdout.flush()
            seen += len(text)
            self.shown = max(self.shown, seen)


def _status(info: Any) -> int:
    if info.status == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None:  # it never ran, or was ended from outside
        say(f"error: job {info.submission_id} {info.status.lower()}: {info.message or ''}")
        return 1
    return int(info.driver_exit_code) if info.driver_exit_code > 0 else 128 - int(info.driver_exit_code)


JOB = Job("submit", Submit, run, __doc__, check=check, passes_on=True)

if __name__ == "__main__":
    sys.exit(JOB.main())
