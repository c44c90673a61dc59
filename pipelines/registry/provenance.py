"""Where a version of a registered model comes from, as its tags: recipe, data, start, and the licences of its parts."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.config.recipe import Recipe
from pipelines.data import shards
from pipelines.registry.card import LICENCE_TAG, licence_tags
from pipelines.registry.versions import find_version
from pipelines.tracking.mlflow_run import TrackingAwayError, TrackingError


def training_tags(recipe: Recipe, manifests: Sequence[shards.Manifest]) -> dict[str, str]:
    """Tags of what a training of this recipe on this data makes.

    Raises:
        TrackingAwayError: where the registry is away that knows the licences of the model it started from.
    """
    tags = {
        "recipe": recipe.name,
        "manifest": manifests[0].url,
        "manifest_sha256": manifests[0].sha256,
        **licence_tags(recipe, manifests, _inherited_licences(recipe)),
    }
    if len(manifests) > 1:
        tags["mixture"] = "; ".join(f"{manifest.url} ({manifest.sha256[:12]})" for manifest in manifests[1:])
    if recipe.model.start is not None:
        tags["start"] = recipe.model.start
    return tags


def _inherited_licences(recipe: Recipe) -> dict[str, str]:
    """Licence tags of the version that a training started from, or one that says that they are not known."""
    start, key = recipe.model.start, f"{LICENCE_TAG}weights"
    if start is None:
        return {}
    unknown = {key: f"not recorded: those of {start}"}
    if not start.startswith("models:"):
        return unknown
    try:
        registry, version = find_version(start, recipe.tracking.uri)
        tags = registry.version(version).tags
    except TrackingAwayError:
        raise
    except TrackingError:  # deleted since
        return unknown
    return {name: text for name, text in tags.items() if name.startswith(LICENCE_TAG)} or unknown
