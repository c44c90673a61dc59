"""Where a version of a registered model comes from, as its tags: recipe, data, start, and the licences of its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.config.recipe import Recipe
from pipelines.data import shards
from pipelines.parts import PARTS
from pipelines.registry.tags import LICENCE_TAG, MANIFEST_TAG
from pipelines.registry.versions import find_version
from pipelines.tracking.server import TrackingAwayError, TrackingError


def training_tags(
    recipe: Recipe, manifests: Sequence[shards.Manifest], started_from: str | None = None
) -> dict[str, str]:
    """Tags of what a training of this recipe on this data makes.

    Args:
        recipe: of the training.
        manifests: of its data.
        started_from: what `model.start` named when the run was begun: models:/NAME/VERSION or a folder; None where that
            was not kept.

    Raises:
        TrackingAwayError: where the registry is away that knows the licences of the model it started from.
    """
    tags = {
        "recipe": recipe.name,
        MANIFEST_TAG: manifests[0].url,
        "manifest_sha256": manifests[0].sha256,
        **licence_tags(recipe, manifests, _inherited_licences(recipe, started_from)),
    }
    if len(manifests) > 1:
        tags["mixture"] = "; ".join(f"{manifest.url} ({manifest.sha256[:12]})" for manifest in manifests[1:])
    if recipe.model.start is not None:
        tags["start"] = started_from or recipe.model.start
    return tags


def _inherited_licences(recipe: Recipe, started_from: str | None) -> dict[str, str]:
    """Licence tags of the version that a training started from, or one that says that they are not known.

    An alias is not asked: it may point elsewhere by now.
    """
    start, key = started_from or recipe.model.start, f"{LICENCE_TAG}weights"
    if start is None:
        return {}
    unknown = {key: f"not recorded: those of {start}"}
    if not start.startswith("models:") or "@" in start:
        return unknown
    try:
        registry, version = find_version(start, recipe.tracking.uri)
        tags = registry.version(version).tags
    except TrackingAwayError:
        raise
    except TrackingError:  # deleted since
        return unknown
    return {name: text for name, text in tags.items() if name.startswith(LICENCE_TAG)} or unknown


def licence_tags(recipe: Recipe, manifests: Sequence[shards.Manifest], inherited: Mapping[str, str]) -> dict[str, str]:
    """Licences of what a training was made from, as tags: data, pretrained parts, the code.

    Args:
        recipe: of the training.
        manifests: of the data; a manifest names its licence in `spec`.
        inherited: tags of the version that the training started from; empty where it started from parts.
    """
    tags = {key: text for key, text in inherited.items() if key.startswith(LICENCE_TAG)}
    tags[f"{LICENCE_TAG}code"] = "Apache-2.0"
    for manifest in manifests:
        source = manifest.spec.get("source", {})
        name = source.get("name", "unknown")
        tags[f"{LICENCE_TAG}data.{name}"] = source.get("license", f"not recorded in {manifest.url}")
    if recipe.model.start is None:
        for part, source in recipe.model.pretrained().weights.items():
            known = PARTS.get(source.removeprefix("parts:")) if source.startswith("parts:") else None
            tags[f"{LICENCE_TAG}weights.{part}"] = f"{known.licence}: {known.what}" if known else f"that of {source}"
        if not recipe.model.pretrained().weights:
            tags[f"{LICENCE_TAG}weights"] = "Apache-2.0: random weights, trained here"
    return tags
