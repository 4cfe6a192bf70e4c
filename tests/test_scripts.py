"""The four scripts: alike outside their method, and doing the whole job from the command line."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import METHODS, ROOT
from transformers import AutoModel, AutoTokenizer

from common.cli import UserError
from common.data import load_reviews
from common.trainer import ReviewTrainer

SCRIPTS = [ROOT / method / "train.py" for method in METHODS]


def run(*command, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    )


def shared_part(source: str) -> str:
    """The text of a script without its docstring, its method's name, its method's fields and its `build_model`."""
    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    (build,) = [node for node in tree.body if getattr(node, "name", "") == "build_model"]
    (config,) = [node for node in tree.body if getattr(node, "name", "") == "Config"]
    fields = next(number for number, line in enumerate(lines, 1) if line.strip() == "# This method")
    assert config.lineno < fields < config.end_lineno
    removed = {
        *range(tree.body[0].lineno, tree.body[0].end_lineno + 1),
        *range(fields + 1, config.end_lineno + 1),
        *range(build.lineno, build.end_lineno + 1),
    }
    text = "".join(line for number, line in enumerate(lines, 1) if number not in removed)
    return re.sub(rf"\b({'|'.join(METHODS)})/train\.py", "METHOD/train.py", text)


def alike(sources: list[str]) -> bool:
    return len(sources) == 4 and len({shared_part(source) for source in sources}) == 1


def test_the_four_scripts_are_alike_outside_their_method():
    assert sorted(SCRIPTS) == sorted(ROOT.glob("*/train.py"))
    assert alike([script.read_text() for script in SCRIPTS])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("warmup_steps=0.1", "warmup_steps=0.2"),
        ("set_seed(seed,", "set_seed(0,"),
        ("# the best and the last", "# best and last"),
        ('help="Tokens per', 'help="Words per'),
        ("import time\n", "import time\nimport json\n"),
        ("    # This method\n", "    extra: int = 0\n\n    # This method\n"),
        ("\n\nif __name__", "\n\ndef another():\n    pass\n\n\nif __name__"),
    ],
)
def test_a_mutated_copy_is_not_alike(old, new):
    sources = [script.read_text() for script in SCRIPTS]
    assert old in sources[2]
    sources[2] = sources[2].replace(old, new, 1)
    assert not alike(sources)


def test_every_field_is_explained_and_scripts_stay_short(method):
    source = (method.FOLDER / "train.py").read_text()
    assert 140 <= len(source.splitlines()) <= 190
    assert all(field.metadata["help"].endswith((".", "]")) for field in fields(method.Config))
    assert [field.name for field in fields(method.Config)][:16] == [
        *("model", "model_revision", "dataset", "dataset_revision", "max_length", "epochs", "batch_size"),
        *("gradient_accumulation_steps", "seeds", "max_train_samples", "max_test_samples"),
        *("output_dir", "resume", "report_to", "demo", "learning_rate"),
    ]


def test_common_names_no_method():
    for file in (ROOT / "common").glob("*.py"):
        assert not re.search("|".join(METHODS), file.read_text()), file


def run_all(*flags, **environment) -> dict[str, subprocess.CompletedProcess]:
    """Every script with these flags, two at a time. `{}` in a flag stands for the method."""
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            name: pool.submit(run, f"{name}/train.py", *(str(flag).format(name) for flag in flags), **environment)
            for name in METHODS
        }
    return {name: job.result() for name, job in jobs.items()}


HELP = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print("exit status", end.code)
"""


def test_help():
    result = run("-c", HELP, *SCRIPTS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("exit status 0") == 4
    for text in ("--model_revision", "--max-length", "--seeds", "--resume", "--demo", "--learning_rate", "Frozen:"):
        assert result.stdout.count(text) >= 4
    for name in METHODS:
        assert f"python {name}/train.py" in result.stdout


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """A finished `--demo` of each script: folders by {method}, and the processes."""
    folder = tmp_path_factory.mktemp("demos")
    flags = ("--demo", "--epochs", "2", "--output-dir", folder / "{}")
    return folder, run_all(*flags, HF_HOME=str(folder / "cache"))


@pytest.mark.parametrize("name", METHODS)
def test_demo_does_the_whole_job(name, demos):
    folder, result = demos[0] / name, demos[1][name]
    assert result.returncode == 0, result.stderr
    record = json.loads((folder / "results.json").read_text())
    (only,) = record["runs"]
    assert record["method"] == name
    assert record["config"]["demo"] is True
    assert "figures mean nothing" in record["note"]
    assert [epoch["epoch"] for epoch in only["epochs"]] == [0, 1, 2]
    assert only["best_epoch"] == max((1, 2), key=lambda epoch: only["epochs"][epoch]["validation_accuracy"])
    for epoch in only["epochs"]:
        assert set(epoch) == {
            *("epoch", "train_accuracy", "train_loss", "validation_accuracy", "validation_f1", "validation_loss"),
            "seconds",
        }
    assert only["train_seconds"] >= sum(epoch["seconds"] for epoch in only["epochs"]) > 0
    assert (only["train_seconds"] > sum(epoch["seconds"] for epoch in only["epochs"])) == (name == "NEW_HEAD")
    assert sum(map(sum, only["test"]["confusion_matrix"])) == record["dataset"]["test"] == 500
    assert sum(only["memory_bytes"].values()) == only["peak_memory_bytes"]
    assert only["checkpoint_bytes"] > 4 * record["model"]["trainable_parameters"]
    assert only["epochs"][2]["train_loss"] < only["epochs"][0]["train_loss"] - 0.01
    assert only["train_reviews_per_second"] == pytest.approx(2 * record["dataset"]["train"] / only["train_seconds"])
    assert 0 < only["padding_percent"] < 30
    assert record["summary"]["test_accuracy"] == {"mean": only["test"]["accuracy"], "sd": None}
    gain = only["test"]["accuracy"] - only["untrained_test"]["accuracy"]
    assert record["summary"]["accuracy_gain"] == {"mean": gain, "sd": None}
    assert gain > 0
    assert len(record["model"]["weights_sha256"]) == len(record["dataset"]["sha256"]) == 64
    for chart in ("bar_chart.png", "line_chart.png"):
        assert (folder / chart).read_bytes().startswith(b"\x89PNG")
    for title in ("Backbone", "Trains", "Frozen", "Quantized", "Reviews", "Device", "Charts", "Record", "Models"):
        assert f"\n{title}:" in "\n" + result.stdout
    assert result.stdout.splitlines()[-1] == (
        "This was the demo, on generated reviews with a tiny model: its figures mean nothing."
    )
    assert str(folder) not in (folder / "results.json").read_text()


RELOAD = """
import sys, torch
from pathlib import Path
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
for folder in map(Path, sys.argv[2:]):
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if (folder / "adapter_config.json").exists():
        names = {"id2label": config.id2label, "label2id": config.label2id}
        if hasattr(config, "quantization_config"):
            names["quantization_config"] = config.quantization_config
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder, **names).eval()
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for part in model.modules():  # or else bitsandbytes infers in bf16 on the CPUs that can
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False
    inputs = tokenizer(sys.argv[1], return_tensors="pt")
    with torch.no_grad():
        print([model.config.id2label[0], model.config.id2label[1], *model(**inputs).logits[0].tolist()])
"""


SENTENCE = "The plot is dull, but the acting saves it."
SMALL = ["--demo", "--epochs", "1", "--seeds", "3", "--max_train_samples", "600", "--max_test_samples", "60"]


def small_run(name: str, folder: Path, *flags: str) -> tuple[dict, Path, list]:
    """A small run of a method in this process: its record, its model's folder, and for every look at the test
    reviews whether training was over, their number, and the logits of SENTENCE."""
    looks, predict = [], ReviewTrainer.predict

    def watched(self, reviews, **kwargs):
        inputs = self.processing_class(SENTENCE, return_tensors="pt")
        with torch.no_grad():
            logits = self.model.eval()(**inputs).logits[0].tolist()
        looks.append((self.state.global_step == self.state.max_steps, len(reviews), logits))
        return predict(self, reviews, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReviewTrainer, "predict", watched)
        record = importlib.import_module(f"{name}.train").main([*SMALL, *flags, "--output_dir", str(folder)])
    return record, folder / "seed_3" / "model", looks


@pytest.fixture(scope="module")
def small_runs(tmp_path_factory):
    return {name: small_run(name, tmp_path_factory.mktemp(name)) for name in METHODS}


def test_trap_13_a_fresh_process_has_the_same_logits_and_label_names(small_runs):
    result = run("-c", RELOAD, SENTENCE, *(folder for _, folder, _ in small_runs.values()))
    assert result.returncode == 0, result.stderr
    for line, (_, _, looks) in zip(result.stdout.splitlines(), small_runs.values(), strict=True):
        negative, positive, *fresh = ast.literal_eval(line)
        assert (negative, positive) == ("negative", "positive")
        assert fresh == pytest.approx(looks[0][2], abs=1e-4)  # the second look is the untrained model's


def test_the_readmes_snippet_loads_what_was_trained(tmp_path, backbones, monkeypatch):
    """Here a decoder in bf16 that knows no padding token, named by a path that is relative to another folder."""
    backbone = AutoModel.from_pretrained(backbones["llama"], dtype=torch.bfloat16)
    backbone.config.pad_token_id = None
    for part in (backbone, AutoTokenizer.from_pretrained(backbones["llama"])):
        part.save_pretrained(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    _, folder, looks = small_run("PEFT_LORA", tmp_path / "runs", "--model", "llama")
    monkeypatch.chdir(ROOT)
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert SENTENCE in snippet
    loaded = {}
    exec(snippet.replace("PEFT_LORA/runs/seed_0/model", str(folder)), loaded)
    assert loaded["logits"][0].tolist() == pytest.approx(looks[0][2], abs=1e-4)
    assert loaded["model"].config.pad_token_id == loaded["tokenizer"].pad_token_id


def test_traps_10_and_12_test_reviews_wait_and_a_seed_repeats(method, small_runs, tmp_path):
    record, _, looks = small_runs[method.FOLDER.name]
    assert [look[:2] for look in looks] == [(True, 60)] * 2
    first, again = record["runs"][0], method.main([*SMALL, "--output_dir", str(tmp_path)])["runs"][0]
    assert first["test"] == again["test"]
    assert [epoch["validation_loss"] for epoch in first["epochs"]] == [
        epoch["validation_loss"] for epoch in again["epochs"]
    ]


def test_a_finished_run_is_not_repeated_by_resume(method, demos, monkeypatch):
    folder = demos[0] / method.FOLDER.name
    before = json.loads((folder / "results.json").read_text())
    monkeypatch.setattr(method, "build_model", None)
    flags = ["--demo", "--epochs", "2", "--output-dir", str(folder), "--resume"]
    assert method.main(flags)["runs"] == before["runs"]
    with pytest.raises(UserError, match="--resume: the interrupted run had --epochs 2, not 3"):
        method.main([*flags, "--epochs", "3"])
    monkeypatch.setattr(method, "load_reviews", lambda *source: (load_reviews(*source)[0], "0" * 64))
    with pytest.raises(
        UserError, match=r"--resume: the interrupted run had --dataset .* with SHA-256 .*, not .* 0000"
    ):
        method.main(flags)


def test_a_mistake_costs_no_trained_model(method, demos, monkeypatch):
    def mistaken(config, labels):
        raise UserError("--model: no such part")

    folder = demos[0] / method.FOLDER.name
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(method, "build_model", mistaken)
    with pytest.raises(UserError, match="no such part"):
        method.main(["--demo", "--epochs", "2", "--output-dir", str(folder)])
    assert sorted(folder.rglob("*")) == before
    assert folder / "seed_0" / "model" in before


def test_an_interrupted_run_goes_on_to_the_same_result(method, demos, tmp_path, monkeypatch):
    whole = json.loads((demos[0] / method.FOLDER.name / "results.json").read_text())
    flags = ["--demo", "--epochs", "2", "--output_dir", str(tmp_path)]
    trainer_class = method.ReviewTrainer

    class Interrupted(trainer_class):
        def _save_checkpoint(self, *args, **kwargs):
            super()._save_checkpoint(*args, **kwargs)
            raise KeyboardInterrupt

    monkeypatch.setattr(method, "ReviewTrainer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        method.main(flags)
    monkeypatch.setattr(method, "ReviewTrainer", trainer_class)
    (tmp_path / "seed_0" / "checkpoint-99999").mkdir()  # as if killed while it was written
    resumed = method.main([*flags, "--resume"])
    for run_whole, run_resumed in zip(whole["runs"], resumed["runs"], strict=True):
        for key in ("best_epoch", "untrained_test", "test"):
            assert run_whole[key] == run_resumed[key]
        for one, other in zip(run_whole["epochs"], run_resumed["epochs"], strict=True):
            assert {**one, "seconds": 0} == {**other, "seconds": 0}
            assert (one["seconds"] > 0) == (other["seconds"] > 0)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_trainer_is_told_what_the_flags_and_the_gpu_say(precision, tmp_path, monkeypatch):
    method = importlib.import_module("PEFT_LORA.train")  # the others are alike

    class Told(Exception):
        pass

    def told(**arguments):
        raise Told(arguments)

    monkeypatch.setattr(method, "mixed_precision", lambda: precision)
    monkeypatch.setattr(method, "TrainingArguments", told)
    flags = [
        "--demo",
        "--learning_rate",
        "0.125",
        "--epochs",
        "7",
        "--batch_size",
        "64",
        "--output_dir",
        str(tmp_path),
    ]
    with pytest.raises(Told) as caught:
        method.main([*flags, "--gradient_accumulation_steps", "4", "--seeds", "5"])
    (arguments,) = caught.value.args
    assert (arguments["learning_rate"], arguments["num_train_epochs"], arguments["seed"]) == (0.125, 7, 5)
    assert arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] == 64
    assert (arguments["bf16"], arguments["fp16"]) == (precision == "bf16", precision == "fp16")
    assert arguments["load_best_model_at_end"]
    assert arguments["metric_for_best_model"] == "validation_accuracy"


def test_a_partial_run_leaves_published_charts_alone(tmp_path, demo, monkeypatch):
    method = importlib.import_module("PEFT_LORA.train")  # the others are alike
    monkeypatch.setattr(method, "FOLDER", tmp_path / "METHOD")
    for split in ("train", "test"):
        rows = (demo[1] / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{split}.jsonl").write_text("".join(rows[:: len(rows) // 250]))
    flags = ["--model", str(demo[0]), "--dataset", str(tmp_path), "--max_length", "32", "--epochs", "1"]
    flags += ["--seeds", "0", "--batch_size", "64"]
    method.main([*flags, "--max_train_samples", "200"])
    assert not (tmp_path / "METHOD" / "results.json").exists()
    assert (tmp_path / "METHOD" / "runs" / "partial" / "results.json").exists()
    method.main([*flags, "--output_dir", str(tmp_path / "elsewhere")])
    assert not (tmp_path / "METHOD" / "results.json").exists()
    method.main(flags)
    assert {path.name for path in (tmp_path / "METHOD").iterdir()} == {
        *("results.json", "bar_chart.png", "line_chart.png", "runs"),
    }


def test_no_network_ends_in_one_line_that_names_the_ways_out(tmp_path):
    no_network = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = run("PEFT_LORA/train.py", **no_network)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: --model sentence-transformers/all-MiniLM-L6-v2: ")
    assert all(way in line for way in ("cache", "--model", "--dataset", "--demo"))


def test_nothing_else_at_the_top():
    allowed = {*METHODS, "common", "tests", "requirements.txt", "LICENSE", "README.md"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    top = {Path(name).parts[0] for name in tracked.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= allowed
