"""Records say what happened and which code did it; what an earlier run left goes only where it is ours."""

import hashlib
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import import_method
from transformers import EvalPrediction

from common import record
from common.cli import SIZES, UserError, file_sizes, public_name, write_json
from common.record import command_line, open_seed, prepare_seed, run_record, spread, summarize


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


def test_a_loss_that_is_not_finite_is_null(tmp_path):
    write_json({"loss": [float("nan"), float("inf"), 0.5]}, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == {"loss": [None, None, 0.5]}
    assert "NaN" not in (tmp_path / "results.json").read_text()


@pytest.mark.parametrize(
    ("values", "summary", "text"),
    [
        ([0.924, 0.925, 0.926], {"mean": 0.925, "sd": 0.001}, "92.5 ± 0.1"),  # of a sample: n - 1
        ([0.5], {"mean": 0.5, "sd": None}, "50.0"),
    ],
)
def test_means_and_deviations(values, summary, text):
    assert summarize(values) == pytest.approx(summary)
    assert spread(summarize(values)) == text


def test_names_and_commands_tell_nothing_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_name(str(tmp_path)) == public_name(".") == tmp_path.name
    assert public_name(f"--model={tmp_path}") == f"--model={tmp_path.name}"
    assert public_name("organisation/model") == "organisation/model" and public_name("--demo") == "--demo"
    assert public_name("~nobody/model") == "~nobody/model", "no user's home"
    flags = ["--output_dir", str(tmp_path), "--epochs", "3"]
    assert command_line("M/train.py", flags) == f"python M/train.py --output_dir {tmp_path.name} --epochs 3"
    assert command_line("M/train.py", ["--dataset", "IMDB Dataset.csv"]) == (
        "python M/train.py --dataset 'IMDB Dataset.csv'"  # as a shell takes it
    )
    assert command_line("M/train.py", []) == "python M/train.py"


# One seed's record


@pytest.mark.parametrize(
    ("accuracies", "losses", "chosen", "best"),
    [
        ((0.9, 0.6, 0.8, 0.7), (0.1, 0.4, 0.4, 0.4), True, 2),
        ((0.5, 0.8, 0.8, 0.8), (0.7, 0.5, 0.4, 0.6), True, 2),
        ((0.5, 0.6, 0.7, 0.8), (0.7, 0.5, 0.5, 0.9), True, 3),
        ((0.5, 0.9, 0.7, 0.8), (0.7, 0.1, 0.5, 0.9), False, 3),
    ],
)
def test_the_best_epoch_is_the_most_accurate_after_training_then_the_one_of_the_lowest_loss(
    accuracies, losses, chosen, best, tmp_path
):
    model = torch.nn.Linear(4, 2)
    history = []
    for epoch, (accuracy, loss) in enumerate(zip(accuracies, losses, strict=True)):
        history += [{"epoch": float(epoch), "seconds": 2.0 * (epoch > 0)}]
        history += [{"epoch": float(epoch), "eval_validation_accuracy": accuracy, "eval_validation_loss": loss}]
        history += [{"epoch": float(epoch), "eval_train_accuracy": accuracy}]
    (tmp_path / "unfinished_seed_7").mkdir()
    trainer = SimpleNamespace(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        args=SimpleNamespace(
            seed=7,
            output_dir=str(tmp_path / "unfinished_seed_7"),
            num_train_epochs=3,
            load_best_model_at_end=chosen,
            world_size=1,
        ),
        state=SimpleNamespace(log_history=history),
        train_dataset=range(100),
        run_once_seconds=4.0,
        peaks={"loading": 5, "training": 90, "evaluation": 70},
        parameters=(10, 10),
        padding_percent=lambda: 1.5,
        tensors_of=lambda reviews: SimpleNamespace(input_ids=torch.tensor([[7, 8]])),
        is_world_process_zero=lambda: True,
    )
    good, bad = (EvalPrediction(np.eye(2)[rows], np.array([0, 1, 1, 0])) for rows in ([0, 1, 0, 0], [1, 1, 0, 1]))
    made = run_record(trainer, validation=bad, test=good, untrained_test=bad, started=0.0)
    assert made["best_epoch"] == best
    assert made["train_sha256"] == hashlib.sha256(np.array([[7, 8]]).tobytes()).hexdigest()
    assert [epoch["validation_accuracy"] for epoch in made["epochs"]] == list(accuracies)
    assert made["untrained_test"] == pytest.approx({"accuracy": 0.25, "f1": 0.4})
    assert (made["test"]["accuracy"], made["test"]["precision"]) == (0.75, 1)
    kept = np.load(tmp_path / "seed_7" / "logits.npz")
    assert (kept["test_logits"] == good.predictions).all() and (kept["validation_logits"] == bad.predictions).all()
    assert kept["test_labels"].tolist() == kept["validation_labels"].tolist() == [0, 1, 1, 0]
    assert (made["train_seconds"], made["train_reviews_per_second"]) == (10.0, 30.0)  # evaluation is left out
    assert made["trainable_parameters"] == made["total_parameters"] == 10
    assert (made["processes"], made["peak_memory_bytes"], sum(made["memory_bytes"].values())) == (1, 90, 90)
    assert made["peak_memory_by_phase_bytes"] == {"loading": 5, "training": 90, "evaluation": 70}
    assert json.loads((tmp_path / "seed_7" / "run.json").read_text()) == made


# Seeds' folders


@pytest.fixture
def config(demo, tmp_path):
    return import_method("PEFT_LORA").Config(model=str(demo[0]), output_dir=str(tmp_path / "out"))


def leave(config, method: str = "METHOD") -> None:
    """A finished run of seed 0."""
    folder, _ = open_seed(method, config, 0, "fingerprint")
    prepare_seed(method, config, folder, "fingerprint")
    (folder / "model").mkdir()
    write_json({"seed": 0}, folder / "run.json")
    folder.rename(folder.with_name("seed_0"))


def test_a_new_run_starts_from_an_empty_folder_and_resume_from_what_is_there(config):
    leave(config)
    config.resume = True
    folder, finished = open_seed("METHOD", config, 0, "fingerprint")
    assert finished == {"seed": 0}
    config.resume = False
    assert open_seed("METHOD", config, 0, "fingerprint") == (folder, None)
    prepare_seed("METHOD", config, folder, "fingerprint")
    assert [path.name for path in folder.iterdir()] == ["flags.json"]
    (folder / "half").mkdir()
    config.resume = True
    assert open_seed("METHOD", config, 0, "fingerprint") == (folder, None)
    prepare_seed("METHOD", config, folder, "fingerprint")
    assert (folder / "half").exists()
    config.resume = False
    prepare_seed("METHOD", config, folder, "fingerprint")
    assert not (folder / "half").exists() and (folder.with_name("seed_0") / "model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 9}, "--epochs None, not 9"),
        ({"fingerprint": "other"}, "--dataset .* SHA-256 fingerprint, not .* other"),
        ({"method": "OTHER"}, "--method METHOD, not OTHER"),
        ({"seeds": [0, 5], "report_to": "all"}, None),
    ],
)
def test_resume_wants_the_same_method_flags_and_reviews(config, change, message):
    leave(config)
    config.resume = True
    method, fingerprint = change.get("method", "METHOD"), change.get("fingerprint", "fingerprint")
    for name, value in change.items():
        setattr(config, name, value)
    if message is None:
        assert open_seed(method, config, 0, fingerprint)[1] == {"seed": 0}
    else:
        with pytest.raises(UserError, match=f"--resume: the interrupted run had {message}"):
            open_seed(method, config, 0, fingerprint)


def test_an_output_folder_that_moved_is_not_resumed(config):
    """Its checkpoints name the place of the best one."""
    leave(config)
    config.resume, before = True, config.output_dir
    config.output_dir = str(Path(before).rename(f"{before}_moved"))
    with pytest.raises(UserError, match=f"the interrupted run had --output_dir {before}, not {before}_moved"):
        open_seed("METHOD", config, 0, "fingerprint")


def test_peak_memory_is_measured_from_here(config, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    open_seed("METHOD", config, 0, "fingerprint")
    assert calls == ["reset"]


def test_checkpoints_are_numbered_and_whole(tmp_path):
    assert record.last_checkpoint(tmp_path) is None
    for number in (9, 10, 11):
        (tmp_path / f"checkpoint-{number}").mkdir()
    for number in (9, 10):
        write_json({"best_global_step": None}, tmp_path / f"checkpoint-{number}" / "trainer_state.json")
        write_json(file_sizes(tmp_path / f"checkpoint-{number}"), tmp_path / f"checkpoint-{number}" / SIZES)
    assert record.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")  # 11 was not written to its end
