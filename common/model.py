"""The parts of a pretrained classifier, found by its structure: head, blocks, projections; and its precision."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from common.cli import UserError
from common.hub import OFFLINE, check_hub


def load_tokenizer(name: str, revision: str | None, max_length: int) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer, with a padding token. It truncates long texts at the start.

    Raises UserError where the backbone cannot be found or used, or takes fewer than `max_length` tokens.
    """
    local = Path(name).is_dir()
    if not local:
        check_hub(name, revision, "model")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: {str(error).splitlines()[0] if local else OFFLINE}") from error
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or config.is_encoder_decoder:
        raise UserError(
            f"--model {name}: {config.model_type} has no classifier; needs an encoder or a decoder that "
            "AutoModelForSequenceClassification loads"
        )
    if getattr(config, "summary_type", None) == "last":  # of XLNet
        raise UserError(
            f"--model {name}: {config.model_type}'s classifier reads the last position, padding where a batch has a "
            "longer review; needs one that reads the first token or the last of the text"
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes up where there are no files
        raise UserError(f"--model {name}: has no tokenizer files; its tokenizer would know no word")
    weights = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    if local and not any((Path(name) / file).exists() for file in weights):
        raise UserError(f"--model {name}: has no weights, {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}")
    for file in Path(name).glob("*.safetensors"):  # half a download, or a Git LFS pointer in its place
        try:
            safe_open(file, framework="pt")
        except SafetensorError as error:
            raise UserError(f"--model {name}: {file.name} is damaged ({error}); download it again") from error
    positions = getattr(config, "max_position_embeddings", -1)  # none: any number
    longest = min(tokenizer.model_max_length, positions if positions > 0 else max_length)
    shortest = tokenizer.num_special_tokens_to_add() + 1
    if not shortest <= max_length <= longest:
        raise UserError(f"--max_length {max_length}: {name} takes {shortest} to {longest} tokens")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # decoders come without one; the mask tells them apart
    tokenizer.truncation_side = "left"  # reviews come to their verdict at the end
    tokenizer.model_max_length = max_length  # saved with the model: whoever uses it truncates as in training
    return tokenizer


def label_config(classes: list[str], tokenizer: PreTrainedTokenizerBase) -> dict:
    """Keyword arguments that give `from_pretrained` its labels' names, and the padding token a decoder pools by."""
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
        "pad_token_id": tokenizer.pad_token_id,
    }


def compute_dtype() -> torch.dtype:
    """bfloat16 where the GPU computes in it, else float16 on a GPU, else float32."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def transformer_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the backbone's Transformer blocks, first to last: as many as its config has hidden layers, and
    in them nearly all of its weights but the embeddings.

    Raises UserError where the architecture has no such list (ALBERT shares one block, XLM has a list for every part).
    """

    def size(module: nn.Module) -> int:
        parts = [part for part in module.modules() if not isinstance(part, nn.Embedding)]
        return sum(weight.numel() for part in parts for weight in part.parameters(recurse=False) if weight.ndim > 1)

    depth = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == depth
            and 4 * size(module) >= 3 * size(model.base_model)
        ):
            return name, module
    raise UserError(
        f"--model {model.config._name_or_path}: no list of {depth} Transformer blocks was found in "
        f"{type(model).__name__}; needs an architecture that keeps its blocks apart"
    )


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that turn the last hidden states into logits, in order.

    They are the parts with weights outside the backbone, and before them the backbone's pooler, where it has one:
    the part with a linear layer that comes after the blocks. Works on the meta device.
    Raises UserError where there is no head.
    """

    def contains(module: nn.Module, kind: type[nn.Module]) -> bool:
        return any(isinstance(part, kind) for part in module.modules())

    prefix = model.base_model_prefix
    parts = list(getattr(model, prefix, nn.Module()).named_children())
    stacks = [index for index, (_, part) in enumerate(parts) if contains(part, nn.ModuleList)]
    after = parts[stacks[0] + 1 :] if stacks else []
    poolers = [f"{prefix}.{name}" for name, part in after if contains(part, nn.Linear)]
    outside = [
        name for name, part in model.named_children() if name != prefix and any(True for _ in part.parameters())
    ]
    if not stacks or not outside:
        lacks = "classification head was" if stacks else "Transformer blocks were"
        raise UserError(f"--model {model.config._name_or_path}: no {lacks} found in {type(model).__name__}")
    return poolers + outside


def attention_projections(model: PreTrainedModel) -> list[str]:
    """Names that the query and value projections end in: from PEFT's own mapping of architectures, or for one that it
    lacks (DistilBERT, for example) the linear layers of every block whose names begin with q and v.

    Raises UserError where neither finds them.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    if model.config.model_type in KNOWN:
        return list(KNOWN[model.config.model_type])
    _, blocks = transformer_blocks(model)
    linear = [name.split(".")[-1] for name, part in blocks[0].named_modules() if isinstance(part, nn.Linear)]
    names = sorted(name for name in linear if re.fullmatch(r"(q|query|v|value)(_\w+)?", name))
    if [name[0] for name in names] != ["q", "v"]:
        raise UserError(
            f"--model {model.config._name_or_path}: no query and value projections were found in "
            f"{type(model).__name__}; PEFT knows those of {', '.join(sorted(KNOWN))}"
        )
    return names


def switch_off_dropout(module: nn.Module, except_in: nn.Module | None = None) -> None:
    """Make frozen parts give the same output in training as in evaluation: Trainer puts all in training mode."""
    kept = set(except_in.modules()) if except_in is not None else set()
    for part in set(module.modules()) - kept:
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(getattr(part, "attention_dropout", None), float):  # decoders' attention has it as a number
            part.attention_dropout = 0.0


def head_token(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Place of the one token whose last hidden state the head reads, (rows,): of decoders the last token that is not
    padding, of encoders the first. input_ids: (rows, width), right-padded."""
    if not hasattr(model, "score"):  # transformers' name for the head of every decoder
        return torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (places * (input_ids != model.config.pad_token_id)).argmax(dim=1)


def missing_weights(loading: dict) -> list[str]:
    """Names of the newly initialised weights, from what `from_pretrained` says of the load."""
    return [*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])]


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights that train, by name."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters as deployed: PEFT's frozen originals of saved modules do not count, and 4-bit
    weights count as the parameters they stand for."""
    trainable = total = 0
    for name, weight in model.named_parameters():
        if "original_module." in name:
            continue
        state = getattr(weight, "quant_state", None)
        count = state.shape.numel() if state is not None else weight.numel()
        total += count
        trainable += count if weight.requires_grad else 0
    return trainable, total
