"""The exported model: one folder that stands alone, sealed by checksums.

Imports no torch: whoever checks, describes or registers a folder needs none (`pipelines.registry.parity` runs it).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meteor_model.foreign import foreign
from pipelines.checkpoint.state import WEIGHT_FILE_BYTES
from pipelines.io.fingerprint import sha256, sha256_of_file
from pipelines.io.local_disk import writing
from pipelines.registry.tags import TOKENS_TAG

if TYPE_CHECKING:
    from meteor_model.configuration_meteor import MeteorConfig
    from meteor_model.modeling_meteor import MeteorForConditionalGeneration
    from meteor_model.processing_meteor import MeteorProcessor

CHECKSUMS_FILE = "checksums.json"
CARD_FILE = "README.md"


class ExportError(ValueError):
    """A model folder is incomplete, changed, or no METEOR model; the message names the file."""


# ------------------------------------------------------------------------------------------------------------- export


def export_model(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    folder: Path,
    shard_bytes: int = WEIGHT_FILE_BYTES,
) -> Path:
    """Write config, safetensors, processor, README and checksums into `folder`; it appears whole or not at all.

    Args:
        model: in any number format, which its config is given.
        processor: the model's.
        folder: new or empty.
        shard_bytes: most bytes of a weight file.

    Raises:
        ExportError: if the folder exists and holds something.
        LocalDiskError: if the disk has no room for it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} exists and is not empty: export into a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        with writing(folder, weights, "the exported model"):
            model.save_pretrained(scratch, max_shard_size=shard_bytes)
            processor.save_pretrained(scratch)
            (scratch / CARD_FILE).write_text(f"{introduction(model.config)}\n{USE}")
            write_checksums(scratch)
        scratch.chmod(0o755)
        scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def tokens_by_stage(config: MeteorConfig) -> dict[str, str]:
    """Visual tokens of an image by stage, as tags: what each encoder is given and keeps, fusion, decoding's target."""
    tags = {}
    for name, budgets in config.encode_budgets.items():
        kept = " > ".join(str(count) for count in (config.encoder_tokens[name], *budgets))
        tags[f"{TOKENS_TAG}{name}"] = kept
    entering = sum(budgets[-1] for budgets in config.encode_budgets.values())
    tags[f"{TOKENS_TAG}fuse"] = f"{entering} > {config.tokens_per_image}"
    decode = config.pruning.decode
    if decode.acts:
        goal = "adaptive" if decode.target_mean is None else f"{decode.target_mean:g} (mean)"
        tags[f"{TOKENS_TAG}decode"] = f"{config.tokens_per_image} > {goal}"
    return tags


def introduction(config: MeteorConfig) -> str:
    """How a README.md begins: what the model is made of and how many visual tokens each stage keeps."""
    rows = "\n".join(f"| {name} | {kept} |" for name, kept in tokens_by_stage(config).items())
    return (
        "# A METEOR vision-language model\n\n"
        f"{len(config.encoders)} vision encoders ({', '.join(item.name for item in config.encoders)}), one "
        f"{config.text_config.model_type} language model, visual tokens pruned in three stages.\n\n"
        f"| stage | visual tokens of an image |\n|---|---|\n{rows}\n"
    )


USE = """## Use

```python
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor

processor = MeteorProcessor.from_pretrained("FOLDER")
model = MeteorForConditionalGeneration.from_pretrained("FOLDER").eval()
batch = processor("What is this?", "picture.png")
ids = model.generate(**batch, max_new_tokens=32, do_sample=False)
print(processor.decode(ids[0, batch["input_ids"].shape[1] :]))
```
"""


def write_card(folder: Path, card: str) -> None:
    """Give a sealed folder another README.md and seal it again. Raises ExportError where it is not whole before."""
    verify_checksums(folder)
    (folder / CARD_FILE).write_text(card)
    write_checksums(folder)


def write_checksums(folder: Path) -> None:
    """Seal a folder: `checksums.json` with the sha256 of every file."""
    checksums = {name: sha256_of_file(folder / name) for name in _file_names(folder)}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=2, sort_keys=True) + "\n")


def verify_checksums(folder: Path) -> None:
    """Check every file of a sealed folder.

    Raises:
        ExportError: a file that is missing, changed, or not in `checksums.json`; or no such file.
    """
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        raise ExportError(f"{path} is missing: {folder} is no METEOR model folder, or its copy is incomplete")
    with foreign(lambda what: ExportError(f"{path} is damaged: {what}")):
        expected = json.loads(path.read_bytes())
    if not isinstance(expected, dict):
        raise ExportError(f"{path} is damaged: it holds no mapping")
    present = set(_file_names(folder))
    if missing := sorted(set(expected) - present):
        raise ExportError(f"{folder} lacks {', '.join(missing)}: the copy is incomplete; pull or export it again")
    if strange := sorted(present - set(expected)):
        raise ExportError(f"{folder} holds {', '.join(strange)}, which the export did not write: do not use this copy")
    for name in sorted(present):
        if sha256_of_file(folder / name) != expected[name]:
            raise ExportError(f"{folder / name} was changed after the export (other sha256): do not use this copy")


def _file_names(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name != CHECKSUMS_FILE)


def model_digest(folder: Path) -> str:
    """One hash of all that decides a model's answers: every file of its folder but card and checksums.

    Variants of one model differ in it.
    """
    return _digest(folder, [name for name in _file_names(folder) if name != CARD_FILE])


def weights_digest(folder: Path) -> str:
    """One hash of a model folder's safetensors files. Raises ExportError where there is none."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise ExportError(f"{folder} holds no weights: there is no .safetensors file")
    return _digest(folder, names)


def _digest(folder: Path, names: Sequence[str]) -> str:
    return sha256("".join(f"{name} {sha256_of_file(folder / name)}\n" for name in names))
