"""One test per entry of meteor_model/compat.py, and the example of docs/model.md as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from meteor_model.compat import CACHE, CACHE_NAMES, cache_of
from tests import versions
from tests.meteor_model.builders import DENSE, PRUNED, decided, model, pixels, processor

REPOSITORY = Path(__file__).parents[2]


def prompts() -> Any:
    """Two prompts of unequal length with an image each."""
    return processor(PRUNED)(text=["Name it.", "What colour is the background?"], images=[[i] for i in pixels(2)])


def test_the_library_passes_its_cache_by_this_name() -> None:
    """From transformers 5.24 on the old name warns at every call; an unknown name would be ignored or refused."""
    built = model(DENSE)
    cache = DynamicCache(config=built.config.text_config)
    embeds_BTC = torch.zeros(1, 3, built.config.text_config.hidden_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = built.language_model(inputs_embeds=embeds_BTC, use_cache=True, **{CACHE: cache})
        create_causal_mask(
            config=built.config.text_config,
            inputs_embeds=embeds_BTC,
            attention_mask=None,
            position_ids=None,
            **{CACHE: cache},
        )
    assert cache_of(output) is cache
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_the_model_takes_a_cache_by_either_name(name: str) -> None:
    built, inputs = model(PRUNED), prompts()
    mine = built.new_cache()
    output = built(**inputs, **{name: mine})
    assert cache_of(output) is mine
    assert output[CACHE] is mine
    assert decided(mine).kept_counts_B.shape == (2,)
    mine = built.new_cache()
    ids = built.generate(**inputs, **{name: mine}, max_new_tokens=2, do_sample=False)
    assert decided(mine).kept_counts_B.shape == (2,), "and in generate"
    assert torch.equal(ids, built.generate(**inputs, max_new_tokens=2, do_sample=False))


def test_a_cache_given_twice_is_refused() -> None:
    built, inputs = model(PRUNED), prompts()
    twice = {name: built.new_cache() for name in CACHE_NAMES}
    for call in (built, built.generate):
        with pytest.raises(ValueError, match="given twice, as past_key_values and as cache"):
            call(**inputs, **twice)


@torch.no_grad()
def test_nothing_of_the_model_uses_a_deprecated_name(caplog: pytest.LogCaptureFixture) -> None:
    built, inputs = model(PRUNED), prompts()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = built(**inputs, labels=inputs["input_ids"]).loss
        built.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2)
    assert torch.isfinite(loss)
    assert "deprecated" not in caplog.text


def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "model.md").read_text()
    found = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert found is not None, "docs/model.md shows how the model is used alone"
    (tmp_path / "example.py").write_text(found.group(1))
    model(PRUNED).save_pretrained(tmp_path / "pulled")
    processor(PRUNED).save_pretrained(tmp_path / "pulled")
    Image.new("RGB", (80, 60), "red").save(tmp_path / "photo.jpg")
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "example.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr


def test_the_table_of_versions_has_both_ends_of_what_is_declared() -> None:
    table = versions.rows()
    for library, (packages, _) in versions.LIBRARIES.items():
        assert {f"{library}-lowest", f"{library}-newest"} <= table.keys()
        assert table[f"{library}-lowest"].pins == tuple(f"{name}=={versions.declared()[name]}" for name in packages)
    assert {"locked", "newest"} <= table.keys()


def test_a_row_moves_its_library_and_holds_the_rest() -> None:
    locked = versions.constraints(versions.Row("locked")).splitlines()
    lowest = versions.constraints(versions.rows()["transformers-lowest"]).splitlines()
    moved = {line.split("==")[0] for line in set(locked) - set(lowest)}
    assert {"transformers", "huggingface_hub"} <= moved
    assert "torch" not in moved
    assert versions.constraints(versions.rows()["newest"]) == ""


def test_other_libraries_of_a_row_stay_locked() -> None:
    text = versions.constraints(versions.rows()["torch-newest"])
    assert not re.search(r"^(torch|torchvision|triton|nvidia-\S+)==", text, flags=re.MULTILINE)
    assert re.search(r"^transformers==", text, flags=re.MULTILINE)
