"""What the tests share: tiny models of many architectures, a generated corpus, no network."""

import importlib
import os
import sys
from pathlib import Path

# One thread: tiny models gain nothing from more, and lose much on a busy machine.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}

import datasets
import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.demo import build_demo

METHODS = ("NEW_HEAD", "LAST_LAYER", "PEFT_LORA", "PEFT_QLORA")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
ARCHITECTURES = {
    "bert": transformers.BertConfig(**SIZES),
    "distilbert": transformers.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128),
    "roberta": transformers.RobertaConfig(**SIZES, pad_token_id=0),
    "electra": transformers.ElectraConfig(**SIZES, embedding_size=64),
    "deberta-v2": transformers.DebertaV2Config(**SIZES, pooler_hidden_size=64),
    "llama": transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2": transformers.Qwen2Config(**SIZES, num_key_value_heads=2),
}


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing is read from, or left in, the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of the demo's model and reviews."""
    return build_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def backbones(tmp_path_factory, demo) -> dict[str, Path]:
    """A folder with a tiny random backbone, without a classifier, and a tokenizer, for every architecture."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo[0])
    folders = {}
    for name, config in ARCHITECTURES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(params=METHODS)
def method(request):
    """Each of the four scripts, as a module."""
    return importlib.import_module(f"{request.param}.train")


def configure(method, model: Path, **changes):
    """The script's Config for the backbone in `model`."""
    config = method.Config(model=str(model), model_revision=None)
    for name, value in changes.items():
        setattr(config, name, value)
    return config
