"""What do two GPUs bring? Training speed and memory of LoRA and QLoRA with one process and with two.

    python -m common.study.processes
    python -m common.study.processes --demo
    python -m common.study.processes -- --dataset ~/imdb

By torchrun each process has the whole model, and half of every batch. By `accelerate launch` with FSDP (`FSDP`, the
content of its configuration file) each holds half of the frozen weights too. The default backbone is as it is; the
others have random weights, in shapes of common/study/memory_by_size.py, and the demo's tokenizer. Two epochs, of which
the second is timed. Flags after `--` go to the scripts. Writes common/study/processes.json; with other reviews or
another backbone than the default one, it goes to common/study/runs/<name of the data>. So it does with `--demo`, which
takes a tiny backbone and generated reviews.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import PartialState
from transformers import AutoTokenizer

from common.cli import UserError, parse_config, public_name, run, write_json
from common.demo import build_demo
from common.record import ROOT, command_line, environment
from common.study.memory_by_size import RandomWeights, shape
from common.study.scripts import HERE, record_path, script

FSDP = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
"""
DEFAULT = "the default"
RUNS = [  # backbone, method, launcher, processes, flags
    *((DEFAULT, "PEFT_LORA", "torchrun", count, ["--batch_size", "128"]) for count in (1, 2)),
    *(("bert-large", "PEFT_LORA", "torchrun", count, ["--batch_size", "128"]) for count in (1, 2)),
    *(
        ("llama-3b", *how, ["--batch_size", "32", "--max_train_samples", "512"])
        for how in (
            *(("PEFT_LORA", "torchrun", 1), ("PEFT_LORA", "torchrun", 2), ("PEFT_LORA", "FSDP", 2)),
            *(("PEFT_QLORA", "torchrun", 1), ("PEFT_QLORA", "FSDP", 2)),
        )
    ),
]
DEMO = [("tiny-llama", "PEFT_LORA", "torchrun", count, ["--batch_size", "16"]) for count in (1, 2)]


def random_backbone(name: str, folder: Path) -> Path:
    """A folder with a backbone of this shape, random weights in 16 bits, and the demo's tokenizer."""
    place, config = folder / name, shape(name)
    if not place.exists():
        build_demo(folder / "demo")
        tokenizer = AutoTokenizer.from_pretrained(folder / "demo" / "tiny-bert", model_max_length=512)
        labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
        options = {"device_map": {"": PartialState().device}, "pad_token_id": tokenizer.pad_token_id, **labels}
        model, _ = RandomWeights.from_pretrained(place, torch.bfloat16, **options)
        for part in (model.base_model, tokenizer):
            part.save_pretrained(place)
        config.save_pretrained(place)
    return place


def launch(launcher: str, processes: int, file: Path, flags: list[str], folder: Path) -> None:
    """Run a script in so many processes. Raises UserError with the end of what it said if it fails."""
    if launcher == "FSDP":
        (folder / "fsdp.yaml").write_text(FSDP)
        start = ["accelerate.commands.launch", "--config_file", str(folder / "fsdp.yaml")]
    else:
        start = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", *start, str(file), *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"{' '.join(map(public_name, command))}\n{result.stderr[-4000:]}")


def main(argv: list[str] | None = None) -> dict:
    """Measure every run; returns the record, which is written after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="Tiny models on generated reviews.")
    parser.add_argument("flags", nargs="*", help="Of the scripts.")
    args = parser.parse_args(argv)
    if not args.demo and torch.cuda.device_count() < 2:
        parser.error("needs two GPUs; --demo does without")
    flags = [*args.flags, *["--demo"] * args.demo]
    path = record_path("processes", parse_config(script("PEFT_LORA").Config, HERE, flags))
    record = {"command": command_line("-m common.study.processes", argv), "environment": environment(), "rows": []}
    with TemporaryDirectory() as name:
        folder = Path(name)
        for backbone, method, launcher, processes, own in DEMO if args.demo else RUNS:
            output_dir = folder / f"{backbone}_{method}_{launcher}_{processes}"
            flags = ["--epochs", "2", "--max_train_samples", "4096", "--max_test_samples", "200", "--seeds", "0"]
            flags += [*own, *args.flags, "--output_dir", str(output_dir)]
            if backbone != DEFAULT:
                flags += ["--model", str(random_backbone(backbone, folder))]
            if args.demo:
                flags += ["--demo", "--max_train_samples", "200"]
            launch(launcher, processes, ROOT / method / "train.py", flags, folder)
            found = json.loads((output_dir / "seed_0" / "run.json").read_text())
            kept = (
                "processes",
                "peak_memory_bytes",
                "peak_memory_by_phase_bytes",
                "train_reviews_per_second",
                "epochs",
            )
            row = {"backbone": backbone, "method": method, "launcher": launcher, **{key: found[key] for key in kept}}
            row["reviews_per_second"] = found["train_reviews"] / row.pop("epochs")[-1]["seconds"]
            record["rows"].append(row)
            write_json(record, path)
            print(row, flush=True)
    print(f"Record:   {path}")
    return record


if __name__ == "__main__":
    run(main)
