"""The datasets of a recipe: their manifests, loaded and checked; the drawings are made where they are missing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.config.recipe import Recipe
from pipelines.config.settings import SettingsError
from pipelines.data import shards
from pipelines.data.build import make_shards
from pipelines.data.sources.openmoji import OpenMoji
from pipelines.data.survey import DIGESTS_NAME, digests_from_parquet, report_lines, shared
from pipelines.io import storage
from pipelines.io.console import say
from pipelines.io.fingerprint import sha256_of_json


def ensure_shards(recipe: Recipe) -> tuple[shards.Manifest, ...]:
    """The manifest of `data.manifest`, then those of `data.mixture` by address: the datasets in their order.

    Where the first is empty, that of the drawings, which are made if they are not there.

    Raises:
        ShardError: a prefix without a manifest, or a damaged one.
        ValueError: a split that is missing or empty; a manifest that is given twice.
    """
    url = recipe.data.manifest
    if url:
        manifest = shards.load_manifest(url)
    else:
        source = OpenMoji(recipe.source)
        url = storage.join(recipe.run.storage, "data", f"openmoji-{sha256_of_json(source.spec())[:8]}")
        made = make_shards(source, url, check=False)  # training checks each shard that it reads
        manifest = made.manifest
        say(f"  shards: {url} ({'already there' if made.reused else f'made in {made.seconds:.1f} s'})")
    for split in (recipe.data.train_split, recipe.data.heldout_split):
        if not sum(info.samples for info in manifest.split(split)):
            raise SettingsError(f"{manifest.url} has no sample in the split {split!r}")
    manifests = [manifest]
    for address, _ in recipe.data.others:
        other = shards.load_manifest(address)
        if other.url in [known.url for known in manifests]:
            raise SettingsError(
                f"data.mixture holds {address}, whose manifest is there already; raise its weight instead"
            )
        if not other.samples(recipe.data.train_split):
            raise SettingsError(f"{other.url} has no sample in the split {recipe.data.train_split!r}")
        manifests.append(other)
    for one in manifests:
        for line in report_lines(one.report):
            say(f"  {one.url}: {line}")
    _say_shared_images(recipe, manifests)
    return tuple(manifests)


def _say_shared_images(recipe: Recipe, manifests: Sequence[shards.Manifest]) -> None:
    """Say how many held-out images other datasets of the mixture train on; datasets of before are not known."""
    if len(manifests) == 1:
        return
    heldout, *others = (
        _digests(one, recipe.data.train_split if number else recipe.data.heldout_split)
        for number, one in enumerate(manifests)
    )
    for one, trained in zip(manifests[1:], others, strict=True):
        if heldout is not None and trained is not None and (both := shared(heldout, trained)):
            say(f"  {one.url}: {both:,} of the {len(heldout):,} held-out images are trained on in this dataset")


def _digests(manifest: shards.Manifest, split: str) -> NDArray[np.uint64] | None:
    """Digests of a split's images; None where the dataset was made before they were kept."""
    try:
        data = storage.read_bytes(storage.join(shards.dataset_url(manifest.url), DIGESTS_NAME))
    except storage.ObjectMissingError:
        return None
    return digests_from_parquet(data, split)


def manifest_hashes(manifests: Sequence[shards.Manifest]) -> dict[str, str]:
    """Address -> SHA-256 of each manifest: the identity of the data."""
    return {manifest.url: manifest.sha256 for manifest in manifests}
