"""A pretrained classifier: its tokenizer, its precision, its head; and the last look at it before training."""

import json
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import has_file

from common.cli import UserError, public_name
from common.data import OFFLINE, check_hub


def load_tokenizer(name: str, revision: str | None, max_length: int) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer, with a padding token. It truncates long texts at the start.
    Raises UserError where the backbone cannot be found or used, or takes fewer than `max_length` tokens."""
    folder = Path(name) if Path(name).is_dir() else None
    if not folder:
        check_hub(name, revision, "model")
    file, index = "config, tokenizer or index", "model.safetensors.index.json"
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        weights = [file for file in ("model.safetensors", index) if has_file(name, file, revision=revision)][:1]
        if folder and weights == [index]:
            weights = sorted({*json.loads((folder / index).read_bytes())["weight_map"].values()})
        for file in weights if folder else ():
            safe_open(folder / file, framework="pt")
    except Exception as error:  # of whatever kind: also half a download, or a Git LFS pointer in its place
        why = OFFLINE if not folder and isinstance(error, OSError) else f"bad {file}: {' '.join(str(error).split())}"
        raise UserError(f"--model {name}: {why}") from error
    other = config.is_encoder_decoder or config.model_type == "xlnet"  # which reads a longer neighbour's padding
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or other:
        missing = f"{config.model_type} has no classifier that reads a text's first token or its last"
        raise UserError(f"--model {name}: {missing}; needs an encoder or a decoder that has one")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes up where there are no files
        raise UserError(f"--model {name}: has no tokenizer files; its tokenizer would know no word")
    if not weights:
        convert = f"from transformers import pipeline as p; p('feature-extraction', {name!r}).save_pretrained('new')"
        raise UserError(f'--model {name}: has no model.safetensors; python -c "{convert}" converts pytorch_model.bin')
    if len(tokenizer) > (known := getattr(config.get_text_config(), "vocab_size", len(tokenizer))):
        raise UserError(f"--model {name}: its tokenizer has {len(tokenizer)} tokens, its embeddings are of {known}")
    positions = getattr(config, "max_position_embeddings", -1)  # none: any number
    longest = min(tokenizer.model_max_length, positions if positions > 0 else max_length)
    shortest = tokenizer.num_special_tokens_to_add() + 1
    if not shortest <= max_length <= longest:
        raise UserError(f"--max_length {max_length}: {name} takes {shortest} to {longest} tokens")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # decoders have none; the mask tells them apart
    tokenizer.truncation_side = "left"  # reviews come to their verdict at the end
    tokenizer.model_max_length = max_length  # saved with the model: whoever uses it truncates as in training
    return tokenizer


def label_config(classes: list[str], tokenizer: PreTrainedTokenizerBase) -> dict:
    """Keyword arguments that give `from_pretrained` its labels' names, and the padding token a decoder pools by."""
    numbers = {name: number for number, name in enumerate(classes)}
    return {"id2label": dict(enumerate(classes)), "label2id": numbers, "pad_token_id": tokenizer.pad_token_id}


def compute_dtype() -> torch.dtype:
    """bfloat16 where the GPU computes in it, else float16 on a GPU, else float32."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def weights_place() -> dict | None:
    """`device_map`: this process's device; None, the host's memory, where FSDP spreads all but 4-bit weights."""
    return None if parse_flag_from_env("ACCELERATE_USE_FSDP") else {"": PartialState().device}


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules that turn the last hidden states into logits, in order: the backbone's pooler, where it has
    one, and what has weights outside the backbone. Works on the meta device."""
    prefix = model.base_model_prefix
    parts = {f"{prefix}.pooler": getattr(model.base_model, "pooler", None), **dict(model.named_children())}
    return [name for name, part in parts.items() if part and name != prefix and any(True for _ in part.parameters())]


def checkpoint_blocks(model: nn.Module) -> None:
    """Gradient checkpointing. Raises UserError for an architecture that has none."""
    if not model.supports_gradient_checkpointing:
        raise UserError(f"--gradient_checkpointing: {model.config.model_type} cannot")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # which only the reentrant kind needs


def switch_off_dropout(module: nn.Module, except_in: nn.Module | None = None) -> None:
    """Make frozen parts give the same output in training as in evaluation: Trainer puts all in training mode."""
    for part in set(module.modules()).difference(except_in.modules() if except_in is not None else ()):
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(getattr(part, "attention_dropout", None), float):  # decoders' attention has it as a number
            part.attention_dropout = 0.0


def missing_weights(loading: dict) -> dict[str, str]:
    """Names of the newly initialised weights and why they are, from what `from_pretrained` says of the load."""
    sizes = {name: f"is {[*saved]} there, not {[*needed]}" for name, saved, needed in loading["mismatched_keys"]}
    return dict.fromkeys(sorted(loading["missing_keys"]), "is not in its weights") | sizes


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights that train, by name."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def load_trainable_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put the weights of `trainable_state` back, also into a model that FSDP has spread over processes."""
    for part in model.modules():
        if hasattr(part, "reshard"):  # FSDP's
            part.reshard()  # after a forward pass the outermost one still holds its weights whole
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters as deployed: no frozen copies of PEFT's; 4-bit weights as those they stand for."""
    weights = [weight for name, weight in model.named_parameters() if "original_module." not in name]
    counts = [(getattr(weight, "quant_state", None) or weight).shape.numel() for weight in weights]
    trainable = sum(count for count, weight in zip(counts, weights, strict=True) if weight.requires_grad)
    return trainable, sum(counts)


def preflight(config, trainer, new: dict[str, str]) -> None:
    """Print what is about to be trained, on what and how. Raises UserError as `check_trainable` does."""
    check_trainable(trainer.model, new)
    args, (trainable, total) = trainer.args, trainer.parameters
    frozen = [weight for weight in trainer.model.parameters() if not weight.requires_grad]
    kinds = {"4 bits" if hasattr(weight, "quant_state") else str(weight.dtype)[len("torch.") :] for weight in frozen}
    truncated = trainer.train_dataset["truncated"][:]
    updates = trainer.training_batches(trainer.tensors_of(trainer.train_dataset).lengths).updates
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    PartialState().print(
        f"Backbone: {public_name(config.model)}, revision {config.model_revision or 'as found'}\n"
        f"Trains:   {trainable:,} of {total:,} parameters ({trainable / total:.2%}) in float32\n"
        f"Frozen:   all the rest, {total - trainable:,} parameters, in {', '.join(sorted(kinds))}\n"
        f"Texts:    {len(truncated):,} to train on, {sum(truncated) / len(truncated):.1%} of them truncated to "
        f"{config.max_length} tokens; batches of {config.batch_size}: {updates} updates in each of {config.epochs} "
        f"epochs, {updates * config.epochs:,} in all; learning rate {args.learning_rate:.2g}\n"
        f"Device:   {args.device.type} in {precision}, processes: {args.world_size}, seed: {args.seed}"
    )


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
