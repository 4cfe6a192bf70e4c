"""The chart on top of the README: test accuracy of the methods beside what they cost, from their records.

python -m common.study.report    (which draws it as common/study/comparison.png and writes the tables)
"""

from itertools import cycle
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from common.plotting import BLUE, GREY, ORANGE, PALE, RED, SKY, limits, noun, page, save, style
from common.record import spread, summarize

MEMORY = {"weights": BLUE, "gradients": ORANGE, "optimizer": RED, "rest": SKY}
REFERENCE_LINES = [(GREY, ":"), (ORANGE, "--"), (RED, "-."), (SKY, "-"), ("black", (0, (6, 2)))]
LEGEND = {"frameon": False, "fontsize": 9, "title_fontsize": 9, "alignment": "left", "columnspacing": 1.5}


def draw_comparison(records: list[dict], references: dict[str, float], path: str | Path) -> None:
    """Save the chart of these results.json. references: test accuracies by name, drawn as lines."""
    save(comparison_figure(records, references), path, [records, references])


def comparison_figure(records: list[dict], references: dict[str, float]) -> Figure:
    """A row for each record: test accuracy, trainable parameters, peak memory by what holds it, training time."""
    first = records[0]
    model, data = (Path(first[part]["name"]).name for part in ("model", "dataset"))
    title = f"{model} fine-tuned on {data}: accuracy and what it costs"
    figure = page(title, (10.4, 2.6 + 0.6 * len(records)), any(record["config"]["demo"] for record in records))
    panels = accuracy, parameters, memory, minutes = figure.subplots(1, 4, sharey=True, width_ratios=(3.2, 1.8, 2, 2))
    scores = [[run["test"]["accuracy"] for run in record["runs"]] for record in records]
    low, high = limits([*references.values(), *(score for row in scores for score in row)])
    titles = f"Test accuracy (axis from {low:.0%})", "Trainable parameters", "Peak memory (GB)", "Training (minutes)"
    for axes, name in zip(panels, titles, strict=True):
        style(axes, grid="x")
        axes.set_title(name, loc="left", size=10)

    for (name, value), (colour, line) in zip(references.items(), cycle(REFERENCE_LINES), strict=False):
        accuracy.axvline(value, color=colour, ls=line, lw=1.3, zorder=1, label=f"{name}: {100 * value:.1f}")
    for row, record in enumerate(records):
        runs, found = record["runs"], summarize(scores[row])
        accuracy.errorbar(found["mean"], row, xerr=found["sd"], fmt="o", color=BLUE, capsize=4, label="mean ± sd")
        # Below the mean, which would hide them
        accuracy.plot(scores[row], [row + 0.22] * len(runs), "o", color=BLUE, alpha=0.35, ms=5, label="each seed")
        _label(accuracy, found["mean"], row, spread(found), above=True)

        trainable = record["model"]["trainable_parameters"]
        parameters.plot(trainable, row, "o", color=BLUE)
        _label(parameters, trainable, row, f"{trainable:,}", above=True)

        end = 0
        for part, colour in MEMORY.items():
            size = mean(run["memory_bytes"][part] for run in runs) / 1e9
            label = "rest, mostly activations" if part == "rest" else part
            memory.barh(row, size, 0.45, left=end, color=colour, label=label)
            end += size
        _label(memory, end, row, f"{end:.2f}")

        found = summarize([run["train_seconds"] / 60 for run in runs])
        minutes.barh(row, found["mean"], 0.45, xerr=found["sd"], color=PALE, capsize=3)
        _label(minutes, found["mean"] + (found["sd"] or 0), row, spread(found, 1, 2))

    # The margins hold the labels, and the dot of an accuracy on the last gridline.
    accuracy.set(xlim=(low, high + 0.01), ylim=(len(records) - 0.5, -0.6))
    accuracy.set_yticks(range(len(records)), [record["method"] for record in records])
    accuracy.xaxis.set(major_locator=MaxNLocator(8, steps=[1, 2, 5, 10]), major_formatter=PercentFormatter(1, 0))
    parameters.set(xscale="log", xmargin=0.35)
    parameters.xaxis.set_minor_formatter(NullFormatter())  # within a power of ten their numbers would overlap
    memory.set_xmargin(0.25)
    minutes.set_xmargin(0.8)
    seeds, device = len(first["runs"]), first["environment"]["gpu"] or "a CPU"
    sizes = f"{first['dataset']['train']:,} training and {first['dataset']['test']:,} test {noun(first)}"
    caption = f"Means and sd over {seeds} seed{'s' * (seeds > 1)}, on {device}; {sizes}"
    for axes, side, columns, title in ((accuracy, "left", 3, caption), (memory, "right", 2, "Peak memory")):
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))  # every row brings the same labels
        legend = figure.legend(once.values(), once, loc=f"outside lower {side}", ncols=columns, title=title, **LEGEND)
        legend.get_title().set_color(GREY)
    return figure


def _label(axes: Axes, x: float, row: int, text: str, above: bool = False) -> None:
    place = {"xytext": (0, 8), "ha": "center"} if above else {"xytext": (6, 0), "va": "center"}
    backing = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # a line behind must not strike it out
    axes.annotate(text, (x, row), textcoords="offset points", size=9, bbox=backing, **place)
