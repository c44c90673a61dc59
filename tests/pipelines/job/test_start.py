"""A run can start from a stored model: in object storage or a folder, checked byte by byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.recipes import recipe
from pipelines.io import storage
from pipelines.job.start import _pulled, needs_local_files, upload_folder
from pipelines.registry.folder import ExportError, export_model
from tests.meteor_model.builders import model, processor
from tests.pipelines.s3_fixture import BUCKET, S3Server


@pytest.mark.stack
def test_a_stored_model_starts_a_run_under_the_recipe_s_pruning(s3: S3Server, tmp_path: Path) -> None:
    built = model()
    folder = export_model(built, processor(), tmp_path / "model")
    url = f"s3://{BUCKET}/runs/first/export"
    upload_folder(folder, url)
    base = recipe("finetune", "tiny")
    for start in (url, str(folder)):
        wanted = replace(base, model=replace(base.model, start=start))
        pulled, its_processor = _pulled(wanted, start)
        assert pulled.config.pruning == wanted.pruning
        assert its_processor.tokens_per_image == pulled.config.tokens_per_image == 32
        for name, tensor in built.state_dict().items():
            assert torch.equal(pulled.state_dict()[name], tensor)

    other = f"s3://{BUCKET}/runs/tampered/export"
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    upload_folder(folder, other)
    with pytest.raises(ExportError, match=r"config\.json"):
        _pulled(replace(base, model=replace(base.model, start=other)), other)
    assert storage.exists(url)


def test_pretrained_parts_are_files_of_the_drivers_machine() -> None:
    small = recipe("pretrain", "small")
    assert needs_local_files(small)
    assert not needs_local_files(replace(small, model=replace(small.model, start="models:/meteor@latest-pretrain")))
    assert not needs_local_files(recipe("pretrain", "tiny"))
