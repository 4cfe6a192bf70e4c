"""What each trick for speed is worth: training speed and peak memory with all of them, and with one left out.

    python -m common.study.tricks
    python -m common.study.tricks --model ~/minilm --dataset ~/imdb --methods PEFT_LORA --rounds 2

Every training is a script's own `train` at its published settings, on a part of the training reviews. A trick is left
out by a patch in this process alone. The variants of a method take turns; ratios are taken within a round. Speed is
that of the second of two epochs; of NEW_HEAD it is that of five epochs and the one pass before them.
Writes common/study/tricks.json, or --json; with other settings, other reviews or another backbone the record goes to
common/study/runs/<name of the data>. On a CPU the peak of memory says nothing: it is the whole process's.
"""

import argparse
import contextlib
import dataclasses
import gc
import io
import statistics
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest.mock import patch

import torch
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from common import speed, trainer
from common.cli import parse_config, public_name, run, write_json
from common.record import command_line, environment
from common.study.scripts import HERE, METHODS, STOCK_FEEDING, prepare, record_path, script, some_reviews

ALL = "all"
FEEDING, FLASH, NORM = "batches cut on the device", "flash attention for padded batches", "LayerNorm outside autocast"
CASTS, STORED = "no casts by PEFT", "outputs stored"
UNFILLED = "new memory not filled"
TRICKS = {
    "NEW_HEAD": (STORED, FLASH, NORM),
    "LAST_LAYER": (FEEDING, FLASH, NORM),
    "PEFT_LORA": (FEEDING, FLASH, NORM, CASTS, UNFILLED),
    "PEFT_QLORA": (FEEDING, FLASH, NORM, CASTS),
}


def without(trick: str, method: ModuleType) -> contextlib.AbstractContextManager:
    """A context in which the script `method` trains without `trick`; without none of them for ALL."""
    speed_up, build_model = speed.speed_up, method.build_model

    class StockFeeding(trainer.ReviewTrainer):
        get_train_dataloader = Trainer.get_train_dataloader

        def __init__(self, *args, **kwargs):
            collator = DataCollatorWithPadding(kwargs["processing_class"], pad_to_multiple_of=8)
            super().__init__(*args, data_collator=collator, **kwargs)

    @contextlib.contextmanager
    def stock_feeding():
        arguments = partial(TrainingArguments, **STOCK_FEEDING)
        with patch.object(trainer, "ReviewTrainer", StockFeeding), patch("transformers.TrainingArguments", arguments):
            yield

    def plain_attention(model, *_):
        speed_up(model)
        model.set_attn_implementation("sdpa")

    @contextlib.contextmanager
    def filled():  # patch cannot: it deletes what it has set, which this one forbids
        torch.utils.deterministic.fill_uninitialized_memory = True
        yield
        torch.utils.deterministic.fill_uninitialized_memory = False

    return {
        ALL: contextlib.nullcontext,
        FEEDING: stock_feeding,
        FLASH: lambda: patch.object(speed, "speed_up", plain_attention),
        NORM: lambda: patch.object(speed, "LayerNormOutsideAutocast", nn.LayerNorm),
        CASTS: lambda: patch.object(trainer, "disable_input_dtype_casting", contextlib.nullcontext),
        STORED: lambda: patch.object(
            method, "build_model", lambda *given: (*build_model(*given)[:2], {"run_once": None})
        ),
        UNFILLED: filled,
    }[trick]()


def measure(method: ModuleType, trick: str, job: dict) -> dict[str, float]:
    """Speed and peak memory of one training without `trick`. job: arguments of the script's `train`."""
    gc.collect()  # the model and the trainer before hold on to each other
    with without(trick, method), TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        record = method.train(**job | {"config": dataclasses.replace(job["config"], output_dir=folder)})
    last = len(job["data"]["train"]) / record["epochs"][-1]["seconds"]
    return {
        "reviews_per_second": record["train_reviews_per_second"] if STORED in TRICKS[method.FOLDER.name] else last,
        "peak_memory_bytes": record["peak_memory_bytes"],
    }


def compare(name: str, reviews, flags: list[str], rounds: int) -> dict[str, dict]:
    """For ALL and for each trick left out, the values of every round."""
    method = script(name)
    epochs = "5" if STORED in TRICKS[name] else "2"
    job = prepare(method, reviews, [*flags, "--epochs", epochs])
    found = {trick: {"reviews_per_second": [], "peak_memory_bytes": []} for trick in (ALL, *TRICKS[name])}
    measure(method, ALL, job)  # to warm up
    for _ in range(rounds):
        for trick, values in found.items():
            result = measure(method, trick, job)
            print(f"{name}, without: {trick if trick != ALL else 'nothing'}", result, flush=True)
            for key in values:
                values[key].append(result[key])
    return found


def worth(found: dict[str, dict], trick: str) -> dict[str, float]:
    """What `trick` does to speed (median, min and max of the rounds) and to peak memory (median): 1.1 is 10% more."""

    def ratios(key: str) -> list[float]:
        return [full / less for full, less in zip(found[ALL][key], found[trick][key], strict=True)]

    speeds = ratios("reviews_per_second")
    memory = statistics.median(ratios("peak_memory_bytes"))
    return {"speed": statistics.median(speeds), "min": min(speeds), "max": max(speeds), "memory": memory}


def main(argv: list[str] | None = None) -> dict:
    """Measure, print a table and write the record; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    default = script(METHODS[0]).Config
    parser.add_argument("--model", default=default.model, help="Backbone: a Hub id or a local folder.")
    parser.add_argument("--dataset", default=default.dataset, help="Reviews, as the scripts take them.")
    parser.add_argument("--reviews", type=int, default=4096, help="Training reviews. [4096]")
    parser.add_argument("--rounds", type=int, default=3, help="Measurements of each variant. [3]")
    parser.add_argument("--json", type=Path, help="File to write.")
    args = parser.parse_args(argv)
    config = parse_config(script(METHODS[0]).Config, HERE, ["--model", args.model, "--dataset", args.dataset])
    whole = all(getattr(args, name) == parser.get_default(name) for name in ("methods", "reviews", "rounds"))
    path = args.json or record_path("tricks", config, whole=whole)
    reviews = some_reviews(args.dataset, args.reviews)
    record = {
        "command": command_line("-m common.study.tricks", argv),
        "model": public_name(args.model),
        "dataset": public_name(args.dataset),
        "reviews": len(reviews["train"]),
        "methods": {},
        "environment": environment(),
    }
    for name in args.methods:  # what is measured is kept, should the next one not end
        record["methods"][name] = compare(name, reviews, ["--model", args.model], args.rounds)
        write_json(record, path)
    print(f"\n{'':<62}{'reviews/s':>10}{'GB':>7}   with the trick: speed (range), memory")
    for name, found in record["methods"].items():
        for trick, values in found.items():
            speeds, memory = (statistics.median(values[key]) for key in values)
            title = f"{name}, " + ("all tricks" if trick == ALL else f"without: {trick}")
            gain = "" if trick == ALL else "{speed:.2f} ({min:.2f} to {max:.2f}), {memory:.2f}"
            print(f"{title:<62}{speeds:>10,.0f}{memory / 1e9:>7.2f}   {gain.format(**worth(found, trick))}")
    print(f"Record:   {path}")
    return record


if __name__ == "__main__":
    run(main)
