"""What happens when something goes wrong: nothing false is written, and nothing that was reached is lost."""

import ast
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import METHODS, ROOT, copy_backbone, import_method
from safetensors.torch import load_file, save_file

from common import metrics, plotting, record, trainer
from common.cli import UserError, locked, run
from common.record import last_checkpoint
from common.trainer import EpochProgress

METHOD = import_method("PEFT_LORA")  # where one stands for all four
FLAGS = "--max_length 32 --epochs 3 --batch_size 64 --gradient_accumulation_steps 1 --seeds 0".split()
FLAGS += "--learning_rate 2e-3 --max_train_samples 300 --max_test_samples 60".split()


@pytest.fixture(scope="module", autouse=True)
def first_epoch_is_best():
    """So that the best checkpoint and the last are two: the lower the loss, the worse."""
    measured = metrics.score

    def score(prediction):
        scores = measured(prediction)
        return scores | {"accuracy": 0.5, "loss": 1 / scores["loss"]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "score", score)
        for name in METHODS:
            patch.setattr(import_method(name), "ENOUGH_TO_CHOOSE", 20)
        yield


@pytest.fixture
def main(demo, tmp_path, monkeypatch):
    """`main` of a script with few reviews; its folder is `out` unless another one is named. It draws no charts."""
    monkeypatch.setattr(record, "save", lambda *args: None)

    def call(*flags, method=METHOD, folder=tmp_path / "out"):
        source = ["--model", str(demo[0]), "--dataset", str(demo[1]), "--output_dir", str(folder)]
        return method.main([*source, *FLAGS, *flags])

    return call


@pytest.fixture
def failing(monkeypatch):
    """Let `call` come after that many calls of a function of a module or class; its result is thrown away."""

    def patch(place, name: str, calls: int, call) -> None:
        original, left = getattr(place, name), [calls]

        def patched(*args, **kwargs):
            found = original(*args, **kwargs)
            left[0] -= 1
            if left[0] == 0:
                call()
            return found

        monkeypatch.setattr(place, name, patched)

    return patch


def stop():
    raise KeyboardInterrupt


def figures(found: dict) -> list[dict]:
    """What must be the same after --resume, of every seed."""
    kept = ("best_epoch", "untrained_test", "test", "train_sha256")
    epochs = [[{**epoch, "seconds": 0} for epoch in one["epochs"]] for one in found["runs"]]
    return [{name: one[name] for name in kept} | {"epochs": epochs} for one in found["runs"]]


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def stopped_run(first_epoch_is_best, demo, tmp_path_factory):
    """A folder with a copy of what a run had left after its second epoch; its checkpoints; the whole run's figures."""
    folder = tmp_path_factory.mktemp("stopped")
    source = ["--model", str(demo[0]), "--dataset", str(demo[1]), "--output_dir", str(folder / "out")]
    saved, on_save = [], EpochProgress.on_save

    def save_and_copy(self, args, state, *rest, **kwargs):
        on_save(self, args, state, *rest, **kwargs)
        saved.append(state.global_step)
        if len(saved) == 2:
            shutil.copytree(folder / "out", folder / "copy")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpochProgress, "on_save", save_and_copy)
        whole = METHOD.main([*source, *FLAGS])
    assert whole["runs"][0]["best_epoch"] == 1
    return folder, saved, figures(whole)


@pytest.fixture
def stopped(stopped_run):
    """The output folder of a run as it was after its second epoch, its checkpoints, and the whole run's figures."""
    folder, *rest = stopped_run
    shutil.rmtree(folder / "out")
    return shutil.copytree(folder / "copy", folder / "out"), *rest


# As the README says


def test_every_line_of_the_readme_has_its_test():
    text = (ROOT / "README.md").read_text().split("## What happens when …")[1].split("\n## ")[0]
    lines = re.findall(r"^\| … (.+?) \|", text, re.MULTILINE)
    sources = [file.read_text() for file in (ROOT / "tests").glob("test_*.py")]
    tests = {part.name for source in sources for part in ast.parse(source).body if hasattr(part, "name")}
    assert 0 < len(lines) <= 12
    assert {f"test_{re.sub(r'[^a-z_]+', '_', line.lower()).strip('_')}" for line in lines} <= tests


@pytest.mark.parametrize(
    ("name", "steps", "number"),
    [(name, index % 2 + 1, (signal.SIGTERM, signal.SIGINT)[index // 2]) for index, name in enumerate(METHODS)],
)
def test_a_run_is_stopped(name, steps, number, main, failing, tmp_path, capsys):
    """In the middle of its second epoch, with checkpoints within epochs too for half of the methods."""
    within = ["--save_steps", "3"] if number == signal.SIGINT else []
    method, flags = import_method(name), ["--gradient_accumulation_steps", str(steps), *within]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "ReviewTrainer", type("Stopped", (trainer.ReviewTrainer,), {}))
        failing(trainer.ReviewTrainer, "training_step", 7 * steps, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as end:
            run(lambda: main(*flags, method=method))
    assert end.value.code == 128 + number
    assert capsys.readouterr().err.splitlines()[-1].startswith("Interrupted. A training goes on")
    left = {path.name for path in (tmp_path / f"out/unfinished_{name}_seed_0").glob("*-*")}
    assert left == {"checkpoint-5", *["checkpoint-6"] * bool(within)}
    resumed = main(*flags, "--resume", method=method)
    assert "--resume:" not in capsys.readouterr().out, "nothing was passed over"
    assert figures(resumed) == figures(main(*flags, method=method, folder=tmp_path / "whole"))


def test_a_checkpoint_is_damaged_or_gone(stopped, main, tmp_path, capsys):
    source, (first, second, _), whole = stopped
    folder = source / "unfinished_PEFT_LORA_seed_0"
    assert last_checkpoint(folder) == str(folder / f"checkpoint-{second}")
    for file in sorted(path for path in (folder / f"checkpoint-{second}").rglob("*") if path.is_file()):
        for damage in (Path.unlink, lambda path: os.truncate(path, 0), lambda path: os.truncate(path, 100)):
            copy = shutil.copytree(folder, tmp_path / "copy")
            damage(copy / file.relative_to(folder))
            assert last_checkpoint(copy) == str(copy / f"checkpoint-{first}"), file.name
            (said,) = capsys.readouterr().out.splitlines()
            assert said.startswith(
                f"--resume: {copy}/checkpoint-{second} is passed over; it is damaged, or the one of"
            )
            shutil.rmtree(copy)
    for gone, left in (
        (second, "is passed over"),
        (first, "unfinished_PEFT_LORA_seed_0 starts from scratch; no run.json"),
    ):  # the best is the first
        shutil.rmtree(source)
        shutil.copytree(source.with_name("copy"), source)
        shutil.rmtree(folder / f"checkpoint-{gone}")
        (folder / f"checkpoint-{gone}").mkdir()
        assert figures(main("--resume", folder=source)) == whole
        assert left in capsys.readouterr().out


def test_two_runs_share_an_output_dir(main, tmp_path):
    lock = tmp_path / "out" / ".lock_0"
    lock.parent.mkdir()
    died = "import filelock, os, sys; filelock.FileLock(sys.argv[1]).acquire(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", died, lock], check=False)
    assert lock.exists()
    with locked(lock.parent):  # nevertheless
        with pytest.raises(UserError, match=rf"--output_dir .*/out: process {os.getpid()} on .+ is at work there; "):
            main()
        with pytest.raises(UserError, match="is at work there"):
            main("--resume", method=import_method("LAST_LAYER"))
        (lock.parent / ".holder_0").unlink()  # it has not yet said who it is
        with pytest.raises(UserError, match="another process is at work there"):
            main()
    with locked(lock.parent):
        pass
    assert {path.name for path in lock.parent.iterdir()} == {".lock_0", ".holder_0"}


def test_the_loss_diverges(main, failing, tmp_path, demo, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "ReviewTrainer", type("Diverging", (trainer.ReviewTrainer,), {}))
        diverging = trainer.ReviewTrainer
        loss, seen = diverging.training_step, []

        def training_step(self, *args):
            seen.append(loss(self, *args))
            return seen[-1] * (float("nan") if len(seen) == 15 else 1)

        diverging.training_step = training_step
        with pytest.raises(SystemExit) as end:
            run(lambda: main("--gradient_accumulation_steps", "2"))
    assert end.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"error: the loss is nan by step 10 of 15; try a lower --learning_rate than 0.002, or other weights .*", said
    )
    assert len(seen) == 20, "stopped at the end of that epoch"
    with pytest.raises(
        UserError, match=r"the loss is (nan|inf) by step 5 of 15; try a lower --learning_rate than 1e\+30, or"
    ):
        main("--learning_rate", "1e30")
    broken = shutil.copytree(demo[0], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file({name: weight * float("nan") for name, weight in weights.items()}, broken / "model.safetensors")
    with pytest.raises(
        UserError, match=r"the loss is nan by step 0 of 15; try .* other weights than those of --model"
    ):
        main("--model", str(broken))
    assert not list(tmp_path.rglob("results.json")) + list(tmp_path.rglob("*.png"))


def test_a_model_predicts_one_class(main, monkeypatch, capsys):
    drawn, draw = [], trainer.ReviewTrainer.predict

    def one_class(self, reviews):
        found = draw(self, reviews)
        found.predictions[:, 0] = 100
        return found

    monkeypatch.setattr(trainer.ReviewTrainer, "predict", one_class)
    monkeypatch.setattr("common.record.save", lambda figure, *rest: drawn.append(figure))
    record = main("--epochs", "1")
    assert record["runs"][0]["warning"] == "predicts one class for every validation text"
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: ")]
    assert said[-1].startswith(f"Warning:  seed 0 {record['runs'][0]['warning']}; see --epochs, ")
    assert drawn[0].axes[0].get_xlabel().endswith(f"\nWarning: seed 0 {record['runs'][0]['warning']}")


def test_a_rerun_crashes(main, failing, monkeypatch, tmp_path):
    main("--epochs", "1")
    before = content(tmp_path / "out" / "seed_0")
    assert {"run.json", "flags.json", "logits.npz", "model/adapter_model.safetensors"} <= set(before)
    for place, calls in {"training_step": 2, "_save_checkpoint": 1, "save_model": 2, "predict": 2}.items():
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "ReviewTrainer", type("Crashing", (trainer.ReviewTrainer,), {}))
            failing(trainer.ReviewTrainer, place, calls, stop)
            with pytest.raises(KeyboardInterrupt):
                main("--epochs", "1", "--learning_rate", "1e-3")
        assert content(tmp_path / "out" / "seed_0") == before
    main("--epochs", "1", "--learning_rate", "1e-3", "--resume")
    assert json.loads((tmp_path / "out/seed_0/flags.json").read_text())["learning_rate"] == 1e-3
    assert not (tmp_path / "out/unfinished_PEFT_LORA_seed_0").exists()


SEED = "unfinished_PEFT_LORA_seed_0"


@pytest.mark.parametrize(
    ("owner", "name", "argument", "written"),
    [
        (trainer.ReviewTrainer, "_save_optimizer_and_scheduler", "checkpoint-5", f"a checkpoint to {{}}/out/{SEED}"),
        (trainer.ReviewTrainer, "save_model", "checkpoint-5", f"a checkpoint to {{}}/out/{SEED}"),
        (trainer.ReviewTrainer, "save_model", "model", f"{{}}/out/{SEED}/model"),
        (record, "write_json", "run.json", f"{{}}/out/{SEED}/run.json"),
        (record, "save", "line_chart.png", "{}/out/line_chart.png"),
    ],
)
def test_the_disk_is_full(owner, name, argument, written, main, stopped, monkeypatch, tmp_path, capsys):
    """No file may be longer than a few bytes while this one is written."""
    original, (soft, hard) = (
        getattr(plotting if name == "save" else owner, name),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )

    def without_room(*args, **kwargs):
        full = any(isinstance(value, str | Path) and Path(value).name == argument for value in args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200 if full else soft, hard))
        try:
            return original(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, without_room)
        with pytest.raises(SystemExit) as end:
            run(main)
    assert end.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    what = f"cannot write {written.format(tmp_path)}; once there is room, --resume goes on"
    assert said == f"error: the disk is full: {what}"
    assert figures(main("--resume")) == stopped[2]
    assert sorted(file.name for file in (tmp_path / "out").rglob(".*")) == [".holder_0", ".lock_0"]


# And more


@pytest.mark.parametrize("size", ["1GB", "100KB"])
def test_weights_that_changed_are_not_resumed(size, main, demo, tmp_path):
    """In one file, and in several."""
    model = tmp_path / "model"
    copy_backbone(demo, model, max_shard_size=size)
    main("--model", str(model), "--epochs", "1")
    *_, last = sorted(model.glob("*.safetensors"))
    save_file({name: 2 * weight for name, weight in load_file(last).items()}, last, {"format": "pt"})
    with pytest.raises(UserError, match=f"interrupted run had --model {model} with SHA-256 .*, not {model} with SHA"):
        main("--model", str(model), "--epochs", "1", "--resume")


def test_damaged_flags_or_a_damaged_record_start_the_seed_anew(stopped, main, capsys):
    folder, flags, run = stopped[0], "unfinished_PEFT_LORA_seed_0/flags.json", "seed_0/run.json"
    for file, damage in ((flags, b'{"method": "PEFT_LORA", "mod'), (run, b""), (run, b"\xff\xfe")):
        (folder / file).write_bytes(damage)
        assert figures(main("--resume", folder=folder)) == stopped[2]
        said = "--resume: unfinished_PEFT_LORA_seed_0 starts from scratch; no run.json or flags.json with"
        assert said in capsys.readouterr().out


def test_a_run_killed_as_it_ended_goes_on(main, stopped, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *names: stop())
        with pytest.raises(KeyboardInterrupt):
            main()
    folder = tmp_path / "out"
    assert (folder / "unfinished_PEFT_LORA_seed_0/run.json").exists()
    monkeypatch.setattr(trainer.ReviewTrainer, "training_step", None)
    assert figures(main("--resume")) == stopped[2]
    assert (folder / "seed_0/model/adapter_model.safetensors").exists()


def test_ctrl_c_while_libraries_load_ends_in_one_line():
    command = [sys.executable, "-X", "importtime", ROOT / "PEFT_LORA/train.py", "--demo"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while "numpy" not in process.stderr.readline():  # long before the last of them
            pass
        process.send_signal(signal.SIGINT)
        lines = process.stderr.read().splitlines()
    assert [line for line in lines if line and not line.startswith("import time:")] == ["Interrupted."]
    assert process.returncode == 130
