"""Command line: flags from a dataclass, checked before any long work; errors in one line."""

import argparse
import dataclasses
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import HfArgumentParser
from transformers.utils import logging

# Beside --model and --dataset: as much as the demo's short reviews and tiny model need.
DEMO_SETTINGS = dict(max_length=64, epochs=5, gradient_accumulation_steps=1, learning_rate=2e-3, seeds=[0])
UPDATES = 600  # about as many at least, where --epochs is not given


class UserError(Exception):
    """Input that cannot be used. The message names the flag, its value and what would be accepted."""


def parse_config(config_class: type, folder: Path, argv: list[str] | None = None):
    """Parse and check the flags that the dataclass `config_class` declares; make the settings of the whole process.
    `folder` is the script's own: `--output_dir` defaults to its `runs/<data>`. With `--demo` the generated reviews and
    model, and settings that suit them, become the defaults; flags given by hand still win.
    Raises UserError for a value that cannot be used; argparse exits for one of the wrong type."""
    logging.set_verbosity_error()  # the preflight says what matters of their reports on loading
    torch.utils.deterministic.fill_uninitialized_memory = False  # finds bugs in kernels, and costs 8% of the speed
    if not torch.accelerator.is_available():  # unless told, several processes on CPUs do not look for each other
        os.environ["ACCELERATE_USE_CPU"] = "true"
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # the first one decides for the process
    about = {"description": sys.modules[config_class.__module__].__doc__, "allow_abbrev": False}
    parser = HfArgumentParser(config_class, formatter_class=argparse.RawDescriptionHelpFormatter, **about)
    for action in parser._actions:
        if action.default not in (None, argparse.SUPPRESS):  # what None stands for, a flag's own help says
            action.help = f"{action.help or ''} [{str(action.default).strip('[]').replace(',', '')}]"
    given = parser.parse_args(argv)
    subset = getattr(given, "max_train_samples", None) or getattr(given, "max_test_samples", None)
    data = "demo" if given.demo else Path(os.path.realpath(os.path.expanduser(given.dataset))).name.split(".")[0]
    output_dir = given.output_dir or folder / "runs" / (f"{data}_partial" if subset else data)
    output_dir = Path(os.path.realpath(os.path.expanduser(output_dir)))  # unlike Path's own, these never fail
    generated = output_dir / "generated"
    if given.demo:
        sources = {"model": str(generated / "tiny-bert"), "dataset": str(generated / "generated-reviews")}
        parser.set_defaults(**DEMO_SETTINGS, **sources, model_revision=None, dataset_revision=None)
    config = config_class(**vars(parser.parse_args(argv)))
    config.output_dir = str(output_dir)
    _check(config, folder.name)
    if config.demo:
        torch.set_num_threads(1)  # more would only get in each other's way with so small a model
        if state.is_local_main_process:  # it alone: written again, files would vanish while another process reads them
            from common.demo import build_demo

            build_demo(generated)
        state.wait_for_everyone()
    for name in ("model", "dataset"):  # the default revision belongs to the default repository
        other, revision = getattr(config, name) != parser.get_default(name), f"{name}_revision"
        if other and getattr(config, revision) == parser.get_default(revision):
            setattr(config, revision, None)
    if os.path.isdir(model := os.path.expanduser(config.model)):
        config.model = os.path.abspath(model)  # an adapter's backbone is looked for there, from anywhere
    return config


def fit_to_size(config, reviews: int):
    """A copy of `config` in which what the user left open suits the number of reviews, those of validation included.
    batch_size: about its square root, a power of two from 16 to 128 (or next to it a multiple of processes and steps).
    epochs: 5, or as many as make about 600 updates: a hundred reviews need many passes."""
    parts = (config.gradient_accumulation_steps or 1) * processes()
    size = config.batch_size or math.ceil(min(max(2 ** int(math.log2(reviews) / 2), 16), 128) / parts) * parts
    epochs = config.epochs or max(5, math.ceil(UPDATES / math.ceil(reviews / size)))
    # On a CPU 16 reviews at a time are faster than 128: what a layer leaves is still in the cache for the next.
    small = 1 if torch.accelerator.is_available() else max(1, min(size, reviews // 2) // 16)
    steps = config.gradient_accumulation_steps or math.gcd(small, size // processes())
    return dataclasses.replace(config, batch_size=size, epochs=epochs, gradient_accumulation_steps=steps)


def processes() -> int:
    """How many processes torchrun started, one per GPU; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _check(config, method: str) -> None:
    """Raise UserError for what is out of range or not there, and for an output folder that may not be written to."""
    from transformers.integrations import get_available_reporting_integrations  # it imports every library it could use

    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) in (int, float) and not (0 < value < math.inf or value == field.default):
            raise UserError(f"--{field.name} {value}: must be a finite number greater than 0")
    if any(not 0 <= seed < 2**32 for seed in config.seeds) or len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"--seeds {' '.join(map(str, config.seeds))}: must be different integers from 0 to 2**32 - 1")
    size, parts = config.batch_size, (config.gradient_accumulation_steps or 1) * processes()
    if size and size % parts:
        raise UserError(f"--batch_size {size}: must be a multiple of {parts}, the accumulation steps times processes")
    trackers = ["none", "all", *get_available_reporting_integrations()]
    if config.report_to not in trackers:
        raise UserError(f"--report_to {config.report_to}: not known or not installed; at hand: {', '.join(trackers)}")
    compilers = os.environ.get("CC", ""), "gcc", "clang", "cl"
    if getattr(config, "torch_compile", False) and not any(map(shutil.which, compilers)):
        raise UserError("--torch_compile: needs a C compiler such as gcc; there is none on the PATH")
    try:  # permissions alone do not tell; and the record will be in UTF-8
        for folder in (Path(config.output_dir, f"seed_{seed}") for seed in config.seeds):
            flags = folder / "flags.json"  # our mark
            if folder.exists() and not (flags.is_file() and f'"method": "{method}"'.encode() in flags.read_bytes()):
                raise UserError(f"--output_dir {folder.parent}: {folder.name} was not left by {method}; name another")
        Path(config.output_dir.encode().decode(), "generated" * config.demo).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.output_dir).close()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--output_dir {config.output_dir}: is no folder that can be written to ({error})") from error


def run(main: Callable[[], object]) -> None:
    """Call `main`; end in one line, not a traceback, where the input was wrong or Ctrl-C was pressed."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        less = "--gradient_accumulation_steps, --gradient_checkpointing or a shorter --max_length"
        sys.exit(f"error: out of GPU memory; {less} may help")
    except KeyboardInterrupt:
        print("\nInterrupted. The same command with --resume goes on after the last saved epoch.", file=sys.stderr)
        sys.exit(130)
