"""Which parts of a backbone low-rank updates go to."""

import re

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN
from torch import nn
from transformers import PreTrainedModel

from common.cli import UserError
from common.model import transformer_blocks


def attention_projections(model: PreTrainedModel) -> list[str]:
    """Names that the query and value projections end in: from PEFT's own mapping of architectures, or for one that it
    lacks (DistilBERT, for example) the linear layers of every block whose names begin with q and v.

    Raises UserError where neither finds them.
    """
    if model.config.model_type in KNOWN:
        return list(KNOWN[model.config.model_type])
    first = transformer_blocks(model)[0]
    linear = [name.split(".")[-1] for name, part in first.named_modules() if isinstance(part, nn.Linear)]
    names = sorted(name for name in linear if re.fullmatch(r"(q|query|v|value)(_\w+)?", name))
    if [name[0] for name in names] != ["q", "v"]:
        raise UserError(
            f"--model {model.config._name_or_path}: no query and value projections were found in "
            f"{type(model).__name__}; PEFT knows those of {', '.join(sorted(KNOWN))}"
        )
    return names
