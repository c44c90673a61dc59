"""What pretrain and finetune share: the command line, the connection to Ray, errors for people."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import ray

from jobs.recipes import parse_recipe
from pipelines.job.run import JobName, run_job
from pipelines.recovery.failures import TrainingError
from pipelines.tracking.redact import hide_passwords


def main(job: JobName, description: str, arguments: Sequence[str] | None = None) -> int:
    """Run one job from its command line. Exit status: 0 done, 1 failed with a message, 2 wrong arguments."""
    recipe = parse_recipe(job, description, arguments)
    context = ray.init(ignore_reinit_error=True, logging_level="WARNING")
    try:
        run_job(recipe, job)
    except (ValueError, TrainingError) as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return 1
    if context.dashboard_url:
        print(f"\n  Ray dashboard  http://{context.dashboard_url}", flush=True)
    print(f"  MLflow         {hide_passwords(recipe.tracking.uri)}", flush=True)
    return 0
