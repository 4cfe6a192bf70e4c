"""The comparison chart shows what the records say."""

import copy
import itertools
from statistics import mean, stdev

import pytest
from matplotlib.image import imread

from common.data import IMDB_SHA256
from common.plotting import DEMO
from common.study.comparison import comparison_figure, draw_comparison

REFERENCES = {"majority class": 0.5, "bag of words": 0.88, "everything": 0.928}
PARTS = ["weights", "gradients", "optimizer", "rest"]
PARTS_SHOWN = [*PARTS[:3], "rest, mostly activations"]


def make_run(seed):
    memory = dict(zip(PARTS, (1e8, 2e7, 4e7, 1e9 * (1 + seed)), strict=True))
    accuracy = 0.84 + 0.01 * seed * (seed + 1)
    return {
        "seed": seed,
        "test": {"accuracy": accuracy},
        "train_seconds": 60.0 + 30 * seed,
        "memory_bytes": memory,
    }


@pytest.fixture
def records():
    """Two methods: one with three seeds, one with a single seed."""
    first = {
        "method": "SOME_METHOD",
        "config": {"demo": False},
        "model": {"name": "organisation/small-backbone", "trainable_parameters": 148_610},
        "dataset": {"name": "organisation/films", "sha256": IMDB_SHA256, "train": 22_500, "test": 25_000},
        "environment": {"gpu": "Fast GPU"},
        "runs": [make_run(seed) for seed in range(3)],
    }
    second = copy.deepcopy(first) | {"method": "OTHER_METHOD", "runs": [make_run(2)]}
    second["model"]["trainable_parameters"] = 1_923_074
    return [first, second]


def labels(axes):
    return [text.get_text() for text in axes.texts]


def lines(axes, label):
    return [line for line in axes.lines if line.get_label() == label]


def whisker(errorbar):
    """The ends of each whisker of an errorbar, along x."""
    return [segment[:, 0].tolist() for segment in errorbar.lines[2][0].get_segments()]


def test_accuracy(records):
    axes = comparison_figure(records, REFERENCES).axes[0]
    scores = [run["test"]["accuracy"] for run in records[0]["runs"]]
    several, single = (errorbar for errorbar in axes.containers if errorbar.get_label() == "mean ± sd")
    assert several.lines[0].get_xydata().tolist() == [[pytest.approx(mean(scores)), 0]]
    assert whisker(several) == [pytest.approx([mean(scores) - stdev(scores), mean(scores) + stdev(scores)])]
    assert single.lines[0].get_xydata().tolist() == [[pytest.approx(0.9), 1]]
    assert not single.has_xerr
    seeds = lines(axes, "each seed")
    assert [list(line.get_xdata()) for line in seeds] == [scores, [pytest.approx(0.9)]]
    assert [line.get_ydata()[0] for line in seeds] == [0.22, 1.22], "not under the mean"
    assert labels(axes) == ["86.7 ± 3.1", "90.0"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["SOME_METHOD", "OTHER_METHOD"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first method is on top"


def test_references(records):
    figure = comparison_figure(records, REFERENCES)
    axes, (legend, _) = figure.axes[0], figure.legends
    expected = ["majority class: 50.0", "bag of words: 88.0", "everything: 92.8"]
    assert set(expected) < {text.get_text() for text in legend.get_texts()}
    drawn = [line for label in expected for line in lines(axes, label)]
    assert [line.get_xdata()[0] for line in drawn] == list(REFERENCES.values())
    assert len({line.get_linestyle() for line in drawn}) == 3
    assert axes.get_xlim()[0] == 0.45 and axes.get_xlim()[1] > 0.928
    assert axes.get_title(loc="left") == "Test accuracy (axis from 45%)"


def test_costs(records):
    figure = comparison_figure(records, REFERENCES)
    _, parameters, memory, minutes = figure.axes
    titles = ["Trainable parameters", "Peak memory (GB)", "Training (minutes)"]
    assert [axes.get_title(loc="left") for axes in figure.axes[1:]] == titles
    assert parameters.get_xscale() == "log"
    assert [line.get_xydata().tolist() for line in parameters.lines] == [[[148_610, 0]], [[1_923_074, 1]]]
    assert labels(parameters) == ["148,610", "1,923,074"]

    bars = [container[0] for container in memory.containers]
    assert [bar.get_width() for bar in bars] == pytest.approx([0.1, 0.02, 0.04, 2.0, 0.1, 0.02, 0.04, 3.0])
    assert [bar.get_x() for bar in bars] == pytest.approx([0, 0.1, 0.12, 0.16] * 2)
    assert [text.get_text() for text in figure.legends[1].get_texts()] == PARTS_SHOWN
    assert len({bar.get_facecolor() for bar in bars}) == 4
    assert labels(memory) == ["2.16", "3.16"]

    several, single = (bars for bars in minutes.containers if hasattr(bars, "patches"))
    assert (several[0].get_width(), single[0].get_width()) == pytest.approx((1.5, 2.0))
    assert whisker(several.errorbar) == [pytest.approx([1.0, 2.0])]
    assert single.errorbar is None
    assert labels(minutes) == ["1.50 ± 0.50", "2.00"]
    assert [text.xy for text in minutes.texts] == [(2.0, 0), (2.0, 1)], "beside the whisker"


def test_heading_and_caption(records):
    figure = comparison_figure(records, REFERENCES)
    assert figure.get_suptitle() == "small-backbone fine-tuned on films: accuracy and what it costs"
    caption = "Means and sd over 3 seeds, on Fast GPU; 22,500 training and 25,000 test reviews"
    assert figure.legends[0].get_title().get_text() == caption
    records[1]["config"]["demo"] = True
    assert comparison_figure(records, REFERENCES).get_suptitle().startswith(DEMO)


def test_nothing_on_the_page_overlaps_or_leaves_it(records):
    records[0]["environment"]["gpu"] = "NVIDIA H100 80GB HBM3"
    references = {f"a reference with a long name {number}": 0.5 + 0.1 * number for number in range(5)}
    figure = comparison_figure([*records, *records], references)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.texts]
    boxes += [axes.get_tightbbox() for axes in figure.axes]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    assert len(boxes) == 7
    page = figure.bbox
    for box in boxes:
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_the_file_is_a_readable_small_picture(records, tmp_path):
    path = tmp_path / "comparison.png"
    draw_comparison(records, REFERENCES, path)
    content, pixels = path.read_bytes(), imread(path)
    assert len(content) < 300_000
    assert pixels.shape[1] >= 1500
    assert pixels[0, 0].tolist() == [1, 1, 1, 1], "an opaque white page"
    draw_comparison(records, REFERENCES, path)
    assert path.read_bytes() == content
