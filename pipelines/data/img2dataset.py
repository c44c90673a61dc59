"""What img2dataset leaves beside its shards: `00000_stats.json` beside `00000.tar`, with what it could not download.

The samples themselves (`KEY.jpg`, `KEY.txt`, `KEY.json`) are read by `pipelines.data.schema`.
"""

from collections.abc import Container

from pipelines.data.tar_format import ShardError
from pipelines.io import storage


def failed_downloads(root: str, path: str, files: Container[str], samples: int) -> dict[str, int]:
    """Samples that img2dataset was asked for and that are not in the shard `path` below `root`, by its reasons.

    Nothing where `files` holds no statistics of it. Raises ShardError where they count other samples than the shard
    holds: a part of it is gone.
    """
    name = f"{path.removesuffix('.tar')}_stats.json"
    if name not in files:
        return {}
    stats = storage.read_json(storage.join(root, name))
    if not isinstance(stats, dict) or not isinstance(stats.get("successes"), int):
        return {}
    if stats["successes"] != samples:
        detail = (
            f"it holds {samples} samples, but img2dataset wrote {stats['successes']}, as {name} says: restore the "
            f"shard, or remove {name} if you took samples out"
        )
        raise ShardError(storage.join(root, path), "wrong_count", detail)
    reasons = ("failed_to_download", "failed_to_resize")
    return {reason: stats[reason] for reason in reasons if isinstance(stats.get(reason), int) and stats[reason] > 0}
