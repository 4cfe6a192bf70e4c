"""The main job on real reviews with the real backbone, small: where MODEL_DIR and IMDB_DIR name them."""

import os

import pytest

from common.data import load_reviews

TRAINABLE = {"NEW_HEAD": 148_610, "LAST_LAYER": 1_923_074, "PEFT_LORA": 296_066, "PEFT_QLORA": 296_066}
pytestmark = pytest.mark.skipif(
    "MODEL_DIR" not in os.environ or "IMDB_DIR" not in os.environ, reason="MODEL_DIR and IMDB_DIR are not set"
)
LOADED = []  # 50,000 reviews take longer to read than a few hundred to train on


def load_once(config, seed):
    if not LOADED:
        LOADED.append(load_reviews(config, seed))
    return LOADED[0]


def test_every_method_learns_from_a_few_real_reviews(method, tmp_path, monkeypatch):
    monkeypatch.setattr(method, "load_reviews", load_once)
    flags = ["--model", os.environ["MODEL_DIR"], "--dataset", os.environ["IMDB_DIR"], "--output_dir", str(tmp_path)]
    flags += ["--max_train_samples", "240", "--max_test_samples", "40", "--max_length", "32"]
    record = method.main([*flags, "--batch_size", "16", "--epochs", "1", "--seeds", "0", "--learning_rate", "2e-3"])
    assert record["model"]["trainable_parameters"] == TRAINABLE[method.FOLDER.name]
    assert record["dataset"]["sha256"] == "6926d9298a1154bb239b57fdec17e037b09d709a3e58a9385bd9a72f333a0f0d"
    assert record["model"]["weights_sha256"] == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    before, after = record["runs"][0]["epochs"]
    assert after["train_loss"] < before["train_loss"]
