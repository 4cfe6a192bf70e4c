"""What the tests share: tiny models of many architectures, a generated corpus, no network."""

import gc
import hashlib
import importlib
import json
import os
import re
import signal
import sys
from pathlib import Path

# One thread: tiny models gain nothing from more, and lose much on a busy machine.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
if os.environ.get("GPU") != "1":  # of tests/test_gpu.py alone
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import datasets
import pytest
import torch
import transformers
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.data import load_reviews, tokenize, training_sample
from common.demo import build_demo
from common.metrics import validation_scores
from common.model import label_config, load_tokenizer
from common.speed import speed_up
from common.trainer import ReviewTrainer

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
DECODERS = ("llama", "qwen2")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing is read from, or left in, the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def read_reviews(dataset: str, revision=None, train=None, test=None, seed=0, load=load_reviews, **columns) -> tuple:
    """`load_reviews` by what it takes from the command line. train, test: sizes of the subsets."""
    source = {"dataset": dataset, "dataset_revision": revision, "max_train_samples": train, "max_test_samples": test}
    return load(import_method("NEW_HEAD").Config(**source, **columns), seed)


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of the demo's model and reviews."""
    folder = tmp_path_factory.mktemp("demo")
    build_demo(folder)
    return folder / "tiny-bert", folder / "generated-reviews"


def copy_backbone(demo, folder: Path, **options) -> nn.Module:
    """Write the demo's tokenizer and model to `folder`; options: of save_pretrained."""
    transformers.AutoTokenizer.from_pretrained(demo[0]).save_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(demo[0])
    model.save_pretrained(folder, **options)
    return model


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


@pytest.fixture(scope="session")
def tokens(demo) -> datasets.DatasetDict:
    """A few of the demo's reviews, at most 48 tokens of each."""
    reviews, _ = read_reviews(str(demo[1]), train=150, test=40)
    return tokenize(reviews, load_tokenizer(str(demo[0]), None, 48), 48)


@pytest.fixture(params=METHODS)
def method(request):
    """Each of the four scripts, as a module."""
    return import_method(request.param)


def import_method(name: str):
    return importlib.import_module(f"{name}.train")


def build(method, folder: Path, seed: int = 0, **flags):
    """What `build_model` of a script, or of the method of this name, returns for the backbone in `folder`."""
    method = import_method(method) if isinstance(method, str) else method
    labels = label_config(["negative", "positive"], transformers.AutoTokenizer.from_pretrained(folder))
    transformers.set_seed(seed)
    return method.build_model(method.Config(model=str(folder), model_revision=None, **flags), labels)


def make_trainer(
    method,
    folder: Path,
    output_dir: Path,
    tokens,
    torch_compile=False,
    class_weights="none",
    flags: dict | None = None,
    **changes,
) -> ReviewTrainer:
    """A trainer as in the scripts, with few and small steps. flags: for the model; changes: for TrainingArguments."""
    model, _, options = build(method, folder, **flags or {})
    speed_up(model, torch_compile)
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 5e-3, "seed": 0}
    settings |= {"output_dir": str(output_dir), "report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
    return ReviewTrainer(
        model=model,
        args=transformers.TrainingArguments(**settings | changes),
        train_dataset=tokens["train"],
        eval_dataset={"train": training_sample(tokens), "validation": tokens["validation"]},
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        compute_metrics=validation_scores,
        class_weights=class_weights,
        **options,
    )


def set_dropout(model: nn.Module, p: float) -> None:
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = p


def watch_dtypes(model: nn.Module, kinds: str) -> dict[str, torch.dtype]:
    """By name, the types of what modules of a class that matches `kinds` give; filled as they run."""
    seen = {}

    def hook(name):
        def note(part, inputs, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).dtype

        return note

    for name, part in model.named_modules():
        if re.search(kinds, type(part).__name__):
            part.register_forward_hook(hook(name))
    return seen


def write_random_backbone(folder: Path, tokenizer_of: Path, config: transformers.PretrainedConfig) -> Path:
    """Write a random backbone of this shape, with the tokenizer of another, into `folder`."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


def digest(drawn: dict | list) -> str:
    """SHA-256 of what a chart is drawn from."""
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


@pytest.fixture(autouse=True)
def handlers():
    """Those of signals, which `run` sets, are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_finish():
    """What the libraries keep is looked through no more: runs collect garbage, and so many objects take a second."""
    gc.collect()
    gc.freeze()
