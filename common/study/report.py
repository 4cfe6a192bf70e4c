"""`python -m common.report` writes the figures into the READMEs, from the records alone.

A README names what it wants between two comments, `<!-- results A B -->` and `<!-- end -->`: here the comparison of
the folders A and B. Whatever stands between them is replaced. The root's README also gets common/comparison.png.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from common.plotting import draw_comparison
from common.record import spread

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?P<start><!-- (?P<name>\w+)(?P<folders>[^>]*) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
UNMEASURED = "_Not measured yet: no run on the full data has been recorded._\n"


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    header = list(header)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def warm_speed(record: dict) -> float:
    """Training reviews per second from the second seed on; the first pays for loading kernels."""
    runs = record["runs"][1:] or record["runs"]
    return statistics.mean(run["train_reviews_per_second"] for run in runs)


def results(root: Path, folders: list[str]) -> str:
    """The methods side by side, best test accuracy first, then what they are compared with."""
    records = [record for folder in folders if (record := read(root / folder / "results.json"))]
    references = read(root / "common" / "references.json")
    rows = [
        [
            f"[{record['method']}]({record['method']}/README.md)",
            f"{record['model']['trainable_parameters']:,} ({record['model']['trainable_percent']:.2f}%)",
            spread(record["summary"]["test_accuracy"]),
            spread(record["summary"]["test_f1"]),
            spread(record["summary"]["accuracy_gain"]),
            spread(record["summary"]["peak_memory_bytes"], 1e9, 2),
            spread(record["summary"]["train_seconds"], 1, 1),
            f"{warm_speed(record):,.0f}",
            f"{record['runs'][0]['checkpoint_bytes'] / 1e6:.1f}",
        ]
        for record in sorted(records, key=lambda record: -record["summary"]["test_accuracy"]["mean"])
    ]
    if references:
        rows += [[name, "", f"{100 * value:.1f}", *[""] * 6] for name, value in references["accuracy"].items()]
    header = "method,trainable parameters,test accuracy,F1,gain,peak memory (GB),training (s),reviews/s,saved (MB)"
    note = "" if len(records) == len(folders) else UNMEASURED + "\n"
    if records:
        seeds, gpu = len(records[0]["runs"]), records[0]["environment"]["gpu"] or "a CPU"
        note += (
            f"Percent where nothing else is said, mean ± sd over {seeds} seeds, on one {gpu}. The first seed's time "
            "includes what the libraries prepare once; reviews/s, in all epochs, are of the later seeds.\n\n"
        )
    if records and len(records) == len(folders):
        note = "![comparison of the methods](common/comparison.png)\n\n" + note
    return note + (table(header.split(","), rows) if rows else "")


def one_pass_speed(record: dict) -> float:
    """Training reviews per second on their one way through frozen blocks, from the second seed on."""
    runs = record["runs"][1:] or record["runs"]
    seconds = statistics.mean(run["train_seconds"] - sum(epoch["seconds"] for epoch in run["epochs"]) for run in runs)
    return record["dataset"]["train"] / seconds


def slowest_epoch(record: dict) -> float:
    """Seconds, from the second seed on."""
    return max(epoch["seconds"] for run in record["runs"][1:] or record["runs"] for epoch in run["epochs"])


MEASURES: dict[str, tuple[str, int, Callable[[dict], float]]] = {
    "accuracy": ("percent of the test reviews", 1, lambda record: 100 * record["summary"]["test_accuracy"]["mean"]),
    "speed": ("training reviews per second", 0, warm_speed),
    "pass": ("reviews per second through the frozen blocks", 0, one_pass_speed),
    "epoch": ("seconds of the slowest epoch from the second seed on", 1, slowest_epoch),
    "memory": ("GB of peak memory", 1, lambda record: record["summary"]["peak_memory_bytes"]["mean"] / 1e9),
    "padding": ("percent of the tokens", 1, lambda record: max(run["padding_percent"] for run in record["runs"])),
}
AT_MOST = ("epoch", "memory", "padding")


def aims(root: Path, words: list[str]) -> str:
    """What was aimed at, and by how much a published figure misses it. words: a measure, then FOLDER=figure, ...

    Of the measures in AT_MOST less is better.
    """
    unit, digits, measure = MEASURES[words[0]]
    pairs = [
        (folder, float(figure), read(root / folder / "results.json"))
        for folder, figure in (word.split("=") for word in words[1:])
    ]
    if not all(record for _, _, record in pairs):
        return UNMEASURED
    text = ", ".join(f"{folder} {figure:,.{digits}f}" for folder, figure, _ in pairs)
    short = [
        (folder, measure(record) - figure if words[0] in AT_MOST else figure - measure(record))
        for folder, figure, record in pairs
    ]
    missed = [f"{folder} by {amount:,.{digits + 1}f}" for folder, amount in short if amount > 0]
    start, no, yes = ("Limits", "Exceeded", "Kept") if words[0] in AT_MOST else ("Aimed at", "Missed", "Reached")
    return f"{start}, in {unit}: {text}. {f'{no}: ' + ', '.join(missed) if missed else yes}.\n"


def charts(root: Path, folders: list[str]) -> str:
    """The pairs of charts, a row for each method."""
    rows = [
        [f"![{folder}: accuracy and F1]({folder}/bar_chart.png)", f"![{folder}: epochs]({folder}/line_chart.png)"]
        for folder in folders
        if (root / folder / "results.json").exists()
    ]
    return table(["before and after", "across epochs"], rows).replace("---:", "---") if rows else UNMEASURED


def result(folder: Path, _: list[str]) -> str:
    """One method's runs: a row for each seed, then mean ± sd."""
    record = read(folder / "results.json")
    if not record:
        return UNMEASURED
    rows = [
        [
            f"seed {run['seed']}",
            run["best_epoch"],
            f"{100 * run['epochs'][run['best_epoch']]['validation_accuracy']:.2f}",
            f"{100 * run['test']['accuracy']:.2f}",
            f"{100 * run['test']['f1']:.2f}",
            f"{run['train_seconds']:.1f}",
            f"{run['train_reviews_per_second']:,.0f}",
            f"{run['peak_memory_bytes'] / 1e9:.2f}",
        ]
        for run in record["runs"]
    ]
    summary = record["summary"]
    rows.append(
        [
            "**mean ± sd**", "", "", spread(summary["test_accuracy"], 0.01, 2), spread(summary["test_f1"], 0.01, 2),
            spread(summary["train_seconds"], 1, 1), "", spread(summary["peak_memory_bytes"], 1e9, 2),
        ]
    )  # fmt: skip
    header = "run,chosen epoch,validation accuracy,test accuracy,test F1,training (s),reviews/s,peak memory (GB)"
    sizes, environment = record["dataset"], record["environment"]
    files = " with uncommitted files" if environment["dirty"] else ""
    untrained = statistics.mean(run["untrained_test"]["accuracy"] for run in record["runs"])
    return (
        f"`{record['command']}` on {environment['gpu'] or environment['cpu']}, torch {environment['torch']}, "
        f"transformers {environment['transformers']}, commit {short_commit(environment)}{files}. "
        f"{sizes['train']:,} training, {sizes['validation']:,} validation and {sizes['test']:,} test reviews. "
        f"Before training: accuracy {100 * untrained:.1f}.\n\n{table(header.split(','), rows)}"
    )


def chart(folder: Path, names: list[str]) -> str:
    """The chart of that name, once it has been drawn."""
    return "".join(f"![{name}]({name})\n" for name in names if (folder / name).exists()) or UNMEASURED


def short_commit(environment: dict) -> str:
    """The commit's first ten digits; a copy of the code without a history has none."""
    return (environment["commit"] or "unknown")[:10]


def sweep(folder: Path, _: list[str]) -> str:
    """What validation said of the hyperparameters and of the choices written into the script."""
    text = ""
    for file in (*sorted(folder.glob("sweep_*.json")), *folder.glob("variants.json")):
        record = read(file)
        first, *others = record["results"]
        measured = ("validation_accuracy", "validation_loss", "best_epoch")
        names = [name for name in first if name not in measured]
        rows = [
            [
                *(row[name] for name in names),
                f"{100 * row['validation_accuracy']:.2f}",
                "not finite" if row["validation_loss"] is None else f"{row['validation_loss']:.4f}",
            ]
            # the same to the last digit: a choice that this method does not have
            for row in [first, *(row for row in others if any(row[name] != first[name] for name in measured))]
        ]
        text += (
            f"`{record['command']}`, commit {short_commit(record['environment'])}\n\n"
            f"{table([*names, 'validation accuracy', 'validation loss'], rows)}\n"
        )
    return text or UNMEASURED


def small_gpu(root: Path, words: list[str]) -> str:
    """Memory and accuracy of one seed in smaller steps, beside the published run. words: FOLDER, limit in GB."""
    folder, limit = root / words[0], float(words[1])
    record, published = read(folder / "small_gpu.json"), read(folder / "results.json")
    if not (record and published):
        return UNMEASURED
    run = record["runs"][0]
    whole = next(other for other in published["runs"] if other["seed"] == run["seed"])
    return (
        f"`{record['command']}`: {run['peak_memory_bytes'] / 1e9:.2f} GB of peak memory (limit: {limit:.1f}), test "
        f"accuracy {100 * run['test']['accuracy']:.2f}; the published run of this seed, without, "
        f"{whole['peak_memory_bytes'] / 1e9:.2f} GB and {100 * whole['test']['accuracy']:.2f}.\n"
    )


def benchmark(root: Path, _: list[str]) -> str:
    """The usual recipe against ours, on every machine that tests/benchmark.py ran on."""
    text = ""
    for file in sorted((root / "tests").glob("benchmark_*.json")):
        record = read(file)
        rows = [
            [
                name,
                f"{statistics.median(sides['usual']['reviews_per_second']):,.1f}",
                f"{statistics.median(sides['ours']['reviews_per_second']):,.1f}",
                "{median:.1f} ({min:.1f} to {max:.1f})".format(**sides["ratio"]),
                f"{statistics.median(sides['usual']['peak_memory_bytes']) / 1e9:.2f}",
                f"{statistics.median(sides['ours']['peak_memory_bytes']) / 1e9:.2f}",
                f"{100 * sides['share_of_floor']:.0f}%",
            ]
            for name, sides in record["methods"].items()
            if "error" not in sides
        ]
        header = "method,usual (reviews/s),ours (reviews/s),ratio (range),usual (GB),ours (GB),of the hardware's limit"
        device = record["environment"]["gpu"] or f"CPU ({record['environment']['cpu']})"
        text += f"{device}: `{record['command']}`\n\n{table(header.split(','), rows)}\n"
    return text or UNMEASURED


def whole_command(root: Path, words: list[str]) -> str:
    """The seconds of one command, where tests/benchmark.py timed it. words: limits of all of them, and of those that
    neither train nor evaluate."""
    most, most_others = map(float, words)
    text = ""
    for file in sorted((root / "tests").glob("benchmark_*.json")):
        record = read(file)
        if whole := record.get("whole_command"):
            others = whole["seconds"] - whole["train_seconds"]
            late, late_others = max(whole["seconds"] - most, 0), max(others - most_others, 0)
            text += (
                f"On {record['environment']['gpu']} the whole command for one seed of LoRA took "
                f"{whole['seconds']:.1f} seconds (limit {most:.0f}: {f'missed by {late:.1f}' if late else 'kept'}): "
                f"training {whole['train_seconds']:.1f}, the rest of `train` (model, evaluation, saving) "
                f"{whole['run_seconds'] - whole['train_seconds']:.1f}, and imports, data and charts "
                f"{whole['seconds'] - whole['run_seconds']:.1f}. The limit for what neither trains nor evaluates, "
                f"{most_others:.0f}, is {f'missed by at most {late_others:.1f}' if late_others else 'kept'}: "
                "evaluation was not timed apart.\n"
            )
    return text or UNMEASURED


BLOCKS: dict[str, Callable[[Path, list[str]], str]] = {
    function.__name__: function
    for function in (results, aims, charts, result, chart, sweep, small_gpu, benchmark, whole_command)
}


def render(text: str, folder: Path) -> str:
    """The README `text` of `folder` with its blocks written anew."""
    return BLOCK.sub(
        lambda block: block["start"] + BLOCKS[block["name"]](folder, block["folders"].split()) + block["end"], text
    )


def main(root: Path = ROOT) -> None:
    """Write every README's figures, and the comparison chart once all its methods have a record."""
    for readme in [root / "README.md", *sorted(root.glob("*/README.md"))]:
        text = readme.read_text()
        readme.write_text(render(text, readme.parent))
        for block in BLOCK.finditer(text):
            records = [read(root / folder / "results.json") for folder in block["folders"].split()]
            references = read(root / "common" / "references.json")
            if block["name"] == "results" and all(records) and references:
                draw_comparison(records, references["accuracy"], root / "common" / "comparison.png")


if __name__ == "__main__":
    main()
