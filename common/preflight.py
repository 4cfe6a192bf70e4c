"""The last look before training: what trains, what is frozen, what is quantized; stops where it cannot work."""

import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers import Trainer

from common.cli import UserError
from common.files import public_name
from common.model import count_parameters


def preflight(config, trainer: Trainer, new: list[str]) -> None:
    """Print what is about to be trained, on what and how. Raises UserError as `check_trainable` does."""
    model, args = trainer.model, trainer.args
    check_trainable(model, new)
    trainable, total = count_parameters(model)
    # PEFT's own wrappers say nothing, and one line stands for a part of every block.
    names = [re.sub(r"^base_model\.model\.|\.modules_to_save", "", name) for name in trained_parts(model)]
    parts = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names) if len(names) > 8 else names
    frozen = {
        str(weight.dtype)[6:]
        for weight in model.parameters()
        if not weight.requires_grad and weight.is_floating_point()
    }
    quantized = sum(hasattr(weight, "quant_state") for weight in model.parameters())
    truncated = trainer.train_dataset["truncated"][:]
    share = f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.2f}%)"
    lines = {
        "Backbone": f"{public_name(config.model)}, revision {config.model_revision or 'as found'}",
        "Trains": f"{', '.join(parts)}: {share} in float32",
        "Frozen": f"all the rest, {total - trainable:,} parameters in {', '.join(sorted(frozen)) or 'no type'}",
        "Quantized": f"{quantized} matrices, to 4 bits" if quantized else "nothing",
        "Reviews": f"{len(truncated):,} to train on, {100 * sum(truncated) / len(truncated):.1f}% of them truncated to "
        f"{config.max_length} tokens; {trainer.padding_percent():.1f}% of the tokens are padding",
        "Device": f"{args.device.type} in {'bf16' if args.bf16 else 'fp16' if args.fp16 else 'fp32'}, "
        f"processes: {args.world_size}, seed: {args.seed}",
    }
    if quantized and args.device.type == "cpu":
        lines["Warning"] = "4-bit weights are slow on a CPU: good for trying out, no more"
    if trainer.is_world_process_zero():
        print(*(f"{title + ':':<11}{text}" for title, text in lines.items()), sep="\n")


def trained_parts(module: nn.Module, name: str = "") -> Iterator[str]:
    """Names of the largest modules in which every weight trains."""
    weights = list(module.parameters())
    if weights and all(weight.requires_grad for weight in weights):
        yield name
        return
    for child_name, child in module.named_children():
        yield from trained_parts(child, f"{name}.{child_name}".lstrip("."))


def check_trainable(model: nn.Module, new: list[str]) -> None:
    """Raise UserError where a newly initialised weight is frozen or quantized, or one would train in few bits.

    new: names of the newly initialised weights, in the model as loaded.
    """
    # PEFT trains a copy of a saved module: "classifier.weight" is in "...classifier.modules_to_save.default.weight".
    weights = {
        name.replace("modules_to_save.default.", "").removeprefix("base_model.model."): weight
        for name, weight in model.named_parameters()
    }
    for name in new:
        weight = weights.get(name)
        if hasattr(weight, "quant_state"):
            raise UserError(f"--model: {name} is newly initialised and was quantized; it could not train")
        if weight is None or not weight.requires_grad:
            raise UserError(f"--model: {name} is newly initialised, but would not train")
    for name, weight in weights.items():
        if weight.requires_grad and weight.dtype != torch.float32:
            raise UserError(f"--model: {name} would train in {weight.dtype}; what trains belongs in float32")
