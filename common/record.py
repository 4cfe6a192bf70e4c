"""Runs on disk: the folder of each seed, which `--resume` goes on from, and results.json with its charts."""

import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import DatasetDict
from huggingface_hub import ModelCard, ModelCardData
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from common.cli import SIZES, UserError, file_sizes, public_name, read_json, whole_file, write_json
from common.data import IMDB_SHA256
from common.plotting import DEMO, bar_figure, line_figure, save

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ("53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", IMDB_SHA256)  # weights, reviews
PACKAGES = ("torch", "transformers", "datasets", "evaluate", "accelerate", "peft", "bitsandbytes")


def open_seed(method: str, config, seed: int, fingerprint: str) -> tuple[Path, dict | None]:
    """Folder that this seed trains in, and its record if an earlier run finished it and `--resume` is on.
    fingerprint: of the reviews. The measuring of peak memory starts here.
    Raises UserError where the run to resume was of another method, had other flags, weights or reviews."""
    gc.collect()  # the model and the trainer of the seed before hold on to each other, and to memory
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    done, folder = (Path(config.output_dir) / f"{start}seed_{seed}" for start in ("", f"unfinished_{method}_"))
    place = folder if (folder / "flags.json").exists() else done
    before = read_json(place / "flags.json") if config.resume else None
    for name, value in _flags(method, config, fingerprint).items() if before else ():
        if value != before.get(name):
            raise UserError(f"--resume: the interrupted run had --{name} {before.get(name)}, not {value}")
    return folder, read_json(place / "run.json") if before and place == done else None


def prepare_seed(method: str, config, folder: Path, fingerprint: str) -> str | None:
    """Make `folder` ready for training; returns the checkpoint that `--resume` goes on from, if any. To be called when
    everything else has been checked. What an earlier run finished stays until this one has: see `run_record`."""
    flags, checkpoint = _flags(method, config, fingerprint), None
    if PartialState().is_main_process:
        if not config.resume or read_json(folder / "flags.json") != flags:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(flags, folder / "flags.json")
        checkpoint = last_checkpoint(folder)
        if config.resume and not checkpoint:
            print(f"--resume: {folder.name} starts from scratch; no run.json or flags.json with a checkpoint is whole")
    return broadcast_object_list([checkpoint])[0]


def _flags(method: str, config, fingerprint: str) -> dict:
    """What must be the same for a run to go on."""
    free = dict.fromkeys(("seeds", "resume", "save_steps", "report_to"))  # checkpoints name their output_dir
    sums = {"model": weights_sha256(config), "dataset": fingerprint}
    sums = {name: f"{getattr(config, name)} with SHA-256 {found}" for name, found in sums.items()}
    return {"method": method, **vars(config), **sums, **free}


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole, as the best one until then is. Newer ones are named and removed."""
    for checkpoint in sorted(folder.glob("checkpoint-[0-9]*"), key=lambda path: -int(path.name.split("-")[1])):
        best = (read_json(checkpoint / "trainer_state.json") or {}).get("best_model_checkpoint")
        if all(read_json(part / SIZES) == file_sizes(part) for part in (checkpoint, Path(best or checkpoint))):
            return str(checkpoint)
        print(f"--resume: {checkpoint} is passed over; it is damaged, or the one of the best epoch until then is")
        shutil.rmtree(checkpoint)
    return None


def run_record(trainer, validation, test, untrained_test, started: float) -> dict:
    """One seed's entry of `runs`, also left as run.json for `--resume`, with the chosen model's logits beside it.
    validation, test, untrained_test: EvalPredictions. started: time.perf_counter() at the start."""
    from common.metrics import score, split_memory

    kept = ("train_accuracy", "validation_accuracy", "validation_f1", "validation_loss", "train_loss")
    epochs, seconds = {}, 0.0
    for entry in trainer.state.log_history:
        seconds += entry.get("seconds", 0.0)
        scores = {name: entry[f"eval_{name}"] for name in kept if f"eval_{name}" in entry}
        if scores and (number := int(entry["epoch"])) == entry["epoch"]:  # else it is where --resume began
            epochs.setdefault(number, {"epoch": number, "seconds": seconds}).update(scores)  # since the one before
            seconds = 0.0
    epochs = list(epochs.values())
    candidates = epochs[1:] if trainer.args.load_best_model_at_end else epochs[-1:]  # epoch 0 is none
    best = max(candidates, key=lambda epoch: (epoch["validation_accuracy"], -epoch["validation_loss"]))  # as Trainer's
    train_seconds = trainer.run_once_seconds + sum(epoch["seconds"] for epoch in epochs)
    folder, reviews = Path(trainer.args.output_dir), len(trainer.train_dataset)
    tokens = trainer.tensors_of(trainer.train_dataset).input_ids.cpu().numpy().tobytes()  # they tell which were drawn
    peaks = gather_object([trainer.peaks])
    phases = {phase: max(peak[phase] for peak in peaks) for phase in peaks[0]}
    peak = max(phases.values())  # of the process that took most
    untrained = {name: value for name, value in score(untrained_test).items() if name in ("accuracy", "f1")}
    saved = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    speed = reviews * trainer.args.num_train_epochs / train_seconds
    record = {"seed": trainer.args.seed, "train_reviews": reviews, "train_sha256": hashlib.sha256(tokens).hexdigest()}
    record |= {"epochs": epochs, "best_epoch": best["epoch"], "untrained_test": untrained, "test": score(test)}
    record |= {"train_seconds": train_seconds, "train_reviews_per_second": speed}
    record |= {"total_seconds": time.perf_counter() - started, "padding_percent": trainer.padding_percent()}
    record |= {"processes": trainer.args.world_size, "peak_memory_bytes": peak, "peak_memory_by_phase_bytes": phases}
    record |= {"memory_bytes": split_memory(trainer.model, trainer.optimizer, peak), "checkpoint_bytes": saved}
    record |= dict(zip(("trainable_parameters", "total_parameters"), trainer.parameters, strict=True))
    if len(set(validation.predictions.argmax(-1))) == 1 < len(set(validation.label_ids)):
        record["warning"] = "predicts one class for every validation text"
    if trainer.is_world_process_zero():
        arrays = {"validation_logits": validation.predictions, "validation_labels": validation.label_ids}
        with whole_file(folder / "logits.npz") as file:
            np.savez(file, **arrays, test_logits=test.predictions, test_labels=test.label_ids)
        write_json(record, folder / "run.json")
        shutil.rmtree(folder.with_name(f"seed_{trainer.args.seed}"), ignore_errors=True)  # of an earlier run
        folder.rename(folder.with_name(f"seed_{trainer.args.seed}"))
    return record


def publish(folder: Path, argv, config, data: DatasetDict, fingerprint: str, runs: list[dict]) -> dict:
    """Write results.json, draw the charts, print what came out; returns the record. The files go to `--output_dir`, or
    beside the script in `folder` where nothing is lost of what is published: see `is_published`."""
    record = make_record(folder.name, argv, config, data, fingerprint, runs)
    place = folder if is_published(config, fingerprint, folder) else Path(config.output_dir)
    if not PartialState().is_main_process:
        return record
    write_json(record, place / "results.json")
    save(bar_figure(record), place / "bar_chart.png", record)
    save(line_figure(record), place / "line_chart.png", record)
    accuracy, f1 = (spread(record["summary"][name]) for name in ("test_accuracy", "test_f1"))
    for run in runs:
        if (model := Path(config.output_dir, f"seed_{run['seed']}", "model")).exists():  # it may be gone on --resume
            write_card(model, record, run, config)
        if "warning" in run:
            print(f"Warning:  seed {run['seed']} {run['warning']}; see --epochs, --learning_rate and --class_weights")
    classes = np.sum(runs[0]["test"]["confusion_matrix"], axis=1)
    print(f"Test:     accuracy {accuracy}, F1 {f1} (percent, mean ± sd over seeds {config.seeds})")
    print(f"          the most frequent class alone: accuracy {classes.max() / classes.sum():.1%}")
    if config.demo:
        print("This was the demo, on generated reviews with a tiny model: its figures mean nothing.")
    print(f"Models:   {', '.join(str(Path(config.output_dir, f'seed_{seed}', 'model')) for seed in config.seeds)}")
    print(f"Record:   {place / 'results.json'}, with bar_chart.png and line_chart.png beside it")
    return record


def write_card(folder: Path, record: dict, run: dict, config) -> None:
    """Make the saved model in `folder` fit to share: a model card, from card.md, and no path of this machine.
    run: the model's entry in `record`. Raises ValueError for metadata of the card that are not valid."""
    told = {**record, "run": run, "spread": spread, "saved": json.loads((folder / "config.json").read_text())}
    for kind, published in zip(("model", "dataset"), PUBLISHED, strict=True):
        flags = vars(type(config)() if published in record[kind].values() else config)  # a copy of the Hub's default
        if not os.path.exists(os.path.expanduser(name := flags[kind])):
            told[kind] = record[kind] | {"id": name, "name": name, "revision": flags[f"{kind}_revision"]}
    if (adapter := folder / "adapter_config.json").exists():
        backbone = {"base_model_name_or_path": told["model"]["name"], "revision": told["model"]["revision"]}
        write_json(json.loads(adapter.read_text()) | backbone, adapter)
    (folder / "training_args.bin").unlink(missing_ok=True)  # Trainer's, with paths
    card = ModelCard.from_template(ModelCardData(), ROOT / "common" / "card.md", adapter=adapter.exists(), **told)
    card.save(folder / "README.md")


def is_published(config, fingerprint: str, folder: Path) -> bool:
    """Whether a run is of all the published reviews on the published backbone, its output in `folder`/runs."""
    part = config.demo or config.max_train_samples or config.max_test_samples
    here = Path(config.output_dir).parent == (folder / "runs").resolve()
    return here and not part and fingerprint == PUBLISHED[1] and weights_sha256(config) == PUBLISHED[0]


def weights_sha256(config) -> str:
    """Of the backbone's weights; spread over several files, of all these in the order of their names."""
    options, digest = {"revision": config.model_revision}, hashlib.sha256()
    whole, index = "model.safetensors", "model.safetensors.index.json"
    files = [cached_file(config.model, whole, **options, _raise_exceptions_for_missing_entries=False)]
    if files == [None]:
        files, _ = get_checkpoint_shard_files(config.model, cached_file(config.model, index, **options), **options)
    for file in sorted(files):
        with open(file, "rb") as weights:
            hashlib.file_digest(weights, lambda: digest)
    return digest.hexdigest()


def spread(summary: dict, scale: float = 0.01, decimals: int = 1) -> str:
    """ "92.4 ± 0.1", mean and sd in units of `scale` (of fractions, percent); without an sd "92.4"."""
    return " ± ".join(f"{number / scale:.{decimals}f}" for number in summary.values() if number is not None)


def summarize(values: list[float]) -> dict:
    """Mean and standard deviation (of a sample: n - 1); of a single value the latter is None."""
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def make_record(method: str, argv, config, data: DatasetDict, fingerprint: str, runs: list[dict]) -> dict:
    """The content of results.json. argv: as of `command_line`."""
    trainable, total = runs[0]["trainable_parameters"], runs[0]["total_parameters"]
    model = {"name": public_name(config.model), "revision": config.model_revision}
    model |= {"weights_sha256": weights_sha256(config), "total_parameters": total, "trainable_parameters": trainable}
    dataset = {"name": public_name(config.dataset), "revision": config.dataset_revision, "sha256": fingerprint}
    dataset |= {split: len(rows) for split, rows in data.items()}
    return {
        "method": method,
        "command": command_line(f"{method}/train.py", argv),
        **({"note": DEMO} if config.demo else {}),
        "config": {name: public_name(flag) if isinstance(flag, str) else flag for name, flag in vars(config).items()},
        "model": model | {"trainable_percent": 100 * trainable / total},
        "dataset": dataset | {"truncated_percent": 100 * statistics.mean(data["train"]["truncated"][:])},
        "environment": environment(),
        "runs": runs,
        "summary": {
            **{f"test_{name}": summarize([run["test"][name] for run in runs]) for name in ("accuracy", "f1")},
            "accuracy_gain": summarize([run["test"]["accuracy"] - run["untrained_test"]["accuracy"] for run in runs]),
            **{name: summarize([run[name] for run in runs]) for name in ("train_seconds", "peak_memory_bytes")},
        },
    }


def command_line(script: str, argv: list[str] | None) -> str:
    """The command as others may read it. argv: its flags; None for those of this process."""
    return shlex.join(["python", *script.split(), *map(public_name, sys.argv[1:] if argv is None else argv)])


def environment() -> dict:
    """Hardware, versions, and the commit: of git, or SOURCE_COMMIT's (for a copy of the code without its history)."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    copied, cpuinfo = os.environ.get("SOURCE_COMMIT"), Path("/proc/cpuinfo")
    commit = copied or git(["git", "rev-parse", "--verify", "HEAD"]).stdout.strip() or None
    cpu = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": f"{cpu[1] if cpu else platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "commit": commit,
        "dirty": bool(git(["git", "status", "--porcelain", "-uno", "*.py"]).stdout) if commit and not copied else None,
    }
