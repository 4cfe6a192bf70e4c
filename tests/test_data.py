"""Reviews come out the same whatever they came in as; what cannot be used is refused in one clear line."""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tarfile
import types
import zlib
from pathlib import Path

import datasets
import hypothesis
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from conftest import read_reviews
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import strategies as st

from common import data
from common.cli import UserError
from common.data import held_out, stratified_rows, tokenize, training_sample
from common.model import load_tokenizer

FILES = ("parquet", "csv", "tsv", "jsonl")
FORMATS = (*FILES, "aclImdb", "aclImdb_v1.tar.gz")
SPLITS = ("train", "validation", "test")


def make_rows(split: str, count: int, labels=(0, 1)) -> list[dict]:
    """Different texts, sorted by label, with whatever is a delimiter, a quote or a line's end in some format."""
    tricky = 'a "film",\twith 日本 and 1/2 a plot;<br /><br />a\nline, a\r\nline'
    texts = [f"{split} {number}: {tricky if number % 3 else 'plain'}" for number in range(count)]
    return [{"text": text, "label": labels[place * len(labels) // count]} for place, text in enumerate(texts)]


TRAIN, TEST = make_rows("train", 100), make_rows("test", 20)


def films(count: int) -> list[dict]:
    return [{"text": f"film {number}", "label": number % 2} for number in range(count)]


def write_file(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


def write_reviews(folder: Path, kind: str = "jsonl", train=TRAIN, test=TEST) -> str:
    """Write the reviews as one of FORMATS into a new folder and return what --dataset takes."""
    folder.mkdir()
    if kind in FILES:
        write_file(folder / f"train.{kind}", train)
        write_file(folder / f"test.{kind}", test)
        return str(folder)
    source = folder / "aclImdb"
    for split, rows in (("train", train), ("test", test)):
        for place, row in enumerate(rows):
            file = source / split / ("neg", "pos")[row["label"]] / f"{place}_7.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(row["text"].encode())
    for other in ("README", "train/unsup/0_0.txt", "train/urls_pos.txt", "train/pos/deeper/0_7.txt"):
        (source / other).parent.mkdir(exist_ok=True, parents=True)
        (source / other).write_text("not a labelled review")
    if kind == "aclImdb":
        return str(source)
    with tarfile.open(folder / kind, "w:gz") as archive:
        archive.add(source, "aclImdb")
    shutil.rmtree(source)
    return str(folder / kind)


def pairs(*splits: Dataset) -> list[tuple[str, int]]:
    return sorted((row["text"], row["label"]) for split in splits for row in split)


def texts(*splits: Dataset) -> set[str]:
    return {text for split in splits for text in split["text"][:]}


def refuse(source, pattern: str = "^--", **options) -> str:
    """Check that load_reviews refuses `source` in one line that names it, and return the line."""
    with pytest.raises(UserError, match=pattern) as error:
        read_reviews(str(source), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer(demo):
    return load_tokenizer(str(demo[0]), None, 128)


# The same reviews from everywhere


@pytest.mark.parametrize("rows", [TRAIN, TRAIN[::-1]], ids=["sorted", "reversed"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_and_order_gives_the_same(tmp_path, kind, rows):
    expected, expected_fingerprint = read_reviews(write_reviews(tmp_path / "plain"))
    reviews, fingerprint = read_reviews(write_reviews(tmp_path / "reviews", kind, rows, TEST[::-1]))
    assert fingerprint == expected_fingerprint
    assert list(reviews) == list(SPLITS)
    for split in SPLITS:
        assert reviews[split].column_names == ["text", "label"]
        assert reviews[split].features["label"].names in (["0", "1"], ["negative", "positive"])
        assert pairs(reviews[split]) == pairs(expected[split])
    assert pairs(reviews["train"], reviews["validation"]) == pairs(TRAIN)
    assert pairs(reviews["test"]) == pairs(TEST)


def test_archive_is_read_in_place(tmp_path):
    source = write_reviews(tmp_path / "reviews", "aclImdb_v1.tar.gz")
    read_reviews(source)
    assert list((tmp_path / "reviews").iterdir()) == [Path(source)]
    assert not list(tmp_path.rglob("*.txt"))


def test_fingerprint_is_of_all_the_reviews_and_nothing_else(tmp_path):
    source = write_reviews(tmp_path / "reviews")
    _, fingerprint = read_reviews(source)
    assert len(fingerprint) == 64
    assert read_reviews(source, train=50, test=10)[1] == fingerprint
    changes = {
        "text": ([{**TRAIN[0], "text": "another"}, *TRAIN[1:]], TEST),
        "label": ([{**TRAIN[0], "label": 1}, *TRAIN[1:]], TEST),
        "row": (TRAIN[1:], TEST),
        "copy": ([*TRAIN, TRAIN[0]], TEST),
        "split": (TRAIN[1:], [TRAIN[0], *TEST]),
    }
    for name, (train, test) in changes.items():
        assert read_reviews(write_reviews(tmp_path / name, train=train, test=test))[1] != fingerprint, name


@pytest.mark.parametrize("kind", FORMATS)
def test_changed_reviews_are_read_anew(tmp_path, kind):
    source = Path(write_reviews(tmp_path / "reviews", kind))
    _, before = read_reviews(str(source))
    times = {path: path.stat().st_mtime_ns for path in [source, *source.rglob("*")]}
    shutil.rmtree(tmp_path / "reviews")
    write_reviews(tmp_path / "reviews", kind, [{**TRAIN[0], "text": "new"}, *TRAIN[1:]])
    for path, time in times.items():  # as if only this review's file had changed, and a second later
        changed = path.name in ("0_7.txt", "train.parquet", "train.csv", "train.tsv", "train.jsonl", source.name)
        os.utime(path, ns=(time, time + 1_000_000_000 * (changed and path.is_file())))
    assert read_reviews(str(source))[1] != before


@pytest.mark.parametrize("kind", FILES)
def test_short_texts_stay_as_they_are(tmp_path, kind):
    rows = [*TRAIN, *({"text": text, "label": 1} for text in ("NA", "n/a", "null", "None", "nan", "-1", "007", "1e5"))]
    reviews, _ = read_reviews(write_reviews(tmp_path / "reviews", kind, rows))
    assert pairs(reviews["train"], reviews["validation"]) == pairs(rows)


# Labels


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((0, 1), ["0", "1"]),
        (("neg", "pos"), ["negative", "positive"]),
        (("positive", "negative"), ["negative", "positive"]),
        (("good", "bad"), ["bad", "good"]),
        (("NA", "None"), ["NA", "None"]),
        ((1, 2, 3, 4, 5), ["1", "2", "3", "4", "5"]),
        ((9, 10, 8), ["8", "9", "10"]),
        ((0.0, 1.0), ["0", "1"]),
        (("world", "sport", "business"), ["business", "sport", "world"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_labels_of_any_kind(tmp_path, kind, labels, names):
    train, test = make_rows("train", 100, labels), make_rows("test", 20, labels)
    reviews, _ = read_reviews(write_reviews(tmp_path / "reviews", kind, train, test))
    assert all(reviews[split].features["label"].names == names for split in SPLITS)
    numbers = {label: number for number, label in enumerate(sorted(labels))}
    expected = [{**row, "label": numbers[row["label"]]} for row in train]
    assert pairs(reviews["train"], reviews["validation"]) == pairs(expected)
    assert sorted(set(reviews["test"]["label"][:])) == list(range(len(labels)))


def write_class_labels(folder: Path, names: list[str], test_names: list[str], train=TRAIN) -> str:
    folder.mkdir()
    for split, rows, labels in (("train", train, names), ("test", TEST, test_names)):
        features = Features(text=Value("string"), label=ClassLabel(names=labels))
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["thumbs up", "thumbs down"], ["thumbs up", "thumbs down"]), (["neg", "pos"], ["negative", "positive"])],
)
def test_class_names_are_kept(tmp_path, names, expected):
    reviews, _ = read_reviews(write_class_labels(tmp_path / "reviews", names, names))
    assert all(reviews[split].features["label"].names == expected for split in SPLITS)
    assert pairs(reviews["train"], reviews["validation"]) == pairs(TRAIN)


def test_class_names_in_another_order_are_not_mixed_up(tmp_path):
    source = write_class_labels(tmp_path / "reviews", ["bad", "good"], ["good", "bad"])
    refuse(source, "row 0 of the test split, .* numbers its classes in another order")


@pytest.mark.parametrize("missing", [-1, None])
def test_class_number_of_a_missing_label(tmp_path, missing):
    unlabelled = [*TRAIN, {"text": "what is this?", "label": missing}]
    source = write_class_labels(tmp_path / "reviews", ["bad", "good"], ["bad", "good"], unlabelled)
    assert source in refuse(source, f"row 100 of the train split, counted from 0, label {missing}, has no label")


# Validation


def digests(*texts: str) -> list[bytes]:
    return [hashlib.sha256(text.encode()).digest() for text in texts]


def test_validation_is_a_tenth_by_the_text_alone(tmp_path):
    rows = films(6000)
    validation = texts(read_reviews(write_reviews(tmp_path / "reviews", train=rows))[0]["validation"])
    assert 500 <= len(validation) <= 700
    others = [{**row, "label": 1 - row["label"]} for row in rows[2000:][::-1]]
    again = texts(read_reviews(write_reviews(tmp_path / "others", "csv", others, rows))[0]["validation"])
    assert again == {row["text"] for row in others} & validation


def test_validation_stays_the_same_in_every_version():
    names = [f"film {number}" for number in range(1000)]
    held = np.flatnonzero(held_out(digests(*names), [0] * 1000))
    assert held[:5].tolist() == [12, 18, 33, 35, 45]
    assert np.flatnonzero(held_out(digests(*names[:20]), [0] * 20)).tolist() == [2, 15]


@pytest.mark.parametrize("sizes", [(30, 70), (4, 996), (14, 1500, 5), (1, 40)])
def test_every_small_class_gives_validation_a_tenth(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    held = held_out(digests(*map(str, range(len(labels)))), labels)
    for label, size in enumerate(sizes):
        share = held[labels == label].sum()
        assert share == (max(1, round(size / 10)) if size > 1 else 0) if size < 1000 else 100 < share < 200


def test_copies_of_a_review_are_never_on_both_sides(tmp_path):
    rows = films(100) * 3 + [{**row, "label": 1 - row["label"]} for row in films(50)]
    reviews, _ = read_reviews(write_reviews(tmp_path / "reviews", train=rows))
    assert not texts(reviews["train"]) & texts(reviews["validation"])
    assert pairs(reviews["train"], reviews["validation"]) == pairs(rows)


@pytest.mark.parametrize("kind", [*FILES, "folder"])
def test_one_file_is_split_by_the_text(tmp_path, capsys, kind):
    rows = films(2000) + films(30)
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / ("train.csv" if kind == "folder" else f"film reviews.{kind}")
    write_file(file, rows)
    source = str(file.parent if kind == "folder" else file)
    reviews, fingerprint = read_reviews(source)
    assert [150 < len(reviews[split]) < 250 for split in ("validation", "test")] == [True, True]
    assert pairs(*reviews.values()) == pairs(rows)
    assert sum(len(texts(reviews[split])) for split in SPLITS) == 2000, "no text is in two splits"
    assert ", split by the hash of the text; " in capsys.readouterr().out
    write_file(file, rows[::-1])
    again = read_reviews(source)
    assert again[1] == fingerprint and all(pairs(again[0][split]) == pairs(reviews[split]) for split in SPLITS)


def test_small_classes_of_one_file_are_in_every_split(tmp_path):
    rows = [{"text": f"ticket {n}", "label": ("bill", "bug", "question")[min(n % 10, 2)]} for n in range(400)]
    write_file(tmp_path / "tickets.csv", rows)
    reviews, _ = read_reviews(str(tmp_path / "tickets.csv"))
    counts = [np.bincount(reviews[split]["label"][:]).tolist() for split in SPLITS]
    assert counts == [[32, 32, 256], [4, 4, 32], [4, 4, 32]]


def test_a_validation_file_is_used_as_it_is(tmp_path, capsys):
    source = write_reviews(tmp_path / "reviews", "csv")
    held = make_rows("validation", 60)
    write_file(tmp_path / "reviews" / "validation.csv", held)
    reviews, _ = read_reviews(source, train=50)
    assert pairs(reviews["validation"]) == pairs(held) and len(reviews["train"]) == 50
    assert "Data:     50 training, 60 validation and 20 test texts; 0 copies" in capsys.readouterr().out
    write_file(tmp_path / "reviews" / "validation.csv", [{"text": "x", "label": 7}])
    refuse(source, "row 0 of the validation split, .* label 7, is of no class in train")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_and_other_names_of_the_columns(tmp_path, separator):
    rows = [{"the review": row["text"], "sentiment": "np"[row["label"]]} for row in TRAIN]
    file = tmp_path / "IMDB Dataset.csv"
    with file.open("w", newline="", encoding="utf-8-sig") as lines:
        writer = csv.DictWriter(lines, rows[0], delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    line = refuse(file, "one column `text`")
    assert line.endswith("it has: the review, sentiment; try --text_column 'the review' --label_column sentiment")
    reviews, _ = read_reviews(str(file), text_column="the review", label_column="sentiment")
    assert pairs(*reviews.values()) == pairs(TRAIN) and reviews["test"].features["label"].names == ["n", "p"]


def test_the_separator_is_the_headers_where_lines_end_in_a_carriage_return_alone(tmp_path):
    file, rows = tmp_path / "mac.csv", "".join(f"not one, two, three but {n};{n % 2}\r" for n in range(100))
    file.write_text(f"text;label\r{rows}", newline="")
    reviews, _ = read_reviews(str(file))
    assert sum(map(len, reviews.values())) == 100


def test_no_columns_are_proposed_where_several_could_be_meant(tmp_path):
    rows = [{"title": f"a {n}", "body": f"b {n}", "kind": n % 2} for n in range(100)]
    write_file(tmp_path / "mail.csv", rows)
    assert refuse(tmp_path / "mail.csv").endswith("it has: title, body, kind")


def warnings_of(capsys, folder: Path, **rows) -> list[str]:
    """Of reading these rows, without those of few texts."""
    read_reviews(write_reviews(folder, **{"test": make_rows("test", 60)} | rows))
    lines = capsys.readouterr().out.splitlines()
    return [
        line.removeprefix("Warning:  ") for line in lines if line.startswith("Warning") and "tell little" not in line
    ]


def test_a_text_has_two_labels(tmp_path, capsys):
    rows = [*TRAIN, TRAIN[0], {**TRAIN[1], "label": 1}, {**TRAIN[2], "label": 1}]
    said = "row 101 of the train split, counted from 0, label 1, repeats a text that has another label"
    assert warnings_of(capsys, tmp_path / "reviews", train=rows) == [f"{said}; the first of 2 such rows"]


def test_a_class_with_one_training_text_is_warned_of(tmp_path, capsys):
    said = "row 100 of the train split, counted from 0, label 7, is the only training text of its class"
    rows = [*TRAIN, {"text": "alone", "label": 7}]
    assert warnings_of(capsys, tmp_path / "reviews", train=rows) == [f"{said}; the first of 1 such rows"]


def test_texts_are_in_both_train_and_test(tmp_path, capsys):
    """From one percent of the test texts on."""
    test = make_rows("test", 198)
    said = "row 198 of the test split, counted from 0, label 0, repeats a text of train: scores will flatter"
    assert warnings_of(capsys, tmp_path / "one", test=[*test, TRAIN[0]]) == []
    assert warnings_of(capsys, tmp_path / "three", test=[*test, *TRAIN[:3]]) == [f"{said}; the first of 3 such rows"]


def test_a_test_set_of_one_text_is_warned_of(tmp_path, capsys):
    read_reviews(write_reviews(tmp_path / "reviews", train=films(600)), test=1)
    assert "Warning:  1 test texts, of 1 of the 2 classes, tell little" in capsys.readouterr().out


def test_few_validation_texts_are_warned_of(tmp_path, capsys):
    read_reviews(write_reviews(tmp_path / "reviews"))
    assert "Warning:  10 validation texts, of 2 of the 2 classes, tell little" in capsys.readouterr().out
    read_reviews(write_reviews(tmp_path / "many", train=films(600), test=make_rows("test", 60)))
    assert "Warning" not in capsys.readouterr().out


def test_copies_and_texts_on_both_sides_are_counted(tmp_path, capsys):
    read_reviews(write_reviews(tmp_path / "reviews", train=[*TRAIN, *TRAIN[:3], *TEST[:2]]))
    assert "; 3 copies in train, 2 texts in train and test" in capsys.readouterr().out


def test_the_default_data_set_has_its_own_names(tmp_path, monkeypatch):
    source = write_reviews(tmp_path / "reviews")
    monkeypatch.setattr(data, "IMDB_SHA256", read_reviews(source)[1])
    assert read_reviews(source)[0]["test"].features["label"].names == ["negative", "positive"]


# Subsets


@pytest.mark.parametrize("labels", [[0] * 60 + [1] * 30 + [2] * 10, [2, 0, 0, 1, 0, 0, 1, 0, 0, 1] * 10])
@pytest.mark.parametrize("size", [3, 10, 37, 50, 99])
def test_subset_has_every_class_in_proportion(labels, size):
    rows = stratified_rows(labels, size, seed=0)
    assert len(rows) == len(set(rows)) == size and sorted(rows) == list(rows)
    counts = np.bincount(np.array(labels)[rows], minlength=3)
    assert counts == pytest.approx(size * np.bincount(labels) / 100, abs=1)


def test_subset_is_random_and_seeded():
    labels = [0] * 100 + [1] * 100
    subsets = [set(stratified_rows(labels, 50, seed)) for seed in range(60)]
    assert set(stratified_rows(labels, 50, seed=0)) == subsets[0]
    assert len({frozenset(subset) for subset in subsets}) == 60
    assert set.union(*subsets) == set(range(200)), "no row is left out for good"


@pytest.mark.parametrize("size", [None, 20, 21])
def test_subset_of_everything_keeps_the_order(size):
    assert stratified_rows([0] * 10 + [1] * 10, size, seed=1).tolist() == list(range(20))


def test_subsets_of_sorted_reviews(tmp_path):
    source = write_reviews(tmp_path / "reviews", train=make_rows("train", 400), test=make_rows("test", 40))
    everything, _ = read_reviews(source)
    first, same, other = (read_reviews(source, None, 200, 10, seed)[0] for seed in (3, 3, 4))
    assert len(texts(first["train"]) & texts(other["train"])) < 120 and pairs(first["test"]) == pairs(other["test"])
    labels = [label for _, label in pairs(first["train"], first["validation"])]
    assert labels.count(0) == labels.count(1) == 100
    assert first["test"]["label"][:].count(0) == first["test"]["label"][:].count(1) == 5
    for split in SPLITS:
        assert pairs(first[split]) == pairs(same[split])
    assert texts(first["train"], first["validation"]) < texts(everything["train"], everything["validation"])
    assert texts(first["test"]) < texts(everything["test"])


# Tokens


@pytest.fixture
def demo_reviews(demo):
    """About 450 + 50 + 50 reviews that the tokenizer knows every word of."""
    return read_reviews(str(demo[1]), train=500, test=50)[0]


def tokenized(tokenizer, max_length: int, *reviews: str) -> list[dict]:
    rows = Dataset.from_dict({"text": reviews, "label": [0] * len(reviews)})
    return list(tokenize(DatasetDict(test=rows), tokenizer, max_length)["test"])


def test_nothing_left_of_a_review_is_one_token(demo):
    tokenizer = load_tokenizer(str(demo[0]), None, 16)
    tokenizer.backend_tokenizer.post_processor = None  # no special tokens, as decoders' tokenizers have none
    rows = tokenized(tokenizer, 16, "good", "")
    assert [len(row["input_ids"]) for row in rows] == [1, 1]
    assert rows[1]["input_ids"] == [tokenizer.pad_token_id]


def test_tokens_are_the_tokenizers(demo_reviews, tokenizer):
    tokens = tokenize(demo_reviews, tokenizer, 128)
    for split in SPLITS:
        assert sorted(tokens[split].column_names) == ["input_ids", "labels", "truncated"]
        assert tokens[split]["labels"][:] == demo_reviews[split]["label"][:]
        plain = [text.replace("<br />", " ") for text in demo_reviews[split]["text"]]
        assert tokens[split]["input_ids"][:] == tokenizer(plain)["input_ids"]


def test_line_breaks_are_no_words(tokenizer):
    row, expected = tokenized(tokenizer, 64, "good<br /><br />film.<br />bad", "good film. bad")
    assert row["input_ids"] == expected["input_ids"]


@pytest.mark.parametrize("max_length", [3, 16, 128])
def test_cut_reviews_keep_the_special_tokens(tokenizer, max_length):
    for row in tokenized(tokenizer, max_length, "good " * 200, "good " * max_length, "bad", ""):
        ids = row["input_ids"]
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert len(ids) <= max_length
        assert (len(ids) == max_length) or not row["truncated"]


def test_cut_reviews_keep_their_end(tokenizer):
    row, end = tokenized(tokenizer, 16, "bad " * 40 + "good " * 14, "good " * 14)
    assert row["truncated"]
    assert row["input_ids"] == end["input_ids"]


def test_only_what_lost_a_token_is_truncated(tokenizer):
    reviews = ["good " * words for words in (15, 1, 13, 14, 40, 14)]
    rows = tokenized(tokenizer, 16, *reviews)  # two special tokens and 14 words
    assert [len(row["input_ids"]) for row in rows] == [16, 3, 15, 16, 16, 16]
    assert [row["truncated"] for row in rows] == [True, False, False, False, True, False]


def test_tokens_come_from_the_cache(demo, demo_reviews, tokenizer, own_cache):
    def cache_files():
        return {path: path.stat().st_ino for path in own_cache.rglob("cache-*.arrow")}

    first = tokenize(demo_reviews, tokenizer, 34)
    assert any(first["train"]["truncated"]) and not all(first["train"]["truncated"])
    files = cache_files()
    for again in (tokenizer, load_tokenizer(str(demo[0]), None, 128)):
        assert tokenize(demo_reviews, again, 34)["train"][:] == first["train"][:]
        assert cache_files() == files, "tokenised again"
    shorter = tokenize(demo_reviews, tokenizer, 12)
    assert len(cache_files()) == len(files) + 3
    for split in SPLITS:
        assert [ids[-11:] for ids in shorter[split]["input_ids"]] == [ids[-11:] for ids in first[split]["input_ids"]]
        assert max(map(len, shorter[split]["input_ids"])) == 12


def test_training_sample_is_like_validation_and_always_the_same(demo_reviews, tokenizer):
    tokens = tokenize(demo_reviews, tokenizer, 16)
    sample = training_sample(tokens)
    assert sample.dataset is tokens["train"]
    assert len(sample) == len(set(sample.indices)) == len(tokens["validation"])
    positive = sum(sample[place]["labels"] for place in range(len(sample)))
    assert positive == pytest.approx(len(sample) * np.mean(tokens["train"]["labels"][:]), abs=1)
    np.random.seed(5)
    assert list(training_sample(tokens).indices) == list(sample.indices)


# The Hub


def test_hub_data_set(monkeypatch):
    """What load_dataset gives for stanfordnlp/imdb, where the tests have no network."""
    features = Features(text=Value("string"), label=ClassLabel(names=["neg", "pos"]))
    splits = DatasetDict(
        train=Dataset.from_list(TRAIN, features=features),
        test=Dataset.from_list(TEST, features=features),
        unsupervised=Dataset.from_list([{"text": "?", "label": -1}], features=features),
    )
    asked = []
    monkeypatch.setattr(data, "load_dataset", lambda *args, **options: asked.append((args, options)) or splits)
    reviews, _ = read_reviews("organisation/films", "v1")
    assert asked == [(("organisation/films",), {"revision": "v1"})]
    assert reviews["train"].features["label"].names == ["negative", "positive"]
    assert pairs(reviews["train"], reviews["validation"]) == pairs(TRAIN)
    del splits["train"]
    assert refuse("organisation/films").endswith("has no train split; it has: test, unsupervised")


@pytest.mark.parametrize("source", ["stanfordnlp/imdb", "films", "aclImdb_v1.tar.gz"])
def test_hub_out_of_reach(source):
    line = refuse(source, revision="e6281661ce1c48d982bc483cf8a173c1bbeb5d31")
    assert line.startswith(f"--dataset {source}: ")
    assert "cache" in line and "local files" in line and line.endswith("--demo")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"),
        RuntimeError("Dataset scripts are no longer supported, but found films.py"),
    ],
)
def test_hub_data_set_that_datasets_refuses(monkeypatch, error):
    def refuse_it(*args, **options):
        raise error

    monkeypatch.setattr(data, "load_dataset", refuse_it)
    assert refuse("organisation/films", str(error)[:20]).startswith("--dataset organisation/films: ")


# What cannot be used


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/nowhere", "no/such/folder"])
def test_missing_folder(source):
    line = refuse(source)
    assert line.startswith(f"--dataset {source}: ")
    assert all(accepted in line for accepted in ("Hub id", ".parquet, .csv, .tsv, .jsonl", "aclImdb", ".tar.gz"))


def test_names_of_files_and_folders_may_be_unusual(tmp_path):
    folder = Path(write_reviews(tmp_path / "films [1] *", "csv"))
    for split in ("train", "test"):
        (folder / f"{split}.csv").rename(folder / f"{split}.CSV")
    assert len(read_reviews(str(folder))[0]["test"]) == len(TEST)


ONE_OF_TWO = "train.parquet, .csv, .tsv or .jsonl; found "
PLAIN = "".join(json.dumps(row) + "\n" for row in TRAIN)


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        ({}, f"needs one train file, {ONE_OF_TWO}none"),
        ({"test.jsonl": PLAIN}, f"needs one train file, {ONE_OF_TWO}none"),
        ({"train.txt": "a", "test.jsonl": PLAIN}, f"{ONE_OF_TWO}none"),
        ({"train.jsonl": PLAIN, "train.csv": "", "test.jsonl": PLAIN}, f"{ONE_OF_TWO}train.csv, train.jsonl"),
        ({"train.jsonl": "", "test.jsonl": PLAIN}, r"cannot be read \(train\.jsonl:"),
        ({"train.jsonl": PLAIN, "test.csv": ""}, r"cannot be read \(test\.csv:"),
    ],
)
def test_missing_surplus_and_empty_files(tmp_path, files, pattern):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert refuse(tmp_path, pattern).startswith(f"--dataset {tmp_path}: ")


CAUSE = r"cannot be read \({}\.%s: (?!An error occurred)"  # what that says is in the cause
ROW = "row %s of the {} split, counted from 0, label %s, %s"
NO_TEXT, KIND = "has no text, or one that is none", "is of another kind; needs integers alone or words alone"
BAD_SPLITS = {
    "no label column": (
        "jsonl",
        '{"text": "a", "stars": 1}\n',
        "the {} split must have one column `label`; it has: .*stars",
    ),
    "no text column": (
        "csv",
        "review,label\na,0\nb,1\n",
        "the {} split must have one column `text`; it has: review, label",
    ),
    "header only": ("csv", "text,label\n", CAUSE % "csv"),
    "blank lines": ("jsonl", "\n\n", CAUSE % "jsonl"),
    "text is null": ("jsonl", PLAIN + '{"text": null, "label": 0}\n', ROW % (100, 0, NO_TEXT)),
    "text is left out": ("csv", "text,label\na,0\n,1\n", ROW % (1, 1, NO_TEXT)),
    "label is null": ("jsonl", '{"text": "a", "label": null}\n' + PLAIN, ROW % (0, None, "has no label")),
    "label is left out": ("tsv", "text\tlabel\na\t0\nb\t\nc\t1\n", ROW % (1, None, "has no label")),
    "text is a number": (
        "jsonl",
        '{"text": 1, "label": 0}\n{"text": 2, "label": 1}\n',
        ROW % (0, 0, NO_TEXT),
    ),
    "label is a fraction": ("csv", "text,label\na,0.5\nb,1.5\n", ROW % (0, 0.5, KIND)),
    "label is a list": ("jsonl", '{"text": "a", "label": [0]}\n', ROW % (0, r"\[0\]", KIND)),
    "labels of two kinds": (
        "jsonl",
        PLAIN + '{"text": "a", "label": "pos"}\n',
        ROW % (100, "'pos'", KIND),
    ),
    "broken JSON": ("jsonl", PLAIN + '{"text": ', r"cannot be read \(line 101 of {}\.jsonl: Expecting value"),
    "another encoding": (
        "csv",
        "text,label\na,1\ncaf\xe9,0\n".encode("latin-1"),
        r"cannot be read \(line 3 of {}\.csv: 'utf-8' codec can't decode byte 0xe9",
    ),
    "an open quote": ("csv", 'text,label\na,0\n"b,1\n', CAUSE % "csv"),
}


BAD_SPLITS |= {
    "a column twice": (
        "csv",
        "text,label,text\na,0,b\nc,1,d\n",
        "the {} split must have one column `text`; .*text.1$",
    ),
    "a key twice": ("jsonl", '{"text": "a", "label": 0, "text": "b"}\n', CAUSE % "jsonl"),
    "rows wider than the header": (
        "csv",
        "text,label\na,b,0\nc,d,1\n",
        CAUSE % "csv" + "its first row has more fields",
    ),
    "a row wider than the others": ("csv", "text,label\na,0\nb,c,1\n", CAUSE % "csv" + "Error .* line 3, saw 3"),
    "a NUL byte in CSV": ("csv", "text,label\na,0\nb\0c,1\n", ROW % (1, 1, "has a NUL byte")),
    "a NUL byte in JSON": ("jsonl", PLAIN + '{"text": "a\\u0000b", "label": 0}\n', ROW % (100, 0, "has a NUL byte")),
    "no JSON, which crashes Arrow's parser": (
        "jsonl",
        'null,": "a", "label": 0}\n{"text": "b, \\"c\\"null, "label": 1}\n',
        r"cannot be read \(line 1 of {}\.jsonl: Extra data",
    ),
    "no UTF-8 in JSON": (
        "jsonl",
        PLAIN.encode() + b'{"text": "caf\xe9", "label": 0}\n',
        r"line 101 of {}\.jsonl: 'utf-8'",
    ),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("case", BAD_SPLITS)
def test_a_row_cannot_be_used(tmp_path, case, split):
    suffix, content, pattern = BAD_SPLITS[case]
    (tmp_path / f"{split}.{suffix}").write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / ("test.jsonl" if split == "train" else "train.jsonl")).write_text(PLAIN)
    assert refuse(tmp_path, pattern.format(split)).startswith(f"--dataset {tmp_path}: ")


def test_one_class(tmp_path):
    source = write_reviews(tmp_path / "reviews", train=TRAIN[:50])
    assert refuse(source).endswith(
        "row 0 of the train split, counted from 0, label 0, is of the only class in train; needs two or more"
    )


def test_test_label_that_train_lacks(tmp_path):
    source = write_reviews(tmp_path / "reviews", test=make_rows("test", 20, (0, 1, 7)))
    line = "row 14 of the test split, counted from 0, label 7, is of no class in train; it has: 0, 1"
    assert refuse(source) == f"--dataset {source}: {line}"


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_stray_label_is_told_where_it_stands(tmp_path, split):
    """It turns its whole column into text; the labels of the other split are integers."""
    for name, rows in (("train", TRAIN), ("test", TEST)):
        rows = [*rows[:7], {"text": "stray", "label": "oops"}, *rows[7:]] if name == split else rows
        write_file(tmp_path / f"{name}.csv", rows)
    refuse(tmp_path, (ROW % (7, "'oops'", KIND)).format(split))


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_that_differ_in_white_space_alone_are_refused(tmp_path, split):
    for name, count in (("train", 100), ("test", 20)):
        rows = make_rows(name, count, ("so so", "fine"))
        rows = [*rows, {"text": "c", "label": "so  so "}] if name == split else rows
        write_file(tmp_path / f"{name}.csv", rows)
    said = "label 'so  so ', equals another label but for white space"
    refuse(tmp_path, f"row {100 if split == 'train' else 20} of the {split} split, counted from 0, {said}")


def test_labels_as_numbers_here_and_as_words_there_are_not_mixed_up(tmp_path):
    words = [{**row, "label": str(row["label"])} for row in TEST]
    refuse(
        write_reviews(tmp_path / "reviews", test=words), "row 0 of the test .* '0', is of no class in train; .* 0, 1$"
    )


def test_parquet_with_an_index_of_pandas_is_no_wide_table(tmp_path):
    for split, rows in (("train", TRAIN), ("test", TEST)):
        pd.DataFrame(rows, index=range(7, 7 + len(rows) * 2, 2)).to_parquet(tmp_path / f"{split}.parquet", index=True)
    assert pairs(read_reviews(str(tmp_path))[0]["test"]) == pairs(TEST)


def test_parquet_with_bytes_that_are_no_text(tmp_path):
    write_file(tmp_path / "test.parquet", TEST)
    bytes_as_text = pyarrow.array([b"good", b"caf\xe9"]).view(pyarrow.string())
    table = pyarrow.table({"text": bytes_as_text, "label": [0, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    refuse(tmp_path, r"cannot be read \(train.parquet: .*[Ii]nvalid UTF8")


@pytest.mark.parametrize(("rows", "size"), [(12, 2), (2, None)])  # a class of one review stays in training
def test_too_few_reviews(tmp_path, rows, size):
    source = write_reviews(tmp_path / "reviews", train=films(rows))
    line = refuse(source, train=size)
    cause = f"--max_train_samples {size}" if size else f"--dataset {source}"
    assert re.match(f"{re.escape(cause)}: leaves a class or validation .*at least 100", line)


@pytest.mark.parametrize("damage", ["no parquet", "cut", "zeroed", "no rows"])
def test_damaged_parquet(tmp_path, damage):
    source = write_reviews(tmp_path / "reviews", "parquet")
    path = Path(source, "train.parquet")
    content = path.read_bytes()
    if damage == "no rows":
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(path)[:0], path)
    else:
        zeroed = content[:100] + bytes(400) + content[500:]
        path.write_bytes({"no parquet": b"nonsense", "cut": content[:-20], "zeroed": zeroed}[damage])
    assert refuse(source, r"cannot be read \(train.parquet: (?!An error occ)").startswith(f"--dataset {source}: ")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_cut_archive(tmp_path, share):
    source = Path(write_reviews(tmp_path / "reviews", "aclImdb_v1.tar.gz"))
    content = source.read_bytes()
    source.write_bytes(content[: int(share * len(content))])
    assert refuse(source).startswith(f"--dataset {source}: ")


def test_archive_damaged_in_the_middle_is_not_a_shorter_archive(tmp_path):
    """tarfile takes a damaged header for the end of the archive; only gzip's checksum tells."""
    source = Path(write_reviews(tmp_path / "reviews", "aclImdb_v1.tar.gz"))
    stored = io.BytesIO()
    with gzip.GzipFile(fileobj=stored, mode="wb", compresslevel=0) as file:
        file.write(gzip.decompress(source.read_bytes()))
    name = b"aclImdb/train/pos/70_7.txt"
    assert stored.getvalue().count(name) == 1
    source.write_bytes(stored.getvalue().replace(name, name.upper()))
    assert refuse(source, "cannot be read").startswith(f"--dataset {source}: ")


def test_an_archive_that_points_out_of_its_folder_is_refused(tmp_path):
    source = write_reviews(tmp_path / "reviews", "aclImdb_v1.tar.gz")
    (tmp_path / "review.txt").write_text("from elsewhere")
    with tarfile.open(source, "w:gz") as archive:
        archive.add(tmp_path / "review.txt", "aclImdb/train/pos/0_9.txt")
        archive.add(tmp_path / "review.txt", "../../train/pos/1_9.txt")
    assert "train/pos/1_9.txt" in refuse(source, r"cannot be read \(.*outside the destination")


def test_archive_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    source = tmp_path / "other.tar.gz"
    with tarfile.open(source, "w:gz") as archive:
        archive.add(tmp_path / "notes.txt", "notes.txt")
    assert refuse(source).startswith(f"--dataset {source}: ")
    assert refuse(tmp_path / "notes.txt", "accepted: ").startswith(f"--dataset {tmp_path / 'notes.txt'}: ")


def test_official_folder_without_test_reviews(tmp_path):
    source = write_reviews(tmp_path / "reviews", "aclImdb")
    shutil.rmtree(Path(source, "test"))
    assert refuse(source).startswith(f"--dataset {source}: ")


# Damage of any kind

CHARACTERS = st.characters(exclude_categories=["Cs"]) | st.sampled_from("\"',;\t\r\n \\{}[]")
ROWS = st.lists(
    st.builds(lambda text, label: {"text": text, "label": label}, st.text(CHARACTERS, min_size=1), st.integers(0, 1)),
    max_size=3,
)
SNIPPETS = st.binary(max_size=6) | st.sampled_from([*b'"\n,\r\0\xff\t{}[]:']).map(lambda byte: bytes([byte]))
# Where, as a share of the bytes; how many are lost there; what is put in their place; inside a compressed file or not.
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 6), SNIPPETS, st.booleans()), max_size=3)


def write_training_rows(source: Path, rows: list[dict]) -> None:
    if source.suffix in (f".{kind}" for kind in FILES):
        write_file(source, rows)
        return
    files = {
        f"train/{('neg', 'pos')[row['label']]}/{place}_7.txt": row["text"].encode() for place, row in enumerate(rows)
    }
    for old in source.rglob("*.txt"):
        old.unlink()
    if not source.suffix:
        for name, text in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(text)
        return
    with tarfile.open(source, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"aclImdb/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))


def damage(file: Path, edits: list[tuple]) -> None:
    for share, lost, new, inside in edits:
        content = file.read_bytes()
        inside = inside and file.suffix == ".gz" and content.startswith(b"\x1f\x8b")
        with contextlib.suppress(OSError, EOFError, zlib.error):
            content = gzip.decompress(content) if inside else content
            place = int(share * len(content))
            content = content[:place] + new + content[place + lost :]
            file.write_bytes(gzip.compress(content, compresslevel=1) if inside else content)


def rows_in(source: Path) -> int:
    """How many rows a file, archive or folder has, counted by other means."""
    if source.is_dir():
        return len([*source.glob("train/neg/*.txt"), *source.glob("train/pos/*.txt")])
    if source.suffix == ".gz":
        with tarfile.open(source) as archive:
            names = [Path(member.name).parts[-3:-1] for member in archive if member.isfile()]
        return names.count(("train", "neg")) + names.count(("train", "pos"))
    if source.suffix == ".parquet":
        return pyarrow.parquet.read_metadata(source).num_rows
    lines = io.StringIO(source.read_bytes().decode("utf-8-sig"), newline="")
    if source.suffix == ".jsonl":
        return sum(bool(line.strip()) for line in io.StringIO(lines.getvalue()))
    separator = max(",;\t", key=lines.readline().count)
    lines.seek(0)
    return sum(len(row) > 1 or bool("".join(row).strip()) for row in csv.reader(lines, delimiter=separator)) - 1


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_is_damaged(kind, tmp_path, caplog):
    """All the rows, or an error of ours."""
    caplog.set_level(logging.CRITICAL)  # datasets logs what it fails to read

    @hypothesis.settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @hypothesis.given(ROWS, EDITS)
    def check(odd, edits):
        rows = [{"text": "bad", "label": 0}, *odd, {"text": 'good, "very"\nso', "label": 1}]
        source = tmp_path / (kind if kind.startswith("aclImdb") else f"all.{kind}")
        write_training_rows(source, rows)
        damage(sorted(source.rglob("*_7.txt"))[-1] if source.is_dir() else source, edits)
        with contextlib.suppress(UserError):
            config = types.SimpleNamespace(dataset=str(source), text_column="text", label_column="label")
            found = data._with_class_labels(data._read(str(source), None), config)["train"]
            assert len(found) == rows_in(source)
            assert edits or sorted(found["text"][:]) == sorted(row["text"] for row in rows)

    check()
