"""What an output of batch inference consists of: its specification, the plan of its parts, and what makes one whole."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from meteor_model.foreign import foreign
from pipelines.data import shards
from pipelines.io import storage
from pipelines.io.fingerprint import sha256, sha256_of_json
from pipelines.io.redact import redact_text

SPEC_FILE, SUCCESS_FILE = "_SPEC.json", "_SUCCESS.json"  # readers of Parquet folders pass over names with "_"
FORMAT = 3
"""3: questions are asked as training has encoded them; 2 asked each user turn alone, its images moved to the front."""
WhichQuestions = Literal["first", "all"]

ANSWERS_SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("shard", pa.string()),
        ("index", pa.int64()),
        ("question", pa.int64()),
        ("key", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("visual_tokens", pa.int64()),
        ("error", pa.string()),
        ("detail", pa.string()),
    ]
)


class PredictError(ValueError):
    """A batch inference that cannot be made as asked; the message says which setting or part, and what to do."""


@dataclass(frozen=True)
class OutputSpec:
    """What the answers depend on; an output holds the answers to one of these.

    Attributes:
        model: folder, s3:// address or models:/NAME/VERSION.
        model_sha256: of its files (`model_folder.model_digest`).
        manifest, manifest_sha256, split: the samples.
        prompt: asked of every sample; empty: the samples' own questions.
        questions: "first" or "all" of a sample's own replies.
        max_new_tokens, visual_tokens: the budget.
        part_samples: most samples of a part.
        bad_shards: "fail" at a shard that is wrong at rest, or "drop" its samples, counted.
    """

    model: str
    model_sha256: str
    manifest: str
    manifest_sha256: str
    split: str
    prompt: str
    questions: WhichQuestions
    max_new_tokens: int
    visual_tokens: int | None
    part_samples: int
    bad_shards: shards.BadShards

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for an output to be gone on with; addresses may change, contents may not."""
        values = {**asdict(self), "format": FORMAT}
        return {name: value for name, value in values.items() if name not in ("model", "manifest")}

    def shown(self) -> dict[str, Any]:
        """What is stored of it: everything, without secrets in the addresses."""
        addresses = {"model": redact_text(self.model), "manifest": redact_text(self.manifest)}
        return {**asdict(self), **addresses, "format": FORMAT}

    @property
    def digest(self) -> str:
        """Of the identity; every part carries it."""
        return sha256_of_json(self.identity)


@dataclass(frozen=True)
class OutputPart:
    """Samples [lo, hi) of one shard, and the name of their Parquet object."""

    number: int
    shard: int
    lo: int
    hi: int

    @property
    def name(self) -> str:
        """By its place in the plan."""
        return f"part-{self.number:06d}.parquet"


def plan_parts(infos: Sequence[shards.ShardInfo], part_samples: int) -> tuple[OutputPart, ...]:
    """Every sample of the split in exactly one part, in manifest order. Raises PredictError."""
    if part_samples < 1:
        raise PredictError(f"part_samples is {part_samples}; it must be at least 1")
    cuts = [
        (shard, lo, min(lo + part_samples, info.samples))
        for shard, info in enumerate(infos)
        for lo in range(0, info.samples, part_samples)
    ]
    return tuple(OutputPart(number, *cut) for number, cut in enumerate(cuts))


def claim_output(output: str, spec: OutputSpec) -> None:
    """Write what the output is of, or compare. Raises PredictError naming what differs, or for files of other kinds."""
    url = storage.join(output, SPEC_FILE)
    if not storage.exists(url):
        foreign = storage.list_files(output)
        if foreign:
            raise PredictError(f"{output} holds files already ({foreign[0]}) and no {SPEC_FILE}: take a new output")
        storage.write_json(url, spec.shown())
    found = storage.read_json(url)
    wanted = spec.identity
    other = [name for name in wanted if not isinstance(found, dict) or found.get(name) != wanted[name]]
    if other:
        was = found.get(other[0]) if isinstance(found, dict) else found
        raise PredictError(
            f"{output} holds answers to something else: {other[0]} was {was!r}, now it is {wanted[other[0]]!r}"
            f"{' (and ' + ', '.join(other[1:]) + ')' if other[1:] else ''}; take a new output"
        )


def whole_part(
    output: str, part: OutputPart, spec: OutputSpec, infos: Sequence[shards.ShardInfo]
) -> dict[str, Any] | None:
    """Rows, errors and SHA-256 of a part in storage; None where it is not the plan's."""
    try:
        data = storage.read_bytes(storage.join(output, part.name))
        with foreign(PredictError):
            table = pq.read_table(io.BytesIO(data))
    except (storage.ObjectMissingError, PredictError):
        return None
    if (table.schema.metadata or {}).get(b"meteor.asked") != spec.digest.encode():
        return None
    if table.schema.names != ANSWERS_SCHEMA.names:
        return None
    places = list(zip(table["index"].to_pylist(), table["question"].to_pylist(), strict=True))
    if set(table["shard"].to_pylist()) != {infos[part.shard].path} or len(set(places)) != len(places):
        return None
    if [index for index, question in places if question == 0] != list(range(part.lo, part.hi)):
        return None
    errors = Counter(reason for reason in table["error"].to_pylist() if reason)
    return {
        "name": part.name,
        "samples": part.hi - part.lo,
        "rows": table.num_rows,
        "errors": dict(sorted(errors.items())),
        "bytes": len(data),
        "sha256": sha256(data),
    }
