"""Memory by size: random weights in 4 bits where the method wants them, out of memory as a row, the formula."""

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification

from common.study import memory_by_size as study
from common.study import report
from common.study.scripts import script

LABELS = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}, "pad_token_id": 0}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The study of one tiny decoder, in this process; records under a folder of its own."""
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(study, "TINY", {"tiny-llama": study.TINY["tiny-llama"]})
    monkeypatch.setattr(study, "BATCHES", (2, 3))
    monkeypatch.setattr(study, "be_quiet", lambda: None)
    monkeypatch.setattr(study, "alone", lambda work, *args: work(*args))
    return tmp_path / "runs"


def test_the_demo_runs_the_scripts_on_random_weights(small):
    record = study.main(["--demo"])
    assert json.loads((small / "memory_by_size.json").read_text())["rows"] == record["rows"]
    ways = {(row["method"], row["gradient_checkpointing"], row["batch"]) for row in record["rows"]}
    assert len(ways) == len(record["rows"]) == 8 and record["matrix_operations_per_second"] > 0
    for row in record["rows"]:
        assert row["trainable_parameters"] == 2 * 16 * (3 * 64 + 32) + 2 * 64
        assert row["parameters"] == study.parameters_of(study.TINY["tiny-llama"])["parameters"]
        assert sum(row["memory_bytes"].values()) == row["peak_memory_bytes"] > row["formula_bytes"]
        assert row["peak_phase"] in ("loading", "training", "evaluation")
        assert row["matrix_share"] > 0 and row["reviews_per_second"] > 0
    assert Image.open(small / "memory_by_size.png").size[0] > 1000


def test_out_of_memory_is_a_row_and_so_is_what_needs_more(small, monkeypatch):
    tried, train = [], study.train_once

    def limited(row, folder):
        tried.append((row["batch"], row["gradient_checkpointing"]))
        if len(tried) == 2:
            raise torch.OutOfMemoryError
        return train(row, folder)

    monkeypatch.setattr(study, "train_once", limited)
    jobs = [study.job("tiny-llama", "PEFT_LORA", batch, on) for batch in (3, 2) for on in (False, True)]
    rows = study.measure([*jobs, study.job("tiny-llama", "PEFT_LORA", 2, True, optim="adamw_8bit")], 1e12)
    assert tried == [(2, True), (3, True), (2, True)] and len(rows) == 5
    assert [row["peak_memory_bytes"] is not None for row in rows] == [True, False, False, False, True]
    assert all(row["formula_bytes"] for row in rows)


@pytest.mark.parametrize("name", ["PEFT_LORA", "PEFT_QLORA"])
def test_random_weights_are_quantized_in_the_blocks_alone(name, tmp_path, monkeypatch):
    method = script(name)
    monkeypatch.setattr(method, "AutoModelForSequenceClassification", study.RandomWeights)
    study.TINY["tiny-llama"].save_pretrained(tmp_path / "tiny-llama")
    model, new, _ = method.build_model(method.Config(model=str(tmp_path / "tiny-llama"), model_revision=None), LABELS)
    quantized = [key for key, part in model.named_modules() if isinstance(part, Linear4bit)]
    assert len(quantized) == (14 if name == "PEFT_QLORA" else 0) and all(".layers." in key for key in quantized)
    assert list(new) == ["score.weight"] and not any(
        weight.is_meta for weight in [*model.parameters(), *model.buffers()]
    )
    assert model(torch.arange(5, 9)[None]).logits.isfinite().all()


def test_one_failure_loses_no_other_rows(small, monkeypatch):
    plain = study.measure

    def measure(jobs, fastest):
        if jobs[0]["method"] == "PEFT_LORA":
            raise RuntimeError("cuBLAS")
        return plain(jobs, fastest)

    monkeypatch.setattr(study, "measure", measure)
    monkeypatch.setattr(study, "BATCHES", (2,))
    with pytest.raises(RuntimeError, match="cuBLAS"):
        study.main(["--demo"])
    rows = json.loads((small / "memory_by_size.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["PEFT_QLORA", "PEFT_QLORA"] and all(row["commit"] for row in rows)


def test_a_row_that_is_there_is_not_measured_again(small, monkeypatch):
    monkeypatch.setattr(study, "measure", lambda jobs, fastest: pytest.fail("measured again"))
    monkeypatch.setattr(study, "matrix_speed", lambda size: 1.0)
    monkeypatch.setattr(study, "ROOT", small)
    (small / "PEFT_QLORA").mkdir(parents=True)
    known = [study.job("llama-70b", "PEFT_LORA", batch, on) for batch in (2, 3) for on in (False, True)]
    measured = {"parameters": 1, "peak_memory_bytes": 1e9, "reviews_per_second": 1.0}
    rows = [row | dict.fromkeys(study.MEASURED) | measured for row in known]
    (small.parent / "memory_by_size.json").write_text(json.dumps({"rows": rows, "environment": {"gpu": None}}))
    record = study.main(["--backbones", "llama-70b", "--methods", "PEFT_LORA"])
    assert record["rows"] == rows


def test_counted_operations_are_those_of_a_forward_pass_and_of_the_gradients_of_its_inputs():
    config = study.TINY["tiny-bert"]
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.bert.encoder(torch.zeros(1, 32, 64))
    matrices = 2 * 32 * study.parameters_of(config)["parameters_in_blocks"]
    pairs = counter.get_total_flops() - matrices
    assert pairs == config.num_hidden_layers * 4 * 32**2 * 64
    counted = study.counted_operations(config, study.parameters_of(config)["parameters_in_blocks"], 32)
    assert counted == 2 * matrices + 3 * pairs


def test_the_formula_of_a_llama():
    config = study.shape("llama-7.5b")
    sizes = study.parameters_of(config)
    assert sizes == {"parameters": 7_504_932_864, "parameters_in_blocks": 6_979_321_856}
    found = {
        (method, on): study.expected_bytes(config, study.job("llama-7.5b", method, 16, on) | sizes) / 1e9
        for method in study.WITH_LORA
        for on in (False, True)
    }
    weights = found["PEFT_LORA", True] - found["PEFT_QLORA", True]
    assert weights == pytest.approx(6.979321856 * (2 - 4.127 / 8), rel=1e-6)
    assert found["PEFT_LORA", False] - found["PEFT_LORA", True] == pytest.approx(
        16 * 512 * (31 * (14 * 4096 + 4 * 1024 + 6 * 14336) - 32 * 2 * 4096) / 1e9, rel=1e-6
    )


def test_tables(tmp_path):
    sizes = {"parameters": 7_504_932_864, "parameters_in_blocks": 6_979_321_856, "max_length": 512}
    measured = {"peak_memory_bytes": 16.2e9, "formula_bytes": 16.0e9, "reviews_per_second": 12.0}
    rows = [
        study.job("llama-7.5b", "PEFT_LORA", 4, True) | sizes | measured | {"matrix_share": 0.25},
        study.job("llama-7.5b", "PEFT_LORA", 4, False)
        | sizes
        | dict.fromkeys(measured)
        | {"formula_bytes": 99e9, "matrix_share": None},
        study.job("llama-7.5b", "PEFT_LORA", 4, True, optim="adamw_8bit")
        | sizes
        | measured
        | {"peak_memory_bytes": 15e9, "matrix_share": 0.12},
    ]
    (tmp_path / "common" / "study").mkdir(parents=True)
    (tmp_path / "PEFT_QLORA").mkdir()
    environment = {"gpu": "a GPU", "commit": "1234567890ab", "dirty": False}
    record = {"command": "python x", "environment": environment, "rows": rows}
    assert report.memory_by_size(tmp_path, ["cards"]) == report.UNMEASURED
    (tmp_path / "common" / "study" / "memory_by_size.json").write_text(json.dumps(record))
    cards = report.memory_by_size(tmp_path, ["cards"])
    assert "| T4, 16 GB | none | none |" in cards and "| RTX 4090, 24 GB | llama-7.5b | none |" in cards
    table = report.memory_by_size(tmp_path / "PEFT_QLORA", ["sizes", "4"])
    assert "| llama-7.5b | out of memory (99) | 16.2 (16) |  |  |" in table
    assert "| llama-7.5b |  | 12.0 (25%) |  |  |" in table
    assert report.memory_by_size(tmp_path, ["ratio", "4"]).count("\n") == 2, "QLoRA was not measured"
    change = report.memory_by_size(tmp_path, ["optim"])
    assert "| llama-7.5b | PEFT_LORA | 4 | adamw_8bit | 16.2 (16) | 15 (16) | 12.0 (25%) | 12.0 (12%) |" in change
    plain = study.job("bert-base", "PEFT_LORA", 128, False) | sizes | measured | {"matrix_share": None}
    plain |= {"reviews_per_second": 1000.0, "first_epoch_seconds": 1.0}
    compiled = plain | {"torch_compile": True, "reviews_per_second": 1250.0, "first_epoch_seconds": 21.0}
    larger, reusing = ({**row, "batch": 256, "first_epoch_seconds": 1.0} for row in (plain, compiled))
    record["rows"] += [plain, compiled, larger, reusing]
    (tmp_path / "common" / "study" / "memory_by_size.json").write_text(json.dumps(record))
    change = report.memory_by_size(tmp_path, ["torch_compile"])
    assert change.count("| 1,000.0 | 1,250.0 | 20 | 0.1 |") == 2
    change = report.memory_by_size(tmp_path, ["gradient_checkpointing"])
    assert "| llama-7.5b | PEFT_LORA | 4 | on | out of memory (99) | 16.2 (16) |  | 12.0 (25%) |" in change


def test_sentences_on_what_takes_the_memory(tmp_path):
    memory = {"weights": 15e9, "gradients": 3e7, "optimizer": 6e7, "rest": 39.51e9}
    measured = {"trainable_parameters": 7_504_932, "peak_memory_bytes": 54.6e9, "reviews_per_second": 20.0}
    row = study.job("llama-7.5b", "PEFT_LORA", 16, False) | measured | {"memory_bytes": memory}
    row |= {"parameters": 7_504_932_864, "matrix_share": None, "formula_bytes": 1e9}
    checkpointing = row | {"gradient_checkpointing": True, "peak_memory_bytes": 20e9, "memory_bytes": {"rest": 4.2e9}}
    qlora = checkpointing | {"method": "PEFT_QLORA", "peak_memory_bytes": 9e9, "memory_bytes": {"weights": 4.7e9}}
    qlora["reviews_per_second"] = 18.0
    (tmp_path / "common" / "study").mkdir(parents=True)
    record = {"rows": [row, checkpointing, qlora]}
    (tmp_path / "common" / "study" / "memory_by_size.json").write_text(json.dumps(record))
    assert report.memory_by_size(tmp_path, ["why"]) == (
        "For llama-7.5b and 16 texts at a time LoRA trains 0.10% of the parameters. Of its peak of 54.6 GB, gradients "
        "and optimizer are 0.09, the weights 15.0, the rest 39.5. With checkpointing the rest is 4.2. With QLoRA the "
        "weights are 4.7.\n"
    )
    assert "| llama-7.5b | 0.45 | 0.90 |" in report.memory_by_size(tmp_path, ["ratio", "16"])
