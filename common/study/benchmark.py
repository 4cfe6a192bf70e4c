"""How fast each method trains and what memory it takes, beside the usual recipe for it and the hardware's limit.

Run by hand, from the repository's root, on a GPU or a CPU; pytest does not collect it:

    python tests/benchmark.py --json benchmark.json
    python tests/benchmark.py --rounds 0 --growth --reviews 1024
    python tests/benchmark.py --methods NEW_HEAD --model ~/minilm --dataset ~/imdb --reviews 512 --epochs 5

The usual recipe is what public examples do, with nothing of ours: see `usual_model` and `usual`. Ours is `train` of
<METHOD>/train.py, as published. Each side of each method has a process of its own, in which a training to warm up
comes first; then the two sides take turns. Seconds are of training alone, from the first step to the last, without
tokenisation, evaluation and saving; of ours with the copy of the tokens to the device and, where the blocks are
frozen, the one pass through them. Peak memory is what tensors took on the GPU, or on a CPU the whole process in RAM.

The floor is the time that the counted work takes at the speed of a large matrix product, or of a large copy if that is
longer; both are measured on the spot, in the precision of our runs. For reviews of l tokens, without padding, and L
blocks of hidden size h with P weights in their matrices, weights of w bytes and activations of a bytes:

    forward     2 P l + 4 L h l^2 operations a review (matrices, attention); w P bytes a batch (the weights once) and
                2 L h a l bytes a review (what enters and what leaves a block)
    NEW_HEAD    one forward for all epochs
    LAST_LAYER  in every epoch a forward, and twice its last block again (gradients of activations and of weights)
    PEFT_*      in every epoch a forward, and again its matrices once and its attention twice (gradients of
                activations, down to the first adapter); bytes twice

Left out as small: embeddings, head, adapters, optimizer, softmax and the other elementwise work.
"""

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from datasets import Dataset, DatasetDict, load_from_disk
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.cli import parse_config, run
from common.data import load_reviews, stratified_rows, tokenize
from common.files import shown, write_json
from common.metrics import peak_memory, synchronize
from common.model import compute_dtype, load_tokenizer, transformer_blocks
from common.record import environment
from LAST_LAYER.train import Config

METHODS = ("NEW_HEAD", "LAST_LAYER", "PEFT_LORA", "PEFT_QLORA")
LENGTHS = (128, 256, 512)
SIZES = ((384, 6), (768, 12), (1024, 24))  # hidden size, blocks
WARM_UP = 64  # reviews of the discarded training on a CPU; on a GPU, where it is cheap, all of them
EVALUATED = 16  # reviews that our side evaluates on, outside the measured time


def usual_model(method: str, name: str, revision: str | None, classes: int) -> torch.nn.Module:
    """The model of the usual recipe. It trains what ours does, but for the pooler, which PEFT leaves frozen."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["pre_classifier", "classifier", "score"],  # without it the new head crashes
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        revision=revision,
        num_labels=classes,
        dtype=torch.float32,
        quantization_config=quantization if method == "PEFT_QLORA" else None,
    )
    if method.startswith("PEFT_"):
        if method == "PEFT_QLORA":
            model = prepare_model_for_kbit_training(model)  # with its default, gradient checkpointing
        return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32))
    last_block = f".{model.config.num_hidden_layers - 1}."
    for part, weight in model.base_model.named_parameters():
        weight.requires_grad = "pooler" in part or (method == "LAST_LAYER" and last_block in part)
    return model


class Stopwatch(TrainerCallback):
    """`seconds` of a training that neither evaluates nor saves."""

    def on_train_begin(self, args, state, control, **kwargs):
        synchronize()
        self.start = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds = time.perf_counter() - self.start


def usual(job: dict, reviews: Dataset, folder: Path) -> float:
    """Train by the usual recipe; returns the seconds. reviews: columns `text` and `label`."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"], revision=job["revision"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokens = reviews.map(
        lambda batch: tokenizer(batch["text"], truncation=True, padding="max_length", max_length=job["max_length"]),
        batched=True,
        remove_columns="text",
    )
    tokens.set_format("torch")
    model = usual_model(job["method"], job["model"], job["revision"], reviews.features["label"].num_classes)
    model.config.pad_token_id = tokenizer.pad_token_id
    stopwatch = Stopwatch()
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=job["epochs"],
        per_device_train_batch_size=16,
        save_strategy="no",
        report_to="none",
    )
    Trainer(model=model, args=args, train_dataset=tokens, callbacks=[stopwatch]).train()
    return stopwatch.seconds


def ours(job: dict, reviews: Dataset, folder: Path) -> float:
    """Train by the method's own script; returns the seconds. reviews: as of `usual`."""
    method = importlib.import_module(f"{job['method']}.train")
    preparing = []  # seconds

    def timed(work, argument):
        synchronize()
        start = time.perf_counter()
        result = work(argument)
        synchronize()
        preparing.append(time.perf_counter() - start)
        return result

    class TimedTrainer(method.ReviewTrainer):
        def tensors_of(self, reviews):
            work = super().tensors_of
            return timed(work, reviews) if reviews is self.train_dataset else work(reviews)

        def run_blocks(self, tensors):
            work = super().run_blocks
            return timed(work, tensors) if tensors is super().tensors_of(self.train_dataset) else work(tensors)

    tokenizer = load_tokenizer(job["model"], job["revision"], job["max_length"])
    evaluated = load_from_disk(job["evaluated"])
    data = tokenize(DatasetDict(train=reviews, validation=evaluated, test=evaluated), tokenizer, job["max_length"])
    flags = ["--model", job["model"], "--max_length", str(job["max_length"]), "--epochs", str(job["epochs"])]
    config = parse_config(method.Config, folder, [*flags, "--output_dir", str(folder)])
    config.model_revision = job["revision"]
    with patch.object(method, "ReviewTrainer", TimedTrainer):
        record = method.train(config, 0, tokenizer, data, "", reviews.features["label"].names)
    return sum(preparing) + sum(epoch["seconds"] for epoch in record["epochs"])


def train(job: dict, reviews: Dataset) -> float:
    with TemporaryDirectory() as folder:
        seconds = {"usual": usual, "ours": ours}[job["side"]](job, reviews, Path(folder))
    gc.collect()  # a Trainer and its model hold on to each other
    return seconds


def warm_up(job: dict) -> None:
    reviews = load_from_disk(job["reviews"])
    few = reviews if torch.cuda.is_available() else reviews.select(range(min(WARM_UP, len(reviews))))
    train(job | {"epochs": 1}, few)


def measure(job: dict) -> dict:
    """One training, and the peak of memory in it."""
    reviews, status = load_from_disk(job["reviews"]), Path("/proc/self/status")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    elif status.exists():
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the process
    seconds = train(job, reviews)
    memory = peak_memory()
    if not on_gpu and status.exists():
        memory = 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return {"reviews_per_second": job["epochs"] * len(reviews) / seconds, "peak_memory_bytes": memory}


def hardware_limits() -> dict:
    """The best speed of a large matrix product in the precision of our runs, and of a large copy."""
    dtype, device = compute_dtype(), "cuda" if torch.cuda.is_available() else "cpu"
    sizes, numbers = ((4096, 8192, 16384), 2**28) if device == "cuda" else ((512, 1024, 2048), 2**26)

    def fastest(work) -> float:
        times = []
        for _ in range(30):
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    def product_speed(size: int) -> float:
        left, right, product = torch.randn(3, size, size, device=device, dtype=dtype)
        return 2 * size**3 / fastest(lambda: torch.matmul(left, right, out=product))

    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "operations_per_second": max(map(product_speed, sizes)),
        "bytes_per_second": 2 * source.nbytes / fastest(lambda: target.copy_(source)),  # read and written
    }


def floor(method: str, config: Config, lengths: list[int], limits: dict) -> dict:
    """The work of one epoch, per review, as the docstring at the top counts it, and the speed that it allows."""
    backbone = AutoConfig.from_pretrained(config.model, revision=config.model_revision)
    with torch.device("meta"):  # the structure without the weights
        _, blocks = transformer_blocks(AutoModelForSequenceClassification.from_config(backbone))
    depth, hidden, tokens = backbone.num_hidden_layers, backbone.hidden_size, sum(lengths)
    weights = sum(weight.numel() for weight in blocks.parameters() if weight.ndim == 2)
    weight_bytes = weights * (0.516 if method == "PEFT_QLORA" else 4)  # 4 bits, and 8 for the scale of 64 weights
    matrices = 2 * weights * tokens
    attention = 4 * depth * hidden * sum(length**2 for length in lengths)
    traffic = math.ceil(len(lengths) / config.batch_size) * weight_bytes
    traffic += 2 * depth * hidden * compute_dtype().itemsize * tokens
    operations, traffic = {
        "NEW_HEAD": ((matrices + attention) / config.epochs, traffic / config.epochs),
        "LAST_LAYER": ((matrices + attention) * (1 + 2 / depth), traffic * (1 + 2 / depth)),
    }.get(method, (2 * matrices + 3 * attention, 2 * traffic))
    seconds = max(operations / limits["operations_per_second"], traffic / limits["bytes_per_second"])
    return {
        "operations_per_review": operations / len(lengths),
        "bytes_per_review": traffic / len(lengths),
        "floor_reviews_per_second": len(lengths) / seconds,
    }


def silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (sys.stdout, sys.stderr):
        os.dup2(nowhere, output.fileno())


def own_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=silence)


def measured(process: ProcessPoolExecutor, job: dict) -> dict:
    """What `measure` returns in `process`; {"error": its message} where it failed."""
    try:
        result = process.submit(measure, job).result()
    except Exception as error:  # out of memory, above all: the table says so, and the others go on
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        result = {"error": message.replace(job["model"], shown(job["model"]))[:200]}  # no paths of this machine
    print(
        job["method"], job["side"], shown(job["model"]), f"{job['max_length']} tokens", json.dumps(result), flush=True
    )
    return result


def compare(methods: list[str], job: dict, rounds: int) -> dict[str, dict]:
    """For each method the values of all rounds, and the ratio ours / usual, which is taken within a round."""
    with contextlib.ExitStack() as stack:
        sides, warm_ups = {method: {} for method in methods}, []
        for method, side in itertools.product(methods, ("usual", "ours")):  # all get ready at once
            process = stack.enter_context(own_process())
            sides[method][side] = process, job | {"method": method, "side": side}
            warm_ups.append(process.submit(warm_up, sides[method][side][1]))
        wait(warm_ups)
        return {method: in_turn(sides[method], rounds) for method in methods}


def in_turn(sides: dict[str, tuple[ProcessPoolExecutor, dict]], rounds: int) -> dict:
    found = {side: {"reviews_per_second": [], "peak_memory_bytes": []} for side in sides}
    for _ in range(rounds):
        for side, values in found.items():
            result = measured(*sides[side])
            if "error" in result:
                return {"error": f"{side}: {result['error']}"}
            for name in values:
                values[name].append(result[name])
    speeds = zip(found["ours"]["reviews_per_second"], found["usual"]["reviews_per_second"], strict=True)
    ratios = [ours / usual for ours, usual in speeds]
    return found | {"ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}}


def growth(methods: list[str], job: dict, tokenizer, folder: Path) -> list[dict]:
    """One epoch of ours: for several lengths, then for several sizes of backbone, with random weights."""
    cases = [(shown(job["model"]), {"max_length": length}) for length in LENGTHS]
    for hidden, depth in SIZES:
        config = BertConfig(hidden_size=hidden, num_hidden_layers=depth, vocab_size=len(tokenizer))
        config.num_attention_heads, config.intermediate_size = hidden // 64, 4 * hidden
        place = folder / f"{hidden}x{depth}"
        BertModel(config).save_pretrained(place)
        tokenizer.save_pretrained(place)
        cases.append((place.name, {"model": str(place), "revision": None}))
    rows = []
    for method in methods:
        with own_process() as process:
            for name, changes in cases:
                case = job | changes | {"epochs": 1, "method": method, "side": "ours"}
                process.submit(warm_up, case)
                rows.append(
                    {"method": method, "model": name, "max_length": case["max_length"]} | measured(process, case)
                )
    return rows


def whole_command(model: str, dataset: str) -> dict:
    """Seconds of `python PEFT_LORA/train.py --seeds 0` on all reviews, imports included; caches should be warm."""
    with TemporaryDirectory() as folder:
        flags = ["--seeds", "0", "--model", model, "--dataset", dataset, "--output_dir", folder]
        start = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "PEFT_LORA" / "train.py", *flags], check=True)
        seconds = time.perf_counter() - start
        run = json.loads((Path(folder) / "results.json").read_text())["runs"][0]
    return {"seconds": seconds, "run_seconds": run["total_seconds"], "train_seconds": run["train_seconds"]}


def show(content: dict) -> None:
    """The tables, as text."""
    print()
    if content["methods"]:
        print("method        usual/s    ours/s  ratio (min-max)     usual MB   ours MB   floor/s  share of floor")
    for method, found in content["methods"].items():
        if "error" in found:
            print(f"{method:<11}{found['error']}")
            continue
        medians = {
            (side, name): statistics.median(values)
            for side in ("usual", "ours")
            for name, values in found[side].items()
        }
        speed, memory = (
            "".join(f"{medians[side, name] / unit:>10.1f}" for side in ("usual", "ours"))
            for name, unit in (("reviews_per_second", 1), ("peak_memory_bytes", 1e6))
        )
        ratio = "{median:.2f} ({min:.2f}-{max:.2f})".format(**found["ratio"])
        limit = f"{found['floor_reviews_per_second']:>10.1f}{100 * found['share_of_floor']:>9.1f}%"
        print(f"{method:<11}{speed}  {ratio:<18}{memory}{limit}")
    if whole := content["whole_command"]:
        print(
            "Whole command: {seconds:.1f} s, of it in `train` {run_seconds:.1f}, training {train_seconds:.1f}".format(
                **whole
            )
        )
    for row in content["growth"]:
        title = f"{row['method']:<11}{row['model']:<30}{row['max_length']:>4} tokens "
        print(title, row.get("error") or f"{row['reviews_per_second']:.1f}/s, {row['peak_memory_bytes'] / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--model", default=Config.model, help="Backbone: a Hub id or a local folder.")
    parser.add_argument("--dataset", default=Config.dataset, help="Reviews, as the scripts take them.")
    parser.add_argument("--reviews", type=int, default=2048, help="Training reviews. [2048]")
    parser.add_argument("--epochs", type=int, default=Config.epochs, help="Passes over them. [5]")
    parser.add_argument("--max_length", type=int, default=Config.max_length, help="Tokens per review. [512]")
    parser.add_argument("--rounds", type=int, default=3, help="Measurements of each side; 0 for --growth alone. [3]")
    parser.add_argument("--growth", action="store_true", help="Also ours for several lengths and sizes of backbone.")
    parser.add_argument("--whole", action="store_true", help="Also the whole command for one seed of LoRA.")
    parser.add_argument("--json", type=Path, help="File to write everything to.")
    args = parser.parse_args()
    flags = [f"--{name}={getattr(args, name)}" for name in ("model", "dataset", "epochs", "max_length")]
    config = parse_config(Config, ROOT, flags)
    tokenizer = load_tokenizer(config.model, config.model_revision, config.max_length)
    data, _ = load_reviews(config.dataset, config.dataset_revision)
    reviews = data["train"].select(stratified_rows(data["train"]["label"][:], args.reviews, seed=0)).shuffle(seed=0)
    tokens = tokenize(DatasetDict(train=reviews), tokenizer, config.max_length)["train"]["input_ids"]
    lengths = [len(review) for review in tokens]
    with own_process() as process:
        limits = process.submit(hardware_limits).result()
    print("limits", json.dumps(limits), flush=True)
    with TemporaryDirectory() as folder:
        job = {"model": config.model, "revision": config.model_revision, "max_length": config.max_length}
        job |= {"epochs": config.epochs, "reviews": f"{folder}/reviews", "evaluated": f"{folder}/evaluated"}
        reviews.save_to_disk(job["reviews"])
        data["validation"].select(range(min(EVALUATED, len(data["validation"])))).save_to_disk(job["evaluated"])
        methods = compare(args.methods, job, args.rounds) if args.rounds else {}
        for method, found in methods.items():
            found |= floor(method, config, lengths, limits)
            if "ratio" in found:
                speed = statistics.median(found["ours"]["reviews_per_second"])
                found["share_of_floor"] = speed / found["floor_reviews_per_second"]
        whole = whole_command(args.model, args.dataset) if args.whole else None
        grown = growth(args.methods, job, tokenizer, Path(folder)) if args.growth else []
    settings = {"model": shown(args.model), "dataset": shown(args.dataset), "reviews": len(reviews)}
    settings |= {"epochs": args.epochs, "max_length": args.max_length, "rounds": args.rounds}
    words = (
        [f"--{name} {value}" for name, value in settings.items()]
        + ["--growth"] * args.growth
        + ["--whole"] * args.whole
    )
    content = {
        "command": " ".join(["python tests/benchmark.py --methods", *args.methods, *words]),
        **settings,
        "mean_tokens": statistics.mean(lengths),
        "limits": limits,
        "methods": methods,
        "growth": grown,
        "whole_command": whole,
        "environment": environment(),
    }
    show(content)
    if args.json:
        write_json(content, args.json)


if __name__ == "__main__":
    run(main)
