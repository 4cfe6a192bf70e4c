"""The sweep's variants change what their names say, and its record holds what validation says."""

import json
from pathlib import Path

import pytest
from conftest import import_method, make_trainer
from torch import nn

from common.record import PUBLISHED
from common.study import sweep


@pytest.mark.parametrize(("variant", "active"), [("as published", set()), ("dropout on in frozen parts", {0.1})])
@pytest.mark.parametrize("name", ["NEW_HEAD", "LAST_LAYER"])
def test_dropout_in_the_frozen_blocks_is_active_in_training(name, variant, active, backbones, tokens, tmp_path):
    """Active: the layer gives something else than it gets, in the passes that the head trains on."""
    method, seen = import_method(name), set()
    with sweep.variants(method)[variant]:
        trainer = make_trainer(method, backbones["bert"], tmp_path, tokens, num_train_epochs=1)
    first = trainer.model.base_model.encoder.layer[0]

    def note(part, inputs, output):
        if not output.equal(inputs[0]):
            seen.add(part.p)

    for part in first.modules():
        if isinstance(part, nn.Dropout):
            part.register_forward_hook(note)
    trainer.train()
    assert seen == active


def test_the_record_holds_every_combination(tmp_path, monkeypatch, capsys):
    class Method:
        commands, reviews = (), PUBLISHED[1]

        def main(self, argv):
            self.commands += (argv,)
            Path(argv[-1]).mkdir(parents=True)
            best = {"epoch": 1, "validation_accuracy": 0.8 + 0.1 * len(self.commands), "validation_loss": 0.5}
            runs = [
                {"best_epoch": 1, "epochs": [{"epoch": 0}, best], "train_seconds": 2.0, "peak_memory_bytes": 5},
                {"best_epoch": 0, "epochs": [best | {"epoch": 0}], "train_seconds": 4.0, "peak_memory_bytes": 6},
            ]
            return {
                "runs": runs,
                "model": {"trainable_parameters": 7, "weights_sha256": PUBLISHED[0]},
                "dataset": {"sha256": self.reviews},
                "config": {"demo": False, "max_train_samples": None},
            }

    method = Method()
    monkeypatch.setattr(sweep, "HERE", tmp_path)
    monkeypatch.setattr(sweep, "script", lambda name: method)
    sweep.main(["PEFT_LORA", "--learning_rate=1e-3,2e-3", "--target_modules=a+b", "--", "--seeds", "0", "1"])
    record = json.loads((tmp_path / "PEFT_LORA_sweep_learning_rate_target_modules.json").read_text())
    assert [list(row.values()) for row in record["results"]] == [
        ["1e-3", "a+b", 7, 3.0, 6, pytest.approx(0.9), 0.5, [1, 0]],
        ["2e-3", "a+b", 7, 3.0, 6, pytest.approx(1.0), 0.5, [1, 0]],
    ]
    first, _ = method.commands
    method.reviews = "0" * 64
    sweep.main(["PEFT_LORA", "--epochs=1"])
    assert [*tmp_path.rglob("*_sweep_epochs.json")] == [
        tmp_path / "runs/PEFT_LORA/sweep_epochs/PEFT_LORA_sweep_epochs.json"
    ]
    assert capsys.readouterr().out.endswith("runs/PEFT_LORA/sweep_epochs/PEFT_LORA_sweep_epochs.json\n")
    assert first[:-1] == "--seeds 0 1 --learning_rate 1e-3 --target_modules a b --output_dir".split()
    assert record["command"].startswith("python -m common.study.sweep PEFT_LORA --learning_rate=1e-3,2e-3")
