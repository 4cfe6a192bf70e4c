"""How much memory does a backbone of each size take, and how fast does it train? 22 million to 70 billion weights.

    python -m common.study.memory_by_size
    python -m common.study.memory_by_size --demo
    python -m common.study.memory_by_size --backbones llama-7.5b --methods PEFT_QLORA

LoRA and QLoRA, with checkpointing and without, and a few runs more (see `EXTRAS`), on texts of 512 random tokens. The
shapes are real. The weights are random: drawn on the GPU layer by layer, and quantized as they are drawn. Every row is
a run of the script's own `train`, two epochs with evaluation and test, of which the second is timed. With one change:
a step that is out of memory ends the run, and is a row without figures, as are those of the same backbone and method
that need more.
Each backbone and method has a process of its own, one at a time on each GPU. Writes common/study/memory_by_size.json
and PEFT_QLORA/memory_by_size.png; rows that are there already stay. With `--demo` two tiny shapes; the record and the
chart go to runs/.
"""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from threading import Lock
from unittest.mock import patch

import torch
from accelerate import PartialState, init_empty_weights
from datasets import Dataset, DatasetDict
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, ScalarFormatter
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.quantizers import AutoHfQuantizer

from common.cli import parse_config, run, write_json
from common.demo import build_demo
from common.metrics import synchronize
from common.model import load_tokenizer
from common.plotting import BLUE, GREY, RED, page, save, style
from common.record import ROOT, command_line, environment
from common.study.labels import be_quiet
from common.study.scripts import HERE, METHODS, script
from common.trainer import ReviewTrainer


def decoder(kind: type, hidden: int, inside: int, layers: int, heads: int, keys: int, words: int) -> PretrainedConfig:
    """Of a decoder. inside: of the feed-forward part. keys: heads of keys and values."""
    return kind(
        hidden_size=hidden,
        intermediate_size=inside,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=words,
        max_position_embeddings=8192,
    )


def encoder(hidden: int, inside: int, layers: int, heads: int) -> PretrainedConfig:
    """Of BERT."""
    sizes = {"hidden_size": hidden, "intermediate_size": inside}
    return BertConfig(**sizes, num_hidden_layers=layers, num_attention_heads=heads)


SHAPES = {  # of these models on the Hub
    "minilm-22m": encoder(384, 1536, 6, 12),  # all-MiniLM-L6-v2
    "bert-base": encoder(768, 3072, 12, 12),
    "bert-large": encoder(1024, 4096, 24, 16),
    "qwen-0.5b": decoder(Qwen2Config, 896, 4864, 24, 14, 2, 151_936),  # Qwen2.5-0.5B
    "llama-1.2b": decoder(LlamaConfig, 2048, 8192, 16, 32, 8, 128_256),  # Llama-3.2-1B
    "llama-3b": decoder(LlamaConfig, 3072, 8192, 28, 24, 8, 128_256),  # Llama-3.2-3B
    "llama-7.5b": decoder(LlamaConfig, 4096, 14336, 32, 32, 8, 128_256),  # Llama-3.1-8B, without its last layer
    "qwen-14b": decoder(Qwen2Config, 5120, 13824, 48, 40, 8, 152_064),  # Qwen2.5-14B
    "qwen-32b": decoder(Qwen2Config, 5120, 27648, 64, 40, 8, 152_064),  # Qwen2.5-32B
    "llama-70b": decoder(LlamaConfig, 8192, 28672, 80, 64, 8, 128_256),  # Llama-3.1-70B
}
TINY = {"tiny-bert": encoder(64, 128, 2, 4), "tiny-llama": decoder(LlamaConfig, 64, 128, 2, 4, 2, 30_522)}
WITH_LORA = ("PEFT_LORA", "PEFT_QLORA")
BATCHES, LENGTH = (4, 16), 512
USUAL = {"max_length": LENGTH, "optim": "adamw_torch_fused", "torch_compile": False}
MEASURED = (
    *("trainable_parameters", "peak_memory_bytes", "peak_phase", "memory_bytes", "first_epoch_seconds"),
    *("reviews_per_second", "matrix_share"),
)
GPUS, STARTING = Queue(), Lock()  # the GPUs that no process has; held while one starts
CARDS = {8: "RTX 4060", 16: "T4", 24: "RTX 4090", 48: "L40S", 80: "H100", 141: "H200"}  # GB


def job(backbone: str, method: str, batch: int, checkpointing: bool, **other) -> dict:
    """What is to be measured: the start of its row."""
    settings = {"gradient_checkpointing": checkpointing, "batch": batch}
    return {"backbone": backbone, "method": method, **settings, **USUAL, **other}


EXTRAS = [
    *itertools.starmap(job, itertools.product(("bert-base", "bert-large"), METHODS, (32,), (True, False))),
    *itertools.starmap(job, itertools.product(("minilm-22m",), WITH_LORA, (128,), (True, False))),
    job("minilm-22m", "PEFT_LORA", 256, False),
    job("bert-base", "PEFT_LORA", 128, False),
    *(job("minilm-22m", "PEFT_LORA", batch, False, torch_compile=True) for batch in (128, 256)),
    *(job("bert-base", "PEFT_LORA", batch, False, torch_compile=True) for batch in (32, 128)),
    *(job("llama-7.5b", "PEFT_QLORA", 4, True, optim=name) for name in ("adamw_8bit", "paged_adamw_8bit")),
]


def shape(name: str) -> PretrainedConfig:
    """The configuration of a backbone."""
    return (SHAPES | TINY)[name]


class RandomWeights:
    """Takes the place of AutoModelForSequenceClassification: no file is read."""

    from_config = AutoModelForSequenceClassification.from_config

    @staticmethod
    def from_pretrained(folder, dtype, quantization_config=None, device_map=None, **options):
        config = shape(Path(folder).name)
        for name in ("id2label", "label2id", "pad_token_id"):
            setattr(config, name, options[name])
        with init_empty_weights(include_buffers=False):
            model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        quantizer = AutoHfQuantizer.from_config(quantization_config) if quantization_config else None
        if quantizer:
            quantizer.preprocess_model(model, dtype=dtype, device_map=device_map)
        draw_weights(model, dtype, device_map[""])
        if quantizer:
            quantizer.postprocess_model(model)
            model.hf_quantizer = quantizer
        new = [name for name, _ in model.named_parameters() if name.split(".")[0] in ("score", "classifier")]
        return model, {"missing_keys": new, "mismatched_keys": []}


def draw_weights(model: PreTrainedModel, dtype: torch.dtype, device) -> None:
    """Give a model on the meta device random weights on `device`; 4-bit ones are quantized one by one."""
    for name, weight in list(model.named_parameters()):
        part, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        values = torch.empty(weight.shape, dtype=dtype, device=device)
        values = values.fill_(1) if values.ndim == 1 else values.normal_(std=0.02)
        if type(weight) is nn.Parameter:
            setattr(part, leaf, nn.Parameter(values))
        else:
            settings = {key: value for key, value in vars(weight).items() if not key.startswith("_")}
            setattr(part, leaf, type(weight)(values, requires_grad=False, **settings).to(device))
    for name, values in list(model.named_buffers()):
        part = model.get_submodule(name.rpartition(".")[0])
        part._buffers[name.rpartition(".")[2]] = values.to(device)


def random_texts(batch: int, length: int, updates: int) -> DatasetDict:
    """Texts of `length` tokens: `updates` batches to train on, for the other splits a batch of evaluation."""
    draw = torch.Generator().manual_seed(0)

    def rows(count: int) -> Dataset:
        tokens = torch.randint(5, 30_000, (count, length), generator=draw).tolist()
        labels = [row % 2 for row in range(count)]
        return Dataset.from_dict({"input_ids": tokens, "labels": labels, "truncated": [False] * count})

    return DatasetDict(train=rows(updates * batch), validation=rows(2 * batch), test=rows(2 * batch))


def expected_bytes(config: PretrainedConfig, row: dict) -> int:
    """The formula beside the measurement, for LoRA and QLoRA.

    Weights: 2 bytes each, in blocks of QLoRA 4.127 bits. What trains: 16 bytes each, for weight, gradient and AdamW's
    two averages in 32 bits. What a block keeps for its backward pass, in 16 bits for each token: the inputs of norms,
    activation functions, attention and LoRA, but not those of frozen matrix products. With checkpointing it is every
    block's input, and all that of one block.
    """
    hidden, inside, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    in_4_bits = row["parameters_in_blocks"] if row["method"] == "PEFT_QLORA" else 0
    weights = 2 * (row["parameters"] - in_4_bits) + 4.127 / 8 * in_4_bits
    if is_decoder(config):
        values = hidden * config.num_key_value_heads // config.num_attention_heads
        kept, head = 14 * hidden + 4 * values + 6 * inside, 2 * hidden
    else:
        values, kept, head = hidden, 16 * hidden + 2 * inside, hidden * hidden + 3 * hidden + 2
    lora = layers * 16 * (3 * hidden + values)
    kept = 2 * hidden * layers + kept if row["gradient_checkpointing"] else kept * layers
    return round(weights + 16 * (lora + head) + row["batch"] * row["max_length"] * kept)


def is_decoder(config: PretrainedConfig) -> bool:
    return hasattr(config, "num_key_value_heads")


def counted_operations(config: PretrainedConfig, parameters_in_blocks: int, length: int) -> int:
    """Floating-point operations that training LoRA on one text needs: the matrix products of the blocks and attention,
    forward and for the gradients of their inputs. Frozen weights need no gradient, and what checkpointing computes
    again is not counted."""
    pairs = config.num_hidden_layers * length**2 * config.hidden_size
    # Scores and their product with the values take 2 operations each, and twice as many backward; of a decoder half.
    return 4 * parameters_in_blocks * length + (6 if is_decoder(config) else 12) * pairs


def matrix_speed(size: int) -> float:
    """Floating-point operations per second of this GPU in products of large matrices in 16 bits."""
    left, right = torch.randn(2, size, size, device=PartialState().device, dtype=torch.bfloat16)
    for count in (3, 20):  # the first ones warm up
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            left @ right
        synchronize()
    return 2 * size**3 * count / (time.perf_counter() - start)


def parameters_of(config: PretrainedConfig) -> dict:
    """How many parameters there are, in all and in the matrices of the blocks, which QLoRA has in 4 bits."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    inside = [part.weight for name, part in model.named_modules() if isinstance(part, nn.Linear) and ".layer" in name]
    counts = (sum(weight.numel() for weight in weights) for weights in (model.parameters(), inside))
    return dict(zip(("parameters", "parameters_in_blocks"), counts, strict=True))


def train_once(job: dict, folder: Path) -> dict:
    """What is measured of one run. folder: holds a folder with the backbone's configuration and a tokenizer."""
    updates = 20 if job["parameters"] < 2e9 else 2  # of an epoch; steps of small backbones are over soon
    method = script(job["method"])
    settings = {"epochs": 2, "gradient_accumulation_steps": 1, "seeds": 0, "batch_size": job["batch"]}
    settings |= {name: job[name] for name in (*USUAL, "gradient_checkpointing")}
    settings |= {"model": folder / job["backbone"], "output_dir": folder / "run"}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    config = parse_config(method.Config, method.FOLDER, flags)
    tokenizer = load_tokenizer(config.model, None, config.max_length)
    data = random_texts(config.batch_size, config.max_length, updates)
    whole_steps = patch.object(ReviewTrainer, "in_parts", lambda trainer, step, inputs: [step(inputs)])
    with whole_steps, patch.object(method, "AutoModelForSequenceClassification", RandomWeights):
        found = method.train(config, 0, tokenizer, data, "", ["negative", "positive"])
    phases, (_, first, second) = found["peak_memory_by_phase_bytes"], found["epochs"]
    return {
        **{name: found[name] for name in MEASURED if name in found},
        "peak_phase": max(phases, key=phases.get),
        "first_epoch_seconds": first["seconds"],
        "reviews_per_second": updates * config.batch_size / second["seconds"],
    }


def measure(jobs: list[dict], fastest: float) -> list[dict]:
    """The rows of runs of the same backbone and method. fastest: as of `matrix_speed`."""
    be_quiet()
    backbone, config = jobs[0]["backbone"], shape(jobs[0]["backbone"])
    rows = [settings | parameters_of(config) | dict.fromkeys(MEASURED) for settings in jobs]
    for row in rows:
        row["formula_bytes"] = expected_bytes(config, row) if row["method"] in WITH_LORA else None
    # Last what takes more than what is before it: it may be out of memory, or leave something behind.
    rows.sort(key=lambda row: (row["optim"] != USUAL["optim"], row["formula_bytes"] or 0))
    too_large = math.inf
    with TemporaryDirectory() as name:
        folder = Path(name)
        build_demo(folder)
        tokenizer = AutoTokenizer.from_pretrained(
            folder / "tiny-bert", model_max_length=config.max_position_embeddings
        )
        place = (folder / "tiny-bert").rename(folder / backbone)
        tokenizer.save_pretrained(place)
        config.save_pretrained(place)
        for row in (row for row in rows if (row["formula_bytes"] or 0) < too_large):
            try:
                row |= train_once(row, folder)
            except torch.OutOfMemoryError:
                too_large = row["formula_bytes"] or math.inf
                continue
            if row["formula_bytes"]:
                operations = counted_operations(config, row["parameters_in_blocks"], row["max_length"])
                row["matrix_share"] = row["reviews_per_second"] * operations / fastest
    return rows


def alone(work: Callable, *args) -> object:
    """What `work(*args)` returns in a process of its own, which sees a GPU that no other has."""
    gpu = GPUS.get()
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            with STARTING, patch.dict(os.environ, CUDA_VISIBLE_DEVICES=gpu):  # the process inherits it
                result = pool.submit(work, *args)
            return result.result()
    finally:
        GPUS.put(gpu)


def key(row: dict) -> tuple:
    """What tells one row from another."""
    return tuple(row[name] for name in job("", "", 0, False))


def usual(rows: list[dict], method: str, checkpointing: bool) -> list[dict]:
    """The measured rows of LoRA or QLoRA with the smallest batch and the usual settings, smallest backbone first."""
    settings = job("", method, BATCHES[0], checkpointing)
    names = set(settings) - {"backbone", "max_length"}
    found = [row for row in rows if row["peak_memory_bytes"] and all(row[name] == settings[name] for name in names)]
    return sorted(found, key=lambda row: row["parameters"])


def largest(rows: list[dict], gigabytes: int) -> list[str]:
    """The largest backbone that LoRA trains in so much memory, with checkpointing, and the largest for QLoRA."""
    fitting = [
        [row["backbone"] for row in usual(rows, method, True) if row["peak_memory_bytes"] <= gigabytes * 1e9]
        for method in WITH_LORA
    ]
    return [names[-1] if names else "none" for names in fitting]


def memory_figure(rows: list[dict], demo: bool = False) -> Figure:
    """Peak memory and speed against the number of parameters, for LoRA and QLoRA with the smallest batch; GPUs by
    their memory, with the largest backbones that fit."""
    figure = page(f"What fits, and how fast? {BATCHES[0]} texts of {LENGTH} tokens at a time", (10.4, 8.4), demo)
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    looks = itertools.product(zip(WITH_LORA, (BLUE, RED), "oD", strict=True), ((False, "--"), (True, "-")))
    for (method, colour, marker), (checkpointing, line) in looks:
        found = usual(rows, method, checkpointing)
        look = {"color": colour, "marker": marker, "ms": 5, "label": f"{method}{', checkpointing' * checkpointing}"}
        sizes = [row["parameters"] for row in found]
        above.plot(sizes, [row["peak_memory_bytes"] / 1e9 for row in found], line, **look)
        below.plot(sizes, [row["reviews_per_second"] for row in found], line, **look)
    for gigabytes, card in CARDS.items():
        above.axhline(gigabytes, color=GREY, lw=0.8, ls=":")
        lora, qlora = largest(rows, gigabytes)
        text = f"{gigabytes} GB ({card}): LoRA {lora}, QLoRA {qlora}"
        above.annotate(text, (1.01, gigabytes), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    for axes in (above, below):
        style(axes, grid="y")
        axes.set(xscale="log", yscale="log")
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 3)), major_formatter=ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    above.set_ylabel("peak memory (GB)")
    below.set(ylabel="training (reviews/s)", xlabel="backbone, by its parameters")
    names = {row["parameters"]: row["backbone"] for row in rows}
    below.set_xticks([*names], names.values(), rotation=40, ha="right", minor=False)
    below.xaxis.set_minor_locator(NullLocator())
    above.legend(frameon=False, fontsize=9)
    return figure


def main(argv: list[str] | None = None) -> dict:
    """Measure what is not measured yet; draws the chart and returns the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--demo", action="store_true", help="Two tiny shapes and short texts.")
    args = parser.parse_args(argv)
    shapes, methods = (TINY, WITH_LORA) if args.demo else (args.backbones, args.methods)
    grid = itertools.product(reversed([*shapes]), WITH_LORA, BATCHES, (True, False))
    jobs = [*itertools.starmap(job, grid), *EXTRAS]
    if args.demo:
        jobs = [found | {"max_length": 32} for found in jobs]
    path = HERE / ("runs" if args.demo else "") / "memory_by_size.json"
    before = json.loads(path.read_text()) if path.exists() and not args.demo else {"rows": []}
    rows = before["rows"]
    if rows and before["environment"]["gpu"] != environment()["gpu"]:
        parser.error(f"{path.name} was measured on {before['environment']['gpu']}; move it away to start anew")
    known = set(map(key, rows))
    jobs = [found for found in jobs if found["backbone"] in shapes and found["method"] in methods]
    groups = {}
    for found in jobs:
        if key(found) not in known:
            groups.setdefault((found["backbone"], found["method"]), []).append(found)
    record = {
        "command": command_line("-m common.study.memory_by_size", argv),
        "environment": environment(),
        "rows": rows,
    }
    path.parent.mkdir(exist_ok=True)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = gpus.split(",")
    for gpu in gpus:
        GPUS.put(gpu)
    with ThreadPoolExecutor(len(gpus)) as threads:
        record["matrix_operations_per_second"] = alone(matrix_speed, 256 if args.demo else 8192)
        failures = []
        measured = partial(measure, fastest=record["matrix_operations_per_second"])
        for result in as_completed([threads.submit(alone, measured, group) for group in groups.values()]):
            if error := result.exception():  # the other groups are worth having
                failures.append(error)
                print(f"Failed: {error!r}", flush=True)
                continue
            rows += [row | {"commit": record["environment"]["commit"]} for row in result.result()]
            rows.sort(key=lambda row: (row["parameters"], str(key(row))))
            write_json(record, path)
            print(*result.result(), sep="\n", flush=True)
    if failures:
        raise failures[0]
    save(
        memory_figure(rows, args.demo),
        (path if args.demo else ROOT / "PEFT_QLORA" / path.name).with_suffix(".png"),
        rows,
    )
    print(f"Record:   {path}")
    return record


if __name__ == "__main__":
    run(main)
