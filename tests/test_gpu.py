"""What only an NVIDIA GPU shows: `GPU=1 python -m pytest tests/test_gpu.py`, without a network, in two minutes."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import DECODERS, ROOT, build, make_trainer, watch_dtypes
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.metrics import split_memory
from common.speed import flash_attention, sequence_ends, speed_up

pytestmark = pytest.mark.skipif(os.environ.get("GPU") != "1", reason="GPU=1 is not set")


@pytest.fixture
def flash_calls(monkeypatch):
    """The scales that the flash kernel was called with."""
    calls, kernel = [], torch.ops.aten._flash_attention_forward
    monkeypatch.setattr(
        torch.ops.aten,
        "_flash_attention_forward",
        lambda *args, scale: calls.append(scale) or kernel(*args, scale=scale),
    )
    return calls


def padded_mask(lengths: list[int], width: int, side: str) -> torch.Tensor:
    """(rows, width), True where a row's text is; padding on the "left", the "right" or "both" sides."""
    starts = torch.tensor(
        [{"left": width - length, "right": 0, "both": (width - length) // 2}[side] for length in lengths]
    )
    places = torch.arange(width)
    mask = (places >= starts[:, None]) & (places < (starts + torch.tensor(lengths))[:, None])
    return mask.cuda()


@pytest.mark.parametrize("scaling", [None, 0.35])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_flash_attention_computes_what_plain_attention_does(side, scaling, flash_calls):
    texts = padded_mask([40, 3, 17, 1, 25], 40, side)
    torch.manual_seed(0)
    inputs = torch.randn(3, 5, 4, 40, 32, device="cuda")
    weights = torch.randn(5, 40, 4, 32, device="cuda") * texts[:, :, None, None]  # padding's own output is of no use
    outputs, gradients = [], []
    for flash, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        parts = inputs.to(torch.bfloat16).to(dtype).requires_grad_()
        mask = texts[:, None, None, :]
        if flash:
            mask.sequence_ends = sequence_ends(texts)
            output, _ = flash_attention(nn.Module(), *parts, mask, scaling=scaling)
        else:
            with sdpa_kernel(SDPBackend.MATH):
                output = nn.functional.scaled_dot_product_attention(*parts, mask, scale=scaling).transpose(1, 2)
        (output.float() * weights).sum().backward()
        outputs.append(output.float()[texts])
        gradients.append(parts.grad.float())
    assert flash_calls == [scaling]
    torch.testing.assert_close(*outputs, rtol=0.02, atol=0.02)
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_faster_model_has_the_same_hidden_states(side, architecture, backbones, flash_calls):
    texts = padded_mask([40, 3, 17, 25], 40, side)
    batch = {"input_ids": torch.randint(5, 50, (4, 40), device="cuda") * texts, "attention_mask": texts.long()}
    model, *_ = build("LAST_LAYER", backbones[architecture])
    backbone = model.cuda().eval().base_model
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        before = backbone(**batch).last_hidden_state[texts].float()
        assert not flash_calls
        speed_up(model)
        after = backbone(**batch).last_hidden_state[texts].float()
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)
    assert bool(flash_calls) == (architecture not in DECODERS)


def test_flash_attention_serves_no_model_that_did_not_ask(backbones, flash_calls):
    speed_up(build("PEFT_LORA", backbones["bert"])[0])
    other, *_ = build("PEFT_LORA", backbones["bert"])
    texts = padded_mask([40, 3], 40, "right")
    with torch.autocast("cuda", torch.bfloat16):
        other.cuda()(input_ids=torch.full((2, 40), 7, device="cuda"), attention_mask=texts.long())
    assert not flash_calls


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("name", ["PEFT_LORA", "PEFT_QLORA"])
def test_one_step_in_16_bits(name, architecture, backbones, tokens, tmp_path, flash_calls):
    """Hidden states stay in bf16 from the embeddings on; what is frozen, in bf16 or 4 bits, stays as it is."""
    trainer = make_trainer(name, backbones[architecture], tmp_path, tokens, bf16=True, max_steps=1)
    model = trainer.model
    seen = watch_dtypes(model, "Norm|Embedding|BertLayer$|DecoderLayer$")
    before = {path: weight.detach().clone() for path, weight in model.named_parameters()}
    trainer.train()
    assert len(seen) >= 8 and set(seen.values()) == {torch.bfloat16}, seen
    assert bool(flash_calls) == (architecture == "bert")
    for path, weight in model.named_parameters():
        changed = not torch.equal(weight.view(torch.uint8), before[path].to(weight.device).view(torch.uint8))
        assert changed == weight.requires_grad or "lora_A" in path, path  # its gradient is 0 at first: B is
        if "original_module" not in path:
            assert weight.dtype == (torch.float32 if weight.requires_grad else torch.bfloat16), path
    quantized = [weight for weight in model.parameters() if hasattr(weight, "quant_state")]
    assert bool(quantized) == (name == "PEFT_QLORA")
    assert {(weight.quant_state.quant_type, weight.quant_state.nested) for weight in quantized} <= {("nf4", True)}
    assert {weight.device.type for weight in model.parameters()} == {"cuda"}
    parts = split_memory(model, trainer.optimizer, torch.cuda.max_memory_allocated())
    assert all(size > 0 for size in parts.values())


def run_demo(name: str, folder, *flags: str) -> dict:
    """The record of `--demo` in a process of its own."""
    command = [sys.executable, f"{name}/train.py", "--demo", *flags, "--output_dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "\nDevice:   cuda in bf16" in result.stdout
    return json.loads((folder / "results.json").read_text())


def test_the_demo_does_the_whole_job(tmp_path):
    record = run_demo("PEFT_LORA", tmp_path)
    assert record["environment"]["gpu"] == torch.cuda.get_device_name()
    assert record["summary"]["accuracy_gain"]["mean"] > 0.05
    run = record["runs"][0]
    assert run["epochs"][-1]["train_loss"] < run["epochs"][0]["train_loss"]
    assert sum(run["memory_bytes"].values()) == run["peak_memory_bytes"]
    assert (tmp_path / "seed_0" / "model" / "adapter_model.safetensors").exists()


def test_the_same_seed_gives_the_same_numbers(method, tmp_path):
    flags = ("--demo", "--epochs", "1", "--max_train_samples", "600", "--max_test_samples", "100")
    records = [method.main([*flags, "--output_dir", str(tmp_path / again)])["runs"][0] for again in ("first", "again")]
    for record in records:
        for changing in [name for name in record if re.search("seconds|per_second|memory", name)]:
            record.pop(changing)
        for epoch in record["epochs"]:
            epoch.pop("seconds")
    assert records[0] == records[1]
