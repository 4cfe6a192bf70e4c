"""How fast each method trains and what memory it takes: the usual way, the careful way, and ours.

    python -m common.study.benchmark --json common/study/benchmark_h200.json --whole
    python -m common.study.benchmark --methods NEW_HEAD --model ~/minilm --dataset ~/imdb --reviews 512 --rounds 2

    usual     what tutorials do: Trainer in fp32, every review padded to --max_length, batches of 16
    careful   what an expert writes with the same Trainer: bf16, batches of 128 reviews of similar length, each padded
              to its longest, 8 worker processes where there are 8 cores; a frozen backbone still runs in every epoch
    ours      `train` of <METHOD>/train.py, as published

Each side of each method has a process of its own, in which a training to warm up comes first. Then the sides take
turns; ratios are taken within a round. Seconds are of training alone, without evaluation and saving. For the first two
sides they begin when the first batch is there. Ours contain the copy of the tokens to the device, and NEW_HEAD's one
pass. Peak memory is the GPU's, or on a CPU that of the whole process. `--whole` times a whole command as well.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, set_start_method
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import DatasetDict, load_from_disk
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from common.cli import public_name, run, write_json
from common.data import clean
from common.metrics import peak_memory, synchronize
from common.model import compute_dtype
from common.record import ROOT, command_line, environment
from common.study.scripts import METHODS, STOCK_FEEDING, prepare, script, some_reviews

SIDES = ("usual", "careful", "ours")
WARM_UP = 64  # reviews of the training to warm up on a CPU; on a GPU, where it is cheap, all of them


def stock_model(job: dict, classes: int) -> torch.nn.Module:
    """The model of the usual and the careful way. It trains what ours does, but for the pooler, which PEFT freezes."""
    method = job["method"]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["pre_classifier", "classifier", "score"],  # without it the new head crashes
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        job["model"],
        revision=job["revision"],
        num_labels=classes,
        dtype=torch.float32,
        quantization_config=quantization if method == "PEFT_QLORA" else None,
    )
    if method.startswith("PEFT_"):
        if method == "PEFT_QLORA":  # by default with gradient checkpointing
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=job["side"] == "usual")
        return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32))
    last_block = f".{model.config.num_hidden_layers - 1}."
    for part, weight in model.base_model.named_parameters():
        weight.requires_grad = "pooler" in part or (method == "LAST_LAYER" and last_block in part)
    return model


class Stopwatch(TrainerCallback):
    """`seconds` from the first step to the last."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            synchronize()
            self.start = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds = time.perf_counter() - self.start


def train_stock(job: dict, reviews: DatasetDict, folder: str) -> tuple[float, int]:
    """Train the usual or the careful way; returns as `train_ours`. reviews: columns `text` and `label`."""
    usual = job["side"] == "usual"
    tokenizer = AutoTokenizer.from_pretrained(job["model"], revision=job["revision"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    padding = {"padding": "max_length" if usual else False, "truncation": True, "max_length": job["max_length"]}
    tokens = reviews["train"].map(
        lambda batch: tokenizer(list(map(clean, batch["text"])), **padding), batched=True, remove_columns="text"
    )
    tokens.set_format("torch" if usual else None)
    model = stock_model(job, reviews["train"].features["label"].num_classes)
    model.config.pad_token_id = tokenizer.pad_token_id
    careful = {"per_device_train_batch_size": 128, "bf16": compute_dtype() == torch.bfloat16, **STOCK_FEEDING}
    args = TrainingArguments(
        output_dir=folder,
        num_train_epochs=job["epochs"],
        save_strategy="no",
        report_to="none",
        **({"per_device_train_batch_size": 16} if usual else careful),
    )
    stopwatch = Stopwatch()
    collator = None if usual else DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)  # as tensor cores like it
    Trainer(model=model, args=args, train_dataset=tokens, data_collator=collator, callbacks=[stopwatch]).train()
    return stopwatch.seconds, peak_memory()


def train_ours(job: dict, reviews: DatasetDict, folder: str) -> tuple[float, int]:
    """Train by the method's own script; returns the seconds and the peak of memory."""
    method = script(job["method"])
    flags = [word for name in ("model", "max_length", "epochs") for word in (f"--{name}", str(job[name]))]
    record = method.train(**prepare(method, reviews, [*flags, "--output_dir", folder]))
    return record["train_seconds"], record["peak_memory_bytes"]


def measure(job: dict, warm_up: bool = False) -> dict:
    """One training of one side, and the peak of memory in it."""
    reviews = load_from_disk(job["reviews"])
    if warm_up:
        size = len(reviews["train"]) if torch.cuda.is_available() else min(WARM_UP, len(reviews["train"]))
        job, reviews["train"] = job | {"epochs": 1}, reviews["train"].select(range(size))
    gc.collect()  # a Trainer and its model hold on to each other
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with TemporaryDirectory() as folder:
        seconds, peak = (train_ours if job["side"] == "ours" else train_stock)(job, reviews, folder)
    speed = job["epochs"] * len(reviews["train"]) / seconds
    return {"reviews_per_second": speed, "peak_memory_bytes": peak}


def prepare_process() -> None:
    """No output from this process. Its own workers start in the machine's usual way, not spawned as it was itself:
    each would import everything anew."""
    set_start_method(None, force=True)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (sys.stdout, sys.stderr):
        os.dup2(nowhere, output.fileno())


def compare(method: str, job: dict, rounds: int) -> dict:
    """The values of all rounds for each side of `method`, and the ratios of ours to the other sides."""
    sides, jobs = {side: {} for side in SIDES}, {side: job | {"method": method, "side": side} for side in SIDES}
    with contextlib.ExitStack() as stack:
        pools = [ProcessPoolExecutor(1, get_context("spawn"), initializer=prepare_process) for _ in SIDES]
        processes = dict(zip(SIDES, map(stack.enter_context, pools), strict=True))
        for warm_up in [processes[side].submit(measure, jobs[side], warm_up=True) for side in SIDES]:
            warm_up.result()
        for _, side in itertools.product(range(rounds), SIDES):
            result = processes[side].submit(measure, jobs[side]).result()
            print(method, side, json.dumps(result), flush=True)
            for name, value in result.items():
                sides[side].setdefault(name, []).append(value)
    found = {}
    for side in ("usual", "careful"):
        speeds = (sides[name]["reviews_per_second"] for name in ("ours", side))
        ratios = [ours / other for ours, other in zip(*speeds, strict=True)]
        found[side] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return sides | {"ratios": found}


def whole_command(model: str, dataset: str) -> dict:
    """Seconds of `python PEFT_LORA/train.py --seeds 0` on all reviews, imports included; caches should be warm."""
    with TemporaryDirectory() as folder:
        flags = ["--seeds", "0", "--model", model, "--dataset", dataset, "--output_dir", folder]
        start = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "PEFT_LORA" / "train.py", *flags], check=True)
        seconds = time.perf_counter() - start
        run = json.loads((Path(folder) / "results.json").read_text())["runs"][0]
    return {"seconds": seconds, "run_seconds": run["total_seconds"], "train_seconds": run["train_seconds"]}


def main(argv: list[str] | None = None) -> dict:
    """Measure, print a table and write the record; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = script(METHODS[0]).Config
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--model", default=default.model, help="Backbone: a Hub id or a local folder.")
    parser.add_argument("--dataset", default=default.dataset, help="Reviews, as the scripts take them.")
    parser.add_argument("--reviews", type=int, default=2048, help="Training reviews. [2048]")
    parser.add_argument("--epochs", type=int, default=2, help="Passes over them. [2]")
    parser.add_argument("--max_length", type=int, default=default.max_length, help="Tokens per review. [512]")
    parser.add_argument("--rounds", type=int, default=3, help="Measurements of each side. [3]")
    parser.add_argument("--whole", action="store_true", help="Also the whole command for one seed of LoRA.")
    parser.add_argument("--json", type=Path, help="File to write everything to.")
    args = parser.parse_args(argv)
    reviews = some_reviews(args.dataset, args.reviews)
    revision = default.model_revision if args.model == default.model else None
    record = {
        "command": command_line("-m common.study.benchmark", argv),
        "model": public_name(args.model),
        "dataset": public_name(args.dataset),
        "reviews": len(reviews["train"]),
        "epochs": args.epochs,
        "max_length": args.max_length,
        "methods": {},
        "whole_command": whole_command(args.model, args.dataset) if args.whole else None,
        "environment": environment(),
    }
    with TemporaryDirectory() as folder:
        reviews.save_to_disk(folder)
        job = {"model": args.model, "revision": revision, "max_length": args.max_length, "epochs": args.epochs}
        for method in args.methods:  # what is measured is kept, should the next one not end
            record["methods"][method] = compare(method, job | {"reviews": folder}, args.rounds)
            if args.json:
                write_json(record, args.json)
    for method, sides in record["methods"].items():
        for side in SIDES:
            speed, memory = map(statistics.median, sides[side].values())
            title = f"{method:<12}{side:<9}{speed:>10,.1f} reviews/s{memory / 1e9:>7.2f} GB"
            ratio = "   ours is {median:.2f} ({min:.2f} to {max:.2f}) times as fast"
            print(title + (ratio.format(**sides["ratios"][side]) if side in sides["ratios"] else ""))
    print(record["whole_command"] or "")
    return record


if __name__ == "__main__":
    run(main)
