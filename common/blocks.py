"""The Transformer blocks of a backbone, and their query and value projections, found by their structure."""

import re

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.cli import UserError


def transformer_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The backbone's Transformer blocks, first to last.
    Raises UserError where an architecture has no such list (ALBERT shares a block, XLM has a list for every part)."""
    depth, lists = model.config.num_hidden_layers, []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not inside:
            lists.append((name, module))
    if len(lists) != 1:
        missing = f"no list of {depth} Transformer blocks was found in {type(model).__name__}"
        raise UserError(f"--model {model.config._name_or_path}: {missing}; needs one that keeps its blocks apart")
    return lists[0][1]


def last_blocks(model: PreTrainedModel, count: int) -> nn.ModuleList:
    """The last `count` Transformer blocks. Raises UserError where there are not as many."""
    blocks = transformer_blocks(model)
    if count > len(blocks):
        raise UserError(f"--blocks {count}: {model.config._name_or_path} has {len(blocks)}")
    return blocks[-count:]


def lora_targets(model: PreTrainedModel, names: list[str] | None, rank: int) -> list[str] | str:
    """PEFT's `target_modules`: `names`, or where none are given the query and value projections: PEFT's own choice,
    or for an architecture that it lacks (DistilBERT, for example) the linear layers whose names begin with q and v.
    Raises UserError for a name that no linear layer ends in, where there is none to choose, for too high a rank."""
    if rank > (width := getattr(model.config.get_text_config(), "hidden_size", rank)):
        raise UserError(f"--lora_r {rank}: is above {width}, the width of the model's layers")
    if names == ["all-linear"]:
        return "all-linear"
    layers = [f".{name}" for name, part in model.named_modules() if isinstance(part, (nn.Linear, Conv1D))]
    ends = sorted({layer.split(".")[-1] for layer in layers})
    found = [name for name in ends if re.fullmatch(r"(q|query|v|value)(_\w+)?", name)]
    found = found if {name[0] for name in found} == {"q", "v"} else []
    chosen = names or KNOWN.get(model.config.model_type, found)
    unknown = [name for name in chosen if not any(layer.endswith(f".{name}") for layer in layers)]
    if unknown or not chosen:
        name = type(model).__name__
        wrong = f"{' '.join(unknown)}: no linear layer ends in it" if unknown else f"must be given for {name}"
        raise UserError(f"--target_modules {wrong}; all-linear alone, or some of {', '.join(ends)}")
    return list(chosen)
