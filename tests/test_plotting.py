"""The two charts of a run show what its record says; nothing on them overlaps."""

import itertools
from statistics import mean, stdev

import pytest
from conftest import digest
from matplotlib.figure import Figure
from matplotlib.image import imread

from common.cli import whole_file
from common.data import IMDB_SHA256
from common.plotting import BLUE, DEMO, bar_figure, limits, line_figure, save


def make_run(seed):
    """The seeds differ in every figure, and each chooses another epoch."""
    shift = 0.01 * seed * (seed + 1)
    validation = [0.5 + shift, 0.8 + shift, 0.85 + shift, 0.84 + shift]
    return {
        "seed": seed,
        "epochs": [
            {"epoch": epoch, "train_accuracy": value + 0.02 * epoch, "validation_accuracy": value}
            for epoch, value in enumerate(validation)
        ],
        "best_epoch": 3 - seed,
        "untrained_test": {"accuracy": 0.48 + shift, "f1": 0.3 + 3 * shift},
        "test": {"accuracy": 0.84 + shift, "f1": 0.83 + 2 * shift},
    }


@pytest.fixture
def record():
    return {
        "method": "SOME_METHOD",
        "config": {"demo": False},
        "model": {
            "name": "organisation/small-backbone",
            "trainable_parameters": 148_610,
            "total_parameters": 22_713_986,
            "trainable_percent": 100 * 148_610 / 22_713_986,
        },
        "dataset": {
            "name": "organisation/films",
            "sha256": IMDB_SHA256,
            "train": 22_500,
            "validation": 2_500,
            "test": 25_000,
        },
        "runs": [make_run(seed) for seed in range(3)],
    }


def drawn(figure):
    """Its axes, after all places and ticks have been settled."""
    figure.draw_without_rendering()
    return figure.axes[0]


def texts(figure) -> tuple[str, str, str]:
    """Title, subtitle and caption."""
    return figure.get_suptitle(), figure.axes[0].get_title(loc="left"), figure.axes[0].get_xlabel()


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_bars_show_mean_and_deviation_before_and_after(record):
    figure = bar_figure(record)
    (axes,) = figure.axes
    before, after = (bars for bars in axes.containers if bars.get_label().endswith("fine-tuning"))
    assert legend(figure) == ["before fine-tuning", "after fine-tuning"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["test accuracy", "test F1"]
    assert before[0].get_x() < after[0].get_x() < before[1].get_x() < after[1].get_x()
    for bars, key in ((before, "untrained_test"), (after, "test")):
        values = [[run[key][metric] for run in record["runs"]] for metric in ("accuracy", "f1")]
        assert [bar.get_height() for bar in bars] == pytest.approx([mean(scores) for scores in values])
        whiskers = [segment[:, 1].tolist() for segment in bars.errorbar.lines[2][0].get_segments()]
        for scores, ends in zip(values, whiskers, strict=True):
            assert ends == pytest.approx([mean(scores) - stdev(scores), mean(scores) + stdev(scores)])
    assert [text.get_text() for text in axes.texts] == ["50.7%", "38.0%", "86.7%", "88.3%"]


def test_bars_stand_on_zero(record):
    axes = drawn(bar_figure(record))
    assert axes.get_ylim()[0] == 0
    ticks = [text.get_text() for text in axes.get_yticklabels()]
    assert "0%" in ticks and "100%" in ticks


def test_a_bars_label_beyond_hundred_percent_stands_on_nothing(record):
    for run, accuracy in zip(record["runs"], (1.0, 0.98, 0.99), strict=True):
        run["test"]["accuracy"] = accuracy
    axes = drawn(bar_figure(record))
    label = next(text for text in axes.texts if text.get_text() == "99.0%")
    assert label.get_annotation_clip() is False
    assert not label.get_window_extent().overlaps(axes._left_title.get_window_extent())


def test_charts_name_method_backbone_data_parameters_seeds_and_what_is_drawn(record):
    caption = "25,000 test reviews; seeds 0, 1, 2: bars are means, whiskers ± 1 sd"
    bars, curves = texts(bar_figure(record)), texts(line_figure(record))
    assert bars[0] == curves[0] == "SOME_METHOD: small-backbone on films"
    assert bars[1] == curves[1] == "Trains 148,610 of 22,713,986 parameters (0.654%) · seeds 0, 1, 2"
    assert bars[2] == caption
    assert "epoch (0: before fine-tuning)" in curves[2] and "2,500 validation reviews" in curves[2]
    record["dataset"]["sha256"] = "0" * 64  # reviews are those of IMDb
    bars, curves = texts(bar_figure(record)), texts(line_figure(record))
    assert bars[2] == caption.replace("reviews", "texts")
    assert "2,500 validation texts; training: a fixed sample of texts" in " ".join(curves[2].split())


def test_one_seed_has_no_deviation(record):
    record["runs"] = record["runs"][1:2]
    bars, curves = bar_figure(record), line_figure(record)
    assert all(container.errorbar is None for container in bars.axes[0].containers)
    assert [text.get_text() for text in bars.axes[0].texts] == ["50.0%", "36.0%", "86.0%", "87.0%"]
    assert texts(bars)[2] == "25,000 test reviews; seed 1"
    assert texts(curves)[1].endswith("· seed 1")


@pytest.mark.parametrize("figure", [bar_figure, line_figure])
def test_the_title_has_no_folders_and_says_where_figures_mean_nothing(figure, record):
    record["model"]["name"] = "/a/very/long/way/to/$back$bone/"
    record["dataset"]["name"] = "../data/films.tar.gz"
    assert texts(figure(record))[0] == "SOME_METHOD: $back$bone on films.tar.gz"
    record["config"]["demo"] = True
    assert texts(figure(record))[0] == f"{DEMO}\nSOME_METHOD: $back$bone on films.tar.gz"
    assert DEMO == "Demo: generated reviews, tiny model; the figures mean nothing"


def test_line_chart_draws_every_seed_the_means_and_the_chosen_epochs(record):
    figure, runs = line_figure(record), record["runs"]
    lines = figure.axes[0].lines
    validation = [[epoch["validation_accuracy"] for epoch in run["epochs"]] for run in runs]
    training = [[epoch["train_accuracy"] for epoch in run["epochs"]] for run in runs]

    marks = [line for line in lines if line.get_marker() == "o"]
    seeds = [line for line in lines if line.get_color() == BLUE and line not in marks]
    bold, dashed = (line for line in lines if line not in (*marks, *seeds))
    assert [list(line.get_ydata()) for line in seeds] == validation
    for line, curves in ((bold, validation), (dashed, training)):
        assert list(line.get_ydata()) == pytest.approx([mean(values) for values in zip(*curves, strict=True)])
    assert (bold.get_label(), dashed.get_label()) == ("validation, mean", "training (sample)")
    assert bold.get_linewidth() > 2 * seeds[0].get_linewidth() and dashed.get_linestyle() == "--"
    assert all(list(line.get_xdata()) == [0, 1, 2, 3] for line in (*seeds, bold, dashed))
    chosen = [(mark.get_xdata()[0], mark.get_ydata()[0]) for mark in marks]
    assert chosen == [(3, validation[0][3]), (2, validation[1][2]), (1, validation[2][1])]
    assert sorted(legend(figure)) == [
        *("chosen epoch", "training (sample)", "validation, each seed", "validation, mean"),
    ]


@pytest.mark.parametrize("narrow", [False, True])
def test_line_axes_have_whole_epochs_and_say_where_accuracy_starts(record, narrow):
    if narrow:
        for epoch in (epoch for run in record["runs"] for epoch in run["epochs"]):
            epoch.update(train_accuracy=0.8, validation_accuracy=0.8 + 0.02 * epoch["epoch"])
    axes = drawn(line_figure(record))
    low, high = (0.75, 0.9) if narrow else (0.45, 1.0)
    assert axes.get_ylim() == (low, high)
    assert axes.get_ylabel() == f"accuracy (axis from {100 * low:.0f}%)"
    assert all(tick == int(tick) for tick in axes.get_xticks())
    shown = [float(text.get_text().removesuffix("%")) for text in axes.get_yticklabels()]
    assert shown == pytest.approx([100 * tick for tick in axes.get_yticks()])


@pytest.mark.parametrize(
    ("values", "expected"), [([0.5, 0.93], (0.45, 0.95)), ([0.51, 0.95], (0.5, 0.95)), ([0, 1], (0, 1))]
)
def test_axis_limits_lie_around_the_values(values, expected):
    assert limits(values) == pytest.approx(expected)


@pytest.mark.parametrize("figure", [bar_figure, line_figure])
def test_nothing_on_the_page_overlaps_or_leaves_it(figure, record):
    record["config"]["demo"] = True
    record["model"]["name"] = "a-backbone-whose-name-is-long-enough-to-need-a-second-line-of-the-title"
    page = figure(record)
    axes = drawn(page)
    boxes = [page._suptitle.get_window_extent(), page.legends[0].get_window_extent(), axes.get_tightbbox()]
    for box in boxes:
        assert page.bbox.x0 <= box.x0 and box.x1 <= page.bbox.x1 and page.bbox.y0 <= box.y0 and box.y1 <= page.bbox.y1
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_saved_files_are_small_whole_and_repeatable_pngs(record, tmp_path):
    for name, figure in (("bar.png", bar_figure), ("line.png", line_figure)):
        save(figure(record), tmp_path / name, record)
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) < 300_000
        pixels = imread(tmp_path / name)
        assert pixels.shape[1] >= 1000
        assert pixels[0, 0].tolist() == [1, 1, 1, 1], "an opaque white page"
        assert pixels.std() > 0.05
        assert b"Software" not in content and digest(record).encode() in content
        save(figure(record), tmp_path / name, record)
        assert (tmp_path / name).read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bar.png", "line.png"]


def test_failed_save_leaves_the_old_chart_alone(record, tmp_path, monkeypatch):
    chart = tmp_path / "chart.png"
    chart.write_bytes(b"old")

    def fail_halfway(figure, path, **options):
        assert path != chart and path.parent == chart.parent and path.suffix == ".png"
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", fail_halfway)
    with pytest.raises(OSError, match="no space"):
        save(bar_figure(record), chart, record)
    assert chart.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [chart]


def test_whole_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "record.json"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
