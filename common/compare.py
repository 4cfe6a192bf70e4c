"""Which method for my data? All four scripts, one after the other, and a folder with what is needed to decide.

    python -m common.compare --dataset path/to/folder
    python -m common.compare --demo    (no network, no GPU, about a minute)

Flags beside --methods and --output_dir go to every script, whose --help explains them. Each script is a process of
its own, so that time and memory are the method's alone. One that fails does not lose the others: its error is in the
report, and the exit status is 1. With --resume what is finished is not repeated. Cheap references are tested on the
same split, that of the first seed. The report begins with a recommendation.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import DatasetDict
from matplotlib.figure import Figure
from scipy.special import softmax
from sklearn.metrics import ConfusionMatrixDisplay, classification_report
from transformers import HfArgumentParser

from common.cli import fit_to_size, locked, parse_config, public_name, run, whole_file, write_json
from common.data import clean, load_reviews, tokenize
from common.model import load_tokenizer
from common.plotting import DEMO, page, save
from common.record import ROOT, command_line, open_seed, spread
from common.study.comparison import draw_comparison
from common.study.labels import BAG, PROBE
from common.study.predictions import compare, describe
from common.study.references import linear_probes, majority_class, tfidf
from common.study.report import advice, charts, difference_lines, read, results_table, table
from common.study.scripts import METHODS, PASSES, script
from common.trainer import longest_first

MAJORITY = "majority class"
WRONG, SHOWN = 10, 300  # how many texts that are confidently wrong, and characters of each


def is_finished(name: str, config, fingerprint: str) -> bool:
    """Whether --resume is on and an earlier run of this method, with the same flags and reviews, left its record.
    Raises UserError where the flags or the reviews were others, as the script itself would."""
    runs = [open_seed(name, config, seed, fingerprint)[1] for seed in config.seeds]
    record = read(Path(config.output_dir) / "results.json")
    return bool(record) and record["runs"] == runs


def run_script(name: str, flags: list[str]) -> str | None:
    """Run <name>/train.py with its output passed through. Returns None, or where it failed its last line of stderr."""
    command, tail = [sys.executable, str(ROOT / name / "train.py"), *flags], b""
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            while chunk := process.stderr.read1():  # not by lines: a progress bar is one that never ends
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
                tail = (tail + chunk)[-10_000:]
        except SystemExit:  # of Ctrl-C or SIGTERM; what the script says of it need not be said twice
            process.terminate()
            process.communicate()
            raise
    last = tail.decode(errors="replace").strip().rpartition("\n")[2]
    return f"{without_folders(last)} (exit status {process.returncode})" if process.returncode else None


def run_scripts(configs: dict, flags: dict[str, list[str]], fingerprint: str) -> dict[str, str]:
    """Run what is not finished. configs, flags: by method. Returns the errors of those that failed, by method."""
    todo = [name for name, config in configs.items() if not is_finished(name, config, fingerprint)]
    errors = {}
    if len(todo) < len(configs):
        print(f"Finished by an earlier run: {', '.join(name for name in configs if name not in todo)}", flush=True)
    for number, name in enumerate(todo):
        rest = todo[number:]
        left = seconds_left(configs, rest, [done for done in configs if done not in {*rest, *errors}])
        about = f"{left / 60:.0f} minutes" if left >= 90 else f"{left:.0f} seconds"
        print(f"[{number + 1}/{len(todo)}] {name}" + f"; about {about} to go" * (left > 0), flush=True)
        if error := run_script(name, flags[name]):
            errors[name] = error
    return errors


def seconds_left(configs: dict, rest: list[str], done: list[str]) -> float:
    """How long `rest` will take, by the records of `done` and passes through the backbone; 0 where none is done."""
    passes = {name: PASSES[name] * config.epochs + 4 for name, config in configs.items()}  # 4: evaluation, at least
    runs = [run for name in done for run in read(Path(configs[name].output_dir) / "results.json")["runs"]]
    seconds = sum(run["total_seconds"] for run in runs)
    return seconds / sum(passes[name] for name in done) * sum(passes[name] for name in rest) if done else 0


def measure_references(config, tokenizer, reviews: DatasetDict, data: DatasetDict) -> tuple[list[dict], dict]:
    """ "name" and "accuracy" of each reference, best first, and the errors of those that failed, by name.
    data: the tokenised `reviews`, both by split."""
    labels = {split: rows["label"][:] for split, rows in reviews.items()}
    measures: dict[str, Callable[[], dict]] = {
        MAJORITY: lambda: majority_class(labels),
        BAG: lambda: tfidf(reviews, labels),
        PROBE: lambda: linear_probes(config, tokenizer, data, labels, ["mean"])["mean"],
    }
    rows, errors = [], {}
    for name, measure in measures.items():
        print(f"Reference: {name}", flush=True)
        try:
            rows.append({"name": name, **measure()})
        except Exception as error:  # such as texts without words, or too little memory: the methods' runs are kept
            errors[name] = without_folders(" ".join(f"{type(error).__name__}: {error}".split()))
    return sorted(rows, key=lambda row: -row["accuracy"]), errors


def recommend(records: dict[str, dict], answers: dict[str, dict], references: list[dict]) -> str:
    """Two sentences: the fastest of the methods that are above every reference and not clearly below the most accurate
    one; or the best reference, where none is. Not clearly: the 95% interval of the difference includes 0, or within
    one sd.

    records: results.json by method; answers: as of common/study/predictions.py; references: best first.
    """
    if not records:
        return "No method finished, so there is nothing to recommend. The errors are below."
    accuracy = {name: record["summary"]["test_accuracy"] for name, record in records.items()}
    seconds = {name: record["summary"]["train_seconds"]["mean"] for name, record in records.items()}
    rows = [
        {"method": name, "test_accuracy": found["test"]["accuracy"]}
        for name, record in records.items()
        for found in record["runs"]
    ]
    best = max(records, key=lambda name: accuracy[name]["mean"])
    level = {name for name in records if compare(answers[best], answers[name])[1] <= 0}
    level.add(advice(rows, seconds)["method"])
    cheap = references[0] if references else {"name": "", "accuracy": 0}
    above = {name for name in level if accuracy[name]["mean"] > cheap["accuracy"]}
    take = min(above or level, key=seconds.get)
    figures = {name: f"{spread(accuracy[name])}% after {seconds[name]:.1f} s of training" for name in records}
    texts = f"the {records[take]['dataset']['test']:,} test texts"
    share = f"{100 * cheap['accuracy']:.1f}%"
    if not above:
        known = f"{share} of {texts} right. Of the methods {take} would be the one to take; it gets {figures[take]}."
        if cheap["name"] == MAJORITY:
            return f"**Take none of these.** Always answering the most frequent class gets {known}"
        return f"**Take {cheap['name']}.** Without fine-tuning it gets {known}"
    if take == best:
        why = "the most accurate of the methods"
        if any(seconds[name] < seconds[best] for name in level):
            why += ", and no faster one that is level with it beats the reference"
        elif len(records) > 1:
            why += ", and no faster one is level with it"
    else:
        why = f"{best} gets {figures[best]}, which is not clearly more"
    other = f" The best cheap reference, {cheap['name']}, gets {share}, which is less." if references else ""
    return f"**Take {take}.** Of {texts} it gets right {figures[take]}: {why}.{other}"


def confusion_figure(records: list[dict], classes: list[str]) -> Figure:
    """A panel for each record: test texts by true and predicted class, mean over the seeds."""
    columns = min(len(records), 2)
    rows, side = math.ceil(len(records) / columns), min(2.6 + 0.35 * len(classes), 12)  # inches
    size = max(columns * side, 6), rows * side + 0.8
    figure = page("Test texts by true and predicted class", size, records[0]["config"]["demo"])
    names = [textwrap.shorten(name, 20, placeholder="…").replace("$", r"\$") for name in classes]
    for number, record in enumerate(records, 1):
        axes = figure.add_subplot(rows, columns, number, title=record["method"])
        counts = np.mean([found["test"]["confusion_matrix"] for found in record["runs"]], axis=0)
        few = len(classes) <= 20  # the figures of more could not be read
        look = {"cmap": "Blues", "colorbar": False, "values_format": ",.0f", "include_values": few}
        look["im_kw"] = {"vmin": 0}  # else 44 beside 56 would be as pale as nothing
        ConfusionMatrixDisplay(counts, display_labels=names).plot(ax=axes, **look)
        axes.set(xlabel="predicted", ylabel="true")
        axes.tick_params("x", rotation=90 * (len(classes) > 3))
    return figure


def by_class(logits: dict[str, np.ndarray], labels: np.ndarray, classes: list[str]) -> str:
    """A table: a row for each class; for each method precision, recall and F1 in percent, of all seeds' answers.
    logits: by method, (seeds, reviews, classes); labels: (reviews,)."""
    options = {"labels": range(len(classes)), "output_dict": True, "zero_division": 0}
    scores = {
        name: classification_report(np.tile(labels, len(found)), found.argmax(axis=2).ravel(), **options)
        for name, found in logits.items()
    }
    rows = []
    for number, title in enumerate(classes):
        found = [score[str(number)] for score in scores.values()]
        cells = [" / ".join(f"{100 * row[key]:.1f}" for key in ("precision", "recall", "f1-score")) for row in found]
        rows.append([plain(title), f"{np.sum(labels == number):,}", *cells])
    return table(["class", "test texts", *scores], rows)


def confidently_wrong(logits: np.ndarray, labels: np.ndarray, texts: list[str], classes: list[str]) -> str:
    """A table of the texts whose wrong label has the highest probability, a mean over the seeds.
    logits: (seeds, reviews, classes); labels and texts in the order of the reviews."""
    probabilities = softmax(logits, axis=2).mean(axis=0)
    predicted, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    rows = [
        [plain(classes[labels[row]]), plain(classes[predicted[row]]), f"{sure[row]:.3f}", plain(clean(texts[row]))]
        for row in wrong[np.argsort(-sure[wrong], kind="stable")][:WRONG]
    ]
    return table("true,predicted,probability,text", rows).replace("---:", "---") if rows else "None is wrong.\n"


def plain(text: str) -> str:
    """`text` in one line of `SHOWN` characters at most, no sign of which means anything in Markdown."""
    line = " ".join(text.split())
    line = line if len(line) <= SHOWN else f"{line[:SHOWN]}…"
    return re.sub(r"([\\`*_\[\]<>|~$&#!])", r"\\\1", line)


def without_folders(line: str) -> str:
    """`line` with the last part of every absolute path alone."""
    line = line.replace(f"{ROOT}/", "").replace(f"{Path.home()}/", "")  # their names may have spaces
    return re.sub(r"(?<![\w:/.])(~|[A-Z]:)?[/\\]([^\s/\\'\":,]+[/\\])+", "", line)


def write_report(
    place: Path, records: dict, argv, references: list[dict], errors: dict, reviews: DatasetDict, order: np.ndarray
) -> str:
    """Write report.md and its pictures to `place`, where the methods' runs are; returns the recommendation.
    records: results.json by method, most accurate first; errors: of what did not finish, by name; order: the rows of
    the test reviews as the saved logits have them."""
    test, classes = reviews["test"].select(order), reviews["test"].features["label"].names
    answers, logits, labels = {}, {}, np.array(test["label"][:])
    for name, record in records.items():
        seeds = [np.load(place / name / f"seed_{found['seed']}" / "logits.npz") for found in record["runs"]]
        if any((seed["test_labels"] != labels).any() for seed in seeds):
            raise RuntimeError(f"{name}: its logits are not in the order of the reviews")
        answers[name] = {"method": name, "runs": [describe(seed) for seed in seeds]}
        logits[name] = np.stack([seed["test_logits"].astype(float) for seed in seeds])
    advised, ordered = recommend(records, answers, references), [*records.values()]
    sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in reviews.items())
    text = f"# Which method?\n\n{advised}\n\n`{command_line('-m common.compare', argv)}`: {sizes} texts.\n"
    text += "".join(f"\n- {name} did not finish: {plain(error)}\n" for name, error in errors.items())
    if records:
        draw_comparison(ordered, {row["name"]: row["accuracy"] for row in references}, place / "comparison.png")
        save(confusion_figure(ordered, classes), place / "confusion.png", ordered)
        pages, best = [f"[{name}]({name}/results.json)" for name in records], ordered[0]["method"]
        text += f"""
## Results

![comparison of the methods](comparison.png)

{results_table(ordered, pages, references)}
Each method against the next one, in points of test accuracy (paired bootstrap over test texts and seeds):

{difference_lines([*answers.values()]) or "- there is one method only"}
## How they get there

{charts(place, [*records])}
## Classes

![confusion matrices](confusion.png)

Precision / recall / F1 in percent, of all seeds' answers together:

{by_class(logits, labels, classes)}
## Confidently wrong

Of which texts is {best}, the most accurate method, most sure of a wrong label? Is the text odd, or its true label?

{confidently_wrong(logits[best], labels, test["text"][:], classes)}"""
    if any(record["config"]["demo"] for record in ordered):
        text += f"\n{DEMO}.\n"
    with whole_file(place / "report.md") as file:
        file.write_text(text, encoding="utf-8")
    return advised


def main(argv: list[str] | None = None) -> str:
    """Run the methods and the references, and write the report. Returns the recommendation; exits with status 1 where
    a method or a reference failed, with 2 where a flag is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="Which to run. [all four]")
    parser.add_argument(
        "--output_dir", "--output-dir", help="For the report and the runs. [runs/compare/<name of the data>]"
    )
    args, flags = parser.parse_known_args(argv)
    for name in args.methods:  # a wrong flag is refused in the name of the script that does not know it
        known = HfArgumentParser(script(name).Config, prog=f"{name}/train.py", allow_abbrev=False)
        given = known.parse_args(flags)
    data_name = "demo" if given.demo else Path(public_name(given.dataset)).name.split(".")[0]
    data_name += "_partial" * bool(given.max_train_samples or given.max_test_samples)  # as the scripts' own folders
    place = Path(os.path.expanduser(args.output_dir or ROOT / "runs" / "compare" / data_name)).resolve()
    flags = {name: [*flags, "--output_dir", str(place / name)] for name in args.methods}
    configs = {name: parse_config(script(name).Config, script(name).FOLDER, own) for name, own in flags.items()}
    config = next(iter(configs.values()))
    tokenizer = load_tokenizer(config.model, config.model_revision, config.max_length)
    reviews, fingerprint = load_reviews(config, config.seeds[0])  # what cannot be read is refused before any training
    size = len(reviews["train"]) + len(reviews["validation"])
    configs = {name: fit_to_size(own, size) for name, own in configs.items()}
    place.mkdir(parents=True, exist_ok=True)
    with locked(str(place)):
        errors = run_scripts(configs, flags, fingerprint)
        records = {name: read(place / name / "results.json") for name in configs if name not in errors}
        records = dict(sorted(records.items(), key=lambda item: -item[1]["summary"]["test_accuracy"]["mean"]))
        data = tokenize(reviews, tokenizer, config.max_length)
        references, failed = measure_references(config, tokenizer, reviews, data)
        write_json({"rows": references}, place / "references.json")
        lengths = np.array([len(ids) for ids in data["test"]["input_ids"][:]])
        order = np.concatenate(list(longest_first(lengths, len(lengths))))  # of the logits that the scripts save
        advised = write_report(place, records, argv, references, errors | failed, reviews, order)
    print(f"\n{advised.replace('**', '')}\nReport: {place / 'report.md'}")
    if errors := errors | failed:
        sys.exit(f"error: did not finish: {', '.join(errors)}")
    return advised


if __name__ == "__main__":
    run(main)
