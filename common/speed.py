"""Faster training of frozen backbones in 16 bits, with the same results: one call of `speed_up` switches it on.
Measured on one H200 (all-MiniLM-L6-v2, LoRA, batch 128): flash attention for padded batches is worth 1.13 times the
speed and 9% of the memory, LayerNorm in 16 bits 1.06 times the speed and 22% of the memory."""

from functools import partial

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from common.cli import UserError


def speed_up(model: PreTrainedModel, torch_compile: bool = False) -> None:
    """Let encoders' padded batches go through flash attention, and frozen LayerNorms compute in their own type.
    torch_compile: compile every Transformer block too, each in place and for all widths, when it first runs."""
    name = "always_masked" if torch_compile else "sequences_in_a_row"  # its own: other models keep theirs
    AttentionInterface.register(name, flash_attention)
    AttentionMaskInterface.register(name, partial(mask_of_texts, always=torch_compile))
    if model.config._attn_implementation == "sdpa":  # others cannot do without their own
        model.set_attn_implementation(name)
    for part in model.modules():
        if type(part) is nn.LayerNorm and not part.weight.requires_grad and part.weight.dtype != torch.float32:
            part.__class__ = LayerNormOutsideAutocast
    blocks = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]  # of transformers
    model._no_split_modules = sorted({type(block).__name__ for block in blocks})  # FSDP's units: no embeddings
    if torch_compile and not blocks:
        raise UserError(f"--torch_compile: {model.config.model_type} has no blocks that can be told apart")
    for block in blocks if torch_compile else ():
        block.compile(dynamic=True)


class LayerNormOutsideAutocast(nn.LayerNorm):
    """LayerNorm that gives the type of its weights; a GPU's autocast gives fp32: every layer keeps twice as much."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


def mask_of_texts(*args, mask_function=None, attention_mask=None, always=False, **kwargs) -> torch.Tensor | None:
    """transformers' mask for attention; of an encoder's padded batch it knows besides where the texts begin and end.
    transformers' own is for every pair of tokens, and asks the device in every step whether there is any padding.
    attention_mask: (rows, width), each row's text in one piece. always: also without padding, for compiled blocks."""
    if always:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        if attention_mask is None:
            attention_mask = torch.ones(kwargs["batch_size"], kwargs["kv_length"], device=kwargs["device"]).bool()
    if mask_function is not bidirectional_mask_function or attention_mask is None or attention_mask.ndim != 2:
        return sdpa_mask(*args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    mask = attention_mask.bool()[:, None, None, :]
    mask.sequence_ends = sequence_ends(attention_mask)  # once, for all blocks
    return mask


def sequence_ends(attention_mask: torch.Tensor) -> torch.Tensor:
    """Where sequences end if rows stand one after another, each as three: padding, text, padding; any may be empty.
    attention_mask: (rows, width). Returns (1 + 3 * rows,), from 0 to rows * width."""
    rows, width = attention_mask.shape
    starts = torch.arange(0, rows * width, width, device=attention_mask.device)
    first = starts + attention_mask.int().argmax(1)
    ends = torch.stack([first, first + attention_mask.sum(1), starts + width], dim=1)
    return nn.functional.pad(ends.flatten(), (1, 0)).int()


def flash_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """transformers' attention by PyTorch, but padded batches go through flash attention too, where the GPU has it.
    Flash attention takes no mask, so PyTorch would choose a slower kernel. It takes sequences of any length, though,
    and padding can be such a sequence. query, key, value: (rows, heads, width, size)."""
    ends = getattr(attention_mask, "sequence_ends", None)
    rows, heads, width, size = query.shape
    if ends is None or size % 8 or size > 128 or kwargs.get("position_bias") is not None or not has_flash(query):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    query, key, value = (part.transpose(1, 2).reshape(rows * width, heads, size) for part in (query, key, value))
    forward = torch.ops.aten._flash_attention_forward  # what torch.nn.attention.varlen_attn calls, without dropout
    output, *_ = forward(query, key, value, ends, ends, width, width, dropout, False, False, scale=scaling)
    return output.view(rows, width, heads, size), None


def has_flash(query: torch.Tensor) -> bool:  # as GPUs have that compute in bfloat16
    return query.is_cuda and query.dtype == torch.bfloat16 and torch.backends.cuda.is_flash_attention_available()
