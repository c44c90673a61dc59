"""Held-out loss, the proof that the model looks at its images, and the batch for the comparison after export.

The comparison needs the logits of the training model itself: a model that is made from a checkpoint's files, whoever
makes it, cannot prove that the files are right. So the workers compute them at every checkpoint that may be exported:
the last one, on a held-out batch, and those that are validated, on a batch of the step before.

Every worker runs the same number of micro-batches, since under ZeRO-3 every forward is a collective.

Legend: B samples, T tokens, M images of all samples in order, S image size.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from meteor_model.outputs import PruningStats
from meteor_model.replay import GivenTokens
from pipelines.checkpoint.lora import is_adapted, is_adapter, plain_name
from pipelines.checkpoint.parity_file import ParityBatch
from pipelines.checkpoint.weight_sums import COARSER, Precision, WeightSums, weight_sum
from pipelines.compat.deepspeed import own_partition
from pipelines.training.batches import MicroBatch


@torch.no_grad()
def evaluate_heldout(
    engine: Any, batches: Iterator[MicroBatch], precision: Precision, loss_chunk: int | None = None
) -> tuple[dict[str, float], ParityBatch]:
    """Run the held-out micro-batches, at least one and as many on every worker (some may be empty).

    Args:
        engine: the training model's.
        batches: of this worker.
        precision: of its weights.
        loss_chunk: supervised tokens whose logits exist at a time; None: those of all tokens.

    Returns:
        the metrics (`_metrics`) over all workers, the same on every one, and the parity batch: worker 0's first
        micro-batch.
    """
    first = next(batches)
    parity = parity_batch(engine, first, precision)
    engine.eval()
    sums = _sums(engine, chain([first], batches), engine.device, loss_chunk)
    torch.distributed.all_reduce(sums)
    engine.train()
    return _metrics(sums), parity


@torch.no_grad()
def heldout_loss(
    model: nn.Module, batches: Iterable[MicroBatch], device: torch.device, loss_chunk: int | None = None
) -> dict[str, float]:
    """The metrics of `evaluate_heldout`, in one process on a whole model."""
    return _metrics(_sums(model, batches, device, loss_chunk))


def _inputs(batch: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.inputs.items()}


def _sums(model: Any, batches: Iterable[MicroBatch], device: torch.device, loss_chunk: int | None) -> Tensor:
    """What `_metrics` is made of, (8,) float64.

    Loss, loss with shuffled images, supervised tokens, samples with images, those of them that got other ones; samples
    asked, samples left out, samples truncated.
    """
    sums = torch.zeros(8, dtype=torch.float64, device=device)
    for batch in batches:
        inputs = _inputs(batch, device)
        shuffled, changed = shuffle_images(inputs["pixel_values"], batch.num_images)
        summed = partial(model, num_items_in_batch=1.0, loss_chunk=loss_chunk)
        true_loss, other_loss = summed(**inputs).loss, summed(**{**inputs, "pixel_values": shuffled}).loss
        with_images = sum(count > 0 for count in batch.num_images)
        counts = [true_loss.item(), other_loss.item(), batch.supervised, with_images, changed]
        counts += [batch.seen, len(batch.dropped), batch.truncated]
        sums += torch.tensor(counts, dtype=sums.dtype).to(device)
    return sums


def _metrics(sums: Tensor) -> dict[str, float]:
    """The metrics; both losses are means over the supervised tokens.

    For `heldout_loss_shuffled_images`, within each micro-batch every image is replaced (`shuffle_images`);
    `heldout_shuffled_share` is the share of the samples with images that got other ones: the rest has its true images
    in both losses.
    """
    true_sum, other_sum, supervised, with_images, changed, seen, dropped, truncated = sums.tolist()
    return {
        "heldout_loss": true_sum / max(1.0, supervised),
        "heldout_loss_shuffled_images": other_sum / max(1.0, supervised),
        "heldout_shuffled_share": changed / max(1.0, with_images),
        "heldout_loss_samples": seen,
        "heldout_loss_dropped": dropped,
        "heldout_loss_truncated": truncated,
    }


def shuffle_images(pixel_values: Tensor, num_images: Sequence[int]) -> tuple[Tensor, int]:
    """Give every sample the images of another sample of the batch that has as many of them.

    Among the samples with the same number of images (above 0) the images move on by one sample; a sample that is the
    only one with its number keeps its own.

    Args:
        pixel_values: (M, 3, S, S).
        num_images: images of each sample, summing to M.

    Returns:
        (M, 3, S, S), and the number of samples that got other images.
    """
    starts = [sum(num_images[:sample]) for sample in range(len(num_images))]
    source = list(range(len(pixel_values)))
    changed = 0
    for count in sorted(set(num_images) - {0}):
        peers = [sample for sample, images in enumerate(num_images) if images == count]
        if len(peers) < 2:
            continue
        changed += len(peers)
        for sample, giver in zip(peers, peers[-1:] + peers[:-1], strict=True):
            source[starts[sample] : starts[sample] + count] = range(starts[giver], starts[giver] + count)
    return pixel_values[torch.tensor(source, dtype=torch.int64, device=pixel_values.device)], changed


@torch.no_grad()
def parity_batch(engine: Any, batch: MicroBatch, precision: Precision) -> ParityBatch:
    """The inputs of worker 0's `batch`, one sample a row, what the model says to and keeps of them, and what it holds.

    The inputs are sent to all, so that every worker runs the same forward; every worker must call it.
    """
    shared: list[Any] = [{name: tensor.cpu() for name, tensor in batch.one_a_row().items()}]
    torch.distributed.broadcast_object_list(shared, src=0)
    inputs: dict[str, Tensor] = shared[0]
    engine.eval()
    # Without labels: with them stage 3 prunes where pruning.decode.train is set, and the replay runs stages 1 and 2.
    given = {name: tensor.to(engine.device) for name, tensor in inputs.items() if name != "labels"}
    output = engine(**given)
    engine.train()
    stats = output.pruning_stats
    kept = GivenTokens.of(stats) if isinstance(stats, PruningStats) else None
    sums = {rounded_to: _weight_sums(engine, rounded_to) for rounded_to in COARSER[precision]}
    merged = tuple(plain_name(name) for name, _ in engine.module.named_parameters() if is_adapted(name))
    return ParityBatch(inputs, output.logits.cpu().float(), kept, sums, merged)


def _weight_sums(engine: Any, precision: Precision) -> WeightSums:
    """The sums of the whole parameters, of which every worker reads its own partitions; the same on every worker.

    Adapters and the weights that they will be merged into have none: their sum is rounded as no worker rounds it.
    """
    names, parts = [], []
    for name, parameter in engine.module.named_parameters():
        if is_adapter(name) or is_adapted(name):
            continue
        part, start = own_partition(parameter)
        names.append(plain_name(name))
        parts.append(weight_sum(part, precision, start).to(engine.device))
    sums_P = torch.stack(parts)
    torch.distributed.all_reduce(sums_P)  # integers wrap at 2^64, as the sums do
    return dict(zip(names, sums_P.tolist(), strict=True))
