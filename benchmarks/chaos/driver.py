"""The command under test, `python -m benchmarks.chaos.driver`.

Its standard input tells it what to run: a line CONFIG.json and a line RESULT.json. It has imported everything by then;
no fault is aimed at the imports.

It trains, or continues, the run of the configuration, and writes what came of it. A killed one writes nothing.
"""

import json
import sys
import time
from pathlib import Path

import ray

from benchmarks.chaos.workload import Config, make_job, prepare_init
from pipelines.io import codec
from pipelines.training.trainer import fit


def main(config_file: str, result_file: str) -> int:
    """Exit status 0 when the training is done."""
    config = codec.decode(Config, Path(config_file).read_text(), config_file)
    started = time.time()
    result: dict[str, object] = {}
    try:
        ray.init(address=config.ray_address, log_to_driver=False, logging_level="ERROR")
        prepare_init(config.storage, config.run_name)
        trained = fit(make_job(config))
        result = {"ok": True, "steps_trained": trained.steps_trained, "checkpoint": trained.checkpoint.url}
    except Exception as error:  # whatever it is, it is the result of this command
        result = {"ok": False, "error_type": type(error).__name__, "error": str(error)}
        raise
    finally:
        Path(result_file).write_text(json.dumps({**result, "seconds": time.time() - started}, indent=1))
    return 0


if __name__ == "__main__":
    paths = sys.stdin.read().split("\n")
    sys.exit(main(paths[0], paths[1]))
