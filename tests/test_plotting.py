import copy
import itertools
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from common.files import whole_file
from common.plotting import (
    DEMO,
    bar_figure,
    comparison_figure,
    draw_bar_chart,
    draw_comparison,
    draw_line_chart,
    line_figure,
)

REFERENCES = {"majority class": 0.5, "bag of words": 0.88, "everything": 0.928}
PARTS = ("weights", "gradients", "optimizer", "activations")


def make_run(seed):
    """The seeds differ in every figure, and each chooses another epoch."""
    shift = 0.01 * seed * (seed + 1)
    validation = [0.5 + shift, 0.8 + shift, 0.85 + shift, 0.84 + shift]
    memory = dict(zip(PARTS, (1e8, 2e7, 4e7, 1e9 * (1 + seed)), strict=True))
    return {
        "seed": seed,
        "epochs": [
            {"epoch": epoch, "train_accuracy": value + 0.02 * epoch, "validation_accuracy": value}
            for epoch, value in enumerate(validation)
        ],
        "best_epoch": 3 - seed,
        "untrained_test": {"accuracy": 0.48 + shift, "f1": 0.3 + 3 * shift},
        "test": {"accuracy": 0.84 + shift, "f1": 0.83 + 2 * shift},
        "train_seconds": 60.0 + 30 * seed,
        "memory_bytes": memory,
        "peak_memory_bytes": sum(memory.values()),
    }


@pytest.fixture
def record():
    return {
        "method": "SOME_METHOD",
        "config": {"demo": False, "epochs": 3},
        "model": {
            "name": "organisation/small-backbone",
            "trainable_parameters": 148_610,
            "total_parameters": 22_713_986,
            "trainable_percent": 100 * 148_610 / 22_713_986,
        },
        "dataset": {"name": "organisation/films", "train": 22_500, "validation": 2_500, "test": 25_000},
        "environment": {"gpu": "Fast GPU"},
        "runs": [make_run(seed) for seed in range(3)],
    }


@pytest.fixture
def records(record):
    """A second method, better, larger and with a single seed."""
    other = copy.deepcopy(record)
    other["method"] = "OTHER_METHOD"
    other["model"]["trainable_parameters"] = 1_923_074
    other["runs"] = other["runs"][2:]
    return [record, other]


def all_figures(record):
    return [bar_figure(record), line_figure(record), comparison_figure([record], REFERENCES)]


def page_texts(figure):
    return [text.get_text() for text in figure.texts]


def labels(axes):
    return [text.get_text() for text in axes.texts]


def legend_labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def lines(axes, label):
    return [line for line in axes.lines if line.get_label() == label]


def whisker(errorbar, axis):
    """The ends of each whisker of an errorbar, along x (0) or y (1)."""
    return [segment[:, axis].tolist() for segment in errorbar.lines[2][0].get_segments()]


def test_bars_show_mean_and_deviation_before_and_after(record):
    (axes,) = bar_figure(record).axes
    before, after = (bars for bars in axes.containers if bars.get_label().endswith("fine-tuning"))
    assert legend_labels(axes) == ["before fine-tuning", "after fine-tuning"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["test accuracy", "test F1"]
    assert before[0].get_x() < after[0].get_x() < before[1].get_x() < after[1].get_x()
    expected_labels = []
    for bars, key in ((before, "untrained_test"), (after, "test")):
        values = [[run[key][metric] for run in record["runs"]] for metric in ("accuracy", "f1")]
        assert [bar.get_height() for bar in bars] == pytest.approx([mean(scores) for scores in values])
        for scores, (low, high) in zip(values, whisker(bars.errorbar, axis=1), strict=True):
            assert (low, high) == pytest.approx((mean(scores) - stdev(scores), mean(scores) + stdev(scores)))
        expected_labels += [f"{100 * mean(scores):.1f}%" for scores in values]
    assert labels(axes) == expected_labels == ["50.7%", "38.0%", "86.7%", "88.3%"]


def test_bar_axis_runs_from_zero_to_hundred_percent(record):
    figure = bar_figure(record)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_ylim() == (0, 1)
    assert [tick.get_text() for tick in axes.get_yticklabels()][:: len(axes.get_yticks()) - 1] == [
        "0%",
        "100%",
    ]


def test_bar_label_survives_a_whisker_beyond_hundred_percent(record):
    for run, accuracy in zip(record["runs"], (1.0, 0.8, 1.0), strict=True):
        run["test"]["accuracy"] = accuracy
    figure = bar_figure(record)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    label = next(text for text in axes.texts if text.get_text() == "93.3%")
    assert label.get_annotation_clip() is False
    assert label.get_window_extent().y1 < figure.texts[1].get_window_extent().y0


def test_bar_caption_names_seeds_and_whiskers(record):
    caption = page_texts(bar_figure(record))[-1]
    assert caption == "25,000 test reviews; seeds 0, 1, 2: bars are means, whiskers ± 1 sd"


def test_method_charts_name_method_backbone_data_parameters_and_seeds(record):
    for figure in (bar_figure(record), line_figure(record)):
        title, subtitle, _ = page_texts(figure)
        assert title == "SOME_METHOD: small-backbone on films"
        assert subtitle == "Trains 148,610 of 22,713,986 parameters (0.654%) · seeds 0, 1, 2"


def test_local_paths_shrink_to_their_last_part(record):
    record["model"]["name"] = "/a/very/long/way/to/backbone/"
    record["dataset"]["name"] = "../data/films.tar.gz"
    for figure in all_figures(record):
        assert "backbone" in page_texts(figure)[0] and "films.tar.gz" in page_texts(figure)[0]
        assert not any("way" in text or "data/" in text for text in page_texts(figure))


def test_line_chart_draws_every_seed_the_means_and_the_chosen_epochs(record):
    figure = line_figure(record)
    (axes,) = figure.axes
    runs = record["runs"]
    validation = [[epoch["validation_accuracy"] for epoch in run["epochs"]] for run in runs]
    training = [[epoch["train_accuracy"] for epoch in run["epochs"]] for run in runs]

    seeds = lines(axes, "validation, each seed")
    assert [list(line.get_ydata()) for line in seeds] == validation
    (bold,) = lines(axes, "validation, mean")
    assert list(bold.get_ydata()) == pytest.approx([mean(values) for values in zip(*validation, strict=True)])
    assert bold.get_linewidth() > 2 * seeds[0].get_linewidth()
    (dashed,) = lines(axes, "training (sample)")
    assert list(dashed.get_ydata()) == pytest.approx([mean(values) for values in zip(*training, strict=True)])
    assert dashed.get_linestyle() == "--"
    assert all(list(line.get_xdata()) == [0, 1, 2, 3] for line in (*seeds, bold, dashed))

    marks = [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines(axes, "chosen epoch")]
    assert marks == [(3, validation[0][3]), (2, validation[1][2]), (1, validation[2][1])]
    assert sorted(legend_labels(axes)) == [
        "chosen epoch",
        "training (sample)",
        "validation, each seed",
        "validation, mean",
    ]


def test_line_axes_have_whole_epochs_and_say_where_accuracy_starts(record):
    figure = line_figure(record)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_ylim() == (0.45, 1.0)
    assert axes.get_ylabel() == "accuracy (axis from 45%)"
    assert all(tick == int(tick) for tick in axes.get_xticks())
    shown = [text.get_text() for text in axes.get_yticklabels()]
    exact = [f"{100 * tick:.6g}%" for tick in axes.get_yticks()]
    assert shown == exact


def test_percent_ticks_are_whole_on_a_narrow_axis(record):
    for run in record["runs"]:
        for epoch in run["epochs"]:
            epoch.update(train_accuracy=0.8, validation_accuracy=0.8 + 0.05 * epoch["epoch"])
    figure = line_figure(record)
    figure.draw_without_rendering()
    shown = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert shown == ["75%", "80%", "85%", "90%", "95%"]


def test_comparison_accuracy(records):
    axes = comparison_figure(records, REFERENCES).axes[0]
    scores = [run["test"]["accuracy"] for run in records[0]["runs"]]
    several, single = (errorbar for errorbar in axes.containers if errorbar.get_label() == "mean ± sd")
    assert several.lines[0].get_xydata().tolist() == [[pytest.approx(mean(scores)), 0]]
    ends = [mean(scores) - stdev(scores), mean(scores) + stdev(scores)]
    assert whisker(several, axis=0) == [pytest.approx(ends)]
    assert single.lines[0].get_xydata().tolist() == [[pytest.approx(0.9), 1]]
    assert not single.has_xerr
    seeds = lines(axes, "each seed")
    assert [list(line.get_xdata()) for line in seeds] == [scores, [pytest.approx(0.9)]]
    assert [round(line.get_ydata()[0]) for line in seeds] == [0, 1]
    assert labels(axes) == ["86.7 ± 3.1", "90.0"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["SOME_METHOD", "OTHER_METHOD"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first method is on top"


def test_comparison_references(records):
    axes = comparison_figure(records, REFERENCES).axes[0]
    expected = ["majority class: 50.0", "bag of words: 88.0", "everything: 92.8"]
    assert set(expected) < set(legend_labels(axes))
    drawn = [line for label in expected for line in lines(axes, label)]
    assert [line.get_xdata()[0] for line in drawn] == list(REFERENCES.values())
    assert len({line.get_linestyle() for line in drawn}) == 3
    low, high = axes.get_xlim()
    assert low == 0.45 and high > 0.928
    assert axes.get_title(loc="left") == "Test accuracy (axis from 45%)"


def test_comparison_costs(records):
    figure = comparison_figure(records, REFERENCES)
    _, parameters, memory, minutes = figure.axes
    titles = ["Trainable parameters", "Peak memory, GB", "Training, min"]
    assert [axes.get_title(loc="left") for axes in figure.axes[1:]] == titles

    assert parameters.get_xscale() == "log"
    assert [line.get_xydata().tolist() for line in parameters.lines] == [[[148_610, 0]], [[1_923_074, 1]]]
    assert labels(parameters) == ["148,610", "1,923,074"]

    bars = [container[0] for container in memory.containers]
    assert [bar.get_width() for bar in bars] == pytest.approx([0.1, 0.02, 0.04, 2.0, 0.1, 0.02, 0.04, 3.0])
    assert [bar.get_x() for bar in bars] == pytest.approx([0, 0.1, 0.12, 0.16] * 2)
    assert [container.get_label() for container in memory.containers] == [*PARTS, *PARTS]
    assert sorted(legend_labels(memory)) == sorted(PARTS)
    assert len({bar.get_facecolor() for bar in bars}) == 4
    assert labels(memory) == ["2.16", "3.16"]

    several, single = (bars for bars in minutes.containers if hasattr(bars, "patches"))
    assert (several[0].get_width(), single[0].get_width()) == pytest.approx((1.5, 2.0))
    assert whisker(several.errorbar, axis=0) == [pytest.approx([1.0, 2.0])]
    assert single.errorbar is None
    assert labels(minutes) == ["1.50 ± 0.50", "2.00"]
    assert [text.xy for text in minutes.texts] == [(2.0, 0), (2.0, 1)], "beside the whisker"
    assert memory.get_xlim()[0] == minutes.get_xlim()[0] == 0


def test_comparison_heading_and_caption(records):
    title, _, caption = page_texts(comparison_figure(records, REFERENCES))
    assert title == "small-backbone fine-tuned on films: accuracy and what it costs"
    shared = "Fast GPU · films: 22,500 training reviews, 25,000 test reviews"
    assert caption == f"seeds 0, 1, 2 / seed 2 · {shared}"
    records[1]["environment"]["gpu"] = None
    assert "Fast GPU / CPU" in page_texts(comparison_figure(records, REFERENCES))[-1]


def test_demo_is_said_on_every_chart_and_only_there(record):
    for figure in all_figures(record):
        assert DEMO not in page_texts(figure)
    record["config"]["demo"] = True
    for figure in all_figures(record):
        assert page_texts(figure)[0] == DEMO
    assert DEMO == "Demo: generated reviews, tiny model; the figures mean nothing"


def test_one_seed_has_no_deviation(record):
    record["runs"] = record["runs"][1:2]
    bars, curves, _ = all_figures(record)
    assert all(container.errorbar is None for container in bars.axes[0].containers)
    assert labels(bars.axes[0]) == ["50.0%", "36.0%", "86.0%", "87.0%"]
    assert page_texts(bars)[-1] == "25,000 test reviews; seed 1"
    assert page_texts(curves)[1].endswith("· seed 1")
    assert len(lines(curves.axes[0], "chosen epoch")) == 1


def test_nothing_on_the_page_overlaps_or_leaves_it(record):
    record["config"]["demo"] = True
    record["model"]["name"] = "a-backbone-whose-name-is-long-enough-to-need-a-second-line-of-the-title"
    for figure in all_figures(record):
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in figure.texts]
        boxes += [axes.get_tightbbox() for axes in figure.axes]
        boxes += [axes.get_legend().get_window_extent() for axes in figure.axes if axes.get_legend()]
        page = figure.bbox
        for box in boxes:
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_saved_files_are_small_whole_and_repeatable_pngs(records, tmp_path):
    draws = {
        "bar.png": lambda path: draw_bar_chart(records[0], path),
        "line.png": lambda path: draw_line_chart(records[0], path),
        "comparison.png": lambda path: draw_comparison(records, REFERENCES, str(path)),
    }
    for name, draw in draws.items():
        draw(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(content) < 300_000
        pixels = imread(tmp_path / name)
        assert pixels.shape[1] >= 1000
        assert pixels[0, 0].tolist() == [1, 1, 1, 1], "an opaque white page"
        assert pixels.std() > 0.05
        assert b"Software" not in content
        draw(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(draws)


def test_failed_save_leaves_the_old_chart_alone(record, tmp_path, monkeypatch):
    chart = tmp_path / "chart.png"
    chart.write_bytes(b"old")

    def fail_halfway(figure, path, **options):
        assert path != chart and path.parent == chart.parent and path.suffix == ".png"
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", fail_halfway)
    with pytest.raises(OSError, match="no space"):
        draw_bar_chart(record, chart)
    assert chart.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [chart]


def test_whole_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "record.json"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_drawing_code_names_no_method():
    root = Path(__file__).parents[1]
    for name in ("plotting.py", "files.py"):
        code = (root / "common" / name).read_text(encoding="utf-8")
        assert not re.search(r"new_?head|last_?layer|lora|\bpeft", code, re.IGNORECASE)
