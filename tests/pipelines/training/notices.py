"""A training that is preempted twice, on a Ray of its own (a drained node stays drained).

`python -m tests.pipelines.training.notices ROOT`: first worker 1 gets a SIGTERM; started again, its node is drained.
Both workers write down what they saw in ROOT/seen-ATTEMPT-RANK.json.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.core.generated import autoscaler_pb2
from ray.train.torch import TorchTrainer

from pipelines.compat.ray_torch import StartHookTorchConfig
from pipelines.recovery import preemption
from pipelines.recovery.preemption import PreemptionWatch, listen, preempted, wait_committed

GRACE_S = 20.0
DRAIN_S = 60
STEPS_AFTER_DRAIN = 3
PATIENCE_S = 60.0


def train(config: dict[str, str]) -> None:
    root, rank = Path(config["root"]), ray.train.get_context().get_world_rank()
    resumed = ray.train.get_checkpoint()
    attempt = 1
    step = 0
    if resumed is not None:
        attempt = 2
        with resumed.as_directory() as folder:
            step = sum(int(path.read_text()) for path in Path(folder).iterdir()) // 2  # whole: one file a worker
    _write(root / f"ready-{attempt}-{rank}.json", {"pid": os.getpid(), "step": step})
    watch = PreemptionWatch(rank, GRACE_S, poll_s=0.2)
    left: int | None = None
    while left != 0:
        sum(range(100_000))
        step += 1
        left = None if left is None else left - 1
        votes = torch.tensor(watch.votes())
        torch.distributed.all_reduce(votes)
        notice = watch.agree(*votes.tolist())
        if notice is None:
            continue
        name = f"step-{step:07d}"
        folder = Path(tempfile.mkdtemp())
        (folder / f"rank-{rank}").write_text(str(step))
        time.sleep(0.3 * rank)  # the other worker is done first: it must wait before it raises
        ray.train.report({"step": step}, ray.train.Checkpoint.from_directory(str(folder)), name)
        committed = wait_committed(name, notice.seconds_left(PATIENCE_S))
        seen = {"kind": notice.kind, "step": step, "committed": committed, "left": notice.seconds_left(-1.0)}
        _write(
            root / f"seen-{attempt}-{rank}.json",
            {**seen, "at": time.time(), "heard": preemption.TERM_NOTICE.received_at},
        )
        if notice.kind == "signal":
            raise preempted(notice, step, committed)
        left = STEPS_AFTER_DRAIN  # goes on; told again, it would never end
    _write(root / f"end-{rank}.json", {"step": step})


def _write(path: Path, value: dict[str, Any]) -> None:
    path.with_suffix(".part").write_text(json.dumps(value))
    path.with_suffix(".part").replace(path)


def _await(path: Path) -> dict[str, Any]:
    while not path.exists():
        time.sleep(0.02)
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def preempt(root: Path, node_id: str, gcs_address: str) -> None:
    """What the outside does to the training."""
    workers = [_await(root / f"ready-1-{rank}.json") for rank in (0, 1)]
    time.sleep(0.3)
    _write(root / "signal.json", {"at": time.time()})
    os.kill(workers[1]["pid"], signal.SIGTERM)
    for rank in (0, 1):
        _await(root / f"ready-2-{rank}.json")
    # Ray's watcher is an actor: it is not placed on a node that is draining already, and this is the only one.
    while not any(
        one["ActorClassName"] == "PreemptionWatcher" and one["State"] == "ALIVE"
        for one in ray._private.state.actors().values()
    ):
        time.sleep(0.1)
    deadline_ms = time.time_ns() // 1_000_000 + DRAIN_S * 1000
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    _write(root / "drain.json", {"at": time.time()})
    ray._raylet.GcsClient(address=gcs_address).drain_node(node_id, reason, "a test", deadline_ms)


def main(root: Path) -> None:
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    context = ray.get_runtime_context()
    threading.Thread(target=preempt, args=(root, context.get_node_id(), context.gcs_address), daemon=True).start()
    TorchTrainer(
        train,
        train_loop_config={"root": str(root)},
        torch_config=StartHookTorchConfig(start_hook=listen, backend="gloo", timeout_s=60),
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(root / "storage"),
            failure_config=ray.train.FailureConfig(max_failures=1),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    ).fit()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
