"""Tags of registered models and their versions: every name that is written, and what it says. Imports nothing.

docs/registry.md shows the same list, by test. Names that end in a dot are prefixes: the rest names a part, a suite, an
alias. Tags are text; MLflow shows and searches them.
"""

from __future__ import annotations

PARITY_TAG = "parity_max_abs_diff"
PARITY_TOLERANCE_TAG = "parity_tolerance"
PRECISION_TAG = "parity_precision"
LARGEST_LOGIT_TAG = "parity_largest_logit"
WEIGHTS_TAG = "precision"
STEP_TAG = "checkpoint_step"
BASE_TAG = "base"
LICENCE_TAG = "licence."
TOKENS_TAG = "visual_tokens."
SUITE_TAG = "suite"
SUITE_NAME_TAG = "suite_name"
ASKED_TAG = "asked"
ANSWERED_TAG = "answered"
LEFT_OUT_TAG = "left_out"
SCORE_TAG = "score."
COMMIT_TAG = "git_commit"
TRAINING_COMMIT_TAG = "training_commit"
STARTS_TAG = "training_starts"
LIBRARIES_TAG = "training_libraries"
MANIFEST_TAG = "manifest"
SELECTED_TAG = "selected_on"
PROMOTED_TAG = "promoted."
FORCED_TAG = "forced."
ROLLED_BACK_TAG = "rolled_back."
HISTORY_TAG = "alias_history."

DATA_TAGS = (MANIFEST_TAG, "manifest_sha256", "mixture")
TRAINING_TAGS = ("recipe", "run_name", "start", STARTS_TAG, LIBRARIES_TAG)
"""With DATA_TAGS what a variant takes over from its base."""

VERSION_TAGS = {
    "job": "the job that made it: `pretrain` or `finetune`",
    "recipe": "name of the recipe that trained it",
    "run_name": "name of the training run in storage",
    "run_id": "the MLflow run that it is filed under",
    "start": "the version or folder that its training started from, as the alias stood when the run was begun",
    STARTS_TAG: "every start of the training run: when, commit, workers",
    LIBRARIES_TAG: "releases that the training ran on, in order where they changed between starts",
    MANIFEST_TAG: "address of the manifest of its training data",
    "manifest_sha256": "hash of that manifest, which covers the hashes of all shards",
    "mixture": "further manifests of the training, each with the start of its hash",
    COMMIT_TAG: "commit of the code that made it",
    TRAINING_COMMIT_TAG: "commit of the code that trained its weights, where it is a variant",
    STEP_TAG: "optimizer steps of the checkpoint that was exported; versions without it are of the last one",
    "heldout_loss": "held-out loss of that checkpoint",
    PARITY_TAG: "largest difference of a logit between its folder, loaded again, and the model that it was made of",
    PARITY_TOLERANCE_TAG: "the difference that was allowed",
    PRECISION_TAG: "number format that both were compared in, `fp32` or `bf16`; versions without it: fp32",
    LARGEST_LOGIT_TAG: "largest logit of that model, which the difference that is allowed in bf16 is a share of",
    WEIGHTS_TAG: "number format of its weights, `fp32` or `bf16`; versions without it: fp32",
    BASE_TAG: "the version whose weights it has, where it is a variant",
    "sweep": "the search that found it",
    "trial": "the trial of that search",
    SELECTED_TAG: "digests of the suites that a search chose it on",
    LICENCE_TAG: "licence of a part: `licence.code`, `licence.data.NAME`, `licence.weights.PART`",
    TOKENS_TAG: "visual tokens of an image through a stage: `visual_tokens.ENCODER`, `.fuse`, `.decode`",
    SUITE_TAG: "digest of the suite that was scored last; the plain numbers below are of it",
    SUITE_NAME_TAG: "that suite for people",
    ASKED_TAG: "questions of it that were asked",
    ANSWERED_TAG: "of those, how many got an answer with words in it",
    LEFT_OUT_TAG: "what was drawn and not asked, by reason",
    "accuracy": "mean credit of the answers by the suite's scorer: the share of right ones",
    "accuracy_interval": "its 95 % interval: low and high",
    "answer_nll": "negative log-likelihood of the expected answers, nats per token",
    "answer_nll_interval": "its 95 % interval: low and high",
    "kept_per_image": "visual tokens of an image after stage 3, mean over the suite's images",
    "tflops": "TFLOPs of one image and prompt",
    SCORE_TAG: "`score.SUITE`: a score in JSON, with its suite and the artifact that holds its questions; one a suite",
    "calibration": "artifact of the run that holds the last calibration",
    "calibration.images": "images that it measured",
    "calibration.drift": "what it found against other data",
    PROMOTED_TAG: "`promoted.ALIAS`: when, by whom, and on what comparison with the version before",
    FORCED_TAG: "`forced.ALIAS`: when, by whom and why it was promoted although evidence was missing, and which",
    ROLLED_BACK_TAG: "`rolled_back.ALIAS`: when the alias was rolled back from this version, and to which",
}
"""Tags of a version, and what they say."""

MODEL_TAGS = {HISTORY_TAG: "`alias_history.ALIAS`: the versions that the alias pointed to, oldest first"}
"""Tags of the registered model."""


def is_known(name: str) -> bool:
    """Whether a tag of a version is one of those above."""
    return name in VERSION_TAGS or any(name.startswith(prefix) for prefix in VERSION_TAGS if prefix.endswith("."))
