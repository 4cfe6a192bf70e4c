"""The READMEs say what the records say."""

import json
import shutil

import pytest
from conftest import METHODS, ROOT, digest
from PIL import Image

from common.cli import UserError
from common.data import IMDB_SHA256
from common.study import report
from common.study.tricks import ALL, FLASH

README = "Before.\n<!-- results B A -->\nold\n<!-- end -->\nBetween.\n<!-- charts B A -->\n<!-- end -->\nAfter.\n"
METHOD_README = (
    "<!-- result -->\nold\n<!-- end -->\n<!-- chart bar_chart.png -->\n<!-- end -->\n<!-- sweep -->\n<!-- end -->\n"
)
REFERENCES = {
    "command": "python references",
    "rows": [
        {"name": "majority class", "accuracy": 0.5},
        {"name": "TF-IDF", "accuracy": 0.888, "validation_accuracy": 0.8912, "C": 30},
    ],
    "test_texts_in_train": {"count": 123, "share": 0.00492},
    "environment": {"commit": "aaaabbbbccccdddd", "dirty": False},
}


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
            "memory_bytes": {"weights": 5e8, "gradients": 5e8, "optimizer": 5e8, "rest": 1e9},
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
        "dataset": {"name": "d", "sha256": IMDB_SHA256, "train": 900, "validation": 100, "test": 1000},
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
    (tmp_path / "common" / "study").mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    for method in "AB":
        (tmp_path / method).mkdir()
        (tmp_path / method / "README.md").write_text(METHOD_README)
    return tmp_path


def write(path, content):
    path.write_text(json.dumps(content))


def render(block, folder):
    """What stands in the README of `folder` where it asks for `block`."""
    return report.render(f"<!-- {block} -->\n<!-- end -->", folder)


def test_the_published_readmes_are_what_the_records_say():
    for readme in [ROOT / "README.md", *(ROOT / method / "README.md" for method in METHODS)]:
        assert report.render(readme.read_text(), readme.parent) == readme.read_text()
        assert report.BLOCK.search(readme.read_text())


@pytest.mark.parametrize(
    ("part", "name"),
    [("model", "weights_sha256"), ("dataset", "sha256"), ("config", "epochs"), ("environment", "gpu")],
)
def test_records_that_cannot_be_compared_are_refused(project, part, name):
    first, other = record("A", [0.9]), record("B", [0.9])
    other[part][name] = "another"
    for method, content in (("A", first), ("B", other)):
        write(project / method / "results.json", content)
    with pytest.raises(UserError, match=f"{part} {name} is .* in A and another in B"):
        render("results A B", project)


def test_the_published_charts_are_drawn_from_the_records():
    def drawn_from(chart):
        with Image.open(chart) as image:
            return image.text["Record"]

    records = [json.loads((ROOT / method / "results.json").read_text()) for method in METHODS]
    for record in records:
        for chart in ("bar_chart.png", "line_chart.png"):
            assert drawn_from(ROOT / record["method"] / chart) == digest(record)
    comparison = ROOT / "common" / "study" / "comparison.png"
    assert drawn_from(comparison) == digest([records, report.reference_lines(ROOT)])


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
    assert not (project / "common" / "study" / "comparison.png").exists()
    for block in ("references", "benchmark", "tricks", "whole_command", "sweep A"):
        assert report.UNMEASURED in render(block, project)


def test_the_table_of_results(project):
    study = project / "common" / "study"
    for method, accuracies in {"A": [0.90, 0.92], "B": [0.91, 0.914]}.items():
        write(project / method / "results.json", record(method, accuracies))
    better = record("B", [0.91, 0.914])
    better["summary"]["test_accuracy"]["mean"] = 0.93
    write(project / "B" / "results.json", better)
    report.main(project)
    figures = "90.3 ± 0.2 | 41.2 ± 0.3 | 2.50 ± 0.00 | 11.0 ± 1.0 | 1,500 | 1.2 |"
    rows = [
        f"| [B](B/README.md) | 296,066 (2.96%) | 93.0 ± 0.1 | {figures}",
        f"| [A](A/README.md) | 296,066 (2.96%) | 91.2 ± 0.1 | {figures}",
    ]
    text = (project / "README.md").read_text()
    assert "\n".join(rows) + "\n<!-- end -->" in text, "the best one first"
    assert "mean ± standard deviation over 2 seeds, on one G1." in text
    assert "![comparison of the methods](common/study/comparison.png)" in text
    assert text.index("B/bar_chart.png") < text.index("A/bar_chart.png")
    assert sorted(map(text.index, ("Before.", "Between.", "After."))) == [
        text.index(word) for word in ("Before.", "Between.", "After.")
    ]
    assert (study / "comparison.png").read_bytes().startswith(b"\x89PNG")

    write(study / "full_fine_tuning.json", record("full fine-tuning", [0.93, 0.93]))
    write(study / "references.json", REFERENCES)
    report.main(project)
    rows += [
        f"| [full fine-tuning](common/study/full_fine_tuning.py) | 296,066 (2.96%) | 91.2 ± 0.1 | {figures}",
        "| TF-IDF |  | 88.8 |  |  |  |  |  |  |",
        "| majority class |  | 50.0 |  |  |  |  |  |  |",
    ]
    text = (project / "README.md").read_text()
    assert "\n".join(rows) + "\n<!-- end -->" in text
    assert report.reference_lines(project) == {"full fine-tuning": 0.912, "TF-IDF": 0.888, "majority class": 0.5}
    with Image.open(study / "comparison.png") as image:
        records = [json.loads((project / method / "results.json").read_text()) for method in "BA"]
        assert image.text["Record"] == digest([records, report.reference_lines(project)])
    again = shutil.copytree(project, project.parent / "again")
    report.main(again)
    assert (again / "README.md").read_text() == text


def test_the_references_and_what_known_test_texts_can_be_worth(project):
    write(project / "common" / "study" / "references.json", REFERENCES)
    text = render("references", project)
    assert "`python references`, commit aaaabbbbcc.\n" in text
    assert "| TF-IDF | 30 | 89.12 | 88.80 |\n" in text
    assert "majority" not in text
    # 0.492% of the reviews, of which 11.2% would else be wrong
    assert "123 test texts (0.49%)" in text and "88.8% test accuracy" in text and "at most 0.06 points" in text


def test_a_methods_page(project):
    write(project / "A" / "results.json", record("A", [0.90, 0.92]))
    write(project / "B" / "results.json", record("B", [0.90, 0.92]))
    (project / "A" / "bar_chart.png").touch()
    sweep = {
        "command": "python sweep",
        "results": [
            {"--lr": "1e-3", "validation_accuracy": 0.9, "validation_loss": 0.25, "best_epoch": [2]},
            {"--lr": "2e-3", "validation_accuracy": 0.9, "validation_loss": None, "best_epoch": [2]},
            {"--lr": "without effect", "validation_accuracy": 0.9, "validation_loss": 0.25, "best_epoch": [2]},
        ],
        "environment": {"commit": "fedcba9876543210"},
    }
    write(project / "common" / "study" / "A_sweep_lr.json", sweep)
    write(project / "common" / "study" / "B_variants.json", sweep | {"command": "of B"})
    report.main(project)
    page = (project / "A" / "README.md").read_text()
    assert "| seed 1 | 2 | 70.00 | 92.00 | 91.00 | 11.0 | 2,000 | 2.50 |" in page
    assert "| **mean ± sd** |  |  | 91.20 ± 0.10 | 90.30 ± 0.20 | 11.0 ± 1.0 |  | 2.50 ± 0.00 |" in page
    assert "`python A/train.py`, commit 0123456789. On G1, with torch 2.13 and transformers 5.23." in page
    assert "commit 0123456789 with uncommitted changes." in (project / "B" / "README.md").read_text()
    assert "before training the test accuracy is 50.0." in page
    assert "![bar_chart.png](bar_chart.png)" in page
    assert "| lr | validation accuracy | validation loss |\n" in page
    assert "| 1e-3 | 90.00 | 0.2500 |\n| 2e-3 | 90.00 | not finite |\n\n" in page
    assert "without effect" not in page and "of B" not in page
    assert "`python sweep`, commit fedcba9876.\n" in page
    assert report.UNMEASURED not in page
    assert "`python sweep`" in render("sweep A", project), "on another page than its own"


def test_the_guide_takes_the_fastest_of_the_most_accurate(project):
    draws = [  # method, labels, accuracies, seconds
        ("PEFT_LORA", 100, (0.80, 0.84), 20),
        ("PEFT_QLORA", 100, (0.82, 0.85), 1),  # the most accurate, by less than its spread
        ("NEW_HEAD", 100, (0.60, 0.61), 1),
        ("LAST_LAYER", 100, (0.2, 0.99), 5),  # its own spread is no excuse
        ("PEFT_LORA", 1000, (0.88, 0.88), 20),  # not all four: no advice
        ("TF-IDF + logistic regression", 100, (0.65, 0.67), 1),
    ]
    rows = [
        {"method": method, "labels": size, "test_accuracy": accuracy, "train_seconds": seconds}
        for method, size, accuracies, seconds in draws
        for accuracy in accuracies
    ]
    write(project / "common" / "study" / "labels.json", {"rows": rows})
    write(project / "common" / "study" / "full_fine_tuning.json", record("full fine-tuning", [0.93]))
    write(project / "common" / "study" / "references.json", REFERENCES)
    block = f"guide {' '.join(METHODS)}"
    assert report.UNMEASURED in render(block, project), "no records of the methods yet"
    for method in METHODS:
        (project / method).mkdir()
        write(project / method / "results.json", record(method, [0.90, 0.92]))
    slow = record("PEFT_QLORA", [0.90, 0.92])
    slow["summary"]["train_seconds"]["mean"] = 30.0  # alone, which counts: in the study others trained beside it
    write(project / "PEFT_QLORA" / "results.json", slow)
    text = render(block, project)
    assert "| 100 | [PEFT_LORA](PEFT_LORA/README.md) | 82.0 ± 2.8 | 66.0 ± 1.4 |  |\n" in text and "1,000" not in text
    assert "Weights here: 500 MB and 500 MB" in text and "PEFT_LORA saves 1.2 MB for each task" in text
    assert "LAST_LAYER reaches 91.2 ± 0.1 in 11 s of training, PEFT_LORA 91.2 ± 0.1 in 11 s" in text


def test_the_benchmark_and_the_whole_command(project):
    def side(*speeds):
        return {"reviews_per_second": speeds, "peak_memory_bytes": [1e9, 1e9, 1.2e9]}

    sides = {"usual": side(1000.0, 1200.0, 1100.0), "careful": side(5e3, 5e3, 5e3), "ours": side(6e3, 6e3, 7e3)}
    ratios = {"usual": {"median": 5.5, "min": 5.0, "max": 6.4}, "careful": {"median": 1.2, "min": 1.2, "max": 1.4}}
    content = {"environment": {"gpu": "G1", "cpu": "c", "commit": None}, "command": "python b"}
    content |= {"methods": {"A": {**sides, "ratios": ratios}}}
    content["whole_command"] = {"seconds": 44.4, "run_seconds": 30.0, "train_seconds": 22.5}
    write(project / "common" / "study" / "benchmark_g1.json", content)
    text = render("benchmark", project)
    assert "On G1: `python b`, commit unknown." in text
    row = "| A | 1,100 | 5,000 | 6,000 | 5.5 (5.0 to 6.4) | 1.2 (1.2 to 1.4) | 1.00 / 1.00 / 1.00 |"
    assert row in text
    text = render("whole_command", project)
    assert (
        "takes 44.4 seconds: 22.5 of training, 7.5 to load the model, evaluate and save, and 14.4 for imports" in text
    )


def test_the_table_of_tricks(project):
    found = {
        ALL: {"reviews_per_second": [6000, 6000], "peak_memory_bytes": [4e9, 4e9]},
        FLASH: {"reviews_per_second": [5000, 4000], "peak_memory_bytes": [5e9, 5e9]},
        "a trick that the code has no longer": {"reviews_per_second": [1, 1], "peak_memory_bytes": [1, 1]},
    }
    content = {
        "environment": {"gpu": "G1", "commit": "0" * 40},
        "command": "python t",
        "methods": {"PEFT_LORA": found},
    }
    write(project / "common" / "study" / "tricks.json", content)
    text = render("tricks", project)
    assert "On G1: `python t`, commit 0000000000." in text
    assert f"| PEFT_LORA: nothing | 6,000 |  | 4.00 |\n| PEFT_LORA: {FLASH} | 4,500 | 1.35 (1.20 to 1.50)" in text
    assert "no longer" not in text


def test_a_copy_of_the_code_without_a_history_is_of_an_unknown_commit(project):
    published = record("A", [0.9, 0.92])
    published["environment"]["commit"] = None
    write(project / "A" / "results.json", published)
    report.main(project)
    assert "commit unknown." in (project / "A" / "README.md").read_text()


def test_of_several_flags_each_combination_has_its_best_rate(project):
    rows = [
        {"--lora_r": rank, "--learning_rate": rate, "validation_accuracy": accuracy, "validation_loss": 0.3}
        | {"best_epoch": [1], "trainable_parameters": parameters, "train_seconds": 9.0, "peak_memory_bytes": 2e9}
        for rank, rate, accuracy, parameters in (
            *(("1", "1e-3", 0.90, 1000), ("1", "2e-3", 0.91, 1000), ("4", "1e-3", 0.93, 4000)),
            ("4", "2e-3", 0.92, 4000),
        )
    ]
    sweep = {"command": "python sweep", "results": rows, "environment": {"commit": "f" * 40}}
    write(project / "common" / "study" / "A_sweep_lora_r_learning_rate.json", sweep)
    assert render("sweep A", project).endswith(
        "commit ffffffffff.\n\n"
        "| lora_r | learning_rate | validation accuracy | validation loss | trainable parameters |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| 1 | 2e-3 | 91.00 | 0.3000 | 1,000 |\n| 4 | 1e-3 | 93.00 | 0.3000 | 4,000 |\n\n<!-- end -->"
    )
