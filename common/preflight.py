"""The last look before training: what trains, what is frozen, what is quantized; stops where it cannot work."""

import torch
from torch import nn

from common.cli import UserError
from common.files import public_name


def preflight(config, trainer, new: dict[str, str]) -> None:
    """Print what is about to be trained, on what and how. Raises UserError as `check_trainable` does."""
    model, args = trainer.model, trainer.args
    check_trainable(model, new)
    trainable, total = trainer.parameters
    frozen = {weight.dtype for weight in model.parameters() if not weight.requires_grad and weight.is_floating_point()}
    kinds = [str(dtype).removeprefix("torch.") for dtype in frozen]
    kinds += ["4 bits"] * any(hasattr(weight, "quant_state") for weight in model.parameters())
    truncated = trainer.train_dataset["truncated"][:]
    updates = trainer.training_batches(trainer.tensors_of(trainer.train_dataset).lengths).updates
    lines = {
        "Backbone": f"{public_name(config.model)}, revision {config.model_revision or 'as found'}",
        "Trains": f"{trainable:,} of {total:,} parameters ({trainable / total:.2%}) in float32",
        "Frozen": f"all the rest, {total - trainable:,} parameters, in {', '.join(kinds)}",
        "Texts": f"{len(truncated):,} to train on, {sum(truncated) / len(truncated):.1%} of them truncated to "
        f"{config.max_length} tokens; batches of {config.batch_size}: {updates} updates in each of "
        f"{config.epochs} epochs, {updates * config.epochs:,} in all; learning rate {args.learning_rate:.2g}",
        "Device": f"{args.device.type} in {'bf16' if args.bf16 else 'fp16' if args.fp16 else 'fp32'}, "
        f"processes: {args.world_size}, seed: {args.seed}",
    }
    if trainer.is_world_process_zero():
        print(*(f"{title + ':':<10}{text}" for title, text in lines.items()), sep="\n")


def check_trainable(model: nn.Module, new: dict[str, str]) -> None:
    """Raise UserError where a newly initialised weight is frozen or quantized, or one would train in few bits.
    new: names of the newly initialised weights, in the model as loaded, and why they are."""
    # PEFT trains a copy of a saved module: "classifier.weight" is in "...classifier.modules_to_save.default.weight".
    weights = {name.replace("modules_to_save.default.", ""): weight for name, weight in model.named_parameters()}
    weights = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
    if still := [name for name in new if not getattr(weights.get(name), "requires_grad", False)]:
        state = "quantized" if hasattr(weights.get(still[0]), "quant_state") else "frozen"
        cause = f"{still[0]} {new[still[0]]}; {state}, it would stay random, one of {len(still)} that would"
        raise UserError(f"--model {model.config._name_or_path}: {cause}; do config.json and weights belong together?")
    for name, weight in weights.items():
        if weight.requires_grad and weight.dtype != torch.float32:
            raise UserError(f"--model: {name} would train in {weight.dtype}; what trains belongs in float32")
