"""The READMEs say what the records say."""

import json
import shutil

import pytest
from conftest import METHODS, ROOT
from PIL import Image

from common import report
from common.files import shown
from common.plotting import digest

README = "Before.\n<!-- results B A -->\nold\n<!-- end -->\nBetween.\n<!-- charts B A -->\n<!-- end -->\nAfter.\n"
METHOD_README = (
    "<!-- result -->\nold\n<!-- end -->\n<!-- chart bar_chart.png -->\n<!-- end -->\n<!-- sweep -->\n<!-- end -->\n"
)


def record(method: str, accuracies: list[float]) -> dict:
    """A results.json as far as the tables read it."""
    runs = [
        {
            "seed": seed,
            "epochs": [
                {"epoch": epoch, "train_accuracy": 0.5, "validation_accuracy": 0.5 + epoch / 10, "seconds": 1.0}
                for epoch in range(3)
            ],
            "best_epoch": 2,
            "untrained_test": {"accuracy": 0.5, "f1": 0.4},
            "test": {"accuracy": accuracy, "f1": accuracy - 0.01},
            "train_seconds": 10.0 + seed,
            "train_reviews_per_second": 1000.0 * (seed + 1),
            "peak_memory_bytes": 2_500_000_000,
            "memory_bytes": {"weights": 5e8, "gradients": 5e8, "optimizer": 5e8, "activations": 1e9},
            "checkpoint_bytes": 1_200_000,
            "padding_percent": 2.5,
        }
        for seed, accuracy in enumerate(accuracies)
    ]
    summary = {
        "test_accuracy": {"mean": 0.912, "sd": 0.001},
        "test_f1": {"mean": 0.903, "sd": 0.002},
        "accuracy_gain": {"mean": 0.412, "sd": 0.003},
        "train_seconds": {"mean": 11.0, "sd": 1.0},
        "peak_memory_bytes": {"mean": 2.5e9, "sd": 0.0},
    }
    return {
        "method": method,
        "command": f"python {method}/train.py",
        "config": {"demo": False, "epochs": 2},
        "model": {
            "name": "m",
            "trainable_parameters": 296_066,
            "total_parameters": 10**7,
            "trainable_percent": 2.96066,
        },
        "dataset": {"name": "d", "train": 900, "validation": 100, "test": 1000},
        "environment": {
            "gpu": "G1",
            "cpu": "c",
            "torch": "2.13",
            "transformers": "5.23",
            "commit": "0123456789abcdef",
            "dirty": method == "B",
        },
        "runs": runs,
        "summary": summary,
    }


@pytest.fixture
def project(tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "README.md").write_text(README)
    for method in "AB":
        (tmp_path / method).mkdir()
        (tmp_path / method / "README.md").write_text(METHOD_README)
    return tmp_path


def test_the_published_readmes_are_what_the_records_say():
    for readme in [ROOT / "README.md", *(ROOT / method / "README.md" for method in METHODS)]:
        assert report.render(readme.read_text(), readme.parent) == readme.read_text()
        assert report.BLOCK.search(readme.read_text())


def test_the_published_charts_are_drawn_from_the_records():
    def drawn_from(chart):
        with Image.open(chart) as image:
            return image.text["Record"]

    records = [json.loads((ROOT / method / "results.json").read_text()) for method in METHODS]
    for record in records:
        for chart in ("bar_chart.png", "line_chart.png"):
            assert drawn_from(ROOT / record["method"] / chart) == digest(record)
    references = json.loads((ROOT / "common" / "references.json").read_text())["accuracy"]
    assert drawn_from(ROOT / "common" / "comparison.png") == digest([records, references])


@pytest.mark.parametrize("method", METHODS)
def test_parameters_in_the_text_are_the_records(method):
    model = json.loads((ROOT / method / "results.json").read_text())["model"]
    text = (ROOT / method / "README.md").read_text().partition("## Run it")[0]
    assert f"{model['trainable_parameters']:,}" in text


def test_all_methods_have_the_same_headings():
    headings = [
        [line for line in (ROOT / method / "README.md").read_text().splitlines() if line.startswith("## ")]
        for method in METHODS
    ]
    assert len(headings[0]) == 6
    assert all(found == headings[0] for found in headings)


def test_without_records_nothing_is_claimed(project):
    report.main(project)
    for readme in project.rglob("README.md"):
        assert report.UNMEASURED in readme.read_text()
        assert "old" not in readme.read_text()
    assert not (project / "common" / "comparison.png").exists()


def test_tables_hold_the_records_figures(project):
    for method, accuracies in {"A": [0.90, 0.92], "B": [0.91, 0.914]}.items():
        (project / method / "results.json").write_text(json.dumps(record(method, accuracies)))
        (project / method / "bar_chart.png").touch()
    references = {"accuracy": {"majority class": 0.5, "TF-IDF": 0.888}}
    (project / "common" / "references.json").write_text(json.dumps(references))
    sweep = {
        "command": "python sweep",
        "results": [
            {"--lr": "1e-3", "validation_accuracy": 0.9, "validation_loss": 0.25, "best_epoch": [2]},
            {"--lr": "2e-3", "validation_accuracy": 0.9, "validation_loss": 0.26, "best_epoch": [2]},
            {"--lr": "without effect", "validation_accuracy": 0.9, "validation_loss": 0.25, "best_epoch": [2]},
        ],
        "environment": {"commit": "fedcba9876543210"},
    }
    (project / "A" / "sweep_lr.json").write_text(json.dumps(sweep))
    report.main(project)
    text = (project / "README.md").read_text()
    row = "296,066 (2.96%) | 91.2 ± 0.1 | 90.3 ± 0.2 | 41.2 ± 0.3 | 2.50 ± 0.00 | 11.0 ± 1.0 | 2,000 | 1.2 |"
    assert f"| [A](A/README.md) | {row}" in text
    assert f"| [B](B/README.md) | {row}" in text
    assert "| TF-IDF |  | 88.8 |" in text
    assert "mean ± sd over 2 seeds, on one G1." in text
    assert "![comparison of the methods](common/comparison.png)" in text
    assert text.index("B/bar_chart.png") < text.index("A/bar_chart.png")
    assert [text.index(word) for word in ("Before.", "Between.", "After.")] == sorted(
        text.index(word) for word in ("Before.", "Between.", "After.")
    )
    assert (project / "common" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (project / "A" / "README.md").read_text()
    assert "| seed 1 | 2 | 70.00 | 92.00 | 91.00 | 11.0 | 2,000 | 2.50 |" in page
    assert "`python A/train.py` on G1, torch 2.13, transformers 5.23, commit 0123456789." in page
    assert "commit 0123456789 with uncommitted files." in (project / "B" / "README.md").read_text()
    assert "Before training: accuracy 50.0." in page
    assert "![bar_chart.png](bar_chart.png)" in page
    assert "| 1e-3 | 90.00 | 0.2500 |\n| 2e-3 | 90.00 | 0.2600 |\n\n" in page
    assert "without effect" not in page
    assert "`python sweep`, commit fedcba9876\n" in page
    assert report.UNMEASURED not in page
    again = shutil.copytree(project, project.parent / "again")
    report.main(again)
    assert (again / "README.md").read_text() == text


def test_small_steps_are_compared_with_the_same_seed(project):
    published, small = record("A", [0.90, 0.92]), record("A", [0.93])
    small["runs"][0] |= {"seed": 1, "peak_memory_bytes": 1.5e9}
    (project / "A" / "results.json").write_text(json.dumps(published))
    (project / "A" / "small_gpu.json").write_text(json.dumps(small))
    text = report.render("<!-- small_gpu A 2.5 -->\n<!-- end -->", project)
    assert "1.50 GB of peak memory (limit: 2.5), test accuracy 93.00;" in text
    assert "2.50 GB and 92.00." in text


def test_the_benchmark_table(project):
    (project / "tests").mkdir()
    side = {"reviews_per_second": [10.0, 12.0, 11.0], "peak_memory_bytes": [1e9, 1e9, 1.2e9]}
    methods = {
        "A": {"usual": side, "ours": side, "ratio": {"median": 4.2, "min": 4.0, "max": 4.5}, "share_of_floor": 0.31}
    }
    content = {"environment": {"gpu": "G1", "cpu": "c"}, "command": "python b", "methods": methods}
    content["whole_command"] = {"seconds": 44.4, "run_seconds": 30.0, "train_seconds": 22.5}
    (project / "tests" / "benchmark_g1.json").write_text(json.dumps(content))
    text = report.render("<!-- benchmark -->\n<!-- end -->", project)
    assert "G1: `python b`" in text
    assert "| A | 11.0 | 11.0 | 4.2 (4.0 to 4.5) | 1.00 | 1.00 | 31% |" in text
    text = report.render("<!-- whole_command 45 20 -->\n<!-- end -->", project)
    assert "took 44.4 seconds (limit 45: kept): training 22.5, the rest of `train` (model, evaluation, sav" in text
    assert (
        "saving) 7.5, and imports, data and charts 14.4. The limit" in text and "20, is missed by at most 1.9:" in text
    )
    assert "44 seconds" not in text and "limit 44: missed by 0.4" in report.render(
        "<!-- whole_command 44 22 -->\n<!-- end -->", project
    )


def test_a_copy_of_the_code_without_a_history_is_of_an_unknown_commit(project):
    published = record("A", [0.9, 0.92])
    published["environment"]["commit"] = None
    (project / "A" / "results.json").write_text(json.dumps(published))
    report.main(project)
    assert "commit unknown." in (project / "A" / "README.md").read_text()


def test_paths_are_not_published(tmp_path):
    assert shown(str(tmp_path)) == tmp_path.name
    assert shown(f"--dataset={tmp_path}") == f"--dataset={tmp_path.name}"
    for word in ("stanfordnlp/imdb", "--demo", "5e-4", "--learning_rate=5e-4", ""):
        assert shown(word) == word


def test_what_was_aimed_at_and_missed_is_said(project):
    for method in ("A", "B"):
        (project / method / "results.json").write_text(json.dumps(record(method, [0.91, 0.914])))

    def rendered(words):
        return report.render(f"<!-- aims {words} -->\n<!-- end -->", project)

    assert "test reviews: A 91.5, B 91.0. Missed: A by 0.30." in rendered("accuracy A=91.5 B=91")
    assert "per second: A 2,000. Reached." in rendered("speed A=2000")
    assert "per second: A 2,001. Missed: A by 1.0." in rendered("speed A=2001")
    # 900 reviews in what 11 seconds leave after three epochs of one second
    assert "frozen blocks: A 112. Reached." in rendered("pass A=112")
    assert "frozen blocks: A 113. Missed: A by 0.5." in rendered("pass A=113")
    assert "Limits, in GB of peak memory: A 2.6, B 2.5. Kept." in rendered("memory A=2.6 B=2.5")
    assert "second seed on: A 1.0. Kept." in rendered("epoch A=1")
    assert "second seed on: A 0.5. Exceeded: A by 0.50." in rendered("epoch A=0.5")
    assert "of the tokens: A 2.0, B 3.0. Exceeded: A by 0.50." in rendered("padding A=2 B=3")
    assert report.UNMEASURED in rendered("speed A=1 C=1")
