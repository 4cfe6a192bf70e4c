"""The four scripts: alike outside their method, and doing the whole job from the command line."""

import ast
import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import METHODS, ROOT, import_method, read_reviews
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from peft import AutoPeftModelForSequenceClassification, PeftConfig
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from common import metrics, predict
from common.cli import UserError
from common.data import load_reviews, tokenize
from common.record import spread, write_card
from common.trainer import ReviewTrainer

SCRIPTS = [ROOT / method / "train.py" for method in METHODS]


def run(*command, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, command)]
    environment = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


# Their text


def shared_part(source: str) -> str:
    """The text of a script without its docstring, its method's name and fields, and its method's own functions: from
    `build_model` to the line before `train`."""
    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    parts = {part.name: part for part in tree.body if hasattr(part, "name")}
    assert list(parts)[:2] == ["Config", "build_model"] and list(parts)[-2:] == ["train", "main"]
    config, fields = parts["Config"], lines.index("    # This method\n") + 1
    assert config.lineno < fields < config.end_lineno
    removed = {
        *range(tree.body[0].lineno, tree.body[0].end_lineno + 1),
        *range(fields + 1, config.end_lineno + 1),
        *range(parts["build_model"].lineno, parts["train"].lineno),
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
        ("\n\ndef main", "\n\nEXTRA = 1\n\n\ndef main"),
    ],
)
def test_a_mutated_copy_is_not_alike(old, new):
    sources = [script.read_text() for script in SCRIPTS]
    assert old in sources[2]
    sources[2] = sources[2].replace(old, new, 1)
    assert not alike(sources)


def test_every_flag_is_explained_and_in_the_same_order(method):
    assert all(flag.metadata["help"].endswith((".", "]")) for flag in fields(method.Config))
    assert [flag.name for flag in fields(method.Config)][:23] == [
        *("model", "model_revision", "dataset", "dataset_revision", "text_column", "label_column", "class_weights"),
        *("max_length", "epochs", "batch_size"),
        *(
            "gradient_accumulation_steps",
            "gradient_checkpointing",
            "torch_compile",
            "optim",
            "seeds",
            "max_train_samples",
            "max_test_samples",
        ),
        *("output_dir", "save_steps", "resume", "report_to", "demo", "learning_rate"),
    ]


def test_common_names_no_method():
    for file in (ROOT / "common").glob("*.py"):
        assert not re.search("|".join(METHODS), file.read_text()), file


def test_common_is_imported_where_there_is_no_module_resource(monkeypatch):
    """As on Windows. Under other names, so that the modules of the other tests stay the same."""
    monkeypatch.setitem(sys.modules, "resource", None)
    for file in (ROOT / "common").glob("*.py"):
        spec = importlib.util.spec_from_file_location(f"again_{file.stem}", file)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def imported(file: Path, seen: frozenset[str] = frozenset()) -> frozenset[str]:
    """The modules of `common` that a file imports, anywhere in it, and what those import."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        else:
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        for name in names - seen:
            module = ROOT / (name.replace(".", "/") + ".py")
            if name.startswith("common.study") or (name.startswith("common.") and module.exists()):
                seen |= {name}
                seen |= imported(module, seen) if module.exists() else set()
    return seen


@pytest.mark.parametrize("script", SCRIPTS, ids=METHODS)
def test_no_script_imports_a_study(script):
    modules = imported(script)
    assert {"common.cli", "common.data", "common.plotting"} <= modules
    assert not [name for name in modules if name.startswith("common.study")]


def test_nothing_else_at_the_top():
    allowed = {*METHODS, "common", "tests", "requirements.txt", "LICENSE", "README.md"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    top = {Path(name).parts[0] for name in tracked.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= allowed


# The command line


def test_help(method, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # every help in one line
    with pytest.raises(SystemExit) as end:
        method.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for text in ("--model_revision", "--max-length", "--seeds", "--resume", "--demo", "--learning_rate", "Frozen:"):
        assert text in shown
    assert f"\nRun:   python {method.FOLDER.name}/train.py\n" in shown
    for flag in fields(method.Config):
        explained = re.search(rf"\n  --{flag.name} .*\n? {{5,}}(.*)\n", shown)[1]
        (default,) = re.findall(r"\[(.+?)\]", explained)
        assert explained.endswith(f" [{default}]")
        assert flag.default in (None, MISSING) or default == str(flag.default)
    assert "One run for each. [0 1 2]" in shown


START = """
import atexit, runpy, sys
slow = ["bitsandbytes", "evaluate", "peft", "transformers.modeling_utils", "transformers.trainer"]
atexit.register(lambda: print("slow:", [name for name in slow if name in sys.modules]))
runpy.run_path("PEFT_QLORA/train.py", run_name="__main__")
"""


def test_help_and_errors_wait_for_nothing_that_only_training_needs(tmp_path):
    result = run("-c", START, "--help")
    assert result.stdout.endswith("\nslow: []\n") and result.stderr == ""
    result = run("-c", START, "--model", tmp_path, "--output_dir", tmp_path / "out")
    assert result.stdout == "slow: []\n" and result.stderr.startswith(f"\nerror: --model {tmp_path}: bad config")


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """A finished `--demo` of each script, two at a time: their folders' folder, and the processes by method."""
    folder = tmp_path_factory.mktemp("demos")

    def start(name):
        flags = ["--demo", "--epochs", "2", "--output-dir", folder / name]
        flags += ["--gradient_checkpointing"] * (name == "PEFT_QLORA")  # it may make libraries warn
        return run(f"{name}/train.py", *flags, HF_HOME=str(folder / "cache"))

    with ThreadPoolExecutor(2) as pool:
        return folder, dict(zip(METHODS, pool.map(start, METHODS), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_demo_does_the_whole_job(name, demos):
    folder, result = demos[0] / name, demos[1][name]
    assert result.returncode == 0, result.stderr
    lines = re.sub(r"\x1b\[A", "", result.stderr).replace("\r", "\n").splitlines()
    assert not [line for line in lines if line.strip() and not re.search(r"(it/s|s/it|examples/s)\] *$", line)]
    record = json.loads((folder / "results.json").read_text())
    (only,) = record["runs"]
    assert record["method"] == name
    assert record["config"]["demo"] is True
    assert "figures mean nothing" in record["note"]
    assert [epoch["epoch"] for epoch in only["epochs"]] == [0, 1, 2]
    for epoch in only["epochs"]:
        assert set(epoch) == {
            *("epoch", "train_accuracy", "train_loss", "validation_accuracy", "validation_f1", "validation_loss"),
            "seconds",
        }
    in_epochs = sum(epoch["seconds"] for epoch in only["epochs"])
    assert only["train_seconds"] >= in_epochs > 0
    assert (only["train_seconds"] > 1.05 * in_epochs) == (name == "NEW_HEAD")  # its one pass
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
    assert str(folder) not in (folder / "results.json").read_text()
    for chart in ("bar_chart.png", "line_chart.png"):
        assert (folder / chart).read_bytes().startswith(b"\x89PNG")
    for title in ("Backbone", "Trains", "Frozen", "Texts", "Device", "Record", "Models", "Test"):
        assert f"\n{title}: " in "\n" + result.stdout
    assert "This was the demo" in result.stdout and result.stdout.splitlines()[-1].startswith("Record: ")
    frozen = next(line for line in result.stdout.splitlines() if line.startswith("Frozen:"))
    assert frozen.endswith(f", in {'4 bits, ' * (name == 'PEFT_QLORA')}float32")


def test_no_network_ends_in_one_line_that_names_the_ways_out(tmp_path):
    no_network = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = run("PEFT_LORA/train.py", "--output_dir", tmp_path / "runs", **no_network)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: --model sentence-transformers/all-MiniLM-L6-v2: ")
    assert all(way in line for way in ("cache", "--model", "--dataset", "--demo"))


# Runs in this process

SENTENCE = "The plot is dull, but the acting saves it."
LONG = "<br /><br />".join([SENTENCE, "I found the music weak.", *["The script is good."] * 50])  # 300 tokens and more
SMALL = ["--demo", "--epochs", "2", "--seeds", "3", "--max_train_samples", "600", "--max_test_samples", "60"]


@dataclass
class Watched:
    """A small run: its record, its trainer, the learning rate of each step, and for every look at the test reviews
    whether training was over, which reviews they were, and the model's logits of SENTENCE and of LONG."""

    folder: Path
    record: dict = None
    trainer: ReviewTrainer = None
    rates: list[float] = field(default_factory=list)
    looks: list[tuple] = field(default_factory=list)


def small_run(name: str, folder: Path, *flags: str, dtype=torch.float32) -> Watched:
    """A run on few reviews, that looks at everything a test may ask for. dtype: that the script computes in."""
    method, watched = import_method(name), Watched(folder / "seed_3" / "model")

    class WatchedTrainer(ReviewTrainer):
        def training_step(self, *args, **kwargs):
            watched.rates.append(self.optimizer.param_groups[0]["lr"])
            return super().training_step(*args, **kwargs)

        def predict(self, reviews, **kwargs):
            watched.trainer, finished = self, self.state.global_step == self.state.max_steps
            texts = DatasetDict(test=Dataset.from_dict({"text": [SENTENCE, LONG], "label": [0, 0]}))
            rows = tokenize(texts, self.processing_class, self.processing_class.model_max_length)["test"]["input_ids"]
            with torch.no_grad(), self.accelerator.autocast():
                logits = [self.model.eval()(input_ids=torch.tensor([row])).logits[0].tolist() for row in rows]
            watched.looks.append((finished, reviews["input_ids"][:], logits))
            return super().predict(reviews, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.trainer.ReviewTrainer", WatchedTrainer)
        patch.setattr(method, "compute_dtype", lambda: dtype)
        patch.setattr("transformers.TrainingArguments", partial(TrainingArguments, use_cpu=True))
        watched.record = method.main([*SMALL, *flags, "--output_dir", str(folder)])
    return watched


@pytest.fixture(scope="module")
def small_runs(tmp_path_factory):
    return {name: small_run(name, tmp_path_factory.mktemp(name)) for name in METHODS}


RELOAD = """
import os, sys, torch
from pathlib import Path
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
for folder in map(Path, sys.argv[2:]):
    os.chdir(folder.parents[1] / "generated")  # an adapter knows the name of its backbone, not its place
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


def test_trap_13_a_fresh_process_has_the_same_logits_and_label_names(small_runs):
    result = run("-c", RELOAD, SENTENCE, *(watched.folder for watched in small_runs.values()))
    assert result.returncode == 0, result.stderr
    for line, watched in zip(result.stdout.splitlines(), small_runs.values(), strict=True):
        negative, positive, *fresh = ast.literal_eval(line)
        assert (negative, positive) == ("negative", "positive")
        assert fresh == pytest.approx(watched.looks[0][2][0], abs=1e-4)  # the second look is the untrained model's


@pytest.mark.parametrize(("name", "architecture"), [("NEW_HEAD", "llama"), ("LAST_LAYER", "bert")])
def test_a_whole_model_frozen_in_bf16_loads_anywhere(name, architecture, backbones, tmp_path):
    watched = small_run(name, tmp_path, "--model", str(backbones[architecture]), dtype=torch.bfloat16)
    saved = load_file(watched.folder / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16, torch.float32}
    ids = AutoTokenizer.from_pretrained(watched.folder)(SENTENCE, return_tensors="pt")
    for options in ({}, {"dtype": torch.float32}):
        model = AutoModelForSequenceClassification.from_pretrained(watched.folder, **options).eval()
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        for key, weight in model.state_dict().items():
            assert torch.equal(weight, saved[key].float()), key
        with torch.no_grad():
            assert model(**ids).logits[0].tolist() == pytest.approx(watched.looks[0][2][0], rel=0.02, abs=0.02)


def test_what_the_readme_says_labels_what_was_trained(tmp_path, backbones, monkeypatch, capsys):
    """Its commands, and its snippet on what they merged. Here a decoder in bf16 that knows no padding token, named by
    a path that is relative to another folder; of two texts, one is longer than the model's positions."""
    backbone = AutoModel.from_pretrained(backbones["llama"], dtype=torch.bfloat16)
    backbone.config.pad_token_id, backbone.config.max_position_embeddings = None, 64
    for part in (backbone, AutoTokenizer.from_pretrained(backbones["llama"])):
        part.save_pretrained(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    watched = small_run("PEFT_LORA", tmp_path / "runs", "--model", "llama")
    monkeypatch.chdir(ROOT)
    readme, places = (ROOT / "README.md").read_text(), {"path/to/merged": str(tmp_path / "merged")}
    places |= {f"{name}/runs/imdb/seed_0/model": str(watched.folder) for name in METHODS}
    commands = [shlex.split(line)[3:] for line in readme.splitlines() if line.startswith("python -m common.predict ")]
    (label,) = (words for words in commands if SENTENCE in words)
    (merge,) = (words for words in commands if "--merge" in words)
    capsys.readouterr()
    predict.main([places.get(word, word) for word in [*label, LONG, "--json"]])
    labelled = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    predict.main([places.get(word, word) for word in merge])
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert SENTENCE in snippet and "path/to/merged" in snippet
    snippet = snippet.replace("path/to/merged", places["path/to/merged"])
    for text, logits, found in zip((SENTENCE, LONG), watched.looks[0][2], labelled, strict=True):
        shares = torch.tensor(logits).softmax(-1).tolist()
        assert list(found["probabilities"].values()) == pytest.approx(shares, abs=1e-5)
        capsys.readouterr()
        exec(snippet.replace(SENTENCE, text.replace("<br />", " ")), {})
        (answer,) = ast.literal_eval(capsys.readouterr().out)
        assert answer["label"] == found["label"] == ("negative", "positive")[shares[1] > shares[0]]
        assert answer["score"] == pytest.approx(max(shares), abs=1e-5)


def run_snippet(folder: Path, backbone: Path, text: str) -> tuple:
    """The model and the probabilities of `text` by label, from the snippet in the card of the model in `folder`, on
    another machine: all that it has is a copy of the folder, and in it the backbone by its name."""
    (snippet,) = re.findall(r"```python\n(.*?)```", ModelCard.load(folder / "README.md").text, re.DOTALL)
    shown = io.StringIO()
    with TemporaryDirectory() as elsewhere, contextlib.chdir(elsewhere), contextlib.redirect_stdout(shown):
        shutil.copytree(folder, ".", dirs_exist_ok=True)
        shutil.copytree(backbone, backbone.name)
        names = {}
        exec(snippet.replace('"A slow start, but what an ending."', repr(text)), names)
    ((*answers,),) = ast.literal_eval(shown.getvalue())
    return names["classify"].model, {answer["label"]: answer["score"] for answer in answers}


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_model_is_fit_to_share(name, demos, capsys):
    folder, text = demos[0] / name / "seed_0" / "model", LONG.replace("<br />", " ")
    record = json.loads((demos[0] / name / "results.json").read_text())
    assert not [file for file in folder.iterdir() if str(demos[0]).encode() in file.read_bytes()]
    card = ModelCard.load(folder / "README.md")
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {score: record["runs"][0]["test"][score] for score in ("accuracy", "f1")}
    assert card.data.license == "unknown" and card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == ("peft" if "PEFT" in name else "transformers")
    assert (card.data.base_model, card.data.datasets) == (None, None), "the Hub does not have them"
    for told in (name, "`tiny-bert`", "`negative`, `positive`", "longer than 64 tokens", record["note"]):
        assert told in card.text
    model, shares = run_snippet(folder, demos[0] / name / "generated" / "tiny-bert", text)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    capsys.readouterr()
    predict.main([str(folder), text, "--json"])
    precision = 0.02 if name == "PEFT_QLORA" else 1e-5  # some CPUs compute its 4-bit layers in bf16
    assert shares == pytest.approx(json.loads(capsys.readouterr().out)["probabilities"], abs=precision)


def test_an_adapter_for_three_classes_and_what_the_hub_has(demo, tmp_path, monkeypatch, capsys):
    """Seen by PEFT alone, an adapter has the backbone's number of labels: its card says how to load it."""
    method, tickets = import_method("PEFT_LORA"), tmp_path / "tickets.jsonl"
    rows = [json.loads(row)["text"] for row in (demo[1] / "train.jsonl").read_text().splitlines()[:1200:4]]
    labels = ["bug", "no: bug", "null"]
    tickets.write_text("".join(json.dumps({"text": row, "label": labels[len(row) % 3]}) + "\n" for row in rows))
    flags = ["--model", str(demo[0]), "--dataset", str(tickets), "--max_length", "32", "--epochs", "1"]
    record = method.main([*flags, "--seeds", "0", "1", "--output_dir", str(tmp_path / "runs")])
    folder = tmp_path / "runs" / "seed_1" / "model"
    card = ModelCard.load(folder / "README.md")
    assert "`bug`, `no: bug`, `null`" in card.text and "tickets.jsonl, " in card.text
    assert f"accuracy {spread(record['summary']['test_accuracy'])}, F1 " in card.text and " ± " in card.text
    model, shares = run_snippet(folder, demo[0], SENTENCE)
    assert (model.config.num_labels, model.config.id2label) == (3, dict(enumerate(labels)))
    monkeypatch.chdir(demo[0].parent)
    with pytest.raises(RuntimeError, match="size mismatch"):
        AutoPeftModelForSequenceClassification.from_pretrained(folder)

    known = method.Config(model="some/backbone", model_revision="v1", dataset="some/tickets", dataset_revision=None)
    write_card(folder, record, record["runs"][1], known)
    data, adapter = ModelCard.load(folder / "README.md").data, PeftConfig.from_pretrained(folder)
    assert (data.base_model, data.datasets) == ("some/backbone", "some/tickets")
    assert (adapter.base_model_name_or_path, adapter.revision) == ("some/backbone", "v1")
    monkeypatch.setattr("common.record.PUBLISHED", (record["model"]["weights_sha256"], record["dataset"]["sha256"]))
    write_card(folder, record, record["runs"][1], method.Config(model=str(demo[0]), dataset=str(tickets)))
    data, adapter = ModelCard.load(folder / "README.md").data, PeftConfig.from_pretrained(folder)
    assert (data.base_model, data.datasets) == (method.Config.model, method.Config.dataset), "whatever their place"
    assert (adapter.base_model_name_or_path, adapter.revision) == (method.Config.model, method.Config.model_revision)
    capsys.readouterr()
    predict.main([str(folder), SENTENCE, "--json"])  # here, the backbone is where it was
    assert shares == pytest.approx(json.loads(capsys.readouterr().out)["probabilities"], abs=1e-5)


def test_a_saved_tokenizer_truncates_as_in_training(small_runs):
    tokenizer = AutoTokenizer.from_pretrained(small_runs["LAST_LAYER"].folder)
    whole, cut = (tokenizer(LONG, truncation=truncation)["input_ids"] for truncation in (False, True))
    assert len(whole) > 128 and cut == [whole[0], *whole[-63:]]  # 128 positions, --max_length 64


def test_trap_10_test_reviews_wait_until_training_is_over(method, small_runs):
    """And each split is used for what it is for: by its content, not by its name."""
    watched = small_runs[method.FOLDER.name]
    reviews, _ = read_reviews(
        str(watched.folder.parents[1] / "generated" / "generated-reviews"), None, 600, 60, seed=3
    )
    splits = tokenize(reviews, watched.trainer.processing_class, 64)
    tokens = {split: rows["input_ids"][:] for split, rows in splits.items()}
    assert [look[:2] for look in watched.looks] == [(True, tokens[split]) for split in ("validation", "test", "test")]
    assert watched.trainer.train_dataset["input_ids"][:] == tokens["train"]
    assert watched.trainer.eval_dataset["validation"]["input_ids"][:] == tokens["validation"] != tokens["test"]
    sample = watched.trainer.eval_dataset["train"]
    assert sample.dataset is watched.trainer.train_dataset and len(sample) == len(tokens["validation"])


def test_the_learning_rate_rises_for_a_tenth_of_the_steps_and_falls_to_the_end(method, small_runs):
    rates, peak = (
        small_runs[method.FOLDER.name].rates,
        small_runs[method.FOLDER.name].record["config"]["learning_rate"],
    )
    steps, rising = len(rates), -(-len(rates) // 10)
    assert steps > 15
    expected = [peak * min(step / rising, (steps - step) / (steps - rising)) for step in range(steps)]
    assert rates == pytest.approx(expected)


def test_the_model_that_is_tested_and_kept_is_the_best_epochs(tmp_path, monkeypatch):
    best, accuracies, losses = 2, (0.99, 0.9, 0.9, 0.9), (0.1, 0.5, 0.4, 0.6)  # the loss decides
    measured = metrics.score

    def scores(prediction):
        epoch = min(scores.calls // 2, 3)  # training reviews, then validation; after the last, test
        scores.calls += 1
        return measured(prediction) | {"accuracy": accuracies[epoch], "loss": losses[epoch]}

    scores.calls = 0
    monkeypatch.setattr(metrics, "score", scores)
    monkeypatch.setattr(import_method("PEFT_LORA"), "ENOUGH_TO_CHOOSE", 60)
    watched = small_run("PEFT_LORA", tmp_path, "--epochs", "3")
    run = watched.record["runs"][0]
    assert [epoch["validation_accuracy"] for epoch in run["epochs"]] == list(accuracies)
    assert run["best_epoch"] == best
    steps = len(watched.rates) // 3
    chosen, last, kept = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (
            tmp_path / f"seed_3/checkpoint-{best * steps}",
            tmp_path / f"seed_3/checkpoint-{3 * steps}",
            watched.folder,
        )
    )
    assert all(torch.equal(weight, chosen[name]) for name, weight in kept.items())
    assert not all(torch.equal(weight, last[name]) for name, weight in kept.items())
    # The kept model is the tested one: test_trap_13 compares the logits of the two.


def test_a_finished_run_is_not_repeated_by_resume(demos, monkeypatch):
    method, folder = import_method("PEFT_LORA"), demos[0] / "PEFT_LORA"  # the others are alike
    before = json.loads((folder / "results.json").read_text())
    monkeypatch.setattr(method, "build_model", None)
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder)
    flags = ["--demo", "--epochs", "2", "--resume", "--output-dir"]
    for same in (f"../{folder.name}/", f"~/{folder.name}"):
        assert method.main([*flags, same])["runs"] == before["runs"]
    model = folder / "seed_0" / "model"
    with TemporaryDirectory(dir=folder) as elsewhere:  # removed to save space
        kept = model.rename(Path(elsewhere) / "model")
        assert method.main([*flags, str(folder)])["runs"] == before["runs"] and not model.exists()
        kept.rename(model)
    with pytest.raises(UserError, match="--resume: the interrupted run had --epochs 2, not 3"):
        method.main([*flags, str(folder), "--epochs", "3"])
    monkeypatch.setattr(method, "load_reviews", lambda *source: (load_reviews(*source)[0], "0" * 64))
    with pytest.raises(
        UserError, match=r"--resume: the interrupted run had --dataset .* with SHA-256 .*, not .* 0000"
    ):
        method.main([*flags, str(folder)])


def test_another_methods_folder_is_neither_resumed_nor_overwritten(demos):
    folder = demos[0] / "NEW_HEAD"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("seed_0/**/*")}
    for flags in ([], ["--resume"]):
        with pytest.raises(UserError, match=f"--output_dir {folder}: seed_0 was not left by LAST_LAYER"):
            import_method("LAST_LAYER").main(["--demo", "--epochs", "2", "--output_dir", str(folder), *flags])
    assert before and {path: path.stat().st_mtime_ns for path in folder.glob("seed_0/**/*")} == before


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


def test_trap_12_an_interrupted_run_of_the_same_seed_goes_on_to_the_same_result(
    method, small_runs, tmp_path, monkeypatch
):
    class Interrupted(ReviewTrainer):
        def _maybe_log_save_evaluate(self, *args, **kwargs):
            super()._maybe_log_save_evaluate(*args, **kwargs)
            if any(Path(self.args.output_dir).glob("checkpoint-*")):
                raise KeyboardInterrupt

    monkeypatch.setattr("common.trainer.ReviewTrainer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        method.main([*SMALL, "--output_dir", str(tmp_path)])
    monkeypatch.setattr("common.trainer.ReviewTrainer", ReviewTrainer)
    unfinished = tmp_path / f"unfinished_{method.FOLDER.name}_seed_3"
    (unfinished / "checkpoint-99999").mkdir()  # as if killed while it was written
    (whole,) = small_runs[method.FOLDER.name].record["runs"]
    (resumed,) = method.main([*SMALL, "--output_dir", str(tmp_path), "--resume"])["runs"]
    for key in ("best_epoch", "untrained_test", "test"):
        assert whole[key] == resumed[key]
    for epoch, again in zip(whole["epochs"], resumed["epochs"], strict=True):
        assert {**epoch, "seconds": 0} == {**again, "seconds": 0}
        assert (epoch["seconds"] > 0) == (again["seconds"] > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_trainer_is_told_what_the_flags_and_the_gpu_say(dtype, tmp_path, monkeypatch):
    method = import_method("PEFT_LORA")  # the others are alike

    class Told(Exception):
        pass

    def told(**arguments):
        raise Told(arguments)

    monkeypatch.setattr(method, "compute_dtype", lambda: dtype)
    monkeypatch.setattr("transformers.TrainingArguments", told)
    flags = "--demo --learning_rate 0.125 --epochs 7 --batch_size 64 --gradient_accumulation_steps 4 --seeds 5"
    with pytest.raises(Told) as caught:
        method.main([*flags.split(), "--output_dir", str(tmp_path)])
    (arguments,) = caught.value.args
    assert (arguments["learning_rate"], arguments["num_train_epochs"], arguments["seed"]) == (0.125, 7, 5)
    assert arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] == 64
    assert (arguments["bf16"], arguments["fp16"]) == (dtype == torch.bfloat16, dtype == torch.float16)


def test_a_partial_run_leaves_published_charts_alone(tmp_path, demo, monkeypatch):
    method = import_method("PEFT_LORA")  # the others are alike
    monkeypatch.setattr(method, "FOLDER", tmp_path / "METHOD")
    for split in ("train", "test"):
        rows = (demo[1] / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{split}.jsonl").write_text("".join(rows[:: len(rows) // 250]))
    flags = ["--model", str(demo[0]), "--dataset", str(tmp_path), "--max_length", "32", "--epochs", "1"]
    flags += ["--batch_size", "64", "--seeds", "0"]
    runs = method.main([*flags, "1", "--max_train_samples", "200"])["runs"]
    assert runs[0]["epochs"][0]["validation_loss"] != runs[1]["epochs"][0]["validation_loss"], "another head"
    assert not (tmp_path / "METHOD" / "results.json").exists()
    assert (tmp_path / "METHOD" / "runs" / f"{tmp_path.name}_partial" / "results.json").exists()
    method.main([*flags, "--output_dir", str(tmp_path / "elsewhere")])
    assert not (tmp_path / "METHOD" / "results.json").exists()
    record = method.main(flags)
    assert (tmp_path / "METHOD" / "runs" / tmp_path.name / "results.json").exists()
    assert not (tmp_path / "METHOD" / "results.json").exists(), "other data, another backbone"
    sums = record["model"]["weights_sha256"], record["dataset"]["sha256"]
    monkeypatch.setattr("common.record.PUBLISHED", sums)
    method.main(flags)
    assert {path.name for path in (tmp_path / "METHOD").iterdir()} == {
        *("results.json", "bar_chart.png", "line_chart.png", "runs"),
    }
