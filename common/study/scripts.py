"""The four scripts as modules, and parts of the reviews: what the studies share. Measures nothing itself."""

import importlib
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from datasets import DatasetDict

from common.cli import fit_to_size, parse_config
from common.data import load_reviews, stratified_rows, tokenize
from common.model import load_tokenizer
from common.record import is_published

HERE = Path(__file__).parent
METHODS = ("NEW_HEAD", "LAST_LAYER", "PEFT_LORA", "PEFT_QLORA")
# What an epoch costs in passes through the backbone, roughly, on a CPU; NEW_HEAD needs one for all epochs.
PASSES = {"NEW_HEAD": 0, "LAST_LAYER": 1.2, "PEFT_LORA": 2.5, "PEFT_QLORA": 3}
EVALUATED = 16  # reviews that a study of speed evaluates on, outside the measured time
WORKERS = 8 if os.cpu_count() >= 8 else 0
# How an expert lets Trainer make batches: reviews of similar length together, by processes of their own.
STOCK_FEEDING = {
    "train_sampling_strategy": "group_by_length",
    "dataloader_num_workers": WORKERS,
    "dataloader_persistent_workers": WORKERS > 0,
}


def script(name: str) -> ModuleType:
    """<name>/train.py as a module."""
    return importlib.import_module(f"{name}.train")


def some_reviews(dataset: str, size: int) -> DatasetDict:
    """A random, stratified part of the training reviews, and a few to evaluate on, with columns `text` and `label`."""
    config = script(METHODS[0]).Config()
    if dataset != config.dataset:
        config = replace(config, dataset=dataset, dataset_revision=None)
    data, _ = load_reviews(config)
    rows = stratified_rows(data["train"]["label"][:], size, seed=0)
    few = data["validation"].shuffle(seed=0).select(range(min(EVALUATED, len(data["validation"]))))
    return DatasetDict(train=data["train"].select(rows).shuffle(seed=0), validation=few, test=few)


def prepare(method: ModuleType, reviews: DatasetDict, flags: list[str]) -> dict:
    """Arguments of the script's `train`. reviews: as of `some_reviews`."""
    config = parse_config(method.Config, method.FOLDER, ["--batch_size", "128", *flags])  # as of the published runs
    tokenizer = load_tokenizer(config.model, config.model_revision, config.max_length)
    return {
        "config": fit_to_size(config, len(reviews["train"])),
        "seed": 0,
        "tokenizer": tokenizer,
        "data": tokenize(reviews, tokenizer, config.max_length),
        "fingerprint": "",
        "classes": reviews["train"].features["label"].names,
    }


def record_path(name: str, config, fingerprint: str | None = None, folder: Path = HERE, whole: bool = True) -> Path:
    """Where a study's record goes: common/study/<name>.json for a `whole` one of the published backbone and reviews,
    else --output_dir. config: the scripts' flags, parsed with `folder`. fingerprint: of the reviews; None reads it."""
    published = whole and is_published(config, fingerprint or load_reviews(config)[1], folder)
    place = HERE if published else Path(config.output_dir)
    place.mkdir(parents=True, exist_ok=True)
    return place / f"{name}.json"
