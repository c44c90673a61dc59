"""Batch inference: the samples of a split to Parquet, each exactly once, on Ray Data actors.

1. plan      the split in manifest order is cut into parts: consecutive samples of one shard, by index arithmetic alone
2. claim     `_SPEC.json` says what the output is of (model, manifest, prompt, budget); another job's is refused
3. answer    actors with the model take parts; a part is one Parquet object, written whole under a name that the plan
             gives it, so a repetition overwrites it and never doubles a row
4. resume    a part that is there and whole is kept; a job that was killed answers only what is missing
5. seal      every part is read again and checked against the plan; `_SUCCESS.json` then lists rows and SHA-256 of each

A sample that cannot be used keeps a row with its reason in `error`, and is counted.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from torch import Tensor

from meteor_model.answering import ROWS_PER_BATCH, Answerer, Budget, Question, RequestError
from meteor_model.chat import IMAGE_PLACEHOLDER, images_in_front
from meteor_model.loading import load_model_and_processor
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.config.workers import Workers
from pipelines.data import shards
from pipelines.data.ray_data import work_items
from pipelines.data.samples import SampleFault, try_sample
from pipelines.data.schema import RawSample, SampleError
from pipelines.inference.output import (
    ANSWERS_SCHEMA,
    SUCCESS_FILE,
    OutputPart,
    OutputSpec,
    PredictError,
    WhichQuestions,
    claim_output,
    plan_parts,
    whole_part,
)
from pipelines.io import storage
from pipelines.io.console import progress, say
from pipelines.io.pulse import Phase, begin_data_task, mark
from pipelines.recovery.watchdog import watch_tasks
from pipelines.registry.folder import model_digest
from pipelines.registry.open import device_for, open_model
from pipelines.registry.versions import PinnedModel


def predict_split(  # noqa: PLR0913 - the settings of a batch prediction, by name
    model: PinnedModel,
    manifest: shards.Manifest,
    split: str,
    output: str,
    budget: Budget,
    workers: Workers,
    *,
    prompt: str = "",
    questions: WhichQuestions = "first",
    part_samples: int = 1024,
    bad_shards: shards.BadShards = "fail",
) -> dict[str, Any]:
    """Answer a split into `output`, or what is missing of it; what `_SUCCESS.json` then says.

    A sample's own question is asked as training has encoded it: all turns before the reply, images where they stand.

    Args:
        model: as for `pipelines.registry.open.open_model`, the same for as long as the output is unfinished.
        manifest: of the samples.
        split: which of its splits.
        output: folder that all nodes share, or s3:// prefix.
        budget: of every question.
        workers: how the cluster is used.
        prompt: asked of every sample, with all its images; empty: the samples' own questions.
        questions: which of their own replies are asked for.
        part_samples: most samples of a part.
        bad_shards: what becomes of a shard that is wrong at rest.

    Raises:
        PredictError: an output that answers something else, or parts that are not what the plan says.
        ShardError, StorageError, ExportError, TrackingError: of what is read and written.
    """
    with open_model(model) as folder:
        digest = model_digest(folder)
        if prompt:
            _check_prompt(prompt, MeteorProcessor.from_pretrained(folder))
    spec = OutputSpec(
        model.address, digest, manifest.url, manifest.sha256, split, prompt, questions, budget.max_new_tokens,
        budget.visual_tokens, part_samples, bad_shards,
    )  # fmt: skip
    infos = manifest.split(split)
    parts = plan_parts(infos, part_samples)
    claim_output(output, spec)
    kept = _whole_parts(output, spec, parts, infos)
    missing = [part for part in parts if part.number not in kept]
    say(f"{len(parts)} parts of {manifest.samples(split)} samples; {len(kept)} are there, {len(missing)} to answer")
    if missing:
        _answer_parts(missing, infos, output, model, spec, budget, workers)
        kept |= _whole_parts(output, spec, missing, infos)
    for part in parts:
        if part.number not in kept:
            raise PredictError(f"{output}: {part.name} is not whole after it was written: start the job again")
    facts = [kept[part.number] for part in parts]
    errors = sum((Counter(one["errors"]) for one in facts), Counter[str]())
    success = {
        "asked": spec.shown(),
        "samples": manifest.samples(split),
        "rows": sum(one["rows"] for one in facts),
        "errors": dict(sorted(errors.items())),
        "parts": facts,
    }
    storage.write_json(storage.join(output, SUCCESS_FILE), success)
    return {**success, "answered_now": len(missing)}


def _check_prompt(prompt: str, processor: MeteorProcessor) -> None:
    """Raise PredictError for a prompt that no sample can be asked."""
    try:
        processor.encode_question(prompt, prompt.count(IMAGE_PLACEHOLDER))
    except ValueError as error:
        raise PredictError(f"prompt: {error}") from None


def _whole_parts(
    output: str, spec: OutputSpec, parts: Sequence[OutputPart], infos: Sequence[shards.ShardInfo]
) -> dict[int, dict[str, Any]]:
    """By number, what `whole_part` says of those that are in storage as they must be."""
    there = set(storage.list_files(output))
    found = {part.number: whole_part(output, part, spec, infos) for part in parts if part.name in there}
    return {number: facts for number, facts in found.items() if facts is not None}


def _answer_parts(
    parts: Sequence[OutputPart],
    infos: Sequence[shards.ShardInfo],
    output: str,
    model: PinnedModel,
    spec: OutputSpec,
    budget: Budget,
    workers: Workers,
) -> None:
    rows = [{"part": asdict(part), "info": asdict(infos[part.shard])} for part in parts]
    with watch_tasks() as mailbox:
        written = work_items(rows, ordered=False).map(
            _PartAnswerer,
            fn_constructor_args=(model, spec, budget, output, workers.gpus, mailbox),
            compute=ray.data.ActorPoolStrategy(size=workers.actors),
            num_cpus=workers.cpus,
            num_gpus=workers.gpus or None,
        )
        for done, row in enumerate(written.iter_rows(), start=1):
            progress(done, len(parts), f"  {done} of {len(parts)} parts, the last {row['name']} of {row['rows']} rows")


def _check_placeholders(prompt: str, num_images: int) -> None:
    """Raise SampleError where a prompt places its images, and a sample has another number of them."""
    placed = prompt.count(IMAGE_PLACEHOLDER)
    if placed not in (0, num_images):
        reason = "placeholder_missing" if placed < num_images else "placeholder_excess"
        raise SampleError(reason, f"{placed} {IMAGE_PLACEHOLDER} in the given prompt but {num_images} images")


class _PartAnswerer:
    """Actor: the model; a part comes in as its place in the plan and goes out as an object in storage."""

    def __init__(
        self, model: PinnedModel, spec: OutputSpec, budget: Budget, output: str, gpus: float, mailbox: str = ""
    ) -> None:
        begin_data_task(mailbox)
        device = device_for(gpus)
        with open_model(model) as folder:
            if model_digest(folder) != spec.model_sha256:
                raise PredictError(f"{model.address} is another one here than where the job was started")
            loaded, processor = load_model_and_processor(folder)
        self._answerer = Answerer(loaded.to(device), processor)
        self._spec, self._budget, self._output = spec, budget, output

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part, info = OutputPart(**row["part"]), shards.ShardInfo(**row["info"])
        mark(Phase.READING, detail=f"{info.path}, part {part.name}")
        samples = shards.fetch_shard(self._spec.manifest, info, bad_shards=self._spec.bad_shards)
        rows: list[dict[str, Any]] = []
        waiting: list[tuple[dict[str, Any], Question]] = []
        for index in range(part.lo, part.hi):
            key, members = samples[index]
            place = {"dataset": self._spec.manifest, "shard": info.path, "index": index, "key": key}
            for answer_row, question in self._ask(place, key, members):
                rows.append(answer_row)
                if question is not None:
                    waiting.append((answer_row, question))
            if len(waiting) >= ROWS_PER_BATCH:
                self._answer(waiting)
        self._answer(waiting)
        schema = ANSWERS_SCHEMA.with_metadata({b"meteor.asked": self._spec.digest.encode()})
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), stream, compression="zstd")
        storage.write_bytes(storage.join(self._output, part.name), stream.getvalue())
        return {"name": part.name, "rows": len(rows)}

    def _ask(
        self, place: dict[str, Any], key: str, members: dict[str, bytes]
    ) -> Iterator[tuple[dict[str, Any], Question | None]]:
        """The rows of one sample: a question each, or one with the reason why there is none."""
        empty = dict.fromkeys(("prompt", "answer", "visual_tokens", "error", "detail"))
        found = try_sample(key, members, self._decoded)
        if isinstance(found, SampleFault):
            yield {**place, **empty, "question": 0, "error": found.reason, "detail": found.detail}, None
            return
        for number, (text, question) in enumerate(self._questions(*found)):
            answer_row = {**place, **empty, "question": number, "prompt": text}
            try:
                self._answerer.require_room([question], self._budget)
            except RequestError as fault:
                yield {**answer_row, "error": "too_long", "detail": str(fault).removeprefix("row 0: ")}, None
                continue
            yield answer_row, question

    def _questions(self, sample: RawSample, images: list[Tensor]) -> list[tuple[str, Question]]:
        """The questions of a sample, each with the turn that is answered, as it is written."""
        processor, given = self._answerer.processor, self._spec.prompt
        if given:
            ((_, text),) = images_in_front(given, len(images))
            return [(str(text), Question.of(given, processor, images))]
        turns = sample.conversation
        questions = [
            (turns[asked.place - 1][1], Question(asked.prompt, images[: asked.num_images]))
            for asked in processor.encode_questions(turns, len(images))
        ]
        return questions[:1] if self._spec.questions == "first" else questions

    def _decoded(self, sample: RawSample) -> tuple[RawSample, list[Tensor]]:
        if self._spec.prompt:
            _check_placeholders(self._spec.prompt, len(sample.images))
        return sample, [self._answerer.processor.load_image(image) for image in sample.images]

    def _answer(self, waiting: list[tuple[dict[str, Any], Question]]) -> None:
        """Fill in the answers of the rows that wait, and let them go."""
        answers = self._answerer.answer([question for _, question in waiting], self._budget)
        for (answer_row, _), answer in zip(waiting, answers, strict=True):
            answer_row.update(answer=answer.text, visual_tokens=answer.visual_tokens)
        waiting.clear()
