"""Texts in, tokens out: the Hub, local files or the official archive; splits; tokenisation.

The default data set is the Large Movie Review Dataset (Maas et al., 2011, "Learning Word Vectors for Sentiment
Analysis"): 25,000 training and 25,000 test reviews, half of them positive.
"""

import csv
import glob
import hashlib
import os
import shlex
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import Subset

from common.cli import UserError
from common.hub import OFFLINE, check_hub

IMDB_SHA256 = "6926d9298a1154bb239b57fdec17e037b09d709a3e58a9385bd9a72f333a0f0d"  # as `load_reviews` sums it
ENOUGH_TO_CHOOSE = 200  # validation reviews; by fewer the best epoch is a matter of luck
SPLITS = ("train", "validation", "test")
COLUMNS = ("string", "large_string", "int64", "bool")  # types of texts and labels
BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json"}  # of load_dataset
AS_WRITTEN = {"keep_default_na": False, "na_values": [""]}  # "NA" and "null" are texts; only nothing is missing
# ValueError: also Arrow's errors, and what load_dataset says of a data set that needs a configuration.
UNREADABLE = (DatasetGenerationError, ValueError, RuntimeError, tarfile.TarError, EOFError)


def load_reviews(config, seed: int = 0) -> tuple[DatasetDict, str]:
    """Splits "train", "validation" and "test" with columns `text` (str) and `label` (ClassLabel), and a fingerprint.
    Prints how many texts each has.

    config: has `dataset`, `dataset_revision`, `text_column`, `label_column`, and `max_train_samples` and
    `max_test_samples`: a random, stratified subset, of the training reviews another one for each `seed`. Without a
    validation split of its own, validation is split off them; without a test split, that is split off first. The
    fingerprint is the SHA-256 of all the reviews, no subset, whatever their order or file format.
    Raises UserError where the data set cannot be read or used.
    """
    source, sample = config.dataset, config.max_train_samples
    splits = _read(source, config.dataset_revision)
    splits, parts = _with_class_labels(splits, source, config.text_column, config.label_column), 10
    note = ""
    if "test" not in splits:
        everything, parts = splits["train"], 9  # of the rest: validation gets as many as test
        held = held_out([digest[8:] for digest in _digests(everything)], everything["label"][:])
        splits |= {"train": everything.select(np.flatnonzero(~held)), "test": everything.select(np.flatnonzero(held))}
        note = ", split by the hash of the text"
    digests = {name: _digests(rows) for name, rows in splits.items()}
    labels = {name: rows["label"][:] for name, rows in splits.items()}
    listing = [
        f"{name} {digest.hex()} {label}"
        for name in splits
        for digest, label in zip(digests[name], labels[name], strict=True)
    ]
    fingerprint = hashlib.sha256("\n".join(sorted(listing)).encode()).hexdigest()

    rows = stratified_rows(labels["train"], sample, seed)
    held = held_out([digests["train"][row] for row in rows], [labels["train"][row] for row in rows], parts)
    held &= "validation" not in splits
    data = DatasetDict(
        train=splits["train"].select(rows[~held]),
        validation=splits.get("validation") or splits["train"].select(rows[held]),
        test=splits["test"].select(stratified_rows(labels["test"], config.max_test_samples, seed=0)),
    )
    if fingerprint == IMDB_SHA256:
        data = data.cast_column("label", ClassLabel(names=["negative", "positive"]))  # of 0 and 1
    classes, seen = len(set(labels["train"])), len(set(data["validation"]["label"][:]))
    if len(set(data["train"]["label"][:])) < 2 or not seen:
        flag = f"--max_train_samples {sample}" if sample else f"--dataset {source}"
        raise UserError(f"{flag}: leaves a class or validation without reviews; at least 100 are a start")
    counts = "{:,} training, {:,} validation and {:,} test texts".format(*map(len, data.values()))
    copies, shared = len(labels["train"]) - len({*digests["train"]}), len({*digests["train"]} & {*digests["test"]})
    PartialState().print(f"Data:     {counts}{note}; {copies:,} copies in train, {shared:,} texts in train and test")
    if len(data["validation"]) < 50 or seen < classes:
        PartialState().print(
            f"Warning:  {len(data['validation'])} validation texts, of {seen} of the {classes} classes, tell little; "
            "label more, or bring a validation file"
        )
    return data, fingerprint


def _digests(rows: Dataset) -> list[bytes]:
    return [hashlib.sha256(text.encode()).digest() for text in rows["text"][:]]


def held_out(digests: list[bytes], labels: list[int], parts: int = 10) -> np.ndarray:
    """Which reviews are held out, about one of `parts`; bool, (reviews,). digests: their SHA-256.
    The text alone decides: the order of rows does not matter, and all copies of a review are on the same side. Of a
    class with 1,000 reviews one digest of `parts` is held out; of a smaller one that share with the lowest digests."""
    numbers = np.array([int.from_bytes(digest[:8], "big") for digest in digests], dtype=np.uint64)
    held, labels = numbers % parts == 0, np.asarray(labels)
    for label, size in zip(*np.unique(labels, return_counts=True), strict=True):
        if size < 1000:
            of_class = numbers[labels == label]
            held[labels == label] = size > 1 and of_class <= np.sort(of_class)[max(1, round(size / parts)) - 1]
    return np.isin(numbers, numbers[held])


def stratified_rows(labels: list[int], size: int | None, seed: int) -> np.ndarray:
    """Sorted row numbers of a random subset of `size` rows with every class in proportion; None keeps all rows."""
    labels = np.asarray(labels)
    if size is None or size >= len(labels):
        return np.arange(len(labels))
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    share = np.empty(len(labels))  # a row's place within its class, of 1: the smallest take evenly from every class
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        share[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(shuffled[np.argsort(share[shuffled], kind="stable")[:size]])


def clean(text: str) -> str:
    """`text` without IMDb's HTML line breaks."""
    return text.replace("<br />", " ")


def tokenize(data: DatasetDict, tokenizer, max_length: int) -> DatasetDict:
    """Columns `input_ids` (at most `max_length`, special tokens included), `labels`, and `truncated` (bool); cached by
    `datasets` for this tokenizer, these reviews and this length."""
    tokens = DatasetDict()
    for split, rows in data.items():
        # Truncation is part of the tokenizer's state, and so of the cache's key: the same state before every split.
        tokenizer("", truncation=True, max_length=max_length)
        tokens[split] = rows.map(
            _encode,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, "max_length": max_length},
            remove_columns=rows.column_names,
            num_proc=min(os.cpu_count(), 8) if len(rows) > 5000 else None,
            desc=f"Tokenising {split}",
        )
    return tokens


def _encode(batch: dict, tokenizer, max_length: int) -> dict:
    texts = [clean(text) for text in batch["text"]]
    input_ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    # Only a row that is full can have lost something: it did, if one token more would have been taken.
    full = [row for row, ids in enumerate(input_ids) if len(ids) == max_length]
    longer = full and tokenizer([texts[row] for row in full], truncation=True, max_length=max_length + 1)["input_ids"]
    cut = {row for row, ids in zip(full, longer, strict=True) if len(ids) > max_length}
    # Without special tokens nothing is left of an empty review; a model needs a token.
    input_ids = [ids or [tokenizer.pad_token_id] for ids in input_ids]
    return {"input_ids": input_ids, "labels": batch["label"], "truncated": [row in cut for row in range(len(texts))]}


def training_sample(data: DatasetDict) -> Subset:
    """As many training reviews as validation has, always the same: training accuracy is measured on them, in
    evaluation mode, so that the two are measured alike."""
    return Subset(data["train"], stratified_rows(data["train"]["labels"][:], len(data["validation"]), seed=0))


def _read(source: str, revision: str | None) -> dict[str, Dataset]:
    """The splits of `source`, unchanged: "train", and where it has them "validation" and "test"."""
    path = Path(source).expanduser()
    try:
        if (path / "train" / "pos").is_dir() or (path.is_file() and tarfile.is_tarfile(path)):
            return {split: _read_acl_imdb(path, split) for split in ("train", "test")}
        if path.is_dir():
            splits = {split: _read_file(file) for split in SPLITS if (file := _file_of(path, split))}
        elif path.is_file() and path.suffix.lower() in BUILDERS:
            splits = {"train": _read_file(path)}
        elif path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise UserError(
                f"--dataset {source}: no such folder, file or readable archive; accepted: a Hub id; a file (.parquet, "
                ".csv, .tsv, .jsonl) or a folder with train and test files; an extracted aclImdb folder; "
                "aclImdb_v1.tar.gz"
            )
        else:
            check_hub(source, revision, "dataset")
            splits = load_dataset(source, revision=revision)
    except UNREADABLE as error:
        reason = " ".join(str(error.__cause__ or error).split())  # in one line
        raise UserError(f"--dataset {source}: cannot be read ({reason})") from error
    except OSError as error:
        raise UserError(f"--dataset {source}: {OFFLINE}") from error
    if "train" not in splits:
        raise UserError(f"--dataset {source}: has no train split; it has: {', '.join(splits) or 'none'}")
    return {split: splits[split] for split in SPLITS if split in splits}


def _file_of(folder: Path, split: str) -> Path | None:
    """The one file of `split` in `folder`, or None."""
    found = sorted(file for file in folder.glob(f"{split}.*") if file.suffix.lower() in BUILDERS)
    if len(found) > 1 or (split == "train" and not found):
        raise UserError(
            f"--dataset {folder}: needs one {split} file, {split}.parquet, .csv, .tsv or .jsonl; "
            f"found {', '.join(file.name for file in found) or 'none'}"
        )
    return found[0] if found else None


def _read_file(file: Path) -> Dataset:
    """A table. Raises one of UNREADABLE for what is in it."""
    suffix = file.suffix.lower()
    try:
        options = AS_WRITTEN | {"sep": _separator(file)} if BUILDERS[suffix] == "csv" else {}
        return load_dataset(BUILDERS[suffix], data_files=glob.escape(str(file)), split="train", **options)
    except (*UNREADABLE, OSError, StopIteration) as error:  # the last of an empty file
        raise ValueError(f"{file.name}: {str(error.__cause__ or error) or 'is empty'}") from None


def _separator(file: Path) -> str:
    """What separates the columns: comma, semicolon or tab, by the first line."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        header = lines.readline()
    try:
        return csv.Sniffer().sniff(header, ",;\t").delimiter
    except csv.Error:  # one column
        return ","


def _read_acl_imdb(path: Path, split: str) -> Dataset:
    """<path>/<split>/{neg,pos}/*.txt of a folder or, read in place, of an archive."""
    rows, names = [], ("neg", "pos")
    if path.is_dir():
        for file in sorted(file for name in names for file in (path / split / name).glob("*.txt")):
            rows.append({"text": file.read_bytes().decode(), "label": file.parent.name})  # no line end is changed
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts  # aclImdb/train/pos/0_9.txt
                if parts[-3:-2] == (split,) and parts[-2] in names and member.isfile():
                    rows.append({"text": archive.extractfile(member).read().decode(), "label": parts[-2]})
            while archive.fileobj.read(2**20):  # to gzip's checksum: tarfile takes a damaged header for the end
                pass
    return Dataset.from_list(rows, Features(text=Value("string"), label=ClassLabel(names=list(names))))


def _with_class_labels(splits: dict, source: str, text_column: str, label_column: str) -> dict[str, Dataset]:
    """The splits, checked, with columns `text` and `label` only and the same ClassLabel in all."""

    def refuse(reason: str) -> None:
        raise UserError(f"--dataset {source}: {reason}")

    for split, rows in splits.items():
        for column, kinds, kind in (
            (text_column, ({str},), "text"),
            (label_column, ({int}, {bool}, {str}), "integers or text"),
        ):
            if column not in rows.column_names:
                there = f"it has: {', '.join(rows.column_names)}{_proposal(rows)}"
                refuse(f"the {split} split has no column `{column}`; {there}")
            values = rows[column][:]
            missing = (None, -1) if isinstance(rows.features[column], ClassLabel) else (None,)
            for row in (row for row, value in enumerate(values) if value in missing):
                refuse(f"row {row} of the {split} split has no {column}")
            if set(map(type, values)) not in kinds:
                refuse(f"column `{column}` of the {split} split is not {kind}")
    train = splits["train"].features[label_column]
    classes = sorted(set(splits["train"][label_column][:]))
    if len(classes) < 2:
        refuse(f"the train split has one class only, {classes[0]!r}; needs two or more")
    for split, rows in splits.items():
        kind = rows.features[label_column]
        if isinstance(train, ClassLabel) and isinstance(kind, ClassLabel) and train.names != kind.names:
            refuse(f"numbers the classes {train.names} in train and {kind.names} in {split}")
        for label in set(rows[label_column][:]) - set(classes):
            refuse(f"label {label!r} of the {split} split is not in the train split, which has: {str(classes)[1:-1]}")
    names = [train.int2str(label) if isinstance(train, ClassLabel) else str(label) for label in classes]
    names = ["negative", "positive"] if names == ["neg", "pos"] else names
    return {
        split: rows.select_columns([text_column, label_column])
        .rename_columns({text_column: "text", label_column: "label"})
        .map(
            lambda labels: {"label": [classes.index(label) for label in labels]},
            batched=True,
            input_columns="label",
            features=Features(text=Value("string"), label=ClassLabel(names=names)),
            desc=f"Reading the labels of {split}",
        )
        for split, rows in splits.items()
    }


def _proposal(rows: Dataset) -> str:
    """Flags that name the columns, where one alone looks like labels and one alone like texts."""
    columns = {name: rows[name][:] for name, kind in rows.features.items() if getattr(kind, "dtype", "") in COLUMNS}
    labels = [name for name, values in columns.items() if len(set(values)) <= min(50, max(2, len(values) / 5))]
    texts = [name for name in columns if name not in labels and "string" in rows.features[name].dtype]
    if len(labels) != 1 or len(texts) != 1:
        return ""
    return f"; try --text_column {shlex.quote(texts[0])} --label_column {shlex.quote(labels[0])}"
