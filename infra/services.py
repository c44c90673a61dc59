"""The three services of the local stack: how each is started, where it answers, and what "healthy" means for it.

s3      SeaweedFS, one process with the real S3 protocol; the only one that sees the key pair in its environment
mlflow  the tracking server and registry on sqlite, which stores artifacts in s3 on behalf of its clients
ray     one head node; everything it listens on is loopback
"""

from __future__ import annotations

import configparser
import contextlib
import http.client
import os
import secrets
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from infra.processes import StackError, write_private

HOST = "127.0.0.1"
REGION = "us-east-1"
BUCKETS = ("meteor", "mlflow")
STORAGE_URL = "s3://meteor"
GRPC_OFFSET = 10000  # SeaweedFS serves gRPC beside each http port, this much above it
DEFAULT_NUM_CPUS = 8
DEFAULT_OBJECT_STORE_BYTES = 1_500_000_000

NAMES = ("s3", "mlflow", "ray")
TITLES = {"s3": "object store (SeaweedFS)", "mlflow": "MLflow server", "ray": "Ray head"}
# The first port of each service is its public address, the one a user may choose.
PORTS: dict[str, tuple[str, ...]] = {
    "s3": ("s3", "master", "volume", "filer", "admin"),
    "mlflow": ("http",),
    "ray": (
        "dashboard",
        "gcs",
        "client",
        "node_manager",
        "object_manager",
        "agent",
        "agent_grpc",
        "runtime_env_agent",
        "metrics",
        "autoscaler_metrics",
        "dashboard_metrics",
    ),
}

# Settings of the user's shell that would override the stack's own; removed for everything that talks to the stack.
OVERRIDES: dict[str, tuple[str, ...]] = {
    "s3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "AWS_DEFAULT_PROFILE",
        "AWS_ENDPOINT_URL_S3",
        "MLFLOW_S3_ENDPOINT_URL",
    ),
    "mlflow": ("MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    "ray": ("RAY_NAMESPACE",),
}


@dataclass(frozen=True)
class Stack:
    """Addresses and paths of one local stack. `services`: the ones it runs; `ports`: service -> role -> port."""

    state_dir: Path
    services: tuple[str, ...]
    ports: Mapping[str, Mapping[str, int]]
    ray_temp_dir: Path | None = None
    num_cpus: int = DEFAULT_NUM_CPUS
    object_store_bytes: int = DEFAULT_OBJECT_STORE_BYTES

    @property
    def credentials_file(self) -> Path:
        """File that holds the keys of the S3 server."""
        return self.state_dir / "credentials"

    @property
    def s3_endpoint(self) -> str:
        """Address of the S3 server."""
        return f"http://{HOST}:{self.ports['s3']['s3']}"

    @property
    def mlflow_uri(self) -> str:
        """Address of the tracking server."""
        return f"http://{HOST}:{self.ports['mlflow']['http']}"

    @property
    def ray_dashboard(self) -> str:
        """Address for `ray job submit` and for the browser."""
        return f"http://{HOST}:{self.ports['ray']['dashboard']}"

    @property
    def ray_gcs_address(self) -> str:
        """Address for `ray.init` from a process on this machine."""
        return f"{HOST}:{self.ports['ray']['gcs']}"

    def address(self, name: str) -> str:
        """Address of a service by its name: s3, mlflow or ray."""
        return {"s3": lambda: self.s3_endpoint, "mlflow": lambda: self.mlflow_uri, "ray": lambda: self.ray_dashboard}[
            name
        ]()

    def log(self, name: str) -> Path:
        """Where a service writes its log."""
        return self.state_dir / "logs" / f"{name}.log"


OF_EVERY_NODE = {
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # Ray's own 15 leaves a training next to nothing beside any other program of the machine.
    "RAY_worker_niceness": "0",
    # Ray Serve ends its proxy and starts another one, again and again, where a busy machine takes longer than its 5 s.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""Environment that each Ray node of the stack is started with."""


def stack_env(stack: Stack) -> dict[str, str]:
    """The environment variables that point a program at the stack: addresses and a credentials path, no secret.

    Only variables of the services that this stack runs; the others stay as the user has set them.
    """
    env: dict[str, str] = {}
    if "s3" in stack.services:
        env |= {
            "AWS_ENDPOINT_URL": stack.s3_endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_SHARED_CREDENTIALS_FILE": str(stack.credentials_file),
            "AWS_EC2_METADATA_DISABLED": "true",
            "METEOR_STORAGE": STORAGE_URL,
        }
    if "mlflow" in stack.services:
        env |= {"MLFLOW_TRACKING_URI": stack.mlflow_uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    if "ray" in stack.services:
        env |= {
            # `ray.init` takes the first; `ray job submit` and Ray's own actors the second, also where a second cluster
            # runs on the machine.
            "RAY_ADDRESS": stack.ray_gcs_address,
            "RAY_API_SERVER_ADDRESS": stack.ray_dashboard,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "METEOR_LOG_DIR": str(stack.state_dir / "logs" / "jobs"),
            # Despite its name it decides everywhere whether Ray may replace 127.0.0.1 by the machine's outer address.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
    if any(name in os.environ for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")):
        known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        env["no_proxy"] = env["NO_PROXY"] = ",".join([*filter(None, known.split(",")), HOST, "localhost"])
    return env


def overridden(stack: Stack) -> list[str]:
    """Names of variables that must be unset for `stack_env` to take effect."""
    return [variable for name in stack.services for variable in OVERRIDES[name]]


def full_env(stack: Stack) -> dict[str, str]:
    """This process's environment with the stack applied: what a program under `run --`, MLflow and Ray's workers see.

    The running interpreter's folder leads PATH: a Ray job's `python jobs/x.py` must not find another Python.
    """
    removed = set(overridden(stack))
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    scripts = str(Path(sys.executable).parent)
    others = [folder for folder in kept.get("PATH", os.defpath).split(os.pathsep) if folder != scripts]
    return kept | stack_env(stack) | {"PATH": os.pathsep.join([scripts, *others])}


def executable(name: str) -> str:
    """Path of a console script that belongs to the running interpreter. Raises StackError when it is not installed."""
    folders = [Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))]
    for folder in folders:
        if (folder / name).exists():
            return str(folder / name)
    raise StackError(f"{name} is not installed beside {sys.executable}; install the project with its extra: .[train]")


def ensure_credentials(path: Path) -> tuple[str, str]:
    """The key pair in the AWS shared-credentials file `path` (0600); generated at the first call.

    Raises StackError when the file holds no key pair.
    """
    if not path.exists():
        key, secret = "METEOR" + secrets.token_hex(7).upper(), secrets.token_urlsafe(30)
        write_private(path, f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    path.chmod(0o600)
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path)
        return parser["default"]["aws_access_key_id"], parser["default"]["aws_secret_access_key"]
    except (configparser.Error, KeyError):
        raise StackError(
            f"{path} holds no [default] key pair; run `down`, delete the file (a new pair is made), then `up`"
        ) from None


def command_and_env(stack: Stack, name: str) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of one service."""
    return {"s3": _s3_command, "mlflow": _mlflow_command, "ray": _ray_command}[name](stack)


def _s3_command(stack: Stack) -> tuple[list[str], dict[str, str]]:
    key, secret = ensure_credentials(stack.credentials_file)
    data = stack.state_dir / "s3"
    data.mkdir(exist_ok=True, mode=0o700)
    options = {
        "dir": str(data),
        "ip": HOST,
        "ip.bind": HOST,
        **{f"{role}.port": str(port) for role, port in stack.ports["s3"].items()},
        "s3.port.iceberg": "0",
        "s3.port.lance": "0",
        "webdav": "false",
        "admin.ui": "false",
        "s3.autoCreateBucket": "false",  # a misspelt bucket is an error, not a new bucket
        # Master and filer take unsigned writes over HTTP from any program and any page in the user's browser; they are
        # reached by gRPC alone. S3 itself asks for signed requests.
        "disableHttp": "true",
        "s3.allowedOrigins": stack.s3_endpoint,
        "master.telemetry": "false",
    }
    command = [
        executable("weed"),
        "-logtostderr=true",
        "mini",
        *(f"-{name}={value}" for name, value in options.items()),
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    # The volume server speaks HTTP with S3's side: both sign with keys that nobody else sees, new at every start.
    signed = ("SIGNING", "SIGNING_READ", "FILER_SIGNING", "FILER_SIGNING_READ")
    keys = {f"WEED_JWT_{part}_KEY": secrets.token_urlsafe(32) for part in signed}
    return command, env | {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, **keys}


def _mlflow_command(stack: Stack) -> tuple[list[str], dict[str, str]]:
    port = stack.ports["mlflow"]["http"]
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{stack.state_dir / 'mlflow.db'}"]
    command += ["--serve-artifacts", "--artifacts-destination", artifact_root(stack)]
    command += ["--allowed-hosts", f"{HOST}:{port},localhost:{port}"]
    env = {name: value for name, value in full_env(stack).items() if not name.startswith("MLFLOW_")}
    return command, env | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def artifact_root(stack: Stack) -> str:
    """Where the MLflow server stores artifacts: its bucket; without an own object store, METEOR_STORAGE or the disk."""
    if "s3" in stack.services:
        return "s3://mlflow"
    storage = os.environ.get("METEOR_STORAGE")
    return f"{storage.rstrip('/')}/mlflow" if storage else str(stack.state_dir / "mlflow-artifacts")


def _ray_command(stack: Stack) -> tuple[list[str], dict[str, str]]:
    ports = stack.ports["ray"]
    assert stack.ray_temp_dir is not None
    flags = {
        "node-ip-address": HOST,
        "dashboard-host": HOST,
        "include-dashboard": "true",
        "port": ports["gcs"],
        "dashboard-port": ports["dashboard"],
        "ray-client-server-port": ports["client"],
        "node-manager-port": ports["node_manager"],
        "object-manager-port": ports["object_manager"],
        "dashboard-agent-listen-port": ports["agent"],
        "dashboard-agent-grpc-port": ports["agent_grpc"],
        "runtime-env-agent-port": ports["runtime_env_agent"],
        "metrics-export-port": ports["metrics"],
        "min-worker-port": 0,  # workers: any free port, chosen by the kernel
        "max-worker-port": 0,
        "num-cpus": stack.num_cpus,
        "object-store-memory": stack.object_store_bytes,
        "temp-dir": stack.ray_temp_dir,
    }
    command = [executable("ray"), "start", "--head", "--block", "--disable-usage-stats", "--log-color=false"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    env = full_env(stack)
    env.pop("RAY_ADDRESS", None)  # a head is no client of another cluster
    return command, env | {
        "AUTOSCALER_METRIC_PORT": str(ports["autoscaler_metrics"]),
        "DASHBOARD_METRIC_PORT": str(ports["dashboard_metrics"]),
        **OF_EVERY_NODE,
    }


def settings(stack: Stack, name: str) -> dict[str, str]:
    """What a running service must have been started with to serve this stack; compared with its record."""
    env = stack_env(stack)
    seen = {
        "s3": (),
        "mlflow": ("AWS_ENDPOINT_URL",),
        "ray": ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"),
    }[name]
    return {variable: env.get(variable, os.environ.get(variable, "")) for variable in seen}


def get(port: int, path: str, timeout_s: float = 5.0) -> tuple[int, bytes]:
    """Status and body of a plain GET on loopback, past every proxy setting. Raises OSError or HTTPException."""
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def s3_request(stack: Stack, method: str, path: str, timeout_s: float = 10.0) -> int:
    """HTTP status of a signed S3 request without a body. Raises OSError or HTTPException when nobody answers."""
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    port = stack.ports["s3"]["s3"]
    request = AWSRequest(method=method, url=f"http://{HOST}:{port}{path}")
    S3SigV4Auth(Credentials(*ensure_credentials(stack.credentials_file)), "s3", REGION).add_auth(request)
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
    try:
        connection.request(method, path, headers=dict(request.prepare().headers.items()))
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def ensure_buckets(stack: Stack) -> list[str]:
    """Create the buckets that are missing; returns those. Raises StackError when the store refuses."""
    made = []
    for bucket in BUCKETS:
        status = s3_request(stack, "HEAD", f"/{bucket}")
        if status == 404:
            status = s3_request(stack, "PUT", f"/{bucket}")
            made.append(bucket)
        if status not in (200, 204, 409):
            raise StackError(f"s3: the object store answers {status} for bucket {bucket}; see {stack.log('s3')}")
    return made


def problem(stack: Stack, name: str) -> str | None:
    """None when the service answers as it should, else what is wrong in one line."""
    try:
        return {"s3": _s3_problem, "mlflow": _mlflow_problem, "ray": _ray_problem}[name](stack)
    except (OSError, http.client.HTTPException) as error:
        return f"no answer on {stack.address(name)} ({type(error).__name__})"


def _s3_problem(stack: Stack) -> str | None:
    status, _ = get(stack.ports["s3"]["s3"], "/healthz")
    if status != 200:
        return f"/healthz answers {status}"
    status = s3_request(stack, "HEAD", f"/{BUCKETS[0]}")
    if status == 403:
        return f"it rejects the key pair in {stack.credentials_file}"
    return None if status in (200, 404) else f"a signed request is answered with {status}"


def _mlflow_problem(stack: Stack) -> str | None:
    status, body = get(stack.ports["mlflow"]["http"], "/health")
    return None if status == 200 and body == b"OK" else f"/health answers {status}"


def _ray_problem(stack: Stack) -> str | None:
    ports = stack.ports["ray"]
    for port, path in ((ports["dashboard"], "/api/gcs_healthz"), (ports["agent"], "/api/local_raylet_healthz")):
        status, _ = get(port, path)
        if status != 200:
            return f"{path} answers {status}"
    return None


def prepare_ray_temp_dir(known: Path | None) -> Path:
    """A private temporary folder for Ray, its path short enough for sockets; sessions before the last are removed."""
    if known is None or not known.is_dir() or known.is_symlink() or known.stat().st_uid != os.getuid():
        return Path(tempfile.mkdtemp(prefix="meteor-ray-", dir="/tmp"))
    for session in sorted(known.glob("session_2*"))[:-1]:
        shutil.rmtree(session, ignore_errors=True)
    return known


def clear_leftover_sockets(stack: Stack, name: str) -> None:
    """Remove the unix sockets that a SeaweedFS of this stack leaves in /tmp, named after its ports."""
    if name != "s3":
        return
    for port in stack.ports["s3"].values():
        for number in (port, port + GRPC_OFFSET):
            for path in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                with contextlib.suppress(OSError):
                    path.unlink()
