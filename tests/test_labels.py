"""The study by number of labels: other reviews for every draw, none of the test set for tuning, nothing done twice."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import transformers
from conftest import read_reviews
from PIL import Image

from common.data import load_reviews
from common.study import labels, report, scripts


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Folder and record of a small demo."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels, "HERE", folder)
        patch.setattr(labels, "ProcessPoolExecutor", ThreadPoolExecutor)  # a process needs seconds to start
        record = labels.main(["--demo", "--sizes", "60", "--methods", "NEW_HEAD", labels.BAG])
    return folder / "runs" / "demo", record


def test_the_demo_measures_every_draw_by_the_scripts_themselves(study):
    folder, record = study
    assert json.loads((folder / "labels.json").read_text())["rows"] == record["rows"]
    assert [(row["method"], row["labels"], row["seed"]) for row in record["rows"]] == [
        *[("NEW_HEAD", 60, 0), ("NEW_HEAD", 60, 1), (labels.BAG, 60, 0), (labels.BAG, 60, 1)]
    ]
    head, again, bag, _ = record["rows"]
    assert head["train_sha256"] != again["train_sha256"]
    assert (head["train_reviews"], bag["train_reviews"], head["updates"]) == (54, 60, 20)
    assert all(0.3 < row["test_accuracy"] <= 1 and row["train_seconds"] > 0 for row in record["rows"])
    assert Image.open(folder / "labels.png").size[0] > 1000


@pytest.mark.parametrize(("flags", "name"), [([], "labels"), (["--record", "other"], "other")])
def test_no_row_is_measured_twice(flags, name, tmp_path, monkeypatch):
    rows = [
        {"method": "NEW_HEAD", "labels": 32, "seed": seed, "test_accuracy": 0.5, "train_seconds": 1} for seed in (0, 1)
    ]
    monkeypatch.setattr(labels, "record_path", lambda name, config: tmp_path / f"{name}.json")
    (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows, "flags": []}))
    assert labels.main([*flags, "--methods", "NEW_HEAD", "--sizes", "32", "--draws", "2"])["rows"] == rows
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.json", f"{name}.png"}


@pytest.mark.parametrize(("flags", "name"), [([], "flags"), (["--tune"], "settings")])
def test_rows_of_other_runs_are_not_taken_for_these(flags, name, tmp_path, monkeypatch, capsys):
    before = {"rows": [], "flags": ["--lora_r", "4"] if name == "flags" else []}
    monkeypatch.setattr(labels, "record_path", lambda name, config: tmp_path / f"{name}.json")
    (tmp_path / f"labels{'_tuning' * bool(flags)}.json").write_text(json.dumps(before))
    with pytest.raises(SystemExit):
        labels.main(flags)
    assert f"was made with other {name}" in capsys.readouterr().err


@pytest.mark.parametrize("published", [True, False])
def test_only_the_published_reviews_and_backbone_write_the_published_record(
    published, demo, tmp_path, monkeypatch, capsys
):
    model, reviews = demo
    monkeypatch.setattr(scripts, "is_published", lambda config, fingerprint, folder: published)
    for module in (labels, scripts):
        monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(labels, "measure", lambda job: {**job, "test_accuracy": 0.5, "train_seconds": 1.0})
    monkeypatch.setattr(labels, "ProcessPoolExecutor", ThreadPoolExecutor)
    flags = ["--methods", "NEW_HEAD", "--sizes", "32", "--", "--dataset", str(reviews), "--model", str(model)]
    labels.main(flags)
    place = tmp_path if published else tmp_path / "runs" / reviews.name
    assert [*tmp_path.rglob("labels.*")] == [place / "labels.json", place / "labels.png"]
    assert capsys.readouterr().out.endswith(f"Record:   {place / 'labels.json'}\n")


@pytest.mark.parametrize(("flags", "draws", "seed"), [([], {32: 5, 1000: 5, 3200: 3}, 0), (["--tune"], {100: 3}, 100)])
def test_draws_for_figures_and_for_tuning_have_nothing_in_common(flags, draws, seed):
    args = type(
        "Args", (), {"methods": ["PEFT_LORA"], "sizes": list(draws), "draws": None, "flags": [], "tune": bool(flags)}
    )
    jobs = labels.wanted(args)
    for size, count in draws.items():
        seeds = {job["seed"] for job in jobs if job["labels"] == size}
        assert seeds == set(range(seed, seed + count))


def test_tuning_sees_training_reviews_outside_the_draw_and_no_test_review(demo, monkeypatch):
    monkeypatch.setattr(labels, "OUTSIDE", 300)
    whole, _ = read_reviews(str(demo[1]))
    draw, _ = read_reviews(str(demo[1]), None, 200, 50, 7, labels.outside_the_draw(load_reviews))
    texts = {split: set(rows["text"][:]) for split, rows in draw.items()}
    assert len(texts["test"]) == 300 and len(texts["train"] | texts["validation"]) == 200
    assert not texts["test"] & (texts["train"] | texts["validation"] | set(whole["test"]["text"][:]))
    assert texts["train"] == set(read_reviews(str(demo[1]), None, 200, None, 7)[0]["train"]["text"][:])


def test_the_tables(tmp_path):
    draws = [  # method, labels, seed, setting, accuracy
        ("PEFT_LORA", 100, 0, "as it is", 0.7),
        ("PEFT_LORA", 100, 1, "as it is", 0.74),
        ("PEFT_LORA", 100, 2, "as it is", 0.2),  # not with the other setting: no part of the comparison
        ("PEFT_LORA", 100, 1, "rate 7e-4", 0.72),
        ("PEFT_LORA", 100, 0, "rate 7e-4", 0.72),
        ("PEFT_LORA", 25_000, 0, "as it is", 0.9),
        ("NEW_HEAD", 1000, 0, "as it is", 0.6),
    ]
    names = ("method", "labels", "seed", "setting", "test_accuracy")
    extra = {"total_seconds": 30, "commit": "0" * 40}
    rows = [dict(zip(names, draw, strict=True)) | extra for draw in draws]
    rest = {
        "command": "python l",
        "jobs_at_a_time": 4,
        "flags": ["--dataset", "d"],
        "environment": {"gpu": "G1", "commit": "0" * 40},
    }
    (tmp_path / "common" / "study").mkdir(parents=True)
    plain = [row for row in rows if row["setting"] == "as it is" and row["seed"] < 2]
    for name, found in (("labels", plain), ("labels_tuning", rows)):
        (tmp_path / "common" / "study" / f"{name}.json").write_text(json.dumps(rest | {"rows": found}))
    text = report.labels(tmp_path, [])
    assert "| method | 100 | 1,000 | all labels |" in text and "over 1 to 2 draws" in text
    assert "4 draws at a time; those of the fine-tuning methods add up to 2 minutes" in text
    assert "| PEFT_LORA | 72.0 ± 2.8 |  | 90.0 |\n| NEW_HEAD |  | 60.0 |  |\n" in text
    other = rest | {"flags": ["--dataset", "d", "--lora_r", "64"], "rows": [rows[0] | {"test_accuracy": 0.8}]}
    (tmp_path / "common" / "study" / "other.json").write_text(json.dumps(other))
    assert report.other_flags(tmp_path / "PEFT_LORA", ["other"]).endswith(
        "| flags | 100 |\n| --- | ---: |\n| as it is | 70.0 |\n| `--lora_r 64` | 80.0 |\n"
    ), "of the other draws nothing"
    for page, words in ((tmp_path / "PEFT_LORA", []), (tmp_path, ["PEFT_LORA"])):
        table = report.labels_tuning(page, words)
        assert "0000000000. 1 to 2 draws, the same for all settings." in table
        assert "| as it is | 72.0 ± 2.8 | 90.0 |\n| rate 7e-4 | 72.0 ± 0.0 |  |\n" in table and "60.0" not in table


def test_a_setting_reaches_the_script_and_the_test_set_plays_no_part(demo, monkeypatch):
    seen = {}
    method = labels.script("PEFT_LORA")

    def watch(config, seed, tokenizer, data, fingerprint, classes):
        warmup = transformers.TrainingArguments(output_dir="x").warmup_steps
        seen.update(config=config, test=len(data["test"]), warmup=warmup)
        raise KeyboardInterrupt

    monkeypatch.setattr(method, "train", watch)
    monkeypatch.setattr(labels, "OUTSIDE", 300)
    flags = ["--demo", "--updates", "90", "--warmup", "0.3", "--lora_r", "4"]
    monkeypatch.setattr("common.cli.DEMO_SETTINGS", {"seeds": [0], "batch_size": 32, "max_length": 64})
    with pytest.raises(KeyboardInterrupt):
        labels.tune({"method": "PEFT_LORA", "labels": 100, "seed": 100, "flags": flags})
    assert (seen["config"].lora_r, seen["config"].epochs, seen["warmup"]) == (4, 23, 0.3)  # 4 updates an epoch
    assert seen["test"] == 300  # the demo's test set has 500
