"""What makes training faster changes no result, and no other model in the process."""

from functools import partialmethod

import pytest
import torch
from conftest import ARCHITECTURES, DECODERS, build, make_trainer, set_dropout
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForSequenceClassification

from common.speed import LayerNormOutsideAutocast, flash_attention, mask_of_texts, sequence_ends, speed_up

PLAIN = nn.functional.scaled_dot_product_attention
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
SIDES = {"left": LEFT, "right": LEFT.flip(1), "both": torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0]])}


@pytest.fixture
def flash_calls(monkeypatch) -> list[float]:
    """The dropout of every call of the flash kernel, whose place here, on a CPU, a plain one takes."""
    calls = []

    def one_by_one(query, key, value, ends, ends_of_keys, longest, _, dropout, causal, debug, scale):
        assert torch.equal(ends, ends_of_keys) and ends.dtype == torch.int32 and not causal and not debug
        assert ends[0] == 0 and ends[-1] == len(query) and ends.diff().min() >= 0 and ends.diff().max() <= longest
        calls.append(dropout)
        parts = [part.transpose(0, 1).split(ends.diff().tolist(), dim=1) for part in (query, key, value)]
        outputs = [PLAIN(*sequence, scale=scale) for sequence in zip(*parts, strict=True)]
        return torch.cat(outputs, dim=1).transpose(0, 1), None, None, None, None

    monkeypatch.setattr("common.speed.has_flash", lambda query: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", one_by_one)
    return calls


def run(model: nn.Module, mask: torch.Tensor):
    """The model's output for different tokens wherever there is no padding."""
    tokens = torch.arange(7, 7 + mask.numel()).view(mask.shape)
    with torch.no_grad():
        return model.eval()(input_ids=tokens * mask, attention_mask=mask)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_faster_model_has_the_same_hidden_states(architecture, side, backbones, flash_calls):
    """At every token of the texts; what comes out for padding, no model may use."""
    model, *_ = build("LAST_LAYER", backbones[architecture])
    before = run(model.base_model, SIDES[side]).last_hidden_state
    assert not flash_calls
    speed_up(model)
    after = run(model.base_model, SIDES[side]).last_hidden_state
    torch.testing.assert_close(*(hidden[SIDES[side].bool()] for hidden in (after, before)), rtol=1e-3, atol=1e-4)
    # DeBERTa has an attention of its own; decoders have a causal mask, which is no matter of padding alone.
    assert bool(flash_calls) == (architecture != "deberta-v2" and architecture not in DECODERS)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_other_models_of_the_process_are_untouched(method, architecture, backbones, tokens, tmp_path, flash_calls):
    def load():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(backbones[architecture])

    early = load()
    expected = {side: run(early, mask).logits for side, mask in SIDES.items()}
    make_trainer(method, backbones[architecture], tmp_path, tokens, max_steps=1).train()
    flash_calls.clear()
    for model in (early, load()):  # one from before ours was made, one from after it
        for side, mask in SIDES.items():
            assert torch.equal(run(model, mask).logits, expected[side]), side
    assert not flash_calls


def test_padding_as_a_sequence_trains_the_same(backbones, tokens, tmp_path, request):
    trainer = make_trainer("PEFT_LORA", backbones["bert"], tmp_path, tokens)
    set_dropout(trainer.model, 0.0)
    batch = trainer.tensors_of(tokens["train"]).__getitems__(list(range(16)))
    trainer.model.train()

    def gradients() -> dict[str, torch.Tensor]:
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        return {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.requires_grad}

    masked, dropouts = gradients(), request.getfixturevalue("flash_calls")
    torch.testing.assert_close(gradients(), masked, rtol=1e-3, atol=1e-5)
    assert any(gradient.any() for name, gradient in masked.items() if "layer.0" in name)
    trainer.model.bert.encoder.layer[0].attention.self.dropout.p = 0.25  # the kernel has dropout of its own
    gradients()
    trainer.predict(tokens["test"])
    assert dropouts[2:4] == [0.25, 0.0] and not any(dropouts[4:])


@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("size", "bias", "flash"),
    [(24, None, True), (26, None, False), (24, 1.0, False)],  # the kernel would pad sizes, and takes no bias
)
def test_attention_is_the_plain_one(size, bias, flash, side, scaling, flash_calls):
    mask = SIDES[side].bool()
    rows, width = mask.shape
    parts = torch.randn(3, rows, 4, width, size)
    position_bias = bias and torch.randn(1, 4, width, width)
    marked = mask[:, None, None, :].clone()
    marked.sequence_ends = sequence_ends(SIDES[side])
    output, _ = flash_attention(nn.Module(), *parts, marked, scaling=scaling, position_bias=position_bias)
    plain_mask = marked
    if bias:
        plain_mask = position_bias.masked_fill(~marked, -torch.inf)
    expected = PLAIN(*parts, plain_mask, scale=scaling).transpose(1, 2)
    torch.testing.assert_close(output[mask], expected[mask])
    assert bool(flash_calls) == flash


def test_every_row_is_padding_text_and_padding():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert sequence_ends(mask).tolist() == [0, 1, 3, 4, 4, 8, 8, 8, 8, 12]


def test_a_mask_that_is_not_of_padding_alone_is_transformers_own():
    sizes = {"batch_size": 2, "q_length": 3, "kv_length": 3}

    def causal(batch, head, query, key):
        return key <= query

    mask = mask_of_texts(**sizes, mask_function=causal, attention_mask=None, allow_is_causal_skip=False)
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert not hasattr(mask, "sequence_ends")


def test_a_frozen_layer_norm_in_16_bits_gives_16_bits(monkeypatch):
    norm, seen = nn.LayerNorm(8).bfloat16(), []
    norm.__class__ = LayerNormOutsideAutocast
    layer_norm = nn.functional.layer_norm
    monkeypatch.setattr(  # autocast on a GPU, not that on a CPU, would compute it in fp32
        nn.functional, "layer_norm", lambda *args: seen.append(torch.is_autocast_enabled("cpu")) or layer_norm(*args)
    )
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float32):
            assert norm(torch.randn(2, 8, dtype=dtype)).dtype == torch.bfloat16
    assert seen == [False, False]


def test_layer_norms_that_train_or_are_in_fp32_stay_as_they_are(backbones):
    model = AutoModelForSequenceClassification.from_pretrained(backbones["bert"], dtype=torch.bfloat16)
    model.requires_grad_(False)
    model.bert.encoder.layer[0].float()
    model.bert.encoder.layer[1].requires_grad_(True)
    speed_up(model)
    kinds = [type(part) for part in model.modules() if isinstance(part, nn.LayerNorm)]
    assert kinds == [LayerNormOutsideAutocast] + 4 * [nn.LayerNorm]  # the embeddings' alone


@pytest.mark.parametrize(("name", "architecture"), [("PEFT_LORA", "bert"), ("LAST_LAYER", "llama")])
def test_compiled_blocks_make_few_graphs_and_change_no_result(
    name, architecture, backbones, tokens, tmp_path, monkeypatch
):
    plain_compile, losses = nn.Module.compile, []
    monkeypatch.setattr(nn.Module, "compile", partialmethod(plain_compile, backend="aot_eager"))
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        sizes = {"per_device_train_batch_size": 12, "num_train_epochs": 1}  # 16 is also the size of a head here
        trainer = make_trainer(name, backbones[architecture], tmp_path, tokens, torch_compile=compiled, **sizes)
        set_dropout(trainer.model, 0.0)
        widths = {batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()}
        trainer.train()
        losses.append(trainer.predict(tokens["test"]).metrics["test_loss"])
    assert len(widths) > 5 and counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
