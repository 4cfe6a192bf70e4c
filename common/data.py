"""Reviews in, tokens out: the Hub, local files or the official archive; validation split; tokenisation.

The default data set is the Large Movie Review Dataset (Maas et al., 2011, "Learning Word Vectors for Sentiment
Analysis"): 25,000 training and 25,000 test reviews, half of them positive.
"""

import glob
import hashlib
import os
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import Subset

from common.cli import UserError
from common.hub import OFFLINE, check_hub

ENOUGH_TO_CHOOSE = 200  # validation reviews; by fewer the best epoch is a matter of luck
BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json"}  # of load_dataset
AS_WRITTEN = {"keep_default_na": False, "na_values": [""]}  # "NA" and "null" are texts; only nothing is missing
# ValueError: also Arrow's errors, and what load_dataset says of a data set that needs a configuration.
UNREADABLE = (DatasetGenerationError, ValueError, RuntimeError, tarfile.TarError, EOFError)


def load_reviews(
    source: str,
    revision: str | None = None,
    max_train_samples: int | None = None,
    max_test_samples: int | None = None,
    seed: int = 0,
) -> tuple[DatasetDict, str]:
    """Splits "train", "validation" and "test" with columns `text` (str) and `label` (ClassLabel), and a fingerprint.

    source: what `--dataset` takes. max_*_samples: a random, stratified subset, of the training reviews another one for
    each `seed`; validation is split off it. The fingerprint is the SHA-256 of all the training and test reviews, no
    subset, whatever their order or file format. Raises UserError where the source cannot be read or used.
    """
    splits = _with_class_labels(_read(source, revision), source)
    digests, labels, listing = {}, {}, []
    for name, rows in splits.items():
        digests[name] = [hashlib.sha256(text.encode()).digest() for text in rows["text"][:]]
        labels[name] = rows["label"][:]
        pairs = zip(digests[name], labels[name], strict=True)
        listing += [f"{name} {digest.hex()} {label}" for digest, label in pairs]
    fingerprint = hashlib.sha256("\n".join(sorted(listing)).encode()).hexdigest()

    rows = stratified_rows(labels["train"], max_train_samples, seed)
    held = in_validation([digests["train"][row] for row in rows], [labels["train"][row] for row in rows])
    data = DatasetDict(
        train=splits["train"].select(rows[~held]),
        validation=splits["train"].select(rows[held]),
        test=splits["test"].select(stratified_rows(labels["test"], max_test_samples, seed=0)),
    )
    if len(set(data["train"]["label"][:])) < 2 or not len(data["validation"]):
        flag = f"--max_train_samples {max_train_samples}" if max_train_samples else f"--dataset {source}"
        raise UserError(f"{flag}: leaves a class or validation without reviews; at least 100 are a start")
    return data, fingerprint


def in_validation(digests: list[bytes], labels: list[int]) -> np.ndarray:
    """Which training reviews are held out for validation, about a tenth; bool, (reviews,). digests: their SHA-256.
    The text alone decides: the order of rows does not matter, and all copies of a review are on the same side. Of a
    class with 1,000 reviews one digest of ten is held out; of a smaller one the tenth with the lowest digests."""
    numbers = np.array([int.from_bytes(digest[:8], "big") for digest in digests], dtype=np.uint64)
    held, labels = numbers % 10 == 0, np.asarray(labels)
    for label, size in zip(*np.unique(labels, return_counts=True), strict=True):
        if size < 1000:
            of_class = numbers[labels == label]
            held[labels == label] = size > 1 and of_class <= np.sort(of_class)[max(1, round(size / 10)) - 1]
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
    """The "train" and "test" splits of `source`, unchanged."""
    path = Path(source).expanduser()
    try:
        if (path / "train" / "pos").is_dir() or (path.is_file() and tarfile.is_tarfile(path)):
            return {split: _read_acl_imdb(path, split) for split in ("train", "test")}
        if path.is_dir():
            return {split: _read_file(path, split) for split in ("train", "test")}
        if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise UserError(
                f"--dataset {source}: no such folder or readable archive; accepted: a Hub id; a folder with train and "
                "test files (.parquet, .csv, .tsv, .jsonl); an extracted aclImdb folder; aclImdb_v1.tar.gz"
            )
        check_hub(source, revision, "dataset")
        splits = load_dataset(source, revision=revision)
    except UNREADABLE as error:
        reason = " ".join(str(error.__cause__ or error).split())  # in one line
        raise UserError(f"--dataset {source}: cannot be read ({reason})") from error
    except OSError as error:
        raise UserError(f"--dataset {source}: {OFFLINE}") from error
    for split in ("train", "test"):
        if split not in splits:
            raise UserError(f"--dataset {source}: has no {split} split; it has: {', '.join(splits)}")
    return {split: splits[split] for split in ("train", "test")}


def _read_file(folder: Path, split: str) -> Dataset:
    """The one file of `split` in `folder`. Raises one of UNREADABLE for what is in it."""
    found = sorted(file for file in folder.glob(f"{split}.*") if file.suffix.lower() in BUILDERS)
    if len(found) != 1:
        raise UserError(
            f"--dataset {folder}: needs one {split} file, {split}.parquet, .csv, .tsv or .jsonl; "
            f"found {', '.join(file.name for file in found) or 'none'}"
        )
    suffix = found[0].suffix.lower()
    options = AS_WRITTEN | {"sep": "\t" if suffix == ".tsv" else ","} if BUILDERS[suffix] == "csv" else {}
    try:
        return load_dataset(BUILDERS[suffix], data_files=glob.escape(str(found[0])), split="train", **options)
    except (*UNREADABLE, OSError, StopIteration) as error:  # the last of an empty file
        raise ValueError(f"{found[0].name}: {str(error.__cause__ or error) or 'is empty'}") from None


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


def _with_class_labels(splits: dict[str, Dataset], source: str) -> dict[str, Dataset]:
    """The two splits, checked, with columns `text` and `label` only and the same ClassLabel in both."""

    def refuse(reason: str) -> None:
        raise UserError(f"--dataset {source}: {reason}")

    for split, rows in splits.items():
        for column, kinds, kind in (("text", ({str},), "text"), ("label", ({int}, {bool}, {str}), "integers or text")):
            if column not in rows.column_names:
                refuse(f"the {split} split has no column `{column}`; it has: {', '.join(rows.column_names)}")
            values = rows[column][:]
            missing = (None, -1) if isinstance(rows.features[column], ClassLabel) else (None,)
            for row in (row for row, value in enumerate(values) if value in missing):
                refuse(f"row {row} of the {split} split has no {column}")
            if set(map(type, values)) not in kinds:
                refuse(f"column `{column}` of the {split} split is not {kind}")
    train, test = (rows.features["label"] for rows in splits.values())
    if isinstance(train, ClassLabel) and isinstance(test, ClassLabel) and train.names != test.names:
        refuse(f"numbers the classes {train.names} in train and {test.names} in test")
    classes = sorted(set(splits["train"]["label"][:]))
    if len(classes) < 2:
        refuse(f"the train split has one class only, {classes[0]!r}; needs two or more")
    for label in set(splits["test"]["label"][:]) - set(classes):
        refuse(f"label {label!r} of the test split is not in the train split, which has: {str(classes)[1:-1]}")
    names = [train.int2str(label) if isinstance(train, ClassLabel) else str(label) for label in classes]
    if names in (["neg", "pos"], ["0", "1"]):
        names = ["negative", "positive"]
    return {
        split: rows.select_columns(["text", "label"]).map(
            lambda labels: {"label": [classes.index(label) for label in labels]},
            batched=True,
            input_columns="label",
            features=Features(text=Value("string"), label=ClassLabel(names=names)),
            desc=f"Reading the labels of {split}",
        )
        for split, rows in splits.items()
    }
