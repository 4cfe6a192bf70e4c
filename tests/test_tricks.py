"""Each trick is really left out where the table says so, and no other; nothing of it stays behind."""

import dataclasses

import pytest
import torch
import transformers
from conftest import import_method
from torch import nn
from transformers import Trainer

from common import speed, trainer
from common.study import scripts, tricks
from common.study.scripts import prepare, some_reviews
from common.study.tricks import (
    ALL,
    CASTS,
    FEEDING,
    FLASH,
    NORM,
    STORED,
    TRICKS,
    UNFILLED,
    measure,
    worth,
)


def left_out(seen: Trainer) -> set[str]:
    """The tricks that this trainer and this process do without, at this moment."""
    without = {
        FEEDING: type(seen).get_train_dataloader is Trainer.get_train_dataloader,
        FLASH: seen.model.config._attn_implementation == "sdpa",
        NORM: speed.LayerNormOutsideAutocast is nn.LayerNorm,
        CASTS: "peft" not in trainer.disable_input_dtype_casting.__module__,
        UNFILLED: torch.utils.deterministic.fill_uninitialized_memory,
        STORED: seen.inputs_of(seen.train_dataset) is seen.tensors_of(seen.train_dataset),
    }
    return {trick for trick, is_so in without.items() if is_so}


@pytest.fixture(scope="module")
def reviews(demo):
    return some_reviews(str(demo[1]), 16)


@pytest.mark.parametrize("trick", [*TRICKS["PEFT_LORA"], STORED, ALL])
def test_one_trick_is_left_out(trick, demo, reviews, monkeypatch, tmp_path):
    method, found = import_method("NEW_HEAD" if trick == STORED else "PEFT_LORA"), []
    flags = ["--model", str(demo[0]), "--max_length", "32", "--epochs", "1", "--output_dir", str(tmp_path)]
    job = prepare(method, reviews, flags)
    preflight = method.preflight

    def look(config, seen, new):
        found.append(left_out(seen))
        preflight(config, seen, new)

    monkeypatch.setattr(method, "preflight", look)
    before = speed.speed_up, method.build_model, trainer.ReviewTrainer, transformers.TrainingArguments
    result = measure(method, trick, job)
    nothing_stored = set() if trick == STORED else {STORED}  # of LoRA never
    assert found == [nothing_stored | {trick} - {ALL}]
    assert result["reviews_per_second"] > 0 and result["peak_memory_bytes"] > 0
    after = speed.speed_up, method.build_model, trainer.ReviewTrainer, transformers.TrainingArguments
    assert after == before
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert job["config"] == dataclasses.replace(job["config"], output_dir=str(tmp_path))


@pytest.mark.parametrize(("published", "flags"), [(True, []), (True, ["--rounds", "1"]), (False, [])])
def test_only_the_published_settings_on_the_published_reviews_write_the_published_record(
    published, flags, demo, reviews, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(scripts, "is_published", lambda config, fingerprint, folder: published)
    for module in (scripts, tricks):
        monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(tricks, "some_reviews", lambda dataset, size: reviews)
    values = {"reviews_per_second": [1.0], "peak_memory_bytes": [1]}
    monkeypatch.setattr(tricks, "compare", lambda name, *given: dict.fromkeys((ALL, *TRICKS[name]), values))
    tricks.main(["--model", str(demo[0]), "--dataset", str(demo[1]), *flags])
    place = tmp_path if published and not flags else tmp_path / "runs" / demo[1].name
    assert [*tmp_path.rglob("tricks.json")] == [place / "tricks.json"]
    assert capsys.readouterr().out.endswith(f"Record:   {place / 'tricks.json'}\n")


def test_what_a_trick_is_worth_is_taken_within_a_round():
    found = {
        ALL: {"reviews_per_second": [100, 50, 200], "peak_memory_bytes": [2, 2, 2]},
        FLASH: {"reviews_per_second": [50, 50, 50], "peak_memory_bytes": [4, 4, 4]},
    }
    assert worth(found, FLASH) == {"speed": 2, "min": 1, "max": 4, "memory": 0.5}
