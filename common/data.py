"""Texts in, tokens out: the Hub, local files or the official archive; splits; tokenisation.
The default data set is the Large Movie Review Dataset (Maas et al., 2011, "Learning Word Vectors for Sentiment
Analysis"): 25,000 training and 25,000 test reviews, half of them positive."""

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
BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json"}  # of load_dataset
# ValueError: also Arrow's errors, and what load_dataset says of a data set that needs a configuration.
UNREADABLE = (DatasetGenerationError, ValueError, RuntimeError, tarfile.TarError, EOFError)


def load_reviews(config, seed: int = 0) -> tuple[DatasetDict, str]:
    """Splits "train", "validation" and "test" with columns `text` (str) and `label` (ClassLabel), and a fingerprint.
    Prints how many texts each has.
    config: has `dataset`, `dataset_revision`, `text_column`, `label_column`, and `max_train_samples` and
    `max_test_samples`: a random, stratified subset, of the training reviews another one for each `seed`. Without a
    validation split of its own, validation is split off them; without a test split, that is split off first. The
    fingerprint is the SHA-256 of all the reviews, no subset, whatever their order or file format.
    Raises UserError where the data set cannot be read or used."""
    sample, parts, note = config.max_train_samples, 10, ""
    splits = _with_class_labels(_read(config.dataset, config.dataset_revision), config)
    if "test" not in splits:
        splits["train"], splits["test"] = _divide(splits["train"], parts, first_byte=8)
        parts, note = 9, ", split by the hash of the text"  # of the rest: validation gets as many as test
    digests = {name: _digests(rows) for name, rows in splits.items()}
    listing = []
    for name, rows in splits.items():
        pairs = zip(digests[name], rows["label"][:], strict=True)
        listing += [f"{name} {digest.hex()} {label}" for digest, label in pairs]
    fingerprint = hashlib.sha256("\n".join(sorted(listing)).encode()).hexdigest()
    train = splits["train"].select(stratified_rows(splits["train"]["label"][:], sample, seed))
    train, validation = (train, splits["validation"]) if "validation" in splits else _divide(train, parts)
    test = splits["test"].select(stratified_rows(splits["test"]["label"][:], config.max_test_samples, seed=0))
    data = DatasetDict(train=train, validation=validation, test=test)
    if fingerprint == IMDB_SHA256:
        data = data.cast_column("label", ClassLabel(names=["negative", "positive"]))  # of 0 and 1
    labels = {name: set(rows["label"][:]) for name, rows in data.items()}
    if len(labels["train"]) < 2 or not labels["validation"]:
        flag = f"--max_train_samples {sample}" if sample else f"--dataset {config.dataset}"
        raise UserError(f"{flag}: leaves a class or validation without texts; at least 100 are a start")
    counts = "{:,} training, {:,} validation and {:,} test texts".format(*map(len, data.values()))
    different = set(digests["train"])
    copies, shared = len(digests["train"]) - len(different), len(different.intersection(digests["test"]))
    PartialState().print(f"Data:     {counts}{note}; {copies:,} copies in train, {shared:,} texts in train and test")
    few, seen, classes = len(data["validation"]), len(labels["validation"]), data["test"].features["label"].num_classes
    if few < 50 or seen < classes:
        told = f"{few} validation texts, of {seen} of the {classes} classes"
        PartialState().print(f"Warning:  {told}, tell little; more labels would help")
    return data, fingerprint


def _digests(rows: Dataset) -> list[bytes]:
    return [hashlib.sha256(text.encode()).digest() for text in rows["text"][:]]


def _divide(rows: Dataset, parts: int, first_byte: int = 0) -> tuple[Dataset, Dataset]:
    """The reviews without those held out, and those held out, by their digests from `first_byte` on."""
    held = held_out([digest[first_byte:] for digest in _digests(rows)], rows["label"][:], parts)
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


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

    def encode(batch: dict) -> dict:
        tokens = tokenizer([clean(text) for text in batch["text"]], truncation=True, max_length=max_length)
        # Without special tokens nothing is left of an empty review; a model needs a token.
        input_ids = [ids or [tokenizer.pad_token_id] for ids in tokens["input_ids"]]
        # Tokenizers in Python do not tell what was cut off: every text of full length counts.
        cut = [row.overflowing for row in tokens.encodings or ()] or [len(ids) == max_length for ids in input_ids]
        return {"input_ids": input_ids, "labels": batch["label"], "truncated": list(map(bool, cut))}

    tokenizer("", truncation=True, max_length=max_length)  # part of its state from here on, and so of the cache's key
    processes = min(os.cpu_count(), 8) if max(map(len, data.values())) > 5000 else None
    options = {"batched": True, "remove_columns": ["text", "label"], "num_proc": processes, "desc": "Tokenising"}
    return data.map(encode, **options)


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
            splits = {}
            for split in SPLITS:
                found = sorted(file for file in path.glob(f"{split}.*") if file.suffix.lower() in BUILDERS)
                if len(found) > 1 or (split == "train" and not found):
                    needs = f"needs one {split} file, {split}.parquet, .csv, .tsv or .jsonl; found"
                    raise UserError(f"--dataset {source}: {needs} {', '.join(file.name for file in found) or 'none'}")
                if found:
                    splits[split] = _read_file(found[0])
        elif path.is_file() and path.suffix.lower() in BUILDERS:
            splits = {"train": _read_file(path)}
        elif path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
            tables = "a file (.parquet, .csv, .tsv, .jsonl) or a folder with train and test files"
            accepted = f"a Hub id; {tables}; an extracted aclImdb folder; aclImdb_v1.tar.gz"
            raise UserError(f"--dataset {source}: no such folder, file or readable archive; accepted: {accepted}")
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


def _read_file(file: Path) -> Dataset:
    """A table. Raises one of UNREADABLE for what is in it."""
    builder, options = BUILDERS[file.suffix.lower()], {}
    try:
        if builder == "csv":
            with file.open(encoding="utf-8-sig") as lines:
                separator = max(",;\t", key=lines.readline().count)
            # "NA" and "null" are texts; only nothing is missing
            options = {"sep": separator, "keep_default_na": False, "na_values": [""]}
        return load_dataset(builder, data_files=glob.escape(str(file)), split="train", **options)
    except (*UNREADABLE, OSError, StopIteration) as error:  # the last of an empty file
        raise ValueError(f"{file.name}: {str(error.__cause__ or error) or 'is empty'}") from None


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


def _with_class_labels(splits: dict[str, Dataset], config) -> dict[str, Dataset]:
    """The splits, checked, with columns `text` and `label` only and the same ClassLabel in all."""
    flag, text, label = f"--dataset {config.dataset}", config.text_column, config.label_column
    for split, rows in splits.items():
        for column, kinds, kind in (text, ({str},), "text"), (label, ({int}, {bool}, {str}), "integers or text"):
            if column not in rows.column_names:
                there = f"it has: {', '.join(rows.column_names)}{_proposal(rows)}"
                raise UserError(f"{flag}: the {split} split has no column `{column}`; {there}")
            values = rows[column][:]
            missing = (None, -1) if isinstance(rows.features[column], ClassLabel) else (None,)
            for row in (row for row, value in enumerate(values) if value in missing):
                raise UserError(f"{flag}: row {row} of the {split} split has no {column}")
            if set(map(type, values)) not in kinds:
                raise UserError(f"{flag}: column `{column}` of the {split} split is not {kind}")
    train, classes = splits["train"].features[label], sorted(set(splits["train"][label][:]))
    if len(classes) < 2:
        raise UserError(f"{flag}: the train split has one class only, {classes[0]!r}; needs two or more")
    for split, rows in splits.items():
        kind = rows.features[label]
        if isinstance(train, ClassLabel) and isinstance(kind, ClassLabel) and train.names != kind.names:
            raise UserError(f"{flag}: numbers the classes {train.names} in train and {kind.names} in {split}")
        for other in set(rows[label][:]) - set(classes):
            there = f"the train split, which has: {str(classes)[1:-1]}"
            raise UserError(f"{flag}: label {other!r} of the {split} split is not in {there}")
    names = [train.int2str(number) for number in classes] if isinstance(train, ClassLabel) else list(map(str, classes))
    names = ["negative", "positive"] if names == ["neg", "pos"] else names
    options = {"batched": True, "features": Features(text=Value("string"), label=ClassLabel(names=names))}
    return {
        split: rows.select_columns([text, label])
        .rename_columns({text: "text", label: "label"})
        .map(lambda rows: {"label": list(map(classes.index, rows["label"]))}, **options, desc=f"Reading {split}")
        for split, rows in splits.items()
    }


def _proposal(rows: Dataset) -> str:
    """Flags that name the columns, where one alone looks like labels and one alone like texts."""
    types = ("string", "large_string", "int64", "bool")  # of texts and labels
    columns = {name: rows[name][:] for name, kind in rows.features.items() if getattr(kind, "dtype", "") in types}
    labels = [name for name, values in columns.items() if len(set(values)) <= min(50, max(2, len(values) / 5))]
    texts = [name for name in columns if name not in labels and "string" in rows.features[name].dtype]
    if len(labels) != 1 or len(texts) != 1:
        return ""
    return f"; try --text_column {shlex.quote(texts[0])} --label_column {shlex.quote(labels[0])}"
