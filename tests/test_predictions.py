"""Right answers, calibration and intervals are what their definitions say."""

import json
import re

import numpy as np
import pytest

from common.study import predictions, report
from common.study.predictions import calibration_error, compare, describe, fit_temperature, log_loss, right_answers


def made(accuracies, seed=0, reviews=4000):
    """A record of seeds with these accuracies on the same reviews, mistakes on the hardest ones mostly."""
    hardness = np.random.default_rng(seed).random(reviews)
    labels = np.zeros(reviews, int)
    runs = []
    for accuracy in accuracies:
        logits = np.stack([np.where(hardness < accuracy, 1.0, -1.0), np.zeros(reviews)], axis=1)
        parts = {
            "test_logits": logits,
            "test_labels": labels,
            "validation_logits": logits,
            "validation_labels": labels,
        }
        runs.append({"seed": len(runs), **describe(parts)})
    return {"runs": runs}


def test_right_answers_survive_as_bits():
    record = made([0.9, 0.8], reviews=1001)
    answers = right_answers(record)
    assert answers.shape == (2, 1001)
    assert answers.mean(axis=1) == pytest.approx([0.9, 0.8], abs=0.05) and (answers[0] >= answers[1]).all()
    assert len(json.dumps(made([0.9] * 3, reviews=25_000))) < 40_000


def test_calibration_error_is_the_distance_of_confidence_from_accuracy():
    labels = np.array([0] * 8 + [1] * 2)
    sure = np.tile([np.log(0.8), np.log(0.2)], (10, 1))  # 80% sure, and right eight times of ten
    assert calibration_error(sure, labels) == pytest.approx(0)
    assert calibration_error(np.tile([np.log(0.95), np.log(0.05)], (10, 1)), labels) == pytest.approx(0.15)
    assert log_loss(sure, labels) == pytest.approx(-0.8 * np.log(0.8) - 0.2 * np.log(0.2))


def test_temperature_takes_back_what_was_scaled():
    random = np.random.default_rng(0)
    logits = random.normal(size=(20_000, 3))
    labels = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from the softmax of the logits
    assert fit_temperature(4 * logits, labels) == pytest.approx(4, rel=0.05)
    parts = {
        f"{split}_{part}": value
        for split in ("test", "validation")
        for part, value in (("logits", 4 * logits), ("labels", labels))
    }
    entry = describe(parts)
    assert entry["calibration_error"] > 0.1 > 0.02 > entry["calibration_error_with_temperature"]
    assert entry["log_loss"] > entry["log_loss_with_temperature"]


def test_a_difference_has_an_interval_around_it():
    difference, low, high = compare(made([0.92, 0.92]), made([0.90, 0.90]))
    assert 1.3 < low < difference < high < 2.7, "on the same reviews: narrower than by chance alone"
    _, apart_low, apart_high = compare(made([0.92, 0.92], seed=1), made([0.90, 0.90], seed=2))
    assert apart_high - apart_low > 1.7 * (high - low), "mistakes on other reviews say less"
    difference, low, high = compare(made([0.92, 0.90]), made([0.91, 0.91]))
    assert low < 0 < high, "the seeds differ more than the methods"


def test_the_record_is_made_from_what_a_run_leaves(tmp_path, monkeypatch, capsys):
    for place in ("study", "NEW_HEAD"):
        (tmp_path / place).mkdir()
    monkeypatch.setattr(predictions, "HERE", tmp_path / "study")
    monkeypatch.setattr(predictions.script("NEW_HEAD"), "FOLDER", tmp_path / "NEW_HEAD")
    with pytest.raises(SystemExit):
        predictions.main(["NEW_HEAD", "--runs", str(tmp_path)])
    (tmp_path / "seed_4").mkdir()
    (tmp_path / "seed_4" / "run.json").write_text('{"seed": 4}')
    logits, labels = np.array([[2.0, 0], [0, 2], [2, 0]]), np.array([0, 1, 1])
    np.savez(
        tmp_path / "seed_4" / "logits.npz",
        test_logits=logits,
        test_labels=labels,
        validation_logits=logits,
        validation_labels=labels,
    )
    for published, place in (([{"seed": 5}], tmp_path), ([{"seed": 4}], tmp_path / "study")):
        (tmp_path / "NEW_HEAD" / "results.json").write_text(json.dumps({"runs": published}))
        record = predictions.main(["NEW_HEAD", "--runs", str(tmp_path)])
        path = place / "NEW_HEAD_predictions.json"
        assert json.loads(path.read_text()) == record
        assert capsys.readouterr().out.endswith(f"Record:   {path}\n")
        path.unlink()
        assert not [*tmp_path.rglob("NEW_HEAD_predictions.json")], "of another run than the published one"
    assert record["runs"][0]["seed"] == 4 and right_answers(record).tolist() == [[1, 1, 0]]


def test_the_lines_and_the_table_of_a_readme(tmp_path):
    assert report.differences(tmp_path, ["A", "B"]) == report.calibration(tmp_path, ["A", "B"]) == report.UNMEASURED
    (tmp_path / "common" / "study").mkdir(parents=True)
    for name, accuracies in (("A", [0.9, 0.9]), ("B", [0.92, 0.92]), ("C", [0.89, 0.91])):
        path = tmp_path / "common" / "study" / f"{name}_predictions.json"
        path.write_text(json.dumps(made(accuracies) | {"method": name}))
    first, second = report.differences(tmp_path, ["A", "B", "C"]).splitlines()
    assert re.fullmatch(r"- B over A: \+[12]\.\d points, 95% interval \+1\.\d to \+2\.\d\.", first)
    assert second.startswith(("- A over C", "- C over A"))
    assert second.endswith(": no difference that these runs can show.")
    assert "| B | 0." in report.calibration(tmp_path, ["A", "B"])
