"""Command line: flags from a dataclass, checked before any long work; errors in one line; files whole or not there."""

import argparse
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from filelock import FileLock, Timeout
from transformers import HfArgumentParser, integrations, logging

DEMO_SETTINGS = dict(max_length=64, epochs=5, gradient_accumulation_steps=1, learning_rate=2e-3, seeds=[0])
FULL = ("No space left", "File too large", "quota exceeded", "StreamWriter", "unexpected pos", "iostream error")
SIZES = "sizes.json"  # the last file of a checkpoint to be written
UPDATES = 600  # about as many at least, where --epochs is not given


class UserError(Exception):
    """Input that cannot be used. The message names the flag, its value and what would be accepted."""


def parse_config(config_class: type, folder: Path, argv: list[str] | None = None):
    """Parse and check the flags of the dataclass `config_class`; make the settings of the whole process. folder: the
    script's own, whose `runs/<data>` is the default output folder. Raises UserError for what cannot be used."""
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
    for name in (name for name, value in vars(given).items() if value == ""):
        raise UserError(f'--{name} "": is empty; is a variable of the shell not set?')
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
    for name in ("model", "dataset"):  # the default revision belongs to the default repository, and files have none
        other, revision = getattr(config, name) != parser.get_default(name), f"{name}_revision"
        default = getattr(config, revision) == parser.get_default(revision)
        if (other and default) or os.path.exists(os.path.expanduser(getattr(config, name))):
            setattr(config, revision, None)
    if os.path.isdir(model := os.path.expanduser(config.model)):
        config.model = os.path.abspath(model)  # an adapter's backbone is looked for there, from anywhere
    return config


def fit_to_size(config, reviews: int):
    """A copy of `config` in which what the user left open suits the number of reviews, those of validation included.
    batch_size: about its square root, a power of two from 16 to 128 (or next to it a multiple of processes and steps).
    epochs: 5, or as many as make about 600 updates: a hundred reviews need many passes."""
    parts = (config.gradient_accumulation_steps or 1) * PartialState().num_processes
    size = config.batch_size or math.ceil(min(max(2 ** int(math.log2(reviews) / 2), 16), 128) / parts) * parts
    epochs = config.epochs or max(5, math.ceil(UPDATES / math.ceil(reviews / size)))
    # On a CPU 16 reviews at a time are faster than 128: what a layer leaves is still in the cache for the next.
    small = 1 if torch.accelerator.is_available() else max(1, min(size, reviews // 2) // 16)
    steps = config.gradient_accumulation_steps or math.gcd(small, size // PartialState().num_processes)
    return dataclasses.replace(config, batch_size=size, epochs=epochs, gradient_accumulation_steps=steps)


def _check(config, method: str) -> None:
    """Raise UserError for what is out of range or not there, and for an output folder that may not be written to."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) in (int, float) and not (0 < value < math.inf or value == field.default):
            raise UserError(f"--{field.name} {value}: must be a finite number greater than 0")
    if any(not 0 <= seed < 2**32 for seed in config.seeds) or len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"--seeds {' '.join(map(str, config.seeds))}: must be different integers from 0 to 2**32 - 1")
    if getattr(config, "torch_compile", False) and not any(map(shutil.which, ("cc", "gcc", "clang", "cl"))):
        raise UserError("--torch_compile: needs a C compiler such as gcc; there is none on the PATH")
    size, parts = config.batch_size, (config.gradient_accumulation_steps or 1) * PartialState().num_processes
    if size and size % parts:
        raise UserError(f"--batch_size {size}: must be a multiple of {parts}, the accumulation steps times processes")
    names = ["none"] if config.report_to == "none" else ["all", *integrations.get_available_reporting_integrations()]
    if config.report_to not in names:
        raise UserError(f"--report_to {config.report_to}: not known or installed; at hand: none, {', '.join(names)}")
    try:  # permissions alone do not tell; and the record will be in UTF-8
        for folder in (Path(config.output_dir, f"seed_{seed}") for seed in config.seeds):
            flags = folder / "flags.json"  # our mark
            if folder.exists() and not (flags.is_file() and f'"method": "{method}"'.encode() in flags.read_bytes()):
                raise UserError(f"--output_dir {folder.parent}: {folder.name} was not left by {method}; name another")
        Path(config.output_dir.encode().decode(), "generated" * config.demo).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.output_dir).close()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--output_dir {config.output_dir}: is no folder that can be written to ({error})") from error


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Keep other runs out of `folder`, or raise UserError if one is there. The system frees a dead process's lock."""
    lock, holder = (Path(folder, f".{name}_{os.environ.get('RANK', 0)}") for name in ("lock", "holder"))
    try:
        with FileLock(lock, timeout=0):
            holder.write_text(f"process {os.getpid()} on {platform.node()}")
            yield
    except Timeout:
        who = holder.read_text() if holder.exists() else "another process"
        raise UserError(f"--output_dir {folder}: {who} is at work there; name another") from None


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Raise UserError, naming `what`, for a full disk. Libraries raise errors of many types then, with few words."""
    try:
        yield
    except Exception as error:
        if not any(sign in str(error) for sign in FULL):
            raise
        raise UserError(f"the disk is full: cannot write {what}; once there is room, --resume goes on") from error


def run(main: Callable[[], object]) -> None:
    """Call `main`; end in one line where the input was wrong, the disk or the GPU is full, Ctrl-C or SIGTERM came."""
    process, status = os.getpid(), [2]

    def stop(number, frame):
        status[0] = 128 + number
        if os.getpid() == process:  # no worker of `datasets`
            print("\nInterrupted. A training goes on after its last checkpoint with --resume.", file=sys.stderr)
        sys.exit(status[0])

    signal.signal(signal.SIGINT, stop)
    if os.environ.get("RANK", "0") == "0":  # others may be waiting for it where Python calls no handler
        signal.signal(signal.SIGTERM, stop)
    try:
        with writing("a file, perhaps of the cache (see HF_HOME)"):
            return main()
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("\nerror: out of GPU memory; try --gradient_checkpointing or a shorter --max_length", file=sys.stderr)
    except Exception:
        if status == [2]:  # else libraries raised it where they clean up
            raise
    sys.exit(status[0])


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path` on success and is deleted on failure."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # savefig goes by the suffix
    try:
        with writing(path):
            yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: dict, path: Path) -> None:
    """Write `content` to `path`, whole or not at all; JSON has no NaN and no infinity, they become null."""
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict | None:
    """What `write_json` wrote; None where it is missing or damaged."""
    with suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text())


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file in `folder`, by its name there; without SIZES, which keeps them."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != SIZES)
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def public_name(name: str) -> str:
    """`name` without the folders of this machine: of a path, its last part; also in the form --flag=path."""
    flag, equals, value = name.rpartition("=")
    path = os.path.expanduser(value)
    return f"{flag}{equals}{Path(os.path.realpath(path)).name}" if os.path.exists(path) else name
