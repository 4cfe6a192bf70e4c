"""Two processes, each with its share of every batch, train what one trains."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import METHODS, ROOT, import_method
from safetensors.torch import load_file

FLAGS = "--demo --epochs 1 --max_train_samples 300 --max_test_samples 60 --batch_size 16".split()
RUN_ALL = """
import importlib, sys
import common.demo
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
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("processes: 2") == 4  # only the main process prints, once for each method,
    assert result.stdout.count("writes the demo") == 4  # and writes what both read
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
