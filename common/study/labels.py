"""How accurate is each method with few labels, and how long does it train? By the number of labels, 32 to all.

    python -m common.study.labels
    python -m common.study.labels --demo
    python -m common.study.labels --jobs 6 --methods PEFT_LORA --sizes 100 1000 -- --dataset ~/imdb --model ~/minilm
    python -m common.study.labels --tune
    python -m common.study.labels --record labels_rank_64 --methods PEFT_LORA --sizes 1000 25000 -- --lora_r 64

Every draw is another random, stratified subset of the training reviews and another seed. The four methods and full
fine-tuning run by the scripts' own `main` with `--max_train_samples` and nothing else. The two references choose their
regularisation by cross-validation within the draw. All are tested on the whole test set. Flags after `--` go to the
scripts. Writes common/study/labels.json, row by row, and the chart labels.png; rows that are there already stay, so
that an interrupted study goes on. `--record` gives draws with other flags a record of their own. With other reviews,
another backbone or --demo the records go to common/study/runs/<name of the data>. `--jobs`: draws at a time, spread
over the GPUs; each then takes longer.

`--tune` compares `SETTINGS` on other draws, whose seeds start at 100, tested on 2,000 training reviews outside
the draw; the test set plays no part. Writes common/study/labels_tuning.json.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch
from datasets import DatasetDict, concatenate_datasets
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, PercentFormatter, ScalarFormatter
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from common.cli import UPDATES, parse_config, public_name, run, write_json
from common.data import clean, load_reviews, stratified_rows, tokenize
from common.metrics import ClassificationScores
from common.model import load_tokenizer
from common.plotting import BLUE, GREY, ORANGE, PALE, RED, SKY, page, save, style
from common.record import command_line, environment
from common.study import full_fine_tuning, references
from common.study.scripts import HERE, METHODS, record_path, script

FULL, BAG, PROBE = full_fine_tuning.FOLDER.name, "TF-IDF + logistic regression", "linear probe on the mean"
EVERYTHING = 25_000  # stands for all training reviews
SIZES = (32, 100, 320, 1000, 3200, 10_000, EVERYTHING)
FIRST_TUNING_SEED, OUTSIDE = 100, 2000
DEMO = {"sizes": [40, 200], "draws": 2}
# What --tune compares for a method: flags beside those of every run, those of the script or of `tuning_parser`.
SETTINGS = {
    "PEFT_LORA": {
        "as it is": [],
        "head's rate 3e-4": ["--head_learning_rate", "3e-4"],
        "head's rate 2e-3": ["--head_learning_rate", "2e-3"],
        "rate 2e-3, as in batches of 128": ["--learning_rate", "2e-3"],
        "longer warm-up": ["--warmup", "0.3"],
        "a third of the updates": ["--updates", "200"],
        "three times the updates": ["--updates", "1800"],
        "head alone first": ["--head_first"],
        "all linear layers": ["--target_modules", "all-linear"],
    },
    "PEFT_QLORA": {"as it is": [], "head's rate 2e-3": ["--head_learning_rate", "2e-3"]},
    "LAST_LAYER": {
        "as it is": [],
        "rate 3e-4": ["--learning_rate", "3e-4"],
        "longer warm-up": ["--warmup", "0.3"],
        "a third of the updates": ["--updates", "200"],
        "two blocks": ["--blocks", "2"],
    },
    "NEW_HEAD": {"as it is": [], "rate 1e-2": ["--learning_rate", "1e-2"]},
    FULL: {"as it is": [], "rate 3e-5": ["--learning_rate", "3e-5"]},
}
TUNED_SIZES = (100, 1000)
LOOKS = {  # markers and dashes hold in grey
    FULL: {"color": "black", "marker": "s", "ls": "--"},
    "PEFT_LORA": {"color": BLUE, "marker": "o"},
    "PEFT_QLORA": {"color": SKY, "marker": "D", "ls": "--"},
    "LAST_LAYER": {"color": RED, "marker": "^"},
    "NEW_HEAD": {"color": ORANGE, "marker": "v"},
    BAG: {"color": GREY, "marker": "x", "ls": ":"},
    PROBE: {"color": PALE, "marker": "+", "ls": "-."},
}
LEGEND = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "frameon": False, "fontsize": 9}


def method(name: str) -> ModuleType:
    """The script of this name, or full fine-tuning."""
    return full_fine_tuning if name == FULL else script(name)


def fine_tune(job: dict) -> dict:
    """One draw through the script's own `main`. job: "method", "labels", "seed", "flags"."""
    with TemporaryDirectory() as folder:
        flags = [*job["flags"], "--max_train_samples", str(job["labels"]), "--seeds", str(job["seed"])]
        record = method(job["method"]).main([*flags, "--output_dir", folder])
    config, found = record["config"], record["runs"][0]
    updates = config["epochs"] * -(-found["train_reviews"] // config["batch_size"])
    return {
        "test_accuracy": found["test"]["accuracy"],
        "test_f1": found["test"]["f1"],
        "train_reviews": found["train_reviews"],
        "train_sha256": found["train_sha256"],
        **{name: config[name] for name in ("batch_size", "epochs", "learning_rate")},
        "updates": updates,
        "train_seconds": found["train_seconds"],
        "total_seconds": found["total_seconds"],
    }


def classify(job: dict) -> dict:
    """One draw of a reference: logistic regression on all its reviews, none held out for validation."""
    with TemporaryDirectory() as folder:
        settings = parse_config(references.Config, references.FOLDER, [*job["flags"], "--output_dir", folder])
        settings.max_train_samples = job["labels"]
        reviews, _ = load_reviews(settings, job["seed"])
        splits = {"train": concatenate_datasets([reviews["train"], reviews["validation"]]), "test": reviews["test"]}
        labels = {split: np.array(rows["label"][:]) for split, rows in splits.items()}
        if job["method"] == BAG:
            texts = {split: list(map(clean, rows["text"][:])) for split, rows in splits.items()}
            rare = 1 if len(labels["train"]) < 1000 else 2
            step = TfidfVectorizer(ngram_range=(1, 2), min_df=rare, sublinear_tf=True)
            strengths, features = (1, 10, 100), texts
        else:
            tokenizer = load_tokenizer(settings.model, settings.model_revision, settings.max_length)
            data = tokenize(DatasetDict(splits), tokenizer, settings.max_length)
            step, strengths = StandardScaler(), (0.001, 0.01, 0.1, 1)
            model = references.frozen_backbone(settings)
            features = {
                split: references.backbone_features(model, rows, tokenizer.pad_token_id, 64)["mean"]
                for split, rows in data.items()
            }
        pipeline = make_pipeline(step, LogisticRegression(max_iter=1000))
        classifier = GridSearchCV(pipeline, {"logisticregression__C": strengths}, cv=5)
        predictions = classifier.fit(features["train"], labels["train"]).predict(features["test"])
        scores = ClassificationScores(keep_in_memory=True).compute(
            predictions=predictions, references=labels["test"], num_classes=len(set(labels["train"]))
        )
        return {
            "test_accuracy": scores["accuracy"],
            "test_f1": scores["f1"],
            "train_reviews": len(labels["train"]),
            "C": classifier.best_params_["logisticregression__C"],
            "train_seconds": classifier.refit_time_,
        }


def outside_the_draw(load):
    """`load_reviews` whose test split is `OUTSIDE` training reviews that are not in the draw."""

    def load_draw(config, seed=0):
        everything, fingerprint = load(replace(config, max_train_samples=None, max_test_samples=None))
        draw, _ = load(config, seed)
        known = {*draw["train"]["text"][:], *draw["validation"]["text"][:]}
        rest = concatenate_datasets([everything["train"], everything["validation"]])
        rest = rest.select([row for row, text in enumerate(rest["text"][:]) if text not in known])
        draw["test"] = rest.select(stratified_rows(rest["label"][:], OUTSIDE, seed=0))
        return draw, fingerprint

    return load_draw


def tuning_parser() -> argparse.ArgumentParser:
    """What --tune varies beside the scripts' own flags."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--warmup", type=float, default=0.1)
    parser.add_argument("--head_first", action="store_true")
    return parser


def train_head_first(trainer: Trainer) -> None:
    """Train the head alone, before LoRA's updates train with it (LP-FT, Kumar et al., 2022, arXiv:2202.10054)."""
    updates = [weight for name, weight in trainer.model.named_parameters() if "lora_" in name]
    off = {"eval_on_start": False, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    for weight in updates:
        weight.requires_grad_(False)
    collator = DataCollatorWithPadding(trainer.processing_class)
    Trainer(trainer.model, replace(trainer.args, **off), collator, trainer.train_dataset).train()
    for weight in updates:
        weight.requires_grad_(True)


def tune(job: dict) -> dict:
    """One draw with one setting, scored outside the draw. job: as of `fine_tune`, and "setting"."""
    module = full_fine_tuning.SCRIPT if job["method"] == FULL else script(job["method"])
    setting, flags = tuning_parser().parse_known_args(job["flags"])
    preflight = module.preflight

    def prepare(config, trainer, new):
        preflight(config, trainer, new)
        if setting.head_first:
            train_head_first(trainer)

    def arguments(**given):
        return TrainingArguments(**given | {"warmup_steps": setting.warmup})

    changes = {"load_reviews": outside_the_draw(load_reviews), "preflight": prepare}
    with (
        patch.multiple(module, **changes),
        patch("transformers.TrainingArguments", arguments),
        patch("common.cli.UPDATES", setting.updates),
    ):
        return fine_tune(job | {"flags": flags})


def be_quiet() -> None:
    """No output from this process, which would mix with that of the others."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())


def measure(job: dict) -> dict:
    """The row of one job."""
    work = tune if "setting" in job else classify if job["method"] in (BAG, PROBE) else fine_tune
    return {name: value for name, value in job.items() if name != "flags"} | work(job)


def wanted(args: argparse.Namespace) -> list[dict]:
    """The jobs: three draws of everything first, and of them those with most labels, which take longest."""
    jobs = []
    for name, size in itertools.product(args.methods, sorted(args.sizes, reverse=True)):
        first, draws = (FIRST_TUNING_SEED, 3) if args.tune else (0, 5 if size <= 1000 else 3)
        draws = args.draws or draws
        settings = SETTINGS.get(name, {}) if args.tune else {None: []}
        for (setting, flags), seed in itertools.product(settings.items(), range(first, first + draws)):
            job = {"method": name, "labels": size, "seed": seed, "flags": [*args.flags, *flags]}
            jobs.append(job | ({"setting": setting} if args.tune else {}))
    return sorted(jobs, key=lambda job: (job["seed"] % FIRST_TUNING_SEED > 2, -job["labels"]))


def labels_figure(rows: list[dict], jobs: int = 1, demo: bool = False) -> Figure:
    """Test accuracy against the number of labels, with a band of one sd for each method; below it, training time,
    measured with `jobs` draws at a time."""
    figure = page("How many labels does each method need?", (8.6, 7.6), demo)
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for (name, look), axes in itertools.product(LOOKS.items(), (above, below)):
        measure = "test_accuracy" if axes is above else "train_seconds"
        found = {}
        for row in rows:
            if row["method"] == name:
                found.setdefault(row["labels"], []).append(row[measure])
        if not found or (axes is below and name in (BAG, PROBE)):
            continue
        sizes = sorted(found)
        means = np.array([np.mean(found[size]) for size in sizes])
        axes.plot(sizes, means, label=name, **look)
        if axes is above:
            sds = np.array([np.std(found[size], ddof=1) if len(found[size]) > 1 else 0 for size in sizes])
            axes.fill_between(sizes, means - sds, means + sds, color=look["color"], alpha=0.15, lw=0)
    for axes in (above, below):
        style(axes, grid="y")
    above.set(xscale="log", ylabel="test accuracy")
    above.yaxis.set_major_formatter(PercentFormatter(1, 0))
    below.set(
        yscale="log", ylabel=f"training (seconds,\n{jobs} at a time)", xlabel="labels, those of validation included"
    )
    below.yaxis.set_major_formatter(ScalarFormatter())
    below.yaxis.set_minor_formatter(NullFormatter())
    ticks = sorted({row["labels"] for row in rows})
    below.set_xticks(ticks, ["all" if size == EVERYTHING else f"{size:,}" for size in ticks], minor=False)
    below.xaxis.set_minor_locator(NullLocator())
    handles, names = above.get_legend_handles_labels()
    highest = sorted(zip(handles, names, strict=True), key=lambda line: -line[0].get_ydata()[-1])  # as the lines end
    above.legend(*zip(*highest, strict=True), **LEGEND)
    return figure


def key(row: dict) -> tuple:
    """What tells one row from another."""
    return row["method"], row["labels"], row["seed"], row.get("setting")


def main(argv: list[str] | None = None) -> dict:
    """Measure what is not measured yet, writing the record row by row; draws the chart and returns the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [*METHODS, FULL, BAG, PROBE]
    parser.add_argument("--methods", nargs="+", choices=everything, default=everything)
    parser.add_argument("--sizes", nargs="+", type=int, help="Labels, those of validation included.")
    parser.add_argument(
        "--draws", type=int, help="Subsets for each size. [5 up to 1,000 labels, 3 above; 3 with --tune]"
    )
    parser.add_argument("--record", help="Name of the record and of the chart. [labels, or labels_tuning]")
    parser.add_argument("--jobs", type=int, default=1, help="Draws at a time, spread over the GPUs. [1]")
    parser.add_argument("--tune", action="store_true", help="Compare settings, on draws and reviews of their own.")
    parser.add_argument("--demo", action="store_true", help="Two sizes and draws of generated reviews, a tiny model.")
    parser.add_argument("flags", nargs="*", help="Of the scripts.")
    args = parser.parse_args(argv)
    if args.demo:
        args.flags, args.sizes = ["--demo", *args.flags], args.sizes or DEMO["sizes"]
        args.draws = args.draws or DEMO["draws"]
    args.sizes = args.sizes or (TUNED_SIZES if args.tune else SIZES)
    name = args.record or ("labels_tuning" if args.tune else "labels")
    first = method(args.methods[0]) if args.methods[0] in (*METHODS, FULL) else references
    path = record_path(name, parse_config(first.Config, HERE, args.flags))
    same = {"flags": [public_name(flag) for flag in args.flags]} | ({"settings": SETTINGS} if args.tune else {})
    before = json.loads(path.read_text()) if path.exists() and not args.demo else {"rows": []} | same
    rows = before["rows"]
    for name in same:
        if before.get(name) != same[name]:
            parser.error(f"{path.name} was made with other {name}: {before.get(name)}; move it away to start anew")
    done = set(map(key, rows))
    record = {
        "command": command_line("-m common.study.labels", argv),
        **same,
        "jobs_at_a_time": args.jobs,
        "environment": environment(),
        "rows": rows,
    }
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    gpus = gpus[: args.jobs]
    jobs = [job for job in wanted(args) if key(job) not in done]
    failures = []
    with contextlib.ExitStack() as stack:
        initializer = be_quiet if args.jobs > 1 else None
        pools = [
            stack.enter_context(
                ProcessPoolExecutor(len(range(number, args.jobs, len(gpus))), get_context("spawn"), initializer)
            )
            for number in range(len(gpus))
        ]
        results = []
        for job, (gpu, pool) in zip(jobs, itertools.cycle(zip(gpus, pools, strict=True)), strict=False):
            with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=gpu):  # for the process that this may start
                results.append(pool.submit(measure, job))
        for result in as_completed(results):
            if error := result.exception():  # the other draws are worth having
                failures.append(error)
                print(f"A draw failed: {error}", file=sys.stderr, flush=True)
                continue
            rows.append(result.result() | {"commit": record["environment"]["commit"]})
            print(rows[-1], flush=True)
            rows.sort(key=lambda row: (everything.index(row["method"]), row["labels"], str(key(row))))
            write_json(record, path)
    if failures:
        raise failures[0]
    if not args.tune:
        save(labels_figure(rows, args.jobs, args.demo), path.with_suffix(".png"), rows)
    print(f"Record:   {path}")
    return record


if __name__ == "__main__":
    run(main)
