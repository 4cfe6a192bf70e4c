"""The parts of a pretrained classifier, found by its structure: head, blocks, projections; and its precision."""

import copy
import re
from collections.abc import Callable
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
from common.hub import OFFLINE, prefer_cache_without_network


def load_tokenizer(name: str, revision: str | None, max_length: int) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer, with a padding token. Of a text that is too long it keeps the end.

    Raises UserError where the backbone cannot be found, or takes fewer than `max_length` tokens.
    """
    if not Path(name).is_dir():
        prefer_cache_without_network(name, revision, "model")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if Path(name).is_dir() else OFFLINE
        raise UserError(f"--model {name}: {reason}") from error
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
    if Path(name).is_dir() and not any((Path(name) / file).exists() for file in weights):
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
    return tokenizer


def label_config(classes: list[str], tokenizer: PreTrainedTokenizerBase) -> dict:
    """Keyword arguments that give `from_pretrained` its labels' names, and the padding token a decoder pools by."""
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
        "pad_token_id": tokenizer.pad_token_id,
    }


def mixed_precision() -> str:
    """ "bf16" where the GPU computes in it, else "fp16" on a GPU, else "fp32"."""
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def compute_dtype() -> torch.dtype:
    """The type of `mixed_precision`."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[mixed_precision()]


def transformer_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the backbone's Transformer blocks, first to last: as many as its config has hidden layers, and
    in them nearly all of its weights but the embeddings.

    Raises UserError where the architecture has no such list (ALBERT shares one block, XLM has a list for every part).
    """
    depth = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == depth
            and 4 * _size(module) >= 3 * _size(model.base_model)
        ):
            return name, module
    raise UserError(
        f"--model {model.config._name_or_path}: no list of {depth} Transformer blocks was found in "
        f"{type(model).__name__}; needs an architecture that keeps its blocks apart"
    )


def _size(module: nn.Module) -> int:
    """Weights of all the matrices in `module` but the embeddings'."""
    parts = [part for part in module.modules() if not isinstance(part, nn.Embedding)]
    return sum(weight.numel() for part in parts for weight in part.parameters(recurse=False) if weight.ndim > 1)


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that turn the last hidden states into logits, in order.

    They are the parts with weights outside the backbone, and before them the backbone's pooler, where it has one:
    the part with a linear layer that comes after the blocks. Works on the meta device.
    Raises UserError where there is no head.
    """
    prefix = model.base_model_prefix
    parts = list(getattr(model, prefix, nn.Module()).named_children())
    stacks = [index for index, (_, part) in enumerate(parts) if _contains(part, nn.ModuleList)]
    if not stacks:
        raise UserError(
            f"--model {model.config._name_or_path}: no Transformer blocks were found in {type(model).__name__}"
        )
    poolers = [f"{prefix}.{name}" for name, part in parts[stacks[0] + 1 :] if _contains(part, nn.Linear)]
    outside = [
        name for name, part in model.named_children() if name != prefix and any(True for _ in part.parameters())
    ]
    if not outside:
        raise UserError(
            f"--model {model.config._name_or_path}: no classification head was found in {type(model).__name__}"
        )
    return poolers + outside


def _contains(module: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(part, kind) for part in module.modules())


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


def compute_frozen_parts_in(dtype: torch.dtype, model: nn.Module) -> None:
    """Let frozen embeddings, linear layers and LayerNorms compute with copies of their weights in `dtype`.

    Autocast would cast the weights in every step, and let LayerNorm give fp32, for every layer after it to cast again.
    The weights themselves, which are saved, stay as they are; to change or move them later is without effect on what
    the model computes.
    """
    for part in list(model.modules()):
        if hasattr(part, "cast_input_dtype_enabled"):
            part.cast_input_dtype_enabled = False  # PEFT would cast to fp32 what autocast then casts back
        if any(weight.requires_grad for weight in part.parameters()):
            continue
        if type(part) in (nn.Embedding, nn.Linear):  # not what bitsandbytes derives from them
            part.forward = copy.deepcopy(part).to(dtype).forward
        if type(part) is nn.LayerNorm:
            part.forward = _without_autocast(copy.deepcopy(part).to(dtype))


def _without_autocast(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    @torch.autocast(layer.weight.device.type, enabled=False)
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return layer(hidden.to(layer.weight.dtype))

    return forward


def keep_trainable(model: nn.Module) -> None:
    """Let 4-bit layers train on a CPU with AVX512-BF16, where bitsandbytes (0.50) repacks their weights at the first
    evaluation into a form that has no backward pass."""
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False


def new_weights(loading: dict) -> list[str]:
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
