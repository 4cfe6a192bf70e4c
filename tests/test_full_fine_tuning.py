"""Full fine-tuning is a script's own flow with every weight trained, and leaves the script's folder alone."""

import json
from functools import partial

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from common import record
from common.cli import parse_config
from common.record import PUBLISHED
from common.study import full_fine_tuning, scripts
from common.study.scripts import record_path


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_every_weight_trains_and_nothing_is_left_beside_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr(scripts, "HERE", tmp_path / "published")
    before = contents(ROOT / "LAST_LAYER")
    flags = "--demo --epochs 1 --max_train_samples 120 --max_test_samples 20 --output_dir".split()
    left = full_fine_tuning.main([*flags, str(tmp_path)])
    assert contents(ROOT / "LAST_LAYER") == before
    assert not (tmp_path / "published").exists()
    assert json.loads((tmp_path / "full_fine_tuning.json").read_text()) == json.loads(json.dumps(left))
    assert left["method"] == "full fine-tuning"
    assert left["command"].startswith("python -m common.study.full_fine_tuning --demo")
    assert left["model"]["trainable_percent"] == 100
    pretrained = load_file(tmp_path / "generated" / "tiny-bert" / "model.safetensors")
    trained = load_file(tmp_path / "seed_0" / "model" / "model.safetensors")
    assert len(trained) == len(pretrained) + 2, "the classifier is new"
    for name, weight in pretrained.items():
        assert trained[f"bert.{name}"].dtype == torch.float32
        assert not torch.equal(trained[f"bert.{name}"], weight), f"{name} did not train"


@pytest.mark.parametrize(
    "flags", [[], ["--max_test_samples", "9"], ["--max_train_samples", "9"], ["--output_dir", "x"]]
)
def test_only_a_full_run_writes_the_published_record(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "weights_sha256", lambda config: PUBLISHED[0])
    monkeypatch.chdir(tmp_path)
    config = parse_config(full_fine_tuning.Config, tmp_path, flags)
    place = ROOT / "common" / "study" / "full_fine_tuning.json"
    path = partial(record_path, "full_fine_tuning", config, folder=tmp_path)
    assert (path(fingerprint=PUBLISHED[1]) == place) == (not flags)
    assert path(fingerprint="0" * 64) != place, "other reviews"
    monkeypatch.setattr(record, "weights_sha256", lambda config: None)
    assert path(fingerprint=PUBLISHED[1]) != place, "another backbone"
