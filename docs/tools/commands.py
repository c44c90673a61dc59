"""What becomes of each command that README.md and docs/ show, when `make docs-check` runs it.

A row may make a run shorter and put something real in the place of a placeholder; it changes nothing else. Rows are
run in this order, since later commands use what earlier ones made. A command that is in no row fails the check, and so
does a row that no page shows any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SHORT_DATA = "--source.code-points 48 --source.heldout-code-points 16 --source.variants 1 --data.heldout-samples 16"
SHORT_TRAINING = (
    "--training.micro-batch 8 --training.global-batch 16 --calibration.samples 16 --calibration.decode-samples 16 "
    "--run.pictures 1"
)
SHORT = f"{SHORT_DATA} {SHORT_TRAINING}"
BUCKET = {"s3://bucket/": "s3://meteor/docs/"}
MLFLOW = {'"http://127.0.0.1:5000"': 'os.environ["MLFLOW_TRACKING_URI"]'}
PHOTO = {"photo.jpg": "$WORK/photo.jpg"}


VIT_IMPORTS = """\
from functools import partial

from transformers import ViTConfig, ViTModel

from meteor_model.encoders.base import ScoreProjections
from meteor_model.encoders.transformers_vit import TransformersVit
"""
PULLED = """\
import base64
import os
from pathlib import Path

from pipelines.registry.publish import pull_model
from pipelines.registry.versions import pin_model

work = Path(os.environ["WORK"])
base64_text = base64.b64encode((work / "photo.jpg").read_bytes()).decode()
FOLDER = pull_model(pin_model("models:/meteor@champion"), work / "champion")
"""
PRUNED = """\
from dataclasses import replace

from meteor_model.configuration_meteor import FusePruning
from tests.meteor_model.builders import DENSE, model as build, pixels, processor as make

model, processor = build(DENSE), make(DENSE)
inputs = processor(text=["Where is the drawing?"], images=[[pixels(1)[0]]])
"""
RUNNING_JOB = (
    "from ray.job_submission import JobSubmissionClient as Jobs; "
    "print(next(job.submission_id for job in Jobs().list_jobs() if job.status == 'RUNNING'))"
)
PROMOTED = """\
make register ARGS="promote --version 1 --to champion --force documentation"
make register ARGS="promote --version 2 --to champion --force documentation"
"""
RUN = "docs"
"""Name of the run that `make pretrain` makes."""
MIXED = f"--data.heldout-samples 8 {SHORT_TRAINING}"
SWEEP = (
    "--trials 2 --questions 8 --final-questions 8 --finalists 1 --portions 1 --calibration-samples 8 --batch 8 "
    "--max-concurrent 1"
)


@dataclass(frozen=True)
class Row:
    """What becomes of a command.

    Attributes:
        shown: the command as pages show it; of a block of Python its first line.
        also: settings that make it shorter, or choose a free port; of `make` they go into ARGS.
        replace: placeholder -> what is really there. `$WORK` is a folder with made-up data, `$PORT` a free port.
        before: what is run before it, so that there is what it takes as given: commands, or lines of Python.
        until: of a server: the address that answers when it is up; it is stopped then.
        by: a test, a file of CI, or a scenario of `make chaos` that runs what the command runs, in this check's place.
        quick: it needs no server, and a test runs it as well.
        slow: it takes a quarter of an hour or more; `--all` runs it.
    """

    shown: str
    also: str = ""
    replace: dict[str, str] = field(default_factory=dict)
    before: str = ""
    until: str = ""
    by: str = ""
    quick: bool = False
    slow: bool = False


ROWS: tuple[Row, ...] = (
    # Without servers.
    Row("make help", quick=True),
    Row("python jobs/pretrain.py --help", quick=True),
    Row("python jobs/sweep.py --help", quick=True),
    Row("python jobs/serve.py --help", quick=True),
    Row("python jobs/predict_shards.py --help", quick=True),
    Row("class VitEncoder(TransformersVit):", before=VIT_IMPORTS, quick=True),
    Row(
        "from meteor_model.pruners.named import with_pruner",
        before=PRUNED,
        replace={"keep=256": "keep=64"},
        quick=True,
    ),
    Row("from meteor_model.pruners.fuse_criteria import FUSE_CRITERIA, Pool", before=PRUNED, quick=True),
    Row("make flops"),
    Row('make plan ARGS="--recipe meteor_x4_7b --nodes 2 --gpus-per-node 8"', by="tests/docs/test_scaling.py"),
    Row("make plan", quick=True),
    Row('make plan-cluster ARGS="--gpus 512 --recipe meteor_x4_7b"', by="tests/pipelines/sizing/test_at_scale.py"),
    Row("make plan-cluster", by="tests/pipelines/sizing/test_at_scale.py"),
    Row("make bench-prune", also="--tiny --rounds 1 --only realised growth"),
    Row("make bench-packing", also="--samples 64 --rounds 1"),
    Row("make bench-loss", also="--rounds 1"),
    Row("make bench-pruners", also="--layouts tiny --rounds 1 --only fastv divprune"),
    Row("make bench-order", also="--shards 1000 --samples 1000000 --only plan"),
    Row("make docs", by="tests/docs/test_settings.py"),
    Row("make test", by=".ci/run"),
    Row("make test-slow", by="tests/benchmarks/chaos/test_quick.py"),
    Row("make test-versions", by=".github/workflows/versions.yml"),
    Row("make chaos", by="tests/benchmarks/chaos/test_quick.py"),
    Row(
        "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message TEXT "
        "--deadline-remaining-seconds N --node-id ID",
        by="benchmarks/chaos/scenarios.py",
    ),
    Row("pip install .", by="tests/versions.py"),
    Row("import meteor_model.auto  # enters METEOR at the auto classes", by="tests/meteor_model/test_compat.py"),
    # The environment of all that follow.
    Row("source .venv/bin/activate"),
    Row('make up && eval "$(python -m infra.local env)"'),
    Row("python -m infra.local up"),
    Row("python -m infra.drain --seconds 300", by="tests/infra/test_drain.py"),
    Row("make status"),
    # Data of one's own.
    Row(
        "python jobs/make_shards.py llava --records data.json --images folder/ --output s3://bucket/mydata",
        also="--heldout-share 0.2",
        replace={**BUCKET, "data.json": "$WORK/data.json", "folder/": "$WORK/folder/"},
    ),
    Row("python jobs/make_shards.py openmoji --output s3://bucket/drawings", also="--code-points 48", replace=BUCKET),
    Row(
        "python jobs/make_shards.py scenes --output s3://bucket/scenes",
        also="--train 8 --validation 4 --search 4 --final 4",
        replace=BUCKET,
    ),
    Row("python -m docs.tools.scenes"),
    Row("python -m docs.tools.kept", before='make parts ARGS="dinov2-small efficientnet-lite0"'),
    Row("python jobs/make_shards.py webdataset --output s3://bucket/shards --heldout 'val-*.tar'", replace=BUCKET),
    Row(
        "python jobs/make_shards.py tables --output s3://bucket/hub --image-column image --caption-column text "
        "--heldout 'data/validation-*'",
        by="tests/pipelines/data/tables/test_index.py",
    ),
    Row(
        "python jobs/make_shards.py tables --output s3://bucket/saved --conversations-column conversations "
        "--heldout 'test/*'",
        by="tests/pipelines/data/tables/test_index.py",
    ),
    Row("python jobs/pretrain.py --data.manifest s3://bucket/mydata", also=MIXED, replace=BUCKET),
    Row(
        "python jobs/pretrain.py --data.manifest s3://bucket/mydata "
        "--data.mixture s3://bucket/more 2.0 s3://bucket/text 0.5",
        also=MIXED,
        replace=BUCKET,
    ),
    # Train.
    Row("make pretrain", also=f"{SHORT} --run.name {RUN}"),
    Row("python jobs/submit.py -- python jobs/pretrain.py --recipe tiny", also=f"{SHORT} --run.name {RUN}"),
    Row('make pretrain ARGS="--training.epochs 2 --pruning.fuse.keep 16"', also=SHORT),
    Row("make finetune", also=SHORT),
    # Ask, look, calibrate.
    Row("make predict ARGS=\"--image photo.jpg --prompt 'What color is the background?'\"", replace=PHOTO),
    Row(
        "make visualize ARGS=\"--image photo.jpg --prompt 'What does the sign say?' --output pictures\"", replace=PHOTO
    ),
    Row(
        "make visualize ARGS=\"--image photo.jpg --prompt 'What does the sign say?' --compare 48 --output pictures\"",
        replace=PHOTO,
    ),
    Row("make calibrate", also="--samples 16 --decode-samples 8"),
    Row(
        'make calibrate ARGS="--samples 512 --against s3://meteor/data/other:train"',
        also="--decode-samples 8",
        replace={"512": "16", "s3://meteor/data/other": "s3://meteor/docs/more"},
    ),
    Row(
        "python jobs/calibrate.py --model s3://bucket/runs/RUN/export --manifest s3://bucket/data --actors 8 --gpus 1",
        also="--samples 16 --decode-samples 8",
        replace={
            "s3://bucket/runs/RUN": f"s3://meteor/runs/{RUN}",
            "s3://bucket/data": "s3://meteor/docs/more",
            "--actors 8 --gpus 1": "--actors 2",
        },
    ),
    # Search, score, register.
    Row("make sweep", also=SWEEP),
    Row(
        "ray job submit --working-dir . -- python jobs/sweep.py --budgets 64 128 256",
        also=SWEEP,
        replace={"64 128 256": "12 24"},
    ),
    Row("ray job submit --working-dir . -- python jobs/sweep.py --cost ms", also=SWEEP),
    Row(
        "ray job submit --working-dir . -- python jobs/sweep.py --budgets 12.5 --budget-unit tflops --register",
        also=SWEEP,
    ),
    Row("python -m tune.redo sweep.json", by="tests/tune/test_choice.py"),
    Row("make bench-search", by="tests/benchmarks/test_search.py"),
    Row("make train-scenes", by="tests/benchmarks/test_quality.py"),
    Row('make train-scenes ARGS="--size hour"', by="tests/benchmarks/test_quality.py"),
    Row('make train-scenes ARGS="--quick"', by="tests/benchmarks/test_quality.py"),
    Row("make bench-quality", by="tests/benchmarks/test_quality.py"),
    Row("python -m benchmarks.quality rival --pruners average_pooling", by="tests/benchmarks/test_quality.py"),
    Row("python -m benchmarks.quality ask --size full --questions 1000", by="tests/benchmarks/test_quality.py"),
    Row("python -m benchmarks.quality statistics", by="tests/benchmarks/test_quality.py"),
    Row("python -m benchmarks.gpu train-scenes", by="tests/benchmarks/test_quality.py"),
    Row('make parts ARGS="reader-conv"', by="tests/pipelines/parts/test_reader_conv.py"),
    Row("make register"),
    Row("make evaluate", also="--questions 8"),
    Row('make evaluate ARGS="--model models:/meteor@budget-16"', also="--questions 8"),
    # Trained for a few steps, it may have learnt to say nothing.
    Row('make register ARGS="promote --alias budget-16 --to champion"', also="--force documentation"),
    Row(
        "python jobs/evaluate.py --model models:/meteor@champion --manifest s3://bucket/scenes --part final "
        "--questions 2000",
        replace={**BUCKET, "2000": "8"},
    ),
    Row(
        'make register ARGS="compare champion budget-8 --output compared.json"',
        replace={"budget-8": "budget-12_5"},
        before="python jobs/evaluate.py --model models:/meteor@budget-12_5 --manifest s3://meteor/docs/scenes "
        "--part final --questions 8",
    ),
    Row('make register ARGS="rollback --alias champion"', before=PROMOTED),
    Row('make register ARGS="parity --version 7"', replace={"7": "1"}),
    Row("from pipelines.registry.open import load_registered  # with this repository", before=PULLED, replace=MLFLOW),
    # Serve.
    Row(
        'make predict-shards ARGS="--manifest URL --output URL"',
        replace={
            "--manifest URL": "--manifest s3://meteor/docs/more",
            "--output URL": "--output s3://meteor/docs/answers",
        },
    ),
    Row(
        "mlflow models serve -m models:/meteor@champion --env-manager local",
        also="--port $PORT",
        until="http://127.0.0.1:$PORT/ping",
    ),
    Row("make serve", also="--port $PORT", until="http://127.0.0.1:$PORT/ping"),
    Row("ray job list"),
    Row("ray job stop ID", replace={"ID": f'"$(python -c "{RUNNING_JOB}")"'}),
    Row("make down"),
    # A quarter of an hour and more.
    Row("make parts", slow=True),
    Row('make pretrain ARGS="--recipe small"', also=SHORT, slow=True),
    Row("make bench-ranks", also="--images 4", slow=True),
    Row("make bench-data", by="tests/benchmarks/test_data.py"),
    Row("make bench-tables", by="tests/benchmarks/test_data.py"),
    Row("make bench-limits", also="--side 1024", slow=True),
    Row("make bench-train", by="tests/benchmarks/test_train.py"),
    Row("make bench-serve", also="--rounds 1 --requests 2 --clients 2 --new-tokens 2", slow=True),
)
