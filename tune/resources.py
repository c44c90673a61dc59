"""How many trials a cluster holds at once, such that none waits for what another one holds.

A trial takes everything that it needs as a whole or is not started: Tune reserves the trial's own bundle, and the
number of trials at a time is such that what they start in turn (workers, data tasks) fits as well. Were it
higher, every trial could hold its own bundle and wait for ever for its workers'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.config.settings import SettingsError
from tune.settings import SweepSettings

Bundle = Mapping[str, float]
"""Resources that must be free on one node: CPU, GPU."""


def bundles_of_trial(settings: SweepSettings) -> list[Bundle]:
    """All that one trial holds at some moment, each part as it must fit on a node."""
    own: list[Bundle] = [{"CPU": settings.cpus_per_trial, "GPU": settings.gpus_per_trial}]
    if settings.kind == "evaluate":
        return own
    recipe = settings.trial_recipe
    training, data = recipe.training, recipe.data
    workers: list[Bundle] = [
        {"CPU": training.cpus_per_worker, "GPU": training.gpus_per_worker} for _ in range(training.workers)
    ]
    return own + workers + [{"CPU": data.data_task_cpus} for _ in range(data.data_tasks)]


def concurrent_trials(trial: Sequence[Bundle], nodes: Sequence[Bundle], at_most: int | None = None) -> int:
    """How many trials fit, each bundle on the first node with room (the largest bundles first).

    Args:
        trial: `bundles_of_trial`.
        nodes: resources of each node of the cluster.
        at_most: no more than so many.

    Raises:
        SettingsError: where not one fits, with what it needs and what there is.
    """
    free = [dict(node) for node in nodes]
    ordered = sorted(trial, key=lambda bundle: (-bundle.get("GPU", 0.0), -bundle.get("CPU", 0.0)))
    count = 0
    while at_most is None or count < at_most:
        if not all(_take(free, bundle) for bundle in ordered):
            break
        count += 1
    if count == 0:
        raise SettingsError(
            f"the cluster cannot hold one trial: it needs {_sums([trial])} (in parts of {_listing(trial)}), the "
            f"cluster's {len(nodes)} nodes have {_listing(nodes)}. Lower --cpus-per-trial, --train.training.workers or "
            "their CPUs, or add nodes"
        )
    return count


def _take(free: list[dict[str, float]], bundle: Bundle) -> bool:
    for node in free:
        if all(node.get(name, 0.0) + 1e-9 >= amount for name, amount in bundle.items()):
            for name, amount in bundle.items():
                node[name] = node.get(name, 0.0) - amount
            return True
    return False


def _sums(groups: Sequence[Sequence[Bundle]]) -> str:
    cpus, gpus = (sum(b.get(name, 0.0) for group in groups for b in group) for name in ("CPU", "GPU"))
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")


def _listing(bundles: Sequence[Bundle]) -> str:
    return ", ".join(_sums([[bundle]]) for bundle in bundles) or "nothing"
