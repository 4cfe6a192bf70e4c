"""Records say which code they come from."""

import subprocess

import pytest

from common import record


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


def test_without_history_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("SOURCE_COMMIT", "abc")
    assert (record.environment()["commit"], record.environment()["dirty"]) == ("abc", None)
