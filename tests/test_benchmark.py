"""The two ways that the scripts are measured against are what their names promise."""

import pytest
from transformers import Trainer

from common.study import benchmark
from common.study.scripts import some_reviews


@pytest.fixture(scope="module")
def job(demo):
    return {"model": str(demo[0]), "revision": None, "max_length": 48, "epochs": 1}


@pytest.mark.parametrize(("side", "rows"), [("usual", {16}), ("careful", {128})])
def test_batches(side, rows, job, demo, tmp_path, monkeypatch):
    seen = []

    class Watched(Trainer):
        def training_step(self, model, inputs, *args, **named):
            seen.append(inputs["input_ids"].shape)
            return super().training_step(model, inputs, *args, **named)

    monkeypatch.setattr(benchmark, "Trainer", Watched)
    reviews = some_reviews(str(demo[1]), 256)
    assert min(benchmark.train_stock(job | {"method": "NEW_HEAD", "side": side}, reviews, str(tmp_path))) > 0
    assert {shape[0] for shape in seen} == rows
    assert (min(shape[1] for shape in seen) == job["max_length"]) == (side == "usual"), "padded no more than needed"


@pytest.mark.parametrize(("side", "checkpointing"), [("usual", True), ("careful", False)])
def test_only_the_usual_qlora_checkpoints_activations(side, checkpointing, job):
    model = benchmark.stock_model(job | {"method": "PEFT_QLORA", "side": side}, classes=2)
    assert model.base_model.model.is_gradient_checkpointing == checkpointing


def test_every_method_trains_its_part(job):
    def trained(method):
        model = benchmark.stock_model(job | {"method": method, "side": "careful"}, classes=2)
        return {name.split(".")[1] for name, weight in model.named_parameters() if weight.requires_grad}, model

    names, model = trained("NEW_HEAD")
    assert names == {"pooler", "weight", "bias"}, "the classifier's are called classifier.weight and classifier.bias"
    names, model = trained("LAST_LAYER")
    blocks = {name for name, weight in model.named_parameters() if weight.requires_grad and "encoder" in name}
    assert blocks and all(".layer.1." in name for name in blocks)
