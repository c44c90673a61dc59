"""The audit itself: an untouched training passes, and every kind of doctored one is found out."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.chaos.audit import (
    AuditError,
    Expectation,
    Line,
    attempts_of,
    audit,
    ledger_violations,
    loss_difference,
    moved_steps,
    read_lines,
    seconds_to_resume,
    violations,
)
from benchmarks.chaos.data import FAULTY, TRAIN_SIZES, ByteProcessor, key_of, keys_in, make_dataset, pack, sample
from pipelines.checkpoint.state import DroppedSample, TrainState
from pipelines.data.ledger import Ledger
from pipelines.data.sample_id import SampleId, SampleIds
from pipelines.data.schema import SampleError, parse_sample
from pipelines.data.tar_format import parse_shard

SHARDS = [["a", "b", "c"], [], ["d", "e", "f", "g"]]
FAULTY_KEYS = {"c"}
EPOCHS, STEPS, WORLD = 2, 4, 2
EXPECTED = Expectation(FAULTY_KEYS, EPOCHS, tolerance=0.0)
GOOD = [key for keys in SHARDS for key in keys if key not in FAULTY_KEYS]


def make_lines(attempt: str = "one", first: int = 1, last: int = STEPS, start: float = 100.0) -> list[Line]:
    """Steps `first` to `last` of a training: three samples a step, the first worker has two of them."""
    order = [(epoch, key) for epoch in range(EPOCHS) for key in GOOD]
    lines = []
    for step in range(first, last + 1):
        mine = order[(step - 1) * 3 : step * 3]
        for rank, samples in enumerate((mine[:2], mine[2:])):
            pid = 10 + rank
            lines.append(Line(attempt, pid, start + step, step, rank, WORLD, 1.0 / step, tuple(samples)))
    return lines


def make_state() -> TrainState:
    faulty = [SampleId(0, epoch, 0, 2, "c") for epoch in range(EPOCHS)]
    drops = tuple(DroppedSample(sample.epoch, sample, "undecodable_image", "") for sample in faulty)
    return TrainState(
        "hash",
        WORLD,
        STEPS,
        step=STEPS,
        samples_seen=EPOCHS * len(GOOD),
        dropped={"undecodable_image": EPOCHS},
        dropped_samples=drops,
    )


LOSSES = tuple(1.0 / step for step in range(1, STEPS + 1))


def make_ledger() -> Ledger:
    ledger = Ledger([[len(keys) for keys in SHARDS]])
    for epoch in range(EPOCHS):
        for shard, keys in enumerate(SHARDS):
            for index, key in enumerate(keys):
                ledger.add(SampleIds.of([SampleId(0, epoch, shard, index)]), dropped=key in FAULTY_KEYS)
    return ledger


REFERENCE = audit(make_lines(), SHARDS, FAULTY_KEYS, EPOCHS, STEPS)


def judge(
    lines: list[Line],
    expected: Expectation = EXPECTED,
    state: TrainState | None = None,
    losses: tuple[float, ...] = LOSSES,
) -> list[str]:
    found = audit(lines, SHARDS, FAULTY_KEYS, EPOCHS, STEPS)
    return violations(found, REFERENCE, state or make_state(), losses, expected)


def test_an_untouched_training_passes() -> None:
    assert judge(make_lines()) == []
    assert (REFERENCE.lost_samples, REFERENCE.replayed, REFERENCE.attempts) == (0, 0, 1)
    assert not any(REFERENCE.repeated.values())
    assert ledger_violations(REFERENCE, make_ledger().to_bytes(), SHARDS, EXPECTED) == []


def test_steps_that_were_rolled_back_count_once() -> None:
    lines = make_lines(last=3) + make_lines("two", first=3, start=200.0)
    assert judge(lines) == []
    assert audit(lines, SHARDS, FAULTY_KEYS, EPOCHS, STEPS).replayed == 1
    assert judge(lines, dataclasses.replace(EXPECTED, replayed=0)) == ["1 steps were replayed instead of 0"]


def test_the_later_attempt_counts_even_when_the_earlier_one_goes_on_writing() -> None:
    late = [dataclasses.replace(line, time=line.time + 500, loss=9.0) for line in make_lines() if line.step == 3]
    lines = [*(line for line in make_lines() if line.step < 3), *late, *make_lines("two", first=3, start=200.0)]
    assert [attempt[0].attempt for attempt in attempts_of(lines)] == ["one", "two"]
    assert judge(lines) == []


def _with_samples(change: Callable[[tuple[tuple[int, str], ...]], tuple[tuple[int, str], ...]]) -> list[Line]:
    """The lines with the samples of step 2 on worker 0 changed."""
    return [
        dataclasses.replace(line, samples=change(line.samples)) if (line.step, line.rank) == (2, 0) else line
        for line in make_lines()
    ]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (_with_samples(lambda samples: samples[1:]), "epoch 0: 1 samples lost: ['e']"),
        (_with_samples(lambda samples: (*samples, samples[0])), "epoch 0: 1 samples repeated: ['e']"),
        (_with_samples(lambda samples: (*samples, (0, "z"))), "samples trained that must not be: [(0, 'z')]"),
        (_with_samples(lambda samples: (*samples, (0, "c"))), "samples trained that must not be: [(0, 'c')]"),
        (_with_samples(lambda samples: (*samples, (2, "a"))), "samples trained that must not be: [(2, 'a')]"),
        (_with_samples(lambda samples: ((1, "e"), samples[1])), "epoch 1: 1 samples repeated: ['e']"),
        (_with_samples(lambda samples: samples[1:]), "steps [2] consumed other samples"),
        ([line for line in make_lines() if line.step != 4], "step 4 was never made"),
        ([line for line in make_lines() if line.step != 2], "which have a gap"),
        ([line for line in make_lines() if (line.step, line.rank) != (3, 1)], "has lines of workers [0] of 2"),
        ([*make_lines(), make_lines()[0]], "has lines of workers [0, 0, 1] of 2"),
        (make_lines(last=2) + make_lines("two", first=4, start=200.0), "step 3 was never made"),
        ([*make_lines(), *make_lines("one", 5, 5)], "step 5 is beyond the last step 4"),
        (
            [dataclasses.replace(line, loss=line.loss + 1e-12) if line.step == 3 else line for line in make_lines()],
            "the losses differ from the undisturbed ones by 1e-12",
        ),
        (
            [dataclasses.replace(line, loss=0.4) if line == make_lines()[3] else line for line in make_lines()],
            "the workers saw different losses",
        ),
        (
            [dataclasses.replace(line, loss=float("nan")) if line.step == 3 else line for line in make_lines()],
            "the losses differ from the undisturbed ones by inf",
        ),
    ],
)
def test_a_doctored_log_fails(lines: list[Line], found: str) -> None:
    assert any(found in wrong for wrong in judge(lines)), judge(lines)


@pytest.mark.parametrize(
    "changes",
    [
        {"samples_seen": 11},
        {"dropped": {}},
        {"dropped_samples": ()},
    ],
)
def test_a_state_that_disagrees_fails(changes: dict[str, object]) -> None:
    assert judge(make_lines(), state=dataclasses.replace(make_state(), **changes)) != []  # type: ignore[arg-type]


@pytest.mark.parametrize("losses", [(1.0, 0.5, 1 / 3, 0.26), (1.0, 0.5, 1 / 3)])
def test_stored_losses_that_disagree_fail(losses: tuple[float, ...]) -> None:
    assert judge(make_lines(), losses=losses) == ["the stored losses are not those that the workers saw"]


def test_other_losses_pass_within_the_stated_tolerance_only() -> None:
    lines = [dataclasses.replace(line, loss=line.loss + 1e-6) for line in make_lines()]
    stored = tuple(loss + 1e-6 for loss in LOSSES)
    assert judge(lines, dataclasses.replace(EXPECTED, tolerance=1e-5), losses=stored) == []
    assert judge(lines, dataclasses.replace(EXPECTED, tolerance=1e-7), losses=stored) != []


def test_the_numbers_of_workers_are_held_against_the_scenario() -> None:
    assert judge(make_lines(), dataclasses.replace(EXPECTED, worlds=(2,))) == []
    assert judge(make_lines(), dataclasses.replace(EXPECTED, worlds=(2, 1))) != []


def test_a_ledger_that_lacks_or_adds_a_sample_fails() -> None:
    missing, dropped = Ledger(make_ledger().sizes), Ledger(make_ledger().sizes)
    for epoch in range(EPOCHS):
        for shard, keys in enumerate(SHARDS):
            for index, key in enumerate(keys):
                if (epoch, key) != (1, "e"):
                    missing.add(SampleIds.of([SampleId(0, epoch, shard, index)]), dropped=key in FAULTY_KEYS)
                dropped.add(SampleIds.of([SampleId(0, epoch, shard, index)]), dropped=key in {"c", "d"})
    assert any("lacks" in wrong for wrong in ledger_violations(REFERENCE, missing.to_bytes(), SHARDS, EXPECTED))
    assert any("as dropped" in wrong for wrong in ledger_violations(REFERENCE, dropped.to_bytes(), SHARDS, EXPECTED))
    fewer = audit(_with_samples(lambda samples: samples[1:]), SHARDS, FAULTY_KEYS, EPOCHS, STEPS)
    wrong = ledger_violations(fewer, make_ledger().to_bytes(), SHARDS, EXPECTED)
    assert any("not consumed" in text for text in wrong)


def test_samples_that_are_given_up_must_be_listed() -> None:
    lines = _with_samples(lambda samples: samples[1:])  # 'e' of epoch 0 is not trained
    lines = [dataclasses.replace(line, samples=tuple(s for s in line.samples if s[1] != "e")) for line in lines]
    expected = dataclasses.replace(EXPECTED, given_up={"e": "shard[1]"})
    given_up = [SampleId(0, epoch, 2, 1, "shard[1]") for epoch in range(EPOCHS)]
    more = tuple(DroppedSample(9 + sample.epoch, sample, "bad_shard", "") for sample in given_up)
    state = make_state()
    listed = dataclasses.replace(
        state,
        samples_seen=state.samples_seen - 2,
        dropped={"undecodable_image": 2, "bad_shard": 2},
        dropped_samples=(*state.dropped_samples, *more),
    )
    assert judge(lines, expected, listed) == []
    unlisted = dataclasses.replace(listed, dropped_samples=state.dropped_samples)
    assert any("lists the dropped samples" in wrong for wrong in judge(lines, expected, unlisted))


def test_seconds_to_resume_are_those_of_the_next_start() -> None:
    lines = make_lines(last=3) + make_lines("two", first=3, start=200.0)
    assert seconds_to_resume(lines, 102.5) == pytest.approx(100.5)  # step 3 of attempt "two", not of "one"
    assert seconds_to_resume(make_lines(), 102.5) == pytest.approx(0.5)
    assert seconds_to_resume(make_lines(), 104.0) is None


def test_differences_are_infinite_where_steps_are_missing() -> None:
    short = audit(make_lines(last=3), SHARDS, FAULTY_KEYS, EPOCHS, STEPS)
    assert loss_difference(short, REFERENCE) == float("inf")
    assert moved_steps(short, REFERENCE) == [4]


def test_a_line_that_is_no_record_is_an_error(tmp_path: Path) -> None:
    line = dataclasses.asdict(make_lines()[0])
    (tmp_path / "log").write_text(json.dumps(line) + "\n")
    assert read_lines(tmp_path / "log") == make_lines()[:1]
    (tmp_path / "log").write_text(json.dumps(line) + "\n" + json.dumps(line)[:40] + "\n")
    with pytest.raises(AuditError, match="line 2"):
        read_lines(tmp_path / "log")


def test_the_data_holds_every_kind_of_sample(tmp_path: Path) -> None:
    """Keys by tarfile are those of the project's reader; exactly the faulty samples cannot be decoded."""
    from meteor_model.images import ImageError, decode_image

    dataset = make_dataset(str(tmp_path / "data"))
    assert [len(keys_in(tar)) for tar in dataset.shards.values()] == [*TRAIN_SIZES, 24]
    kinds, undecodable = set(), set()
    for name, tar in dataset.shards.items():
        contents = parse_shard(tar, name)
        assert [key for key, _ in contents.samples] == keys_in(tar)
        for key, members in contents.samples:
            raw = parse_sample(key, members)
            encoded = ByteProcessor().encode([(turn.role, turn.text) for turn in raw.turns], len(raw.images))
            assert any(label != -100 for label in encoded.labels)
            kinds.add((len(raw.images), len(raw.turns)))
            try:
                for image in raw.images:
                    decode_image(image, 8)
            except (ImageError, SampleError):
                undecodable.add(key)
    assert kinds == {(0, 2), (1, 2), (2, 2), (1, 4)}
    assert undecodable == {key_of(number) for number in FAULTY}


def test_a_key_that_comes_back_is_seen_by_the_tar_reader() -> None:
    assert keys_in(pack([("a", sample(0)), ("b", sample(1)), ("a", sample(2))])) == ["a", "b", "a"]
