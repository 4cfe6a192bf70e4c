"""The saved models of all four methods label texts as training did, from every source, and merge into plain ones."""

import csv
import io
import json
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import METHODS, SIZES, import_method, read_reviews, write_random_backbone
from pyarrow import parquet
from transformers import AutoTokenizer, BertConfig, pipeline

from common import predict
from common.cli import UserError
from common.data import tokenize
from common.trainer import longest_first

TEXTS = ["The plot is dull, but the acting saves it.", "What a funny film!<br /><br />"]
FLAGS = "--demo --epochs 1 --max_train_samples 200 --max_test_samples 60".split()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a saved model of each method, and what is beside it."""
    folder = tmp_path_factory.mktemp("models")
    for name in METHODS:
        import_method(name).main([*FLAGS, "--output_dir", str(folder / name)])
    return {name: folder / name / "seed_0" / "model" for name in METHODS}


@pytest.fixture
def label(capsys):
    """What `python -m common.predict` prints for these words; with --json, as objects."""

    def label(*words):
        capsys.readouterr()
        predict.main(list(map(str, words)))
        shown = capsys.readouterr().out.splitlines()
        return [json.loads(line) for line in shown] if "--json" in words else shown

    return label


def shares(found: list[dict]) -> np.ndarray:
    return np.array([list(one["probabilities"].values()) for one in found])


@pytest.mark.parametrize("name", METHODS)
def test_the_answers_are_those_of_training(name, models, label, monkeypatch, tmp_path):
    """To rounding, whatever the size of the parts; some of the texts are truncated, at the start."""
    generated = models[name].parents[1] / "generated" / "generated-reviews"
    reviews, _ = read_reviews(str(generated), None, 200, 60)
    tokenizer = AutoTokenizer.from_pretrained(models[name])
    lengths = np.array(list(map(len, tokenize(reviews, tokenizer, 64)["test"]["input_ids"])))
    order = [row for batch in longest_first(lengths, 64) for row in batch]
    with np.load(models[name].parent / "logits.npz") as left:
        logits = torch.tensor(left["test_logits"])
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in reviews["test"]["text"])
    )
    monkeypatch.setattr(predict, "CHUNK", 25)
    found = label(models[name], "--json", "--file", tmp_path / "texts.jsonl")
    assert [one["text"] for one in found] == reviews["test"]["text"][:]
    assert shares(found)[order] == pytest.approx(logits.softmax(-1).numpy(), abs=1e-5)
    assert [one["label"] for one in found] == [
        max(one["probabilities"], key=one["probabilities"].get) for one in found
    ]
    assert set(found[0]["probabilities"]) == {"negative", "positive"} == {one["label"] for one in found}
    long = "The script is good. " * 40 + TEXTS[0]
    cut = tokenizer.decode(tokenizer(long)["input_ids"][-63:-1])  # what is left beside [CLS] and [SEP]
    whole, end = shares(label(models[name], "--json", long, cut))
    assert whole == pytest.approx(end, abs=1e-5)


def test_texts_from_the_command_line_and_from_standard_input(models, label, monkeypatch):
    folder = models["LAST_LAYER"]
    found = label(folder, *TEXTS, "--json")
    assert label(folder, "--json", *TEXTS) == found
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(TEXTS)))
    assert label(folder, "--json") == found
    for line, one in zip(label(folder, *TEXTS), found, strict=True):
        negative, positive = (f"{name} {one['probabilities'][name]:.1%}" for name in ("negative", "positive"))
        assert line == f"{one['label']}  {negative}, {positive}  {one['text']}"


ROWS = [
    {"id": "007", "label": "NA", "text": TEXTS[0]},
    {"id": "", "label": "wrong, or not", "text": 'A "quoted"\ntext\twith é'},
    {"id": "1.50", "label": "null", "text": TEXTS[1]},
]


def write(path, rows):
    predict.write_rows([rows], list(rows[0]), path, None)
    return path


@pytest.mark.parametrize("source", predict.SUFFIXES)
@pytest.mark.parametrize("target", predict.SUFFIXES)
def test_files_keep_their_rows_and_gain_columns(source, target, models, label, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "CHUNK", 2)
    file, output = write(tmp_path / f"in{source}", ROWS), tmp_path / f"out{target.upper()}"
    assert label(models["LAST_LAYER"], "--file", file, "--output", output) == []
    expected = label(models["LAST_LAYER"], "--json", *(row["text"] for row in ROWS))
    if target == ".parquet":
        rows = parquet.read_table(output).to_pylist()
    elif target == ".jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        rows = list(csv.DictReader(output.open(newline=""), delimiter="\t" if target == ".tsv" else ","))
    assert [{name: row[name] for name in ROWS[0]} for row in rows] == ROWS
    assert list(rows[0]) == [*ROWS[0], "predicted_label", "probability_negative", "probability_positive"]
    assert [row["predicted_label"] for row in rows] == [one["label"] for one in expected]
    for name in ("negative", "positive"):
        found = [float(row[f"probability_{name}"]) for row in rows]
        assert found == pytest.approx([one["probabilities"][name] for one in expected], abs=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([file.name, output.name])


def test_another_column_and_values_of_other_types(models, label, tmp_path):
    schema = pa.schema([("stars", pa.int8()), ("review", pa.large_string()), ("note", pa.string())])
    rows = [{"stars": stars, "review": TEXTS[0], "note": None} for stars in (1, None)]
    parquet.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "in.parquet")
    flags = ["--file", tmp_path / "in.parquet", "--text-column", "review", "--output"]
    label(models["LAST_LAYER"], *flags, tmp_path / "out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert list(table.schema)[:3] == list(schema) and table.select(schema.names).to_pylist() == rows
    assert table.schema.names[3:] == ["label", "probability_negative", "probability_positive"]
    label(models["LAST_LAYER"], *flags, tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[1])["stars"] is None


@pytest.mark.parametrize("separator", [";", "\t"])
def test_the_separator_of_a_csv_file_is_found_and_kept(separator, models, label, tmp_path):
    file, output = tmp_path / "in.csv", tmp_path / "out.csv"
    file.write_text(f"\ufeffnr{separator}text\n1{separator}A slow start, but what an ending.\n", encoding="utf-8")
    label(models["LAST_LAYER"], "--file", file, "--output", output)
    header, row = output.read_text().splitlines()
    assert header.split(separator)[:3] == ["nr", "text", "label"]
    assert row.split(separator)[:2] == ["1", "A slow start, but what an ending."]
    assert all(len(share) <= len("0.123456") for share in row.split(separator)[3:])


def test_a_failure_leaves_the_old_file(models, tmp_path, monkeypatch):
    file, output = write(tmp_path / "in.csv", ROWS), tmp_path / "out.csv"
    output.write_text("old")
    measured, calls = predict.probabilities, []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise RuntimeError
        return measured(*arguments)

    monkeypatch.setattr(predict, "CHUNK", 2)
    monkeypatch.setattr(predict, "probabilities", fails)
    with pytest.raises(RuntimeError):
        predict.main([str(models["LAST_LAYER"]), "--file", str(file), "--output", str(output)])
    assert output.read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_mistakes_are_told_before_a_model_is_loaded(models, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "load", None)
    file, full = write(tmp_path / "in.csv", ROWS), models["LAST_LAYER"]
    (tmp_path / "more.csv").write_text("text,id\nfine,1\nfine,2,3\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "number.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "none.tsv").write_text("text\n")
    (tmp_path / "broken.parquet").write_text("PAR1")
    empty = write(tmp_path / "empty.csv", [*ROWS, ROWS[0] | {"text": " <br />"}])
    labelled = write(tmp_path / "labelled.csv", [{"text": "fine", "probability_positive": "1"}])
    for words, message in (
        ([tmp_path, "fine"], r"has no trained model; .* python LAST_LAYER/train.py or .* python PEFT_QLORA/train.py$"),
        (["NEW_HEAD/runs/seed_9/model", "fine"], "NEW_HEAD/runs/seed_9/model: .*: python NEW_HEAD/train.py$"),
        ([full, "--file", tmp_path / "gone.csv"], "--file .*gone.csv: no such file"),
        ([full, "--file", tmp_path / "texts.txt"], "--file .*texts.txt: must be one of .csv, .tsv, .jsonl, .parquet"),
        ([full, "--file", file, "--text_column", "review"], "no column review; it has: id, label, text$"),
        ([full, "--file", file, "fine"], "--file .*in.csv: goes without texts"),
        ([full, "--file", empty], "--file .*empty.csv: row 4 has no text"),
        ([full, "--file", tmp_path / "number.jsonl"], "row 1 has no text"),
        ([full, "--file", tmp_path / "more.csv"], "row 2 has more fields than the header"),
        ([full, "--file", tmp_path / "list.jsonl"], "row 1 "),
        ([full, "--file", tmp_path / "none.tsv"], "none.tsv: has no rows"),
        ([full, "--file", tmp_path / "broken.jsonl"], "broken.jsonl: cannot be read"),
        ([full, "--file", tmp_path / "broken.parquet"], "broken.parquet: cannot be read"),
        (
            [full, "--file", labelled, "--output", tmp_path / "o.csv"],
            "labelled.csv: already has .* probability_positive",
        ),
        ([full, "fine", "--output", tmp_path / "no" / "o.csv"], "--output .*: no such folder"),
        ([full, "fine", "--output", tmp_path / "o.xlsx"], "--output .*o.xlsx: must be one of"),
        ([full, "fine", " "], "the command line: row 2 has no text"),
        ([full, "fine", "--batch_size", "0"], "--batch_size 0: must be 1 or more"),
        ([full, "--merge", tmp_path / "new"], f"--merge: {full} already is a plain checkpoint"),
        ([models["PEFT_LORA"], "--merge", tmp_path], f"--merge {tmp_path}: is there already"),
        ([models["PEFT_LORA"], "--merge", file], f"--merge {file}: is there already"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            predict.main(list(map(str, words)))
        assert "\n" not in str(caught.value)


def test_an_empty_line_of_standard_input_is_named(models, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("fine\n\n"))
    with pytest.raises(UserError, match="standard input: row 2 has no text"):
        predict.main([str(models["LAST_LAYER"])])


def test_a_backbone_has_no_trained_head(demo):
    with pytest.raises(UserError, match="has no trained head; classifier"):
        predict.main([str(demo[0]), "fine"])


@pytest.mark.parametrize("name", ["PEFT_LORA", "PEFT_QLORA"])
def test_a_backbone_that_moved_is_asked_for(name, models, label, demo, backbones, tmp_path):
    folder, sizes = models[name], SIZES | {"hidden_size": 32}
    narrow = write_random_backbone(tmp_path / "narrow", demo[0], BertConfig(vocab_size=58, **sizes))
    before = label(folder, *TEXTS)
    generated = folder.parents[1] / "generated"
    generated.rename(generated.with_name("moved"))
    try:
        for flags in ([], *(["--backbone", str(other)] for other in (narrow, backbones["distilbert"]))):
            with pytest.raises(UserError, match=r"its backbone .* does not fit .* --backbone") as caught:
                predict.main([str(folder), "fine", *flags])
            assert "\n" not in str(caught.value) and (flags or [str(generated / "tiny-bert")])[-1] in str(caught.value)
        assert label(folder, *TEXTS, "--backbone", demo[0]) == before
    finally:
        generated.with_name("moved").rename(generated)


@pytest.mark.parametrize("name", METHODS)
def test_transformers_pipeline_takes_a_whole_checkpoint_and_a_merged_one(name, models, label, tmp_path):
    folder, shown = models[name], []
    if "PEFT" in name:
        (tmp_path / "merged").mkdir()  # an empty one is taken
        shown, folder = label(folder, "--merge", tmp_path / "merged"), tmp_path / "merged"
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == "float32" and "quantization_config" not in config
        assert (folder / "model.safetensors").stat().st_size > 4 * 64 * 64 * 2
        assert not (folder / "adapter_config.json").exists()
    found = label(folder, "--json", *TEXTS, "The script is good. " * 40 + TEXTS[0])
    answers = pipeline("text-classification", model=str(folder))(
        [one["text"].replace("<br />", " ") for one in found], truncation=True
    )
    assert [answer["label"] for answer in answers] == [one["label"] for one in found]
    assert [answer["score"] for answer in answers] == pytest.approx(shares(found).max(1), abs=1e-5)
    if shown:
        apart = shares(
            label(models[name], "--json", "--file", models[name].parents[1] / "generated/generated-reviews/test.jsonl")
        )
        whole = shares(
            label(folder, "--json", "--file", models[name].parents[1] / "generated/generated-reviews/test.jsonl")
        )
        changed, most = (apart.argmax(1) != whole.argmax(1)).sum(), np.abs(apart - whole).max()
        assert shown[-1] == f"Check:   {changed} of 500 labels changed, largest change of a probability {most:.4f}"
        assert (most > 1e-3) == (name == "PEFT_QLORA"), "which was trained on rounded weights"
        assert most < 0.5
