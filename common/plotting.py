"""The two charts of a run, drawn from its results.json: means and sd (of a sample: n - 1) are over the seeds."""

import hashlib
import json
import math
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from common.cli import whole_file
from common.data import IMDB_SHA256

BLUE, SKY, ORANGE, RED = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"  # Okabe and Ito's, for any colour vision
GREY, PALE, FAINT = "#5F6368", "#A9AFB5", "#E4E6E8"
DEMO = "Demo: generated reviews, tiny model; the figures mean nothing"


def noun(record: dict) -> str:
    """What the charts and tables of a record call its texts."""
    return "reviews" if record["dataset"]["sha256"] == IMDB_SHA256 else "texts"


def bar_figure(record: dict) -> Figure:
    """Test accuracy and F1 in percent, before and after fine-tuning, with whiskers of one sd."""
    runs = record["runs"]
    whiskers = ": bars are means, whiskers ± 1 sd" if len(runs) > 1 else ""
    warnings = "".join(f"\nWarning: seed {run['seed']} {run['warning']}" for run in runs if "warning" in run)
    caption = f"{record['dataset']['test']:,} test {noun(record)}; {_seeds(runs)}{whiskers}{warnings}"
    figure, axes = _method_page(record, caption)
    before, after = ("untrained_test", "before fine-tuning", PALE), ("test", "after fine-tuning", BLUE)
    for offset, (key, label, colour) in ((-0.19, before), (0.19, after)):
        scores = np.array([[run[key]["accuracy"], run[key]["f1"]] for run in runs])
        sds = scores.std(axis=0, ddof=1) if len(runs) > 1 else None
        whisker = {"yerr": sds, "capsize": 4, "error_kw": {"clip_on": False}}  # near 100 % it leaves the axis
        bars = axes.bar([offset, 1 + offset], scores.mean(axis=0), 0.36, color=colour, label=label, **whisker)
        axes.bar_label(bars, fmt="{:.1%}", padding=3, annotation_clip=False)
    axes.set(xticks=[0, 1], xticklabels=["test accuracy", "test F1"], ylim=(0, 1))
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9, columnspacing=1.5)
    return figure


def line_figure(record: dict) -> Figure:
    """Accuracy in percent across epochs, on validation and on training reviews, with the chosen epochs marked."""
    runs, kind = record["runs"], noun(record)
    caption = f"epoch (0: before fine-tuning)\n{record['dataset']['validation']:,} validation {kind}; "
    figure, axes = _method_page(record, caption + f"training: a fixed sample of {kind}, in evaluation mode")
    epochs = [epoch["epoch"] for epoch in runs[0]["epochs"]]
    training = np.array([[epoch["train_accuracy"] for epoch in run["epochs"]] for run in runs])
    validation = np.array([[epoch["validation_accuracy"] for epoch in run["epochs"]] for run in runs])
    # Unclipped: a curve at 100 % would lose its upper half. The mean is wide and pale: often the seeds lie within it.
    axes.plot(epochs, validation.mean(axis=0), color=SKY, lw=5, clip_on=False, label="validation, mean")
    axes.plot(epochs, training.mean(axis=0), "--", color=ORANGE, lw=2, clip_on=False, label="training (sample)")
    for run, curve in zip(runs, validation, strict=True):
        chosen, first = epochs.index(run["best_epoch"]), run is runs[0]
        axes.plot(epochs, curve, color=BLUE, lw=0.9, clip_on=False, label="validation, each seed" if first else None)
        mark = {"ms": 9, "mfc": "none", "mec": RED, "mew": 1.6, "label": "chosen epoch" if first else None}
        axes.plot(epochs[chosen], curve[chosen], "o", clip_on=False, **mark)
    low, high = limits([*training.flat, *validation.flat])
    axes.set(ylabel=f"accuracy (axis from {low:.0%})", ylim=(low, high))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=9, columnspacing=1.5)
    return figure


def _method_page(record: dict, caption: str) -> tuple[Figure, Axes]:
    model, data = record["model"], Path(record["dataset"]["name"]).name
    figure = page(f"{record['method']}: {Path(model['name']).name} on {data}", (7.4, 4.8), record["config"]["demo"])
    axes = figure.subplots()
    style(axes, grid="y")
    axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
    counts = f"{model['trainable_parameters']:,} of {model['total_parameters']:,} parameters"
    trains = f"Trains {counts} ({model['trainable_percent']:.3g}%)"
    axes.set_title(f"{trains} · {_seeds(record['runs'])}", loc="left", size=10, color=GREY, pad=20)
    axes.set_xlabel(caption, loc="left", size=9, color=GREY)
    return figure, axes


def page(title: str, size: tuple[float, float], demo: bool) -> Figure:
    """An empty figure with a title, white: dark text must read on dark READMEs too. size: inches, width first."""
    figure = Figure(size, dpi=160, facecolor="white", layout="constrained")
    title = textwrap.fill(title, int(7.5 * size[0]))
    look = {"weight": "bold", "color": RED if demo else "black", "parse_math": False}  # "$" in a name is no formula
    figure.suptitle(f"{DEMO}\n{title}" if demo else title, x=0.01, ha="left", **look)
    return figure


def style(axes: Axes, grid: str) -> None:
    """Axes with a pale grid along "x" or "y" and nothing else."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.grid(axis=grid, color=FAINT)
    axes.set_axisbelow(True)


def limits(values: list[float]) -> tuple[float, float]:
    """The multiples of 5 % around the values, the lower one strictly below them unless it is zero."""
    return max(0, math.ceil(20 * min(values)) - 1) / 20, math.ceil(20 * max(values)) / 20


def _seeds(runs: list[dict]) -> str:
    return f"seed{'s' * (len(runs) > 1)} {', '.join(str(run['seed']) for run in runs)}"


def save(figure: Figure, path: Path, drawn: dict | list) -> None:
    """Save `figure` as PNG. drawn: the records that it is drawn from; the file's metadata keep their SHA-256."""
    digest = hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()
    with whole_file(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None, "Record": digest})
