"""Flags are read and checked before any work; what cannot be used ends in one line."""

import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from conftest import ROOT, copy_backbone, import_method
from transformers import AutoModel, AutoTokenizer

import common.demo
from common.cli import UserError, fit_to_size, parse_config, run
from common.model import load_tokenizer

FOLDER = Path("SOME_METHOD")
MODEL_REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
DATASET_REVISION = "e6281661ce1c48d982bc483cf8a173c1bbeb5d31"


Config = import_method("PEFT_LORA").Config


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Output folders are made when flags are checked."""
    monkeypatch.chdir(tmp_path)


def parse(flags: str = "", config_class=Config, folder: Path = FOLDER):
    return parse_config(config_class, folder, flags.split())


@pytest.fixture
def demo_built(monkeypatch):
    """The folders in which a demo was asked for; nothing is generated."""
    built = []
    monkeypatch.setattr(common.demo, "build_demo", built.append)
    return built


# Flags


def test_defaults():
    config = parse()
    assert (config.model, config.model_revision) == ("sentence-transformers/all-MiniLM-L6-v2", MODEL_REVISION)
    assert (config.dataset, config.dataset_revision) == ("stanfordnlp/imdb", DATASET_REVISION)
    assert (config.max_length, config.seeds, config.report_to) == (512, [0, 1, 2], "none")
    assert config.max_train_samples is config.max_test_samples is None
    assert config.resume is config.demo is False
    assert config.output_dir == str(FOLDER.absolute() / "runs" / "imdb")


def test_dashes_are_as_good_as_underscores():
    flags = "--{0} 256 --{1} 8 --{2} 0.5 --{3} 100 --{4} v1 --{5} out --seeds 7 5 --epochs 2 --resume"
    names = "max_length batch_size learning_rate max_train_samples model_revision output_dir".split()
    config = parse(flags.format(*names))
    assert config == parse(flags.format(*(name.replace("_", "-") for name in names)))
    assert [getattr(config, name) for name in names] == [256, 8, 0.5, 100, "v1", str(Path("out").absolute())]
    assert (config.seeds, config.epochs, config.resume) == ([7, 5], 2, True)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--batch_size 0", "--batch_size 0: "),
        ("--batch-size -8", "--batch_size -8: "),
        ("--learning_rate 0", "--learning_rate 0.0: "),
        ("--learning_rate -0.001", "--learning_rate -0.001: "),
        ("--learning_rate nan", "--learning_rate nan: "),
        ("--learning_rate inf", "--learning_rate inf: "),
        ("--epochs 0", "--epochs 0: "),
        ("--max_length -1", "--max_length -1: "),
        ("--max_train_samples 0", "--max_train_samples 0: "),
        ("--max_test_samples -5", "--max_test_samples -5: "),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: "),
        ("--lora_r 0", "--lora_r 0: "),
        ("--seeds 0 1 0", "--seeds 0 1 0: must be different"),
        ("--seeds 3 -1", "--seeds 3 -1: must be different integers from 0"),
        ("--seeds 4294967296", "--seeds 4294967296: must be different integers from 0"),
        ("--batch_size 10 --gradient_accumulation_steps 4", "--batch_size 10: must be a multiple of 4"),
        ("--report_to nobody", "--report_to nobody: not known or installed; at hand: none, all"),
    ],
)
def test_values_that_cannot_be_used(flags, expected, demo_built):
    with pytest.raises(UserError) as error:
        parse(flags)
    assert str(error.value).startswith(expected)


@dataclass
class CopiedConfig(Config):
    """Of a script that was copied and given a flag whose default is no positive number."""

    lora_dropout: float = 0.0


def test_a_flag_may_have_its_default_though_it_is_zero():
    assert parse("", CopiedConfig).lora_dropout == parse("--lora_dropout 0", CopiedConfig).lora_dropout == 0.0
    assert parse("--lora_dropout 0.1", CopiedConfig).lora_dropout == 0.1
    with pytest.raises(UserError, match=r"--lora_dropout -0\.1: must be a finite number greater than 0"):
        parse("--lora_dropout -0.1", CopiedConfig)


def test_batch_is_divided_over_the_processes(monkeypatch):
    parse()  # from where on the state of processes is there
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 3)
    assert parse("--batch_size 12 --gradient_accumulation_steps 2").batch_size == 12
    for size in (8, 9):
        with pytest.raises(UserError, match=f"--batch_size {size}: must be a multiple of 6"):
            parse(f"--batch_size {size} --gradient_accumulation_steps 2")


@pytest.mark.parametrize("flags", ["--epochs many", "--learningrate 1", "--seeds", "--max_length 1.5"])
def test_wrong_types_and_unknown_flags_end_in_the_usage(flags, capsys):
    with pytest.raises(SystemExit) as end:
        parse(flags)
    assert end.value.code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert usage[0].startswith("usage: ") and flags.split()[0] in line


@pytest.mark.parametrize(
    ("flags", "model_revision", "dataset_revision"),
    [
        ("--model other/backbone", None, DATASET_REVISION),
        ("--dataset other/films", MODEL_REVISION, None),
        ("--model ./backbone --dataset ./films", None, None),
        ("--model other/backbone --model_revision v1", "v1", DATASET_REVISION),
        ("--dataset other/films --dataset-revision v2", MODEL_REVISION, "v2"),
        ("--model_revision v1 --dataset_revision v2", "v1", "v2"),
        ("--model sentence-transformers/all-MiniLM-L6-v2", MODEL_REVISION, DATASET_REVISION),
    ],
)
def test_default_revision_belongs_to_the_default_name(flags, model_revision, dataset_revision):
    config = parse(flags)
    assert (config.model_revision, config.dataset_revision) == (model_revision, dataset_revision)


def test_an_adapter_finds_its_backbone_from_any_folder(demo, monkeypatch):
    monkeypatch.chdir(demo[0].parent)
    assert Path(parse(f"--model {demo[0].name}").model) == demo[0].absolute()


# Demo


def test_demo_needs_nothing_else(demo_built):
    config, usual = parse("--demo"), parse()
    assert demo_built == [FOLDER.absolute() / "runs/demo/generated"]
    assert config.output_dir == str(FOLDER.absolute() / "runs/demo")
    assert [config.model, config.dataset] == [str(demo_built[0] / name) for name in ("tiny-bert", "generated-reviews")]
    assert config.model_revision is config.dataset_revision is None
    assert config.max_length < usual.max_length and config.epochs and config.seeds == [0]
    assert fit_to_size(config, 2000).batch_size == 32


def test_flags_by_hand_win_over_the_demo(demo_built):
    flags = "--demo --model mine --dataset-revision v2 --max_length 32 --seeds 4 5 --batch-size 128 --output_dir out"
    config = parse(flags)
    assert (config.model, config.model_revision, config.dataset_revision) == ("mine", None, "v2")
    assert (config.max_length, config.seeds, config.batch_size, config.output_dir) == (
        *(32, [4, 5], 128),
        str(Path("out").absolute()),
    )
    assert demo_built == [Path("out/generated").absolute()]
    assert config.dataset == str(Path("out/generated/generated-reviews").absolute())


def test_one_process_of_a_machine_writes_the_demo_and_the_others_read_it(demo_built, monkeypatch):
    first = parse("--demo")
    monkeypatch.setattr(PartialState, "is_local_main_process", False)
    second = parse("--demo")
    assert len(demo_built) == 1 and (second.model, second.dataset) == (first.model, first.dataset)


def test_demo_writes_what_it_names(tmp_path):
    config = parse("--demo", folder=tmp_path)
    assert load_tokenizer(config.model, config.model_revision, config.max_length)("good film")["input_ids"]
    assert sorted(path.name for path in Path(config.dataset).iterdir()) == ["test.jsonl", "train.jsonl"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("flags", ["--epochs 0", "--report_to nobody", f"--output_dir {__file__}"])
def test_nothing_is_written_where_a_flag_is_wrong(flags, demo_built):
    with pytest.raises(UserError):
        parse(f"--demo {flags}")
    assert not demo_built


def test_files_have_no_revision(tmp_path):
    """Which nobody checked."""
    config = parse(f"--model {tmp_path} --model_revision v1 --dataset {tmp_path} --dataset_revision v2")
    assert config.model_revision is config.dataset_revision is None


@pytest.mark.parametrize("name", ["model", "dataset", "output_dir"])
def test_an_empty_value_is_refused(name):
    with pytest.raises(UserError, match=f'--{name} "": is empty'):
        parse(f"--{name}=")


# --output_dir


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("/proc/results", "No such file or directory"),
        ("{here}/" + 300 * "a", "File name too long"),
        ("{here}/file", "File exists"),
        ("{here}/file/below", "Not a directory"),
        ("{here}/dangling", "No such file or directory"),  # a link into /proc
        ("{here}/loop", "Too many levels of symbolic links|File exists"),
        ("{here}/latin\udce9", "surrogates not allowed"),  # the byte E9: the name is not UTF-8
        ("{here}/taken --demo", "File exists"),
    ],
)
def test_an_output_folder_that_cannot_be_is_refused_in_one_line(place, reason, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("/proc/nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "generated").touch()
    with pytest.raises(
        UserError, match=f"^--output_dir .*: is no folder that can be written to .*({reason})"
    ) as error:
        parse(f"--output_dir {place.format(here=tmp_path)}")
    assert "\n" not in str(error.value)


def test_an_output_folder_is_made_and_left_empty(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "down")
    assert parse("--output_dir link").output_dir == str(tmp_path / "deep" / "down")
    assert list((tmp_path / "deep").rglob("*")) == [tmp_path / "deep" / "down"]


def test_a_folder_that_only_the_disk_refuses(tmp_path, monkeypatch):
    """Root may write everywhere, as far as permissions tell."""

    def refuse(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"--output_dir .*out: is no folder .*Read-only file system"):
        parse("--output_dir out")


def test_names_that_mean_no_home(tmp_path):
    config = parse("--model ~nobody-here/model --dataset ~nobody-here/films")
    assert config.model == "~nobody-here/model" and config.output_dir.endswith("/runs/films")


def test_one_folder_has_one_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("~/results", "results", "./other/../results/", f"{tmp_path}/results//"):
        assert parse(f"--output_dir {name}").output_dir == str(tmp_path / "results")


def test_a_seeds_folder_that_is_not_this_methods_is_refused(tmp_path):
    flags = f"--output_dir {tmp_path} --seeds 4 0"
    parse(flags)
    (tmp_path / "seed_7").mkdir()
    (tmp_path / "seed_0").mkdir()
    (tmp_path / "seed_0" / "thesis.txt").write_text("two years of work")
    parse(f"--output_dir {tmp_path} --seeds 4 5")  # those are other folders
    for more in ("", " --resume", " --demo"):
        with pytest.raises(UserError, match=f"{tmp_path}: seed_0 was not left by SOME_METHOD; name"):
            parse(flags + more)
    mark = tmp_path / "seed_0" / "flags.json"
    mark.write_text('{"method": "OTHER_METHOD"}')
    with pytest.raises(UserError, match=f"{tmp_path}: seed_0 was not left by SOME_METHOD; name"):
        parse(flags)
    for foreign in (b"", b"{half", b"[1, 2]", b'{"other": "program"}', b"\xff"):
        mark.write_bytes(foreign)
        with pytest.raises(UserError, match=f"{tmp_path}: seed_0 was not left by SOME_METHOD; name"):
            parse(flags)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["flags.json", "seed_0", "seed_7", "thesis.txt"]
    mark.write_text('{"method": "SOME_METHOD"}')
    parse(flags)
    (tmp_path / "seed_4").touch()
    with pytest.raises(UserError, match=f"{tmp_path}: seed_4 was not left by SOME_METHOD; name"):
        parse(flags)


# Endings


@pytest.mark.parametrize(
    ("body", "status", "lines"),
    [
        ("pass", 0, []),
        (
            "raise UserError('--epochs 0: must be greater than 0')",
            2,
            ["", "error: --epochs 0: must be greater than 0"],
        ),
        (
            "os.kill(os.getpid(), signal.SIGINT)",
            130,
            ["", "Interrupted. A training goes on after its last checkpoint "],
        ),
        (  # as a library may that waits for its workers, which are told too
            """ready, worker = os.pipe(), os.fork() == 0
    try:
        os.write(ready[1], b"!") if worker else os.read(ready[0], 1)
        while worker: pass
        os.kill(0, signal.SIGTERM)
    finally:
        if worker: os._exit(1)
        os.wait()
        raise TimeoutError""",
            143,
            ["", "Interrupted. A training goes on after its last checkpoint "],
        ),
    ],
)
def test_run_ends_in_one_line(body, status, lines):
    script = f"import os, signal\nfrom common.cli import UserError, run\ndef main():\n    {body}\nrun(main)"
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, start_new_session=True)
    assert (ended.returncode, ended.stdout) == (status, "")
    shown = ended.stderr.splitlines()
    assert len(shown) == len(lines)
    assert all(line.startswith(expected) for line, expected in zip(shown, lines, strict=True))


@pytest.mark.parametrize("bug", [ZeroDivisionError, ValueError, OSError, MemoryError])
def test_run_does_not_hide_bugs(bug):
    def main():
        raise bug("a bug")

    with pytest.raises(bug, match="a bug"):
        run(main)


# --model and --max_length


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *(
            (name, "is no folder here, and no name that the Hub could have")
            for name in ("./nowhere", "no/such/folder")
        ),
        *((name, "is not here or in the cache, and the Hub is not reached") for name in ("nowhere", "nobody/nothing")),
    ],
)
def test_unknown_model(name, reason):
    with pytest.raises(UserError) as error:
        load_tokenizer(name, None, 64)
    line = str(error.value)
    assert line.startswith(f"--model {name}: {reason}") and "\n" not in line
    assert line.endswith("could have") or ("cache" in line and "local files" in line and line.endswith("--demo"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "config.json"),
        ("{nope", "not a valid JSON file"),
        ('{"model_type": "warpdrive"}', "warpdrive"),
        ('{"model_type": "t5"}', "t5 has no classifier that reads a text's first token or its last; needs an enc"),
        ('{"model_type": "mamba"}', "mamba has no classifier that reads"),
        ('{"model_type": "xlnet"}', "xlnet has no classifier that reads"),
        ('{"model_type": "bert"}', "has no model.safetensors; "),
    ],
)
def test_folder_that_is_no_backbone(tmp_path, demo, content, reason):
    if content:
        for file in Path(demo[0]).glob("tokenizer*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path), None, 64)
    line = str(error.value)
    assert line.startswith(f"--model {tmp_path}: ") and "\n" not in line and reason in line


@pytest.mark.parametrize("max_length", [1, 2, 129, 512])
def test_max_length_beyond_the_model(demo, max_length):
    with pytest.raises(UserError) as error:
        load_tokenizer(str(demo[0]), None, max_length)
    assert str(error.value) == f"--max_length {max_length}: {demo[0]} takes 3 to 128 tokens"
    assert load_tokenizer(str(demo[0]), None, 3) and load_tokenizer(str(demo[0]), None, 128)


def test_a_backbone_without_its_tokenizer_is_refused(tmp_path, demo):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((demo[0] / name).read_bytes())
    with pytest.raises(UserError, match=f"--model {tmp_path}: has no tokenizer files"):
        load_tokenizer(str(tmp_path), None, 64)


@pytest.mark.parametrize("damage", [b"version https://git-lfs.github.com/spec/v1", None])
def test_damaged_weights_are_refused(tmp_path, demo, damage):
    for file in demo[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(damage or weights.read_bytes()[:-100])
    with pytest.raises(
        UserError, match=f"^--model {tmp_path}: bad model.safetensors: Error while deserializing header"
    ):
        load_tokenizer(str(tmp_path), None, 64)


@pytest.mark.parametrize("damage", ["missing", "index"])
def test_a_missing_part_of_the_weights_is_named(tmp_path, demo, damage):
    copy_backbone(demo, tmp_path, max_shard_size="100KB")
    assert load_tokenizer(str(tmp_path), None, 64)
    shard, index = sorted(tmp_path.glob("model-*"))[1], tmp_path / "model.safetensors.index.json"
    if damage == "index":
        index.write_text("{")
    else:
        shard.unlink()
    wrong = "config, tokenizer or index" if damage == "index" else shard.name
    with pytest.raises(UserError, match=f"^--model {tmp_path}: bad {wrong}: ") as error:
        load_tokenizer(str(tmp_path), None, 64)
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, demo):
    model = copy_backbone(demo, tmp_path)
    tokens = model.config.vocab_size
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    model.resize_token_embeddings(tokens - 7)
    model.save_pretrained(tmp_path)
    expected = f"its tokenizer has {tokens} tokens, its embeddings are of {tokens - 7}"
    with pytest.raises(UserError, match=f"^--model {tmp_path}: {expected}$"):
        load_tokenizer(str(tmp_path), None, 64)


class Pickled:
    """Unpickling one runs a program: here it makes a folder."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path, demo):
    model = copy_backbone(demo, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"^--model {tmp_path}: has no model.safetensors; python -c .*bin$") as error:
        load_tokenizer(str(tmp_path), None, 64)
    exec(re.search('python -c "(.*)"', str(error.value))[1])
    assert load_tokenizer("new", None, 64)
    converted = AutoModel.from_pretrained("new").state_dict()
    assert all(torch.equal(weight, converted[name]) for name, weight in model.state_dict().items())


def test_code_or_pickles_come_with_a_model(tmp_path, demo, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *question: "y")  # transformers may ask whether to run it
    copy_backbone(demo, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"weight": Pickled(tmp_path / "trace")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="has no model") as error:
        load_tokenizer(str(tmp_path), None, 64)
    with pytest.raises(pickle.UnpicklingError):
        exec(re.search('python -c "(.*)"', str(error.value))[1])
    (tmp_path / "own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'trace')!r})")
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}')
    with pytest.raises(
        UserError, match=f"^--model {tmp_path}: bad config, tokenizer or index: .* contains custom code"
    ):
        load_tokenizer(str(tmp_path), None, 64)
    assert not (tmp_path / "trace").exists()


def test_the_smaller_limit_counts(tmp_path, demo):
    for file in Path(demo[0]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 50}))
    with pytest.raises(UserError, match=f"--max_length 51: {tmp_path} takes 3 to 50 tokens"):
        load_tokenizer(str(tmp_path), None, 51)


def test_decoder_without_padding_token_gets_one(tmp_path, demo):
    tokenizer = load_tokenizer(str(demo[0]), None, 64)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((demo[0] / name).read_bytes())
    assert load_tokenizer(str(tmp_path), None, 64).pad_token == "[SEP]"


@pytest.mark.parametrize(
    ("gpu", "flags", "steps"),
    [
        (True, "", 1),
        (False, "", 8),
        (False, "--batch_size 12", 1),
        (False, "--batch_size 50", 1),
        (False, "--gradient_accumulation_steps 2", 2),
        (True, "--gradient_accumulation_steps 4", 4),
    ],
)
def test_a_cpu_takes_smaller_steps(gpu, flags, steps, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: gpu)
    assert fit_to_size(parse(flags), 22_546).gradient_accumulation_steps == steps


def test_a_gpu_that_is_too_small_ends_in_one_line(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(SystemExit, match="2"):
        run(main)
    assert capsys.readouterr().err.startswith("\nerror: out of GPU memory; try --gradient_checkpointing")


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", {"gcc": "/usr/bin/gcc"}.get)
    assert parse("--torch_compile").torch_compile
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="--torch_compile: needs a C compiler such as gcc"):
        parse("--torch_compile")
    assert not parse().torch_compile


def test_an_optimizer_is_one_of_those_named(capsys):
    assert parse("--optim paged_adamw_8bit").optim == "paged_adamw_8bit"
    with pytest.raises(SystemExit):
        parse("--optim sgd")
    said = capsys.readouterr().err
    assert "argument --optim: invalid choice: 'sgd'" in said and "paged_adamw_8bit" in said


# The number of reviews


@pytest.mark.parametrize(
    ("reviews", "size", "epochs"),
    [(22_546, 128, 5), (16_384, 128, 5), (9_000, 64, 5), (2_880, 32, 7), (900, 16, 11), (90, 16, 100), (20, 16, 300)],
)
def test_few_reviews_make_small_batches_and_many_updates(reviews, size, epochs, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    config = fit_to_size(parse(), reviews)
    assert (config.batch_size, config.epochs, config.gradient_accumulation_steps) == (size, epochs, 1)
    assert config.epochs * -(-reviews // config.batch_size) >= 600


def test_no_batch_size_is_blamed_that_nobody_gave(demo_built):
    for flags in ("", "--demo "):
        assert fit_to_size(parse(f"{flags}--gradient_accumulation_steps 3"), 2000).batch_size == 33
    assert fit_to_size(parse("--demo --gradient_accumulation_steps 64"), 2000).batch_size == 64


def test_what_the_user_sets_stays(monkeypatch):
    config = fit_to_size(parse("--epochs 2 --batch_size 50 --gradient_accumulation_steps 5"), 90)
    assert (config.epochs, config.batch_size, config.gradient_accumulation_steps) == (2, 50, 5)
    assert fit_to_size(parse("--batch_size 45"), 90).epochs == 300
    parse()  # from where on the state of processes is there
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 3)
    assert fit_to_size(parse("--gradient_accumulation_steps 2"), 90).batch_size == 18, "a share for every process"
