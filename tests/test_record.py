"""Records say which code they come from."""

import json
import subprocess

import pytest

from common import record
from common.files import write_json


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "train.py").write_text("1")
    git("add", "train.py")
    git("commit", "-q", "-m", "first")
    return git


def test_commit_and_whether_the_code_differs_from_it(repository, tmp_path):
    before = record.environment()
    assert before["commit"] == repository("rev-parse", "HEAD")
    assert before["dirty"] is False
    (tmp_path / "notes.txt").write_text("no code")
    assert record.environment()["dirty"] is False
    (tmp_path / "train.py").write_text("2")
    assert record.environment() == before | {"dirty": True}


def test_a_loss_that_is_not_finite_is_null(tmp_path):
    write_json({"loss": [float("nan"), float("inf"), 0.5]}, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == {"loss": [None, None, 0.5]}
    assert "NaN" not in (tmp_path / "results.json").read_text()


def test_without_history_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("SOURCE_COMMIT", "abc")
    assert (record.environment()["commit"], record.environment()["dirty"]) == ("abc", None)
