"""Charts drawn from results.json: what a method reached, and what it cost.

A record is one method's results.json as a dict. Means and standard deviations (sd, of a sample: n - 1)
are over its runs, one per seed; a single run has no sd. Accuracies are fractions, shown in percent.
`*_figure` builds what `draw_*` saves as PNG.
"""

import hashlib
import json
import math
import textwrap
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import blended_transform_factory

from common.files import whole_file

# Okabe and Ito's colours: people with any colour vision can tell them apart.
BLUE, SKY, ORANGE, GREEN, PURPLE, RED = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
GREY, PALE, FAINT = "#5F6368", "#A9AFB5", "#E4E6E8"
MEMORY_COLOURS = {"weights": BLUE, "gradients": ORANGE, "optimizer": PURPLE, "activations": GREEN}
REFERENCE_STYLES = (GREY, ":"), (RED, "--"), ("black", "-.")
DEMO = "Demo: generated reviews, tiny model; the figures mean nothing"


def draw_bar_chart(record: dict, path: str | Path) -> None:
    """Save test accuracy and F1 in percent, before and after fine-tuning, with whiskers of one sd.

    Each run must hold "untrained_test" and "test", both with "accuracy" and "f1".
    """
    _save(bar_figure(record), path, record)


def draw_line_chart(record: dict, path: str | Path) -> None:
    """Save accuracy in percent across epochs, on validation and on training reviews.

    Each run must hold "best_epoch", which is marked, and "epochs", the same ones in every run, each with
    "epoch", "validation_accuracy" and "train_accuracy".
    """
    _save(line_figure(record), path, record)


def draw_comparison(records: list[dict], references: dict[str, float], path: str | Path) -> None:
    """Save one row per record: test accuracy (percent), trainable parameters, memory (GB), time (minutes).

    Each run must hold "test", "peak_memory_bytes", "memory_bytes" (that peak in its four parts) and
    "train_seconds". `references` maps a label to an accuracy, which becomes a vertical line.
    """
    _save(comparison_figure(records, references), path, [records, references])


def bar_figure(record: dict) -> Figure:
    runs, size = record["runs"], f"{record['dataset']['test']:,} test reviews"
    several = len(runs) > 1
    reading = ": bars are means, whiskers ± 1 sd" if several else ""
    figure = _method_figure(record, f"{size}; {_seeds(record)}{reading}")
    axes = figure.subplots()
    _style(axes, grid="y")
    for offset, key, label, colour in (
        (-0.19, "untrained_test", "before fine-tuning", PALE),
        (0.19, "test", "after fine-tuning", BLUE),
    ):
        spreads = (_spread(run[key][metric] for run in runs) for metric in ("accuracy", "f1"))
        means, sds = zip(*spreads, strict=True)
        # Unclipped, because a mean near 100 % plus its sd leaves the axis, and the label on top does too.
        whiskers = {"yerr": sds if several else None, "capsize": 4, "error_kw": {"clip_on": False}}
        bars = axes.bar([offset, 1 + offset], means, width=0.36, color=colour, label=label, **whiskers)
        axes.bar_label(bars, [f"{value:.1%}" for value in means], padding=3, annotation_clip=False)
    axes.set(xticks=[0, 1], xticklabels=["test accuracy", "test F1"], ylim=(0, 1))
    _percent_ticks(axes.yaxis)
    _legend(axes, columns=2)
    return figure


def line_figure(record: dict) -> Figure:
    runs, size = record["runs"], f"{record['dataset']['validation']:,} validation reviews"
    figure = _method_figure(record, f"{size}; training: a fixed sample of reviews, in evaluation mode")
    axes = figure.subplots()
    _style(axes, grid="y")

    epochs = [epoch["epoch"] for epoch in runs[0]["epochs"]]
    training = [[epoch["train_accuracy"] for epoch in run["epochs"]] for run in runs]
    validation = [[epoch["validation_accuracy"] for epoch in run["epochs"]] for run in runs]
    # Unclipped, because a curve or a mark at 100 % would lose its upper half. The mean is pale and wide,
    # so that the seeds, often within its width, can be told apart on top of it.
    for curves, line, colour, width, label in (
        (validation, "-", SKY, 5, "validation, mean"),
        (training, "--", ORANGE, 2, "training (sample)"),
    ):
        means = [mean(values) for values in zip(*curves, strict=True)]
        axes.plot(epochs, means, line, color=colour, lw=width, clip_on=False, label=label)
    for run, curve in zip(runs, validation, strict=True):
        axes.plot(epochs, curve, color=BLUE, lw=0.9, clip_on=False, label="validation, each seed")
        chosen = run["best_epoch"], curve[epochs.index(run["best_epoch"])]
        axes.plot(*chosen, "o", ms=9, mfc="none", mec=RED, mew=1.6, clip_on=False, label="chosen epoch")

    low, high = _limits(value for curve in training + validation for value in curve)
    axes.set(xlabel="epoch (0: before fine-tuning)", ylabel=f"accuracy (axis from {low:.0%})")
    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent_ticks(axes.yaxis)
    _legend(axes, columns=4)
    return figure


def comparison_figure(records: list[dict], references: dict[str, float]) -> Figure:
    model = _each(records, lambda record: _short(record["model"]["name"]))
    data = _each(records, lambda record: _short(record["dataset"]["name"]))
    training = _each(records, lambda record: f"{record['dataset']['train']:,} training reviews")
    test = _each(records, lambda record: f"{record['dataset']['test']:,} test reviews")
    gpu = _each(records, lambda record: record["environment"]["gpu"] or "CPU")
    figure = _figure(
        records,
        f"{model} fine-tuned on {data}: accuracy and what it costs",
        "Means over seeds; whiskers and ±: 1 sd over seeds",
        f"{_each(records, _seeds)} · {gpu} · {data}: {training}, {test}",
        size=(10, 2.4 + 0.6 * len(records)),
        legend_height=0.65,
    )
    panels = figure.subplots(1, 4, sharey=True, width_ratios=(3.2, 1.8, 2, 2))
    accuracy, parameters, memory, minutes = panels
    scores = [[run["test"]["accuracy"] for run in record["runs"]] for record in records]
    low, high = _limits([*references.values(), *(score for row in scores for score in row)])
    titles = (
        f"Test accuracy (axis from {low:.0%})",
        "Trainable parameters",
        "Peak memory, GB",
        "Training, min",
    )
    for axes, title in zip(panels, titles, strict=True):
        _style(axes, grid="x")
        axes.set_title(title, loc="left", size=10)

    for (name, value), (colour, line) in zip(references.items(), cycle(REFERENCE_STYLES), strict=False):
        accuracy.axvline(value, color=colour, ls=line, lw=1.3, zorder=1, label=f"{name}: {100 * value:.1f}")
    for row, record in enumerate(records):
        runs = record["runs"]
        average, sd = _spread(scores[row])
        accuracy.errorbar(average, row, xerr=sd, fmt="o", color=BLUE, ms=7, capsize=4, label="mean ± sd")
        # The seeds lie below the mean's dot, which would hide them.
        seeds = {"color": BLUE, "alpha": 0.35, "ms": 5, "label": "each seed"}
        accuracy.plot(scores[row], [row + 0.22] * len(runs), "o", **seeds)
        _label(accuracy, average, row, plus_minus(100 * average, sd and 100 * sd, 1), above=True)

        trainable = record["model"]["trainable_parameters"]
        parameters.plot(trainable, row, "o", color=BLUE, ms=7)
        _label(parameters, trainable, row, f"{trainable:,}", above=True)

        end = 0
        for part, colour in MEMORY_COLOURS.items():
            size = mean(run["memory_bytes"][part] for run in runs) / 1e9
            memory.barh(row, size, 0.45, left=end, color=colour, label=part)
            end += size
        _label(memory, end, row, f"{mean(run['peak_memory_bytes'] for run in runs) / 1e9:.2f}")

        average, sd = _spread(run["train_seconds"] / 60 for run in runs)
        minutes.barh(row, average, 0.45, xerr=sd, color=PALE, capsize=3)
        _label(minutes, average + (sd or 0), row, plus_minus(average, sd, 2))

    # The margins hold the labels, and the dot of an accuracy on the last gridline.
    accuracy.set(xlim=(low, high + 0.01), ylim=(len(records) - 0.5, -0.6))
    accuracy.set_yticks(range(len(records)), [record["method"] for record in records])
    _percent_ticks(accuracy.xaxis)
    parameters.set(xscale="log", xmargin=0.35)
    memory.set_xmargin(0.25)
    minutes.set_xmargin(0.5)
    for axes in (accuracy, memory):
        _legend(axes, columns=2)
    return figure


def _method_figure(record: dict, caption: str) -> Figure:
    model = record["model"]
    share = f"{model['trainable_parameters']:,} of {model['total_parameters']:,} parameters"
    title = f"{record['method']}: {_short(model['name'])} on {_short(record['dataset']['name'])}"
    subtitle = f"Trains {share} ({model['trainable_percent']:.3g}%) · {_seeds(record)}"
    return _figure([record], title, subtitle, caption, size=(7.5, 4.7), legend_height=0.25)


def _figure(
    records: list[dict],
    title: str,
    subtitle: str,
    caption: str,
    size: tuple[float, float],
    legend_height: float,
) -> Figure:
    """A page with a heading, and at its foot room for the legends and a caption; sizes in inches."""
    width, height = size
    # White and opaque, because dark text must read on a dark README too.
    figure = Figure(size, dpi=160, facecolor="white", layout="constrained")
    heading = [(textwrap.fill(title, int(7.5 * width)), 13, "bold", "black"), (subtitle, 10, "normal", GREY)]
    if any(record["config"]["demo"] for record in records):
        heading.insert(0, (DEMO, 11, "bold", RED))
    left, top, bottom = 0.12 / width, height - 0.12, 0.35 + legend_height
    plain = {"parse_math": False}  # a name with dollar signs is no formula
    for text, points, weight, colour in heading:
        figure.text(left, top / height, text, va="top", size=points, weight=weight, color=colour, **plain)
        top -= (text.count("\n") + 1) * 1.5 * points / 72
    figure.text(left, 0.1 / height, caption, size=9, color=GREY, **plain)
    rect = 0.08 / width, bottom / height, 1 - 0.16 / width, (top - 0.06 - bottom) / height
    figure.get_layout_engine().set(rect=rect)
    return figure


def _style(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.grid(axis=grid, color=FAINT)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0)


def _percent_ticks(axis: Axis) -> None:
    # Whole percents need whole steps: matplotlib's own 2.5 would read 2 %, 5 %, 8 %.
    axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1, decimals=0))


def _legend(axes: Axes, columns: int) -> None:
    figure = axes.get_figure()
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # every seed and row brings the same labels
    # At the left edge of the axes, in the room that the layout left free at the foot of the page.
    legend = axes.legend(
        once.values(),
        once,
        loc="upper left",
        bbox_to_anchor=(0, figure.get_layout_engine().get()["rect"][1]),
        bbox_transform=blended_transform_factory(axes.transAxes, figure.transFigure),
        ncols=columns,
        columnspacing=1.5,
        borderpad=0,
        frameon=False,
        fontsize=9,
    )
    legend.set_in_layout(False)


def _label(axes: Axes, x: float, row: int, text: str, above: bool = False) -> None:
    place = {"xytext": (0, 8), "ha": "center"} if above else {"xytext": (6, 0), "va": "center"}
    backing = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # a line behind must not strike it out
    axes.annotate(text, (x, row), textcoords="offset points", size=9, bbox=backing, **place)


def _limits(values: Iterable[float]) -> tuple[float, float]:
    """The multiples of 5 % around the values, the lower one strictly below them unless it is zero."""
    values = list(values)
    return max(0, math.ceil(20 * min(values)) - 1) / 20, math.ceil(20 * max(values)) / 20


def _spread(values: Iterable[float]) -> tuple[float, float | None]:
    values = list(values)
    return mean(values), stdev(values) if len(values) > 1 else None


def plus_minus(average: float, sd: float | None, decimals: int) -> str:
    """ "92.4 ± 0.1", or without an sd "92.4"."""
    return f"{average:.{decimals}f}" + ("" if sd is None else f" ± {sd:.{decimals}f}")


def _each(records: list[dict], describe: Callable[[dict], str]) -> str:
    """What the records share said once; where they differ, every version."""
    return " / ".join(dict.fromkeys(map(describe, records)))


def _short(name: str) -> str:
    return Path(name).name or name


def _seeds(record: dict) -> str:
    seeds = [str(run["seed"]) for run in record["runs"]]
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"


def digest(drawn: dict | list) -> str:
    """SHA-256 of what a chart is drawn from; the chart's own metadata keep it as "Record"."""
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def _save(figure: Figure, path: str | Path, drawn: dict | list) -> None:
    # Without matplotlib's version in its metadata, a newer one that draws the same leaves the same file.
    with whole_file(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None, "Record": digest(drawn)})
