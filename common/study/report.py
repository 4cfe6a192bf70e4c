"""Writes every figure in the READMEs from the records: measures nothing itself.

    python -m common.study.report

A README names what it wants between two comments, `<!-- results A B -->` and `<!-- end -->`: here the comparison of
the folders A and B. What stands between them is replaced. common/study/comparison.png is drawn as well.
"""

import itertools
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

from common.cli import UserError, run
from common.plotting import noun
from common.record import ROOT, spread, summarize
from common.study.comparison import draw_comparison
from common.study.labels import BAG, EVERYTHING, FULL
from common.study.memory_by_size import BATCHES, CARDS, SHAPES, WITH_LORA, job, key, largest
from common.study.predictions import compare, right_answers
from common.study.tricks import ALL, TRICKS, worth

BLOCK = re.compile(r"(?P<start><!-- (?P<name>\w+)(?P<words>[^>]*) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
UNMEASURED = "_Not measured yet._\n"
COMPARED = {  # what must be the same in the records of one table
    "model": ("weights_sha256",),
    "dataset": ("sha256", "train", "validation", "test"),
    "config": ("max_length", "epochs", "batch_size", "class_weights", "seeds"),
    "environment": ("gpu",),
}


def table(header: str | list[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; the first column is text, the others are figures. header: its titles, listed
    or with commas between."""
    titles = header.split(",") if isinstance(header, str) else header
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def read(path: Path) -> dict | None:
    """The record in `path`, if there is one."""
    return json.loads(path.read_text()) if path.exists() else None


def results(root: Path, folders: list[str]) -> str:
    """The methods side by side, best test accuracy first; then full fine-tuning, and what costs less."""
    records = [record for folder in folders if (record := read(root / folder / "results.json"))]
    if len(records) < len(folders):
        return UNMEASURED
    records.sort(key=lambda record: -record["summary"]["test_accuracy"]["mean"])
    pages = [f"[{record['method']}]({record['method']}/README.md)" for record in records]
    study = root / "common" / "study"
    if full := read(study / "full_fine_tuning.json"):
        records.append(full)
        pages.append(f"[{full['method']}](common/study/full_fine_tuning.py)")
    check_comparable(records)
    return (
        "![comparison of the methods](common/study/comparison.png)\n\n"
        f"{results_table(records, pages, reference_rows(root))}"
    )


def check_comparable(records: list[dict]) -> None:
    """Raise UserError where records are not of the same weights, reviews, budget and GPU, and name what differs."""
    for part, names in COMPARED.items():
        for name, record in itertools.product(names, records[1:]):
            found, first = record[part].get(name), records[0][part].get(name)
            if found != first:
                what = f"{part} {name} is {first} in {records[0]['method']} and {found} in {record['method']}"
                raise UserError(f"the records cannot be compared: {what}")


def results_table(records: list[dict], pages: list[str], references: list[dict]) -> str:
    """A row for each results.json, titled by its link in `pages`, and below them one for each reference; before the
    table a sentence on its units. references: "name" and "accuracy" of each."""
    rows = [
        [
            page,
            f"{record['model']['trainable_parameters']:,} ({record['model']['trainable_percent']:.2f}%)",
            *(spread(record["summary"][name]) for name in ("test_accuracy", "test_f1", "accuracy_gain")),
            spread(record["summary"]["peak_memory_bytes"], 1e9, 2),
            spread(record["summary"]["train_seconds"], 1, 1),
            f"{statistics.mean(run['train_reviews_per_second'] for run in record['runs']):,.0f}",
            f"{record['runs'][0]['checkpoint_bytes'] / 1e6:.1f}",
        ]
        for page, record in zip(pages, records, strict=True)
    ]
    rows += [[row["name"], "", f"{100 * row['accuracy']:.1f}", *[""] * 6] for row in references]
    speed = f"{noun(records[0])}/s"
    header = f"method,trainable parameters,test accuracy,F1,gain,peak memory (GB),training (s),{speed},saved (MB)"
    seeds, device = len(records[0]["runs"]), records[0]["environment"]["gpu"] or "CPU"
    return (
        f"Accuracy, F1 and gain in percent; mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}, on one "
        f"{device}. Gain is the accuracy after training less the accuracy before.\n\n{table(header, rows)}"
    )


def reference_rows(root: Path) -> list[dict]:
    """What `python -m common.study.references` measured, best first."""
    rows = (read(root / "common" / "study" / "references.json") or {}).get("rows", [])
    return sorted(rows, key=lambda row: -row["accuracy"])


def reference_lines(root: Path) -> dict[str, float]:
    """The test accuracies that the comparison chart draws as lines, by name."""
    full = read(root / "common" / "study" / "full_fine_tuning.json")
    lines = {full["method"]: full["summary"]["test_accuracy"]["mean"]} if full else {}
    return lines | {row["name"]: row["accuracy"] for row in reference_rows(root)}


def references(root: Path, _: list[str]) -> str:
    """What was chosen on validation for each reference, and what test texts in the training reviews can be worth."""
    rows = [
        [row["name"], row["C"], f"{100 * row['validation_accuracy']:.2f}", f"{100 * row['accuracy']:.2f}"]
        for row in reference_rows(root)
        if "C" in row
    ]
    if not rows:
        return UNMEASURED
    record = read(root / "common" / "study" / "references.json")
    twice, best = record["test_texts_in_train"], max(reference_lines(root).values())
    return (
        f"{source(record)}\n\n{table('reference,C,validation accuracy,test accuracy', rows)}\n"
        f"{twice['count']:,} test texts ({100 * twice['share']:.2f}%) are among the training reviews too. If a model "
        f"of {100 * best:.1f}% test accuracy is right on all of them for that reason, it gains at most "
        f"{100 * twice['share'] * (1 - best):.2f} points.\n"
    )


def charts(root: Path, folders: list[str]) -> str:
    """The pairs of charts, a row for each method."""
    rows = [
        [f"![{folder}: accuracy and F1]({folder}/bar_chart.png)", f"![{folder}: epochs]({folder}/line_chart.png)"]
        for folder in folders
        if (root / folder / "results.json").exists()
    ]
    return table("before and after,across epochs", rows).replace("---:", "---") if rows else UNMEASURED


def result(folder: Path, _: list[str]) -> str:
    """One method's runs: a row for each seed, then mean ± sd."""
    record = read(folder / "results.json")
    if not record:
        return UNMEASURED
    rows = [
        [
            f"seed {run['seed']}",
            run["best_epoch"],
            f"{100 * chosen['validation_accuracy']:.2f}",
            f"{100 * run['test']['accuracy']:.2f}",
            f"{100 * run['test']['f1']:.2f}",
            f"{run['train_seconds']:.1f}",
            f"{run['train_reviews_per_second']:,.0f}",
            f"{run['peak_memory_bytes'] / 1e9:.2f}",
        ]
        for run in record["runs"]
        for chosen in run["epochs"]
        if chosen["epoch"] == run["best_epoch"]
    ]
    summary = record["summary"]
    accuracy, f1 = (spread(summary[name], decimals=2) for name in ("test_accuracy", "test_f1"))
    seconds, memory = spread(summary["train_seconds"], 1, 1), spread(summary["peak_memory_bytes"], 1e9, 2)
    rows.append(["**mean ± sd**", "", "", accuracy, f1, seconds, "", memory])
    header = "run,chosen epoch,validation accuracy,test accuracy,test F1,training (s),reviews/s,peak memory (GB)"
    sizes, environment = record["dataset"], record["environment"]
    untrained = statistics.mean(run["untrained_test"]["accuracy"] for run in record["runs"])
    return (
        f"{source(record)} On {environment['gpu'] or environment['cpu']}, with torch {environment['torch']} and "
        f"transformers {environment['transformers']}. {sizes['train']:,} training, {sizes['validation']:,} validation "
        f"and {sizes['test']:,} test reviews. Accuracy and F1 in percent; before training the test accuracy is "
        f"{100 * untrained:.1f}.\n\n{table(header, rows)}"
    )


def chart(folder: Path, names: list[str]) -> str:
    """The chart of that name, once it has been drawn."""
    return "".join(f"![{name}]({name})\n" for name in names if (folder / name).exists()) or UNMEASURED


def source(record: dict) -> str:
    """The command that left `record`, and the commits it ran at; a copy of the code without a history has none."""
    environment = record["environment"]
    commits = {row.get("commit", environment["commit"]) for row in record.get("rows") or [{}]}
    names = ", ".join(sorted((commit or "unknown")[:10] for commit in commits))
    return f"`{record['command']}`, commit {names}{' with uncommitted changes' * bool(environment.get('dirty'))}."


COSTS = {  # of a sweep's runs: title and format
    "trainable_parameters": ("trainable parameters", "{:,}".format),
    "train_seconds": ("training (s)", "{:.1f}".format),
    "peak_memory_bytes": ("peak memory (GB)", lambda number: f"{number / 1e9:.2f}"),
}


def best_rates(results: list[dict], names: list[str]) -> list[dict]:
    """Where a sweep varies learning rates beside other flags: for the others' every combination its best rate."""
    if "--learning_rate" not in names or len(names) == 1:
        return results
    best = {}
    for row in sorted(results, key=itemgetter("validation_accuracy")):
        best[tuple(row[name] for name in names if name != "--learning_rate")] = row
    return [row for row in results if row in best.values()]


def sweep(folder: Path, words: list[str]) -> str:
    """What validation said of hyperparameters and other choices. words: a method, on another page than its own."""
    root, name = (folder, words[0]) if words else (folder.parent, folder.name)
    study, text = root / "common" / "study", ""
    for file in (*sorted(study.glob(f"{name}_sweep_*.json")), *study.glob(f"{name}_variants.json")):
        record = read(file)
        measured = ("validation_accuracy", "validation_loss", "best_epoch")
        names = [name for name in record["results"][0] if name == "variant" or name.startswith("--")]
        first, *others = best_rates(record["results"], names)
        costs = [name for name in COSTS if len({row.get(name) for row in (first, *others)}) > 1 and len(names) > 1]
        rows = [
            [
                *(row[name] for name in names),
                f"{100 * row['validation_accuracy']:.2f}",
                "not finite" if row["validation_loss"] is None else f"{row['validation_loss']:.4f}",
                *(COSTS[name][1](row[name]) for name in costs),
            ]
            # the same to the last digit: a choice that this method does not have
            for row in [first, *(row for row in others if any(row[name] != first[name] for name in measured))]
        ]
        columns = [*(name.lstrip("-") for name in names), "validation accuracy", "validation loss"]
        header = ",".join([*columns, *(COSTS[name][0] for name in costs)])
        text += f"{source(record)}\n\n{table(header, rows)}\n"
    return text or UNMEASURED


def benchmark(root: Path, _: list[str]) -> str:
    """The usual way, the careful way and ours, on every machine that common/study/benchmark.py ran on."""
    text = ""
    for file in sorted((root / "common" / "study").glob("benchmark_*.json")):
        record = read(file)
        rows = []
        for name, sides in record["methods"].items():
            if "ratios" not in sides:
                continue
            speeds, memory = (
                [statistics.median(sides[side][key]) for side in ("usual", "careful", "ours")]
                for key in ("reviews_per_second", "peak_memory_bytes")
            )
            ratios = ["{median:.1f} ({min:.1f} to {max:.1f})".format(**ratio) for ratio in sides["ratios"].values()]
            memory = " / ".join(f"{size / 1e9:.2f}" for size in memory)
            rows.append([name, *(f"{speed:,.0f}" for speed in speeds), *ratios, memory])
        header = "method,usual (reviews/s),careful,ours,ours / usual (range),ours / careful (range),peak memory (GB)"
        device = record["environment"]["gpu"] or record["environment"]["cpu"]
        text += f"On {device}: {source(record)}\n\n{table(header, rows)}\n" if rows else ""
    return text or UNMEASURED


def tricks(root: Path, _: list[str]) -> str:
    """Speed and memory of each method with all tricks, and with each of them left out."""
    record = read(root / "common" / "study" / "tricks.json")
    if not record:
        return UNMEASURED
    rows = []
    for name, found in record["methods"].items():
        for trick in filter(found.get, (ALL, *TRICKS[name])):
            speed, memory = map(statistics.median, found[trick].values())
            slower = "" if trick == ALL else "{speed:.2f} ({min:.2f} to {max:.2f})".format(**worth(found, trick))
            left_out = "nothing" if trick == ALL else trick
            rows.append([f"{name}: {left_out}", f"{speed:,.0f}", slower, f"{memory / 1e9:.2f}"])
    header = "left out,reviews/s,speed with it / without (range),peak memory (GB)"
    return f"On {record['environment']['gpu']}: {source(record)}\n\n{table(header, rows)}"


def span(counts: Iterable[int]) -> str:
    """ "3", or "2 to 5"."""
    counts = sorted(counts)
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def accuracy_by_labels(rows: list[dict], title: str) -> str:
    """A table of test accuracies, mean ± sd over draws: a row for each `title`, a column for each number of labels."""
    found, sizes = {}, sorted({row["labels"] for row in rows})
    for row in rows:
        found.setdefault(row[title], {}).setdefault(row["labels"], []).append(row["test_accuracy"])
    lines = [
        [name, *(spread(summarize(draws[size])) if size in draws else "" for size in sizes)]
        for name, draws in found.items()
    ]
    return table([title, *("all labels" if size == EVERYTHING else f"{size:,}" for size in sizes)], lines)


def labels(root: Path, _: list[str]) -> str:
    """Chart and table of the methods by the number of labels."""
    record = read(root / "common" / "study" / "labels.json")
    if not record:
        return UNMEASURED
    minutes = sum(row.get("total_seconds", 0) for row in record["rows"]) / 60
    counts = Counter((row["method"], row["labels"]) for row in record["rows"]).values()
    return (
        "![test accuracy by the number of labels](common/study/labels.png)\n\n"
        f"{source(record)} On {record['environment']['gpu']}, {record['jobs_at_a_time']} draws at a time; those of "
        f"the fine-tuning methods add up to {minutes:.0f} minutes. Test accuracy in percent, mean ± standard "
        f"deviation over {span(counts)} draws.\n\n"
        f"{accuracy_by_labels(record['rows'], 'method')}"
    )


def advice(rows: list[dict], seconds: dict[str, float]) -> dict | None:
    """Of one number of labels: the fastest method of those within one sd of the most accurate, and the scores of all.
    seconds: of training with all labels, by method."""
    found = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    if not set(seconds) <= set(found):
        return None
    scores = {name: summarize([row["test_accuracy"] for row in draws]) for name, draws in found.items()}
    best = max(seconds, key=lambda name: scores[name]["mean"])
    lowest = scores[best]["mean"] - (scores[best]["sd"] or 0)  # not a method's own sd, which one failed draw widens
    level = [name for name in seconds if scores[name]["mean"] >= lowest]
    return {"method": min(level, key=seconds.get), "scores": scores}


def guide(root: Path, folders: list[str]) -> str:
    """Which method to take, by questions that a reader can answer: each answer with its figures and its command."""
    study, records = root / "common" / "study", {folder: read(root / folder / "results.json") for folder in folders}
    counted, full = read(study / "labels.json"), read(study / "full_fine_tuning.json")
    if not (all(records.values()) and counted and full):
        return UNMEASURED
    rows, alone = [], {name: record["summary"]["train_seconds"]["mean"] for name, record in records.items()}
    for size in sorted({row["labels"] for row in counted["rows"]}):
        if advised := advice([row for row in counted["rows"] if row["labels"] == size], alone):
            name, scores = advised["method"], advised["scores"]
            others = [spread(scores[other]) if other in scores else "" for other in (BAG, FULL)]
            rows.append([f"{size:,}", f"[{name}]({name}/README.md)", spread(scores[name]), *others])
    lora, qlora, last = (records[name] for name in ("PEFT_LORA", "PEFT_QLORA", "LAST_LAYER"))
    weights = [f"{record['runs'][0]['memory_bytes']['weights'] / 1e6:,.0f} MB" for record in (lora, qlora)]
    saved = [f"{record['runs'][0]['checkpoint_bytes'] / 1e6:.1f} MB" for record in (lora, last, full)]
    seconds = [f"{record['summary']['train_seconds']['mean']:.0f} s" for record in (last, lora)]
    accuracy = {record["method"]: spread(record["summary"]["test_accuracy"]) for record in records.values()}
    bag = {row["name"]: f"{100 * row['accuracy']:.1f}" for row in reference_rows(root)}.get(BAG, "")
    answers = [
        [
            "Does the backbone fit your GPU?",
            f"Yes: PEFT_LORA. No: PEFT_QLORA, which keeps it in 4 bits. Weights here: {' and '.join(weights)}",
            "`python PEFT_QLORA/train.py`",
        ],
        [
            "Many tasks on one backbone?",
            "PEFT_LORA saves {} for each task, LAST_LAYER {}, full fine-tuning {}".format(*saved),
            "`python PEFT_LORA/train.py`",
        ],
        [
            "Is time short?",
            f"LAST_LAYER reaches {accuracy['LAST_LAYER']} in {seconds[0]} of training, PEFT_LORA "
            f"{accuracy['PEFT_LORA']} in {seconds[1]}",
            "`python LAST_LAYER/train.py`",
        ],
        [
            "No GPU?",
            f"NEW_HEAD, which runs the backbone once per review: {accuracy['NEW_HEAD']}. Without a backbone {BAG} "
            f"reaches {bag}",
            "`python NEW_HEAD/train.py`",
        ],
    ]
    return (
        "**How many labels do you have?** Take the fastest of the four methods that are within one standard deviation "
        "of the most accurate of them (test accuracy in percent, mean ± standard deviation over draws of the labels; "
        "labels include those for validation):\n\n"
        f"{table(f'labels,take,test accuracy,{BAG},{FULL}', rows)}\n**What else matters?** Figures are of this "
        f"backbone and all labels.\n\n{table('question,answer,command', answers).replace('---:', '---')}"
    )


def labels_tuning(folder: Path, words: list[str]) -> str:
    """What other settings of a method do with few labels, on the draws that all of them have. words: as of `sweep`."""
    root, name = (folder, " ".join(words)) if words else (folder.parent, folder.name)
    record = read(root / "common" / "study" / "labels_tuning.json")
    rows = [row for row in record["rows"] if row["method"] == name] if record else []
    if not rows:
        return UNMEASURED
    seeds = {}
    for row in rows:
        seeds.setdefault(row["labels"], {}).setdefault(row["setting"], set()).add(row["seed"])
    shared = {size: set.intersection(*found.values()) for size, found in seeds.items()}
    rows = sorted((row for row in rows if row["seed"] in shared[row["labels"]]), key=itemgetter("setting"))
    return (
        f"{source(record)} {span(map(len, shared.values()))} draws, the same for all settings.\n\n"
        f"{accuracy_by_labels(rows, 'setting')}"
    )


def other_flags(folder: Path, words: list[str]) -> str:
    """A method as it is, and the same draws with other flags. words: the name of a record of `labels --record`."""
    plain, other = (read(folder.parent / "common" / "study" / f"{name}.json") for name in ("labels", *words))
    if not (plain and other):
        return UNMEASURED
    known = {(folder.name, row["labels"], row["seed"]) for row in other["rows"]}
    flags = " ".join(flag for flag in other["flags"] if flag not in plain["flags"])
    rows = [
        row | {"flags": "as it is"} for row in plain["rows"] if (row["method"], row["labels"], row["seed"]) in known
    ] + [row | {"flags": f"`{flags}`"} for row in other["rows"]]
    return f"{source(other)}\n\n{accuracy_by_labels(rows, 'flags')}"


def predictions(root: Path, folders: list[str]) -> list[dict]:
    """The records of common/study/predictions.py, most accurate method first; none if one is missing."""
    found = [read(root / "common" / "study" / f"{folder}_predictions.json") for folder in folders]
    return sorted(found, key=lambda record: -right_answers(record).mean()) if all(found) else []


def differences(root: Path, folders: list[str]) -> str:
    """By how much each method is above the next one, with its interval."""
    return difference_lines(predictions(root, folders)) or UNMEASURED


def difference_lines(records: list[dict]) -> str:
    """A line for each pair of neighbours. records: of common/study/predictions.py, most accurate method first."""
    lines = []
    for better, worse in pairwise(records):
        points, low, high = compare(better, worse)
        pair, doubt = f"{better['method']} over {worse['method']}", ": no difference that these runs can show"
        lines.append(f"- {pair}: {points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}{doubt * (low <= 0)}.\n")
    return "".join(lines)


def calibration(root: Path, folders: list[str]) -> str:
    """How far each method's probabilities can be trusted, before and after one temperature."""
    names = [f"{name}{suffix}" for name in ("calibration_error", "log_loss") for suffix in ("", "_with_temperature")]
    rows = [
        [record["method"], *(f"{statistics.mean(run[name] for run in record['runs']):.3f}" for name in names)]
        for record in predictions(root, folders)
    ]
    header = "method,calibration error,with temperature,log loss,with temperature"
    return table(header, rows) if rows else UNMEASURED


def whole_command(root: Path, _: list[str]) -> str:
    """The seconds of one command, where common/study/benchmark.py timed it."""
    text = ""
    for file in sorted((root / "common" / "study").glob("benchmark_*.json")):
        record = read(file)
        if whole := record.get("whole_command"):
            text += (
                f"On {record['environment']['gpu']} the whole command for one seed of LoRA takes "
                f"{whole['seconds']:.1f} seconds: {whole['train_seconds']:.1f} of training, "
                f"{whole['run_seconds'] - whole['train_seconds']:.1f} to load the model, evaluate and save, and "
                f"{whole['seconds'] - whole['run_seconds']:.1f} for imports, data and charts.\n"
            )
    return text or UNMEASURED


def memory_cell(row: dict) -> str:
    """Gigabytes, and in brackets those of the formula."""
    peak, formula = row["peak_memory_bytes"], row["formula_bytes"]
    return (f"{peak / 1e9:.3g}" if peak else "out of memory") + (f" ({formula / 1e9:.3g})" if formula else "")


def speed_cell(row: dict) -> str:
    """Reviews per second, and in brackets the share of the GPU's matrix speed."""
    speed, share = row["reviews_per_second"], row["matrix_share"]
    return (f"{speed:,.1f}" if speed else "") + (f" ({share:.0%})" if share else "")


def memory_by_size(folder: Path, words: list[str]) -> str:
    """A table of common/study/memory_by_size.json: `cards`; `sizes` with a batch; or what a flag changes, by name."""
    root = folder if (folder / "common").exists() else folder.parent
    record, (kind, *batch) = read(root / "common" / "study" / "memory_by_size.json"), words
    if not record:
        return UNMEASURED
    rows = {key(row): row for row in record["rows"]}
    if kind == "cards":
        lines = [[f"{card}, {size} GB", *largest(record["rows"], size)] for size, card in CARDS.items()]
        chart = f"![memory and speed by size](PEFT_QLORA/memory_by_size.png)\n\n{source(record)}"
        return f"{chart} On {record['environment']['gpu']}.\n\n{table(['GPU', *WITH_LORA], lines)}"
    if kind == "sizes":
        ways = [(method, int(batch[0]), on) for method in WITH_LORA for on in (False, True)]
        titles = [f"{method}{', checkpointing' * on}" for method, _, on in ways]
        lines = {name: [rows.get(key(job(name, *way))) for way in ways] for name in SHAPES}
        return "\n".join(
            table(
                [title, *titles], [[name, *(cell(row) if row else "" for row in line)] for name, line in lines.items()]
            )
            for title, cell in (("peak memory (GB)", memory_cell), ("reviews/s", speed_cell))
        )
    if kind == "ratio":
        lines = []
        for name in SHAPES:
            lora, qlora = (rows.get(key(job(name, method, int(batch[0]), True))) for method in WITH_LORA)
            if lora and qlora and lora["peak_memory_bytes"] and qlora["peak_memory_bytes"]:
                measures = ("peak_memory_bytes", "reviews_per_second")
                lines.append([name, *(f"{qlora[measure] / lora[measure]:.2f}" for measure in measures)])
        return table("QLoRA / LoRA,peak memory,reviews/s", lines)
    if kind == "why":
        ways = (("PEFT_LORA", False), ("PEFT_LORA", True), ("PEFT_QLORA", True))
        found = [rows.get(key(job("llama-7.5b", method, 16, on))) for method, on in ways]
        if not all(row and row["peak_memory_bytes"] for row in found):
            return UNMEASURED
        lora, checkpointing, qlora = found
        parts = {name: size / 1e9 for name, size in lora["memory_bytes"].items()}
        trained = sum(size for name, size in parts.items() if name in ("gradients", "optimizer"))
        share = lora["trainable_parameters"] / lora["parameters"]
        return (
            f"For llama-7.5b and 16 texts at a time LoRA trains {share:.2%} of the parameters. Of its peak of "
            f"{lora['peak_memory_bytes'] / 1e9:.1f} GB, gradients and optimizer are {trained:.2f}, the weights "
            f"{parts['weights']:.1f}, the rest {parts['rest']:.1f}. With checkpointing the rest is "
            f"{checkpointing['memory_bytes']['rest'] / 1e9:.1f}. With QLoRA the weights are "
            f"{qlora['memory_bytes']['weights'] / 1e9:.1f}.\n"
        )
    usual, lines = job("", "", 0, False)[kind], []
    for row in record["rows"]:
        plain = rows.get(key(row | {kind: usual}))
        if plain and row[kind] != usual and (row["batch"] not in BATCHES or row["backbone"] == "llama-7.5b"):
            cells = [cell(found) for cell in (memory_cell, speed_cell) for found in (plain, row)]
            lines.append([row["backbone"], row["method"], row["batch"], row[kind] if usual else "on", *cells])
            if kind == "torch_compile":
                same = (found for found in record["rows"] if found["backbone"] == row["backbone"] and found[kind])
                first = max(found["first_epoch_seconds"] for found in same)  # the others reuse what it compiled
                compiling = first - plain["first_epoch_seconds"]
                gain = 1 / plain["reviews_per_second"] - 1 / row["reviews_per_second"]  # seconds per review
                lines[-1] += [f"{compiling:.0f}", f"{compiling / gain / 1e6:.1f}" if gain > 0 else "never"]
    more = ",compiling (s),pays from (millions of reviews)" if kind == "torch_compile" else ""
    return table(f"backbone,method,batch,{kind},GB without,GB with,reviews/s without,reviews/s with{more}", lines)


def processes(root: Path, _: list[str]) -> str:
    """Speed and memory of one process and of two."""
    record = read(root / "common" / "study" / "processes.json")
    if not record:
        return UNMEASURED
    rows = [
        [f"{row['backbone']}, {row['method']}, {row['launcher']}", row["processes"], *cells]
        for row in record["rows"]
        for cells in [(f"{row['reviews_per_second']:,.0f}", f"{row['peak_memory_bytes'] / 1e9:.2f}")]
    ]
    header = ["backbone, method, launcher", "GPUs", "reviews/s", "peak memory of a GPU (GB)"]
    return f"{source(record)} On {record['environment']['gpu']}.\n\n{table(header, rows)}"


BLOCKS: dict[str, Callable[[Path, list[str]], str]] = {
    block.__name__: block
    for block in (
        guide,
        results,
        references,
        charts,
        result,
        chart,
        sweep,
        labels,
        labels_tuning,
        other_flags,
        differences,
        calibration,
        benchmark,
        tricks,
        whole_command,
        memory_by_size,
        processes,
    )
}


def render(text: str, folder: Path) -> str:
    """The README `text` of `folder` with its blocks written anew."""
    return BLOCK.sub(
        lambda block: block["start"] + BLOCKS[block["name"]](folder, block["words"].split()) + block["end"], text
    )


def main(root: Path = ROOT) -> None:
    """Write the figures of every README, and the comparison chart once all its methods have a record."""
    for readme in [root / "README.md", *sorted(root.glob("*/README.md"))]:
        text = readme.read_text()
        readme.write_text(render(text, readme.parent))
        for block in BLOCK.finditer(text):
            records = [read(root / folder / "results.json") for folder in block["words"].split()]
            if block["name"] == "results" and all(records):
                draw_comparison(records, reference_lines(root), root / "common" / "study" / "comparison.png")


if __name__ == "__main__":
    run(main)
