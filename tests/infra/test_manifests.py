"""What operators start from is true: every command, setting, port and variable in it exists, and its numbers agree.

With the folder of KubeRay's custom resource definitions in KUBERAY_CRDS (`ray.io_rayclusters.yaml`,
`ray.io_rayjobs.yaml`), the manifests are held to them, unknown fields included.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from infra import drain
from jobs.environment import CARRIED, is_secret
from jobs.pretrain import JOB as PRETRAIN
from jobs.serve import Serve
from jobs.submit import JOB as SUBMIT
from pipelines.io.redact import is_secret_name
from pipelines.sizing.layout import Layout
from pipelines.sizing.plan import plan_run
from pipelines.sizing.terms import Place

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
CLUSTER: dict[str, Any] = yaml.safe_load((INFRA / "kuberay/raycluster.yaml").read_text())
JOB: dict[str, Any] = yaml.safe_load((INFRA / "kuberay/rayjob.yaml").read_text())
HEAD, WORKERS = CLUSTER["spec"]["headGroupSpec"], CLUSTER["spec"]["workerGroupSpecs"][0]
PODS = {"head": HEAD["template"]["spec"], "gpu": WORKERS["template"]["spec"]}
SLURM = INFRA / "slurm/meteor.sbatch"
CONTAINERFILE = (INFRA / "container/Containerfile").read_text()
UNITS = {"Gi": 2**30, "Mi": 2**20, "": 1}


def container(pod: str) -> dict[str, Any]:
    (only,) = PODS[pod]["containers"]
    return dict(only)


def size(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(\w*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


# ------------------------------------------------------------------------------------------------------------ KubeRay


def _strict(schema: Any) -> None:
    """Kubernetes drops fields that a schema does not know; a misspelt one is a fault here."""
    if isinstance(schema, dict):
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
            schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _strict(part)


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder of definitions")
@pytest.mark.parametrize(("name", "manifest"), [("rayclusters", CLUSTER), ("rayjobs", JOB)])
def test_manifests_fit_kuberays_definitions(name: str, manifest: dict[str, Any]) -> None:
    definition = yaml.safe_load(Path(os.environ["KUBERAY_CRDS"], f"ray.io_{name}.yaml").read_text())
    version = manifest["apiVersion"].partition("/")[2]
    (schema,) = [one["schema"]["openAPIV3Schema"] for one in definition["spec"]["versions"] if one["name"] == version]
    _strict(schema["properties"]["spec"])
    faults = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    assert [f"{list(fault.path)}: {fault.message[:200]}" for fault in faults] == []


def test_the_job_has_the_cluster_to_the_letter() -> None:
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]


def test_versions_are_those_that_are_installed() -> None:
    assert CLUSTER["spec"]["rayVersion"] == pinned("ray")
    python = re.search(r"python:(\d+\.\d+)-", CONTAINERFILE)
    assert python is not None
    assert f">={python[1]}" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("pod", PODS)
def test_every_variable_is_one_that_the_code_reads_and_secrets_come_by_reference(pod: str) -> None:
    variables = container(pod)["env"]
    assert {"METEOR_STORAGE", "MLFLOW_TRACKING_URI"} <= {one["name"] for one in variables}
    for one in variables:
        assert one["name"] in CARRIED
        assert is_secret_name(one["name"]) <= ("secretKeyRef" in one.get("valueFrom", {})), one
        assert not is_secret("PLAIN", one.get("value", "")), one


@pytest.mark.parametrize("pod", PODS)
def test_pods_run_without_rights_and_within_what_they_ask_for(pod: str) -> None:
    assert PODS[pod]["securityContext"]["runAsNonRoot"]
    assert PODS[pod]["securityContext"]["runAsUser"] == 1000
    assert container(pod)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    resources = container(pod)["resources"]
    assert resources["requests"] == resources["limits"]
    volumes = {one["name"]: one["emptyDir"] for one in PODS[pod]["volumes"]}
    assert {one["name"] for one in container(pod)["volumeMounts"]} == set(volumes)
    assert volumes["shared-memory"]["medium"] == "Memory"
    assert size(volumes["shared-memory"]["sizeLimit"]) < size(resources["limits"]["memory"]) / 2
    assert size(volumes["temp"]["sizeLimit"]) < size(resources["limits"]["ephemeral-storage"])


def test_memory_and_temp_folders_are_those_of_the_size_estimate() -> None:
    (gpus, nodes) = int(container("gpu")["resources"]["limits"]["nvidia.com/gpu"]), WORKERS["replicas"]
    found = plan_run(entrypoint(), Layout(nodes=nodes, gpus_per_node=gpus))
    places: dict[str, tuple[Place, ...]] = {"head": ("head",), "gpu": ("node", "task")}  # the head takes no tasks
    for pod, there in places.items():
        volumes = {one["name"]: size(one["emptyDir"]["sizeLimit"]) for one in PODS[pod]["volumes"]}
        memory = size(container(pod)["resources"]["limits"]["memory"])
        assert memory - volumes["shared-memory"] > 1.2 * found.peak_of(there, "ram")[1], pod
        assert volumes["temp"] > 1.2 * found.peak_of(there, "temp")[1], pod


def test_a_last_checkpoint_has_time_before_a_node_is_stopped() -> None:
    hook = container("gpu")["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[:3] == ["python", "-m", drain.__name__]
    seconds = int(hook[hook.index("--seconds") + 1])
    training = entrypoint().training
    assert PODS["gpu"]["terminationGracePeriodSeconds"] > seconds >= training.preemption_grace_s


def entrypoint() -> Any:
    words = shlex.split(JOB["spec"]["entrypoint"])
    assert words[:2] == ["python", "jobs/pretrain.py"]
    return PRETRAIN.parse(words[2:]).settings


def test_the_jobs_settings_exist_and_fill_the_cluster() -> None:
    recipe = entrypoint()
    gpus = int(container("gpu")["resources"]["limits"]["nvidia.com/gpu"])
    assert recipe.training.workers * recipe.training.gpus_per_worker == WORKERS["replicas"] * gpus
    assert recipe.run.name, "a job that is started again must find its run"
    assert WORKERS["minReplicas"] == WORKERS["replicas"] == WORKERS["maxReplicas"]


@pytest.fixture(scope="module")
def ray_start_help() -> str:
    ray = Path(sys.executable).with_name("ray")
    shown = subprocess.run([str(ray), "start", "--help"], capture_output=True, text=True, check=True).stdout
    return " ".join(shown.split())


def test_ports_are_rays_own_and_the_jobs(ray_start_help: str) -> None:
    ports = {one["name"]: one["containerPort"] for one in container("head")["ports"]}
    for name in ("gcs-server", "dashboard", "client"):
        assert f"{ports[name]}" in re.findall(r"default(?:s)? to (\d+)", ray_start_help), name
    assert ports["serve"] == Serve(model="x").port
    probes = yaml.safe_dump([container(pod)[kind] for pod in PODS for kind in ("readinessProbe", "livenessProbe")])
    assert set(re.findall(r"localhost:(\d+)", probes)) == {str(ports["dashboard"]), "52365"}
    known = (INFRA / "nodes.py").read_text() + (INFRA / "services.py").read_text()
    for path in set(re.findall(r"localhost:\d+(/[\w/]+)", probes)):
        assert path in known


def test_options_of_ray_start_exist(ray_start_help: str) -> None:
    for group in (HEAD, WORKERS):
        for name in group["rayStartParams"]:
            assert f"--{name} " in ray_start_help
    used = re.findall(r"--[a-z-]+", _ray_start_of_slurm())
    assert {"--block", "--temp-dir", "--head", "--dashboard-host"} <= set(used)
    for option in set(used):
        assert f"{option} " in ray_start_help, option


# -------------------------------------------------------------------------------------------------------------- Slurm


def _ray_start_of_slurm() -> str:
    text = SLURM.read_text().replace("\\\n", " ")
    lines = [line.partition("ray start")[2] for line in text.splitlines() if "ray start" in line]
    return "\n".join([*lines, *(line for line in text.splitlines() if line.strip().startswith("start_node "))])


def test_the_script_is_sound() -> None:
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    assert os.access(SLURM, os.X_OK)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(SLURM)], check=True)


def test_its_commands_exist_and_its_times_agree() -> None:
    text = SLURM.read_text()
    (submitted,) = re.findall(r"python (jobs/submit\.py) -- \"\$@\"", text)
    assert (ROOT / submitted).is_file()
    assert SUBMIT.parse(["--", "true"]).command == ("true",)
    (drained,) = re.findall(r"python -m ([\w.]+) --seconds", text)
    assert drained == drain.__name__
    (notice,) = re.findall(r"--signal=B:USR1@(\d+)", text)
    (grace,) = re.findall(r"METEOR_GRACE_S:-(\d+)", text)
    assert int(notice) > int(grace) >= entrypoint().training.preemption_grace_s


def test_without_a_command_it_says_how_to_call_it() -> None:
    done = subprocess.run([str(SLURM)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: no command; write sbatch" in done.stderr


# ---------------------------------------------------------------------------------------------------------- container


def stages() -> dict[str, str]:
    """Text of every stage by name."""
    parts = re.split(r"^FROM (\S+) AS (\S+)$", CONTAINERFILE, flags=re.MULTILINE)
    return {name: f"FROM {source}\n{text}" for source, name, text in zip(*(iter(parts[1:]),) * 3, strict=True)}


def test_the_image_has_both_targets_pinned_and_without_root() -> None:
    for target in ("cpu", "cuda"):
        assert re.findall(r"^USER (.*)$", stages()[target], re.MULTILINE) == ["1000:1000"]
        assert "METEOR_GIT_COMMIT=${COMMIT}" in stages()[target]
        (installs,) = [text for name, text in stages().items() if name == f"{target}-libraries"]
        assert 'pip install --constraint constraints.txt ".[train]"' in installs
    assert pinned("torch")
    assert pinned("torchvision")


def test_what_is_copied_into_the_image_is_there_and_let_through() -> None:
    ignored = (INFRA / "container/Containerfile.dockerignore").read_text().split()
    assert ignored[0] == "*", "what is not named stays out: credentials, state, results"
    copied = {
        source for line in re.findall(r"^COPY (.*)$", CONTAINERFILE, re.MULTILINE) for source in line.split()[:-1]
    }
    assert {f"!{source}" for source in copied} == {line for line in ignored if line.startswith("!")}
    for source in copied:
        assert (ROOT / source).exists(), source
    assert not [name for name in re.findall(r"\b([A-Z][A-Z0-9_]+)=", CONTAINERFILE) if is_secret_name(name)]
