"""Digests that are stored outside this code: literal values, so that none of the forms changes by accident."""

import ast
import hashlib
import json
from pathlib import Path

import numpy as np

from pipelines.config.recipe import Recipe
from pipelines.data.ledger import Ledger
from pipelines.data.mixture import MixturePlan
from pipelines.data.shards import Manifest, ShardInfo
from pipelines.data.sources import fraction_of
from pipelines.data.sources.llava import key_of
from pipelines.evaluation.suite import Suite
from pipelines.io.fingerprint import canonical_json, sha256, sha256_bytes, sha256_of_file, sha256_of_json
from pipelines.job.assemble import training_hash
from pipelines.registry.folder import model_digest, weights_digest

ROOT = Path(__file__).resolve().parents[3]
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, the example "abc"


def test_it_is_sha256_of_utf8_and_canonical_json(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("abc")
    assert sha256("abc") == sha256(b"abc") == sha256_bytes(b"abc").hex() == sha256_of_file(tmp_path / "file") == ABC
    assert canonical_json({"b": 1, "ä": [1.5, None]}) == '{"b":1,"ä":[1.5,null]}'
    assert sha256_of_json({"b": 1, "ä": [1.5, None]}) == sha256('{"b":1,"ä":[1.5,null]}')


def test_stored_digests_stay(tmp_path: Path) -> None:
    shards = (
        ShardInfo("train-000000.tar", "train", 3, 10240, "ab" * 32, {"jpg": 3, "json": 3}),
        ShardInfo("hé.tar", "heldout", 1, 1, "cd" * 32, {}),
    )
    manifest = Manifest("s3://b/m.parquet", shards, {"format": 1, "source": {"name": "ü"}})
    assert manifest.sha256 == "049415d557a5661c4d64a07982a24b81ea56a573e3cfe8e3d25472d463dc7511"
    assert Suite.of(manifest, "heldout", 5).digest == "86d53acd9f47"
    recipe = hashlib.sha256(json.dumps(Recipe().identity(), sort_keys=True).encode()).hexdigest()[:12]  # as in 0.1
    assert Recipe().digest() == recipe
    assert training_hash(Recipe(), [manifest]) == sha256(f'{recipe}["{manifest.sha256}"]')[:12]
    assert fraction_of("cat") == 0.4675211634764018
    assert (key_of("a b/ü"), key_of("ok")) == ("ra_b__-736afe6567bb", "ok")
    plan = MixturePlan([[4], [4], [4], [4]], [1.0] * 4, seed=7, epochs=1, global_batch=1, window_shards=1)
    assert plan.streams[3].seed == 6871276889697263410
    ledger = Ledger([[3, 4], [5]])
    ledger.add_shards(0, 0, np.array([1]))
    assert ledger.to_bytes()[12:44].hex() == "12ed82d3a7700a6148b5cc9b55b6c7643fe014966f5892f780dfa9eaf9fa311f"
    (tmp_path / "a.safetensors").write_text("abc")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "c.json").write_text("{}")
    assert model_digest(tmp_path) == "8289e1fbf6e6dec95cec81e50aba9821b48e824b714c173257e3025af47c32bd"
    assert weights_digest(tmp_path) == "2c7e895b8c16e86b1eccf47c996661af127224b7694d7d08cd705d687b3da742"


def test_nothing_else_hashes() -> None:
    """Every digest of the pipelines is made by one module."""
    found = [
        str(path.relative_to(ROOT))
        for room in ("pipelines", "jobs", "tune", "benchmarks")
        for path in sorted((ROOT / room).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and "hashlib" in [*(alias.name for alias in node.names), getattr(node, "module", "")]
    ]
    assert found == ["pipelines/io/fingerprint.py"]
