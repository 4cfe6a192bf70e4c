"""Two processes, each with its share of every batch, train what one trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import METHODS, ROOT, import_method, write_random_backbone
from safetensors.torch import load_file
from transformers import AutoConfig

from common.cli import write_json
from common.study import processes, report

FLAGS = "--demo --epochs 1 --max_train_samples 300 --max_test_samples 60 --batch_size 16".split()
RUN_ALL = """
import importlib, os, sys
if os.environ.get("ACCELERATE_USE_FSDP"):  # which accelerate does on GPUs alone
    from accelerate.state import PartialState
    plain = PartialState.__init__
    def as_on_gpus(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if self.distributed_type == "MULTI_CPU":
            vars(self)["distributed_type"] = "MULTI_GPU"
    PartialState.__init__ = as_on_gpus
import common.demo
from common.trainer import ReviewTrainer
from torch.distributed.tensor import DTensor
train = ReviewTrainer.train
def watched(self, *args, **kwargs):
    result = train(self, *args, **kwargs)
    spread = sum(isinstance(weight, DTensor) for weight in self.model.parameters())
    print(f"spread: {spread}\\n", end="")  # in one piece: both write to one pipe, by torchrun without a buffer
    return result
ReviewTrainer.train = watched
build_demo = common.demo.build_demo
common.demo.build_demo = lambda folder: print("writes the demo") or build_demo(folder)
for name in sys.argv[1].split():
    importlib.import_module(f"{name}.train").main([*sys.argv[3:], "--output_dir", f"{sys.argv[2]}/{name}"])
"""


def test_two_processes_train_what_one_does(tmp_path):
    """In one start of the two processes, which takes longer than the runs. The demo's model has no dropout."""
    script = tmp_path / "all.py"
    script.write_text(RUN_ALL)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*start, script, " ".join(METHODS), tmp_path / "two", *FLAGS],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "", "PYTHONPATH": str(ROOT)},  # they find out themselves
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("processes: 2") == 4  # only the main process prints, once for each method,
    assert result.stdout.count("writes the demo") == 4  # and writes what both read
    assert "find_unused_parameters" not in result.stderr  # DDP's warning of a search that costs time in every step
    for name in METHODS:
        import_method(name).main([*FLAGS, "--output_dir", str(tmp_path / "one" / name)])
        one, two = (
            json.loads((tmp_path / count / name / "results.json").read_text())["runs"][0] for count in ("one", "two")
        )
        for epoch, again in zip(one["epochs"], two["epochs"], strict=True):
            for loss in ("train_loss", "validation_loss"):
                assert epoch[loss] == pytest.approx(again[loss], rel=1e-3), (name, epoch["epoch"])
        assert (one["processes"], two["processes"]) == (1, 2)
        assert one["test"] == two["test"] | {"loss": pytest.approx(two["test"]["loss"], rel=1e-3)}
        saved = (next((tmp_path / count / name / "seed_0/model").glob("*.safetensors")) for count in ("one", "two"))
        weights, again = map(load_file, saved)
        for key in (key for key in weights if not key.endswith("key.bias")):  # its gradients are rounding errors alone
            weight = weights[key]
            torch.testing.assert_close(weight, again[key], rtol=1e-2, atol=1e-3, msg=f"{name}: {key}")


def test_fsdp_spreads_the_weights_and_trains_what_one_process_does(backbones, demo, tmp_path):
    script, config, methods = tmp_path / "all.py", tmp_path / "fsdp.yaml", ("PEFT_LORA", "PEFT_QLORA")
    script.write_text(RUN_ALL)
    config.write_text(processes.FSDP + 'use_cpu: true\nmixed_precision: "no"\n')
    of_llama = AutoConfig.from_pretrained(backbones["llama"])  # without dropout, of which each process has its own
    backbone = write_random_backbone(tmp_path / "backbone", backbones["llama"], of_llama)
    flags = ["--model", str(backbone), "--dataset", str(demo[1]), "--max_length", "48", *FLAGS[1:]]
    flags += ["--gradient_accumulation_steps", "1", "--seeds", "0", "--gradient_checkpointing"]
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    result = subprocess.run(
        [*start, script, " ".join(methods), tmp_path / "two", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("spread: ") == 4 and "spread: 0" not in result.stdout
    for name in methods:
        import_method(name).main([*flags, "--output_dir", str(tmp_path / "one" / name)])
        one, two = (
            json.loads((tmp_path / count / name / "results.json").read_text())["runs"][0] for count in ("one", "two")
        )
        assert (one["processes"], two["processes"]) == (1, 2)
        for epoch, again in zip(one["epochs"], two["epochs"], strict=True):
            assert epoch["validation_loss"] == pytest.approx(again["validation_loss"], rel=1e-3), name
        assert one["untrained_test"] == two["untrained_test"] and one["total_parameters"] == two["total_parameters"]
        saved = (next((tmp_path / count / name / "seed_0/model").glob("*.safetensors")) for count in ("one", "two"))
        weights, again = map(load_file, saved)
        assert set(weights) == set(again)
        for key, weight in weights.items():
            torch.testing.assert_close(weight, again[key], rtol=1e-2, atol=1e-3, msg=f"{name}: {key}")


def test_the_readme_shows_the_configuration_that_was_measured():
    assert f"```yaml\n{processes.FSDP}```" in (ROOT / "README.md").read_text()


def test_the_study_of_processes_writes_a_row_after_every_run(demo, tmp_path, monkeypatch, capsys):
    def launch(launcher, count, script, flags, folder):
        place = Path(flags[flags.index("--output_dir") + 1]) / "seed_0"
        place.mkdir(parents=True)
        run = {"processes": count, "peak_memory_bytes": 2e9, "peak_memory_by_phase_bytes": {}, "train_reviews": 180}
        run |= {"train_reviews_per_second": 90.0, "epochs": [{"seconds": 0.0}, {"seconds": 3.0}, {"seconds": 2.0}]}
        (place / "run.json").write_text(json.dumps(run))

    monkeypatch.setattr(processes, "HERE", tmp_path)
    monkeypatch.setattr(processes, "launch", launch)
    monkeypatch.setattr(processes, "random_backbone", lambda name, folder: folder / name)
    record = processes.main(["--demo"])
    assert json.loads((tmp_path / "runs" / "demo" / "processes.json").read_text()) == record
    assert [(row["processes"], row["reviews_per_second"]) for row in record["rows"]] == [(1, 90.0), (2, 90.0)]
    (tmp_path / "common" / "study").mkdir(parents=True)
    assert report.processes(tmp_path, []) == report.UNMEASURED
    write_json(record, tmp_path / "common" / "study" / "processes.json")
    assert "| tiny-llama, PEFT_LORA, torchrun | 2 | 90 | 2.00 |" in report.processes(tmp_path, [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    processes.main(["--", "--dataset", str(demo[1]), "--model", str(demo[0])])
    assert (tmp_path / "runs" / demo[1].name / "processes.json").exists()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit):
        processes.main([])
    assert "needs two GPUs" in capsys.readouterr().err
