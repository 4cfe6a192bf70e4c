"""Reviews come out the same whatever they came in as; what cannot be used is refused in one clear line."""

import csv
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import read_reviews
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

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
        (source / other).parent.mkdir(exist_ok=True)
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
    assert source in refuse(source, "bad.*good")


@pytest.mark.parametrize("missing", [-1, None])
def test_class_number_of_a_missing_label(tmp_path, missing):
    unlabelled = [*TRAIN, {"text": "what is this?", "label": missing}]
    source = write_class_labels(tmp_path / "reviews", ["bad", "good"], ["bad", "good"], unlabelled)
    assert source in refuse(source, "row 100 of the train split has no label")


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
    refuse(source, "label 7 of the validation split is not in the train split")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_and_other_names_of_the_columns(tmp_path, separator):
    rows = [{"the review": row["text"], "sentiment": "np"[row["label"]]} for row in TRAIN]
    file = tmp_path / "IMDB Dataset.csv"
    with file.open("w", newline="", encoding="utf-8-sig") as lines:
        writer = csv.DictWriter(lines, rows[0], delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    line = refuse(file, "no column `text`")
    assert line.endswith("it has: the review, sentiment; try --text_column 'the review' --label_column sentiment")
    reviews, _ = read_reviews(str(file), text_column="the review", label_column="sentiment")
    assert pairs(*reviews.values()) == pairs(TRAIN) and reviews["test"].features["label"].names == ["n", "p"]


def test_no_columns_are_proposed_where_several_could_be_meant(tmp_path):
    rows = [{"title": f"a {n}", "body": f"b {n}", "kind": n % 2} for n in range(100)]
    write_file(tmp_path / "mail.csv", rows)
    assert refuse(tmp_path / "mail.csv").endswith("it has: title, body, kind")


def test_few_validation_texts_are_warned_of(tmp_path, capsys):
    read_reviews(write_reviews(tmp_path / "reviews"))
    assert "Warning:  10 validation texts, of 2 of the 2 classes, tell little" in capsys.readouterr().out
    read_reviews(write_reviews(tmp_path / "many", train=films(600)))
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
KIND = "column `label` of the {} split is not integers or text"
BAD_SPLITS = {
    "no label column": ("jsonl", '{"text": "a", "stars": 1}\n', "the {} split has no column `label`; it has: .*stars"),
    "no text column": ("csv", "review,label\na,0\nb,1\n", "the {} split has no column `text`; it has: review, label"),
    "header only": ("csv", "text,label\n", CAUSE % "csv"),
    "blank lines": ("jsonl", "\n\n", CAUSE % "jsonl"),
    "text is null": ("jsonl", PLAIN + '{"text": null, "label": 0}\n', "row 100 of the {} split has no text"),
    "text is left out": ("csv", "text,label\na,0\n,1\n", "row 1 of the {} split has no text"),
    "label is null": ("jsonl", '{"text": "a", "label": null}\n' + PLAIN, "row 0 of the {} split has no label"),
    "label is left out": ("tsv", "text\tlabel\na\t0\nb\t\nc\t1\n", "row 1 of the {} split has no label"),
    "text is a number": (
        "jsonl",
        '{"text": 1, "label": 0}\n{"text": 2, "label": 1}\n',
        "`text` of the {} .* not text",
    ),
    "label is a fraction": ("csv", "text,label\na,0.5\nb,1.5\n", KIND),
    "label is a list": ("jsonl", '{"text": "a", "label": [0]}\n', KIND),
    "labels of two kinds": (
        "jsonl",
        PLAIN + '{"text": "a", "label": "pos"}\n',
        KIND,
    ),
    "broken JSON": ("jsonl", PLAIN + '{"text": ', CAUSE % "jsonl"),
    "another encoding": (
        "csv",
        "text,label\ncaf\xe9,0\nb,1\n".encode("latin-1"),
        CAUSE % "csv",
    ),
    "an open quote": ("csv", 'text,label\na,0\n"b,1\n', CAUSE % "csv"),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("case", BAD_SPLITS)
def test_bad_split(tmp_path, case, split):
    suffix, content, pattern = BAD_SPLITS[case]
    (tmp_path / f"{split}.{suffix}").write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / ("test.jsonl" if split == "train" else "train.jsonl")).write_text(PLAIN)
    assert refuse(tmp_path, pattern.format(split)).startswith(f"--dataset {tmp_path}: ")


def test_one_class(tmp_path):
    source = write_reviews(tmp_path / "reviews", train=TRAIN[:50])
    assert refuse(source) == f"--dataset {source}: the train split has one class only, 0; needs two or more"


def test_test_label_that_train_lacks(tmp_path):
    source = write_reviews(tmp_path / "reviews", test=make_rows("test", 20, (0, 1, 7)))
    line = refuse(source)
    assert line == f"--dataset {source}: label 7 of the test split is not in the train split, which has: 0, 1"


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
