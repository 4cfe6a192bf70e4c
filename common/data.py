"""Texts in, tokens out: the Hub, local files or the official archive; splits; tokenisation."""

import glob
import hashlib
import json
import os
import shlex
import tarfile
from pathlib import Path, PurePosixPath

import datasets
import numpy as np
import pandas as pd
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from huggingface_hub import HfApi, constants, errors, get_token
from torch.utils.data import Subset

from common.cli import UserError

IMDB_SHA256 = "6926d9298a1154bb239b57fdec17e037b09d709a3e58a9385bd9a72f333a0f0d"  # as `load_reviews` sums it
ENOUGH_TO_CHOOSE = 200  # validation reviews; by fewer the best epoch is a matter of luck
SPLITS = ("train", "validation", "test")
OFFLINE = "is not here or in the cache, and the Hub is not reached; give --model and --dataset local files, or --demo"
BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json"}  # of load_dataset


def load_reviews(config, seed: int = 0) -> tuple[DatasetDict, str]:
    """Splits "train", "validation" and "test" with columns `text` (str) and `label` (ClassLabel), and a fingerprint:
    the SHA-256 of all the reviews, whatever their order or file format. What has no test split loses a part of train
    to it, then one to validation if that is missing too. What `config.max_train_samples` and `max_test_samples` keep
    is stratified, and of train another part for each `seed`. Raises UserError for what cannot be read or used."""
    sample, parts, note = config.max_train_samples, 10, ""
    splits = _with_class_labels(_read(config.dataset, config.dataset_revision), config)
    if "test" not in splits:
        splits["train"], splits["test"] = _divide(splits["train"], parts, first_byte=8)
        parts, note = 9, ", split by the hash of the text"  # of the rest: validation gets as many as test
    digests = {name: _digests(rows) for name, rows in splits.items()}
    labels = {name: rows["label"][:] for name, rows in splits.items()}
    pairs = {name: zip(digests[name], labels[name], strict=True) for name in splits}
    listing = [f"{name} {digest.hex()} {label}" for name, rows in pairs.items() for digest, label in rows]
    fingerprint = hashlib.sha256("\n".join(sorted(listing)).encode()).hexdigest()
    train = splits["train"].select(stratified_rows(labels["train"], sample, seed))
    train, validation = (train, splits["validation"]) if "validation" in splits else _divide(train, parts)
    test = splits["test"].select(stratified_rows(labels["test"], config.max_test_samples, seed=0))
    data = DatasetDict(train=train, validation=validation, test=test)
    if fingerprint == IMDB_SHA256:  # whose labels may be 0 and 1
        data = data.cast_column("label", ClassLabel(names=["negative", "positive"]))
    labels = {name: set(rows["label"][:]) for name, rows in data.items()}
    if len(labels["train"]) < 2 or not labels["validation"]:
        flag = f"--max_train_samples {sample}" if sample else f"--dataset {config.dataset}"
        raise UserError(f"{flag}: leaves a class or validation without texts; at least 100 are a start")
    counts = "{:,} training, {:,} validation and {:,} test texts".format(*map(len, data.values()))
    copies, shared = len(digests["train"]) - len(set(digests["train"])), len({*digests["train"]} & {*digests["test"]})
    PartialState().print(f"Data:     {counts}{note}; {copies:,} copies in train, {shared:,} texts in train and test")
    for split in ("validation", "test"):
        if len(labels[split]) < (classes := data[split].features["label"].num_classes) or len(data[split]) < 50:
            few = f"{len(data[split])} {split} texts, of {len(labels[split])} of the {classes} classes"
            PartialState().print(f"Warning:  {few}, tell little; more would help")
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
    of_class = pd.Series(numbers).groupby(np.asarray(labels))
    size = of_class.transform("size")
    lowest = (of_class.rank("min") <= (size / parts).round().clip(1)) & (size > 1)
    return np.isin(numbers, numbers[np.where(size < 1000, lowest, numbers % parts == 0)])


def stratified_rows(labels: list[int], size: int | None, seed: int) -> np.ndarray:
    """Sorted row numbers of a random subset of `size` rows with every class in proportion; None keeps all rows."""
    labels = np.asarray(labels)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    of_class = pd.Series(labels[shuffled]).groupby(labels[shuffled])
    share = (of_class.cumcount() + 0.5) / of_class.transform("size")  # a row's place within its class, of 1
    return np.sort(shuffled[np.argsort(share, kind="stable")[:size]])  # the smallest take evenly from every class


def clean(text: str) -> str:
    """`text` without IMDb's HTML line breaks."""
    return text.replace("<br />", " ")


def tokenize(data: DatasetDict, tokenizer, max_length: int) -> DatasetDict:
    """Columns `input_ids` (at most `max_length`, special tokens included), `labels`, `truncated` (bool); cached."""

    def encode(batch: dict) -> dict:
        tokens = tokenizer([clean(text) for text in batch["text"]], truncation=True, max_length=max_length)
        input_ids = [ids or [tokenizer.pad_token_id] for ids in tokens["input_ids"]]  # a model needs a token
        # Tokenizers in Python do not tell what was cut off: every text of full length counts.
        cut = [row.overflowing for row in tokens.encodings or ()] or [len(ids) == max_length for ids in input_ids]
        return {"input_ids": input_ids, "labels": batch["label"], "truncated": list(map(bool, cut))}

    tokenizer("", truncation=True, max_length=max_length)  # part of its state from here on, and so of the cache's key
    processes = min(os.cpu_count(), 8) if max(map(len, data.values())) > 5000 else None
    return data.map(encode, batched=True, remove_columns=["text", "label"], num_proc=processes, desc="Tokenising")


def training_sample(data: DatasetDict) -> Subset:
    """As many training reviews as validation has, always the same: so that both accuracies are measured alike."""
    return Subset(data["train"], stratified_rows(data["train"]["labels"][:], len(data["validation"]), seed=0))


def _read(source: str, revision: str | None) -> dict[str, Dataset]:
    """The splits of `source`, unchanged: "train", and where it has them "validation" and "test"."""
    path = Path(os.path.expanduser(source))
    try:
        if (path / "train" / "pos").is_dir() or (path.is_file() and tarfile.is_tarfile(path)):
            splits = {split: _read_acl_imdb(path, split) for split in ("train", "test")}
        elif path.is_dir():
            splits = {}
            for split in SPLITS:
                found = sorted(file for file in path.glob(f"{split}.*") if file.suffix.lower() in BUILDERS)
                if len(found) > 1 or (split == "train" and not found):
                    needs = f"needs one {split} file, {split}.parquet, .csv, .tsv or .jsonl; found"
                    raise UserError(f"--dataset {source}: {needs} {', '.join(file.name for file in found) or 'none'}")
                splits |= {split: _read_file(found[0])} if found else {}
        elif path.is_file() and path.suffix.lower() in BUILDERS:
            splits = {"train": _read_file(path)}
        elif path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
            accepted = "a Hub id; a file or folder (.parquet, .csv, .tsv, .jsonl); aclImdb, a folder or .tar.gz"
            raise UserError(f"--dataset {source}: no such folder, file or readable archive; accepted: {accepted}")
        else:
            check_hub(source, revision, "dataset")
            splits = load_dataset(source, revision=revision)
    except UserError:
        raise
    except Exception as error:  # of whatever kind: the file is a stranger's, and parsers have their own
        reason = " ".join(str(error.__cause__ or error).split())  # in one line
        offline = isinstance(error, OSError) and not os.path.exists(path)
        raise UserError(f"--dataset {source}: {OFFLINE if offline else f'cannot be read ({reason})'}") from error
    if "train" not in splits:
        raise UserError(f"--dataset {source}: has no train split; it has: {', '.join(splits) or 'none'}")
    return {split: splits[split] for split in SPLITS if split in splits}


def _read_file(file: Path) -> Dataset:
    """A table. Raises ValueError for whatever is in it."""
    builder, options, row = BUILDERS[file.suffix.lower()], {}, 0
    try:
        with file.open("rb") as lines:
            for row, line in enumerate(lines if builder != "parquet" else (), 1):
                line = line.decode("utf-8-sig")
                if builder == "json":  # what is none can crash Arrow's parser
                    json.loads(line.strip() or "{}")
                elif row == 1:  # "NA" and "null" are texts
                    options = dict(sep=max(",;\t", key=line.split("\r")[0].count), keep_default_na=False, na_values="")
        rows = load_dataset(builder, data_files=glob.escape(str(file)), split="train", **options)
        if options and rows.column_names[-1] == "__index_level_0__":
            raise ValueError("its first row has more fields than its header")
        rows.data.validate(full=True)  # Arrow lets bytes pass that are not UTF-8
        return rows
    except Exception as error:
        place = f"line {row} of {file.name}" if isinstance(error, json.JSONDecodeError | UnicodeError) else file.name
        raise ValueError(f"{place}: {getattr(error, 'msg', str(error.__cause__ or error)) or 'is empty'}") from None


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
                    member = tarfile.data_filter(member, path.parent)  # refuses what points out of it
                    rows.append({"text": archive.extractfile(member).read().decode(), "label": parts[-2]})
            while archive.fileobj.read(2**20):  # to gzip's checksum: tarfile takes a damaged header for the end
                pass
    return Dataset.from_list(rows, Features(text=Value("string"), label=ClassLabel(names=list(names))))


def _with_class_labels(splits: dict[str, Dataset], config) -> dict[str, Dataset]:
    """The splits, checked, with columns `text` and `label` only and the same ClassLabel in all."""
    flag, text, label = f"--dataset {config.dataset}", config.text_column, config.label_column
    texts, labels, named = {}, {}, {}
    for split, rows in splits.items():
        for column in (text, label):
            if column not in rows.column_names or f"{column}.1" in rows.column_names:  # pandas' name for a second one
                there = f"it has: {', '.join(rows.column_names)}{_proposal(rows)}"
                raise UserError(f"{flag}: the {split} split must have one column `{column}`; {there}")
        texts[split], labels[split] = (pd.Series(rows[column][:], dtype=object) for column in (text, label))
        named[split] = getattr(rows.features[label], "names", None)  # of a ClassLabel, whose -1 is none
    texts, labels = pd.concat(texts), pd.concat(labels)
    train, shown, kinds = labels.index.get_level_values(0) == "train", labels.map(repr), set(labels.map(type))
    mixed = len(kinds) > 1 or not kinds <= {int, bool, str}  # one stray cell turns a whole column into another type
    plain, there = labels.map(lambda label: " ".join(str(label).split())), ", ".join(sorted(set(shown[train])))
    shared, numbered = texts.map(str).isin(texts[train].map(str)) & ~train, {*map(str, filter(None, named.values()))}
    unusable = {
        "has no text, or one that is none": ~texts.map(lambda text: isinstance(text, str)),
        "has no label": shown.isin(["None", "-1"] if numbered else ["None"]),
        "has a NUL byte; UTF-8 texts have none": texts.map(lambda text: "\0" in str(text)),
        "is of another kind; needs integers alone or words alone": ~plain.str.fullmatch(r"-?\d+(\.0)?") & mixed,
        "equals another label but for white space": (shown != shown.groupby(plain).transform("first")) & (not mixed),
        "is of a split that numbers its classes in another order": shown.notna() & ~train & (len(numbered) > 1),
        "is of the only class in train; needs two or more": (shown.groupby(train).transform("nunique") < 2) & train,
        f"is of no class in train; it has: {there}": ~shown.isin(shown[train]),
    }
    doubtful = {
        "repeats a text that has another label": shown != shown.groupby(texts.map(str)).transform("first"),
        "is the only training text of its class": (shown.groupby([train, shown]).transform("size") == 1) & train,
        "repeats a text of train: scores will flatter": shared & (shared.sum() > sum(~train) / 100),
    }
    for found, rows in (unusable | doubtful).items():
        for split, row in rows[rows].index[:1]:
            line = f"row {row} of the {split} split, counted from 0, label {shown[split, row]}, {found}"
            if found in unusable:
                raise UserError(f"{flag}: {line}")
            PartialState().print(f"Warning:  {line}; the first of {rows.sum():,} such rows")
    classes = sorted(set(labels[train]))
    names = [str(int(label) if isinstance(label, float) else label) for label in classes]  # 1.0 is 1
    names = [named["train"][number] for number in classes] if named["train"] else names
    names = ["negative", "positive"] if names == ["neg", "pos"] else names
    options = {"features": Features(text=Value("string"), label=ClassLabel(names=names)), "desc": "Reading"}
    options["function"] = lambda rows: {"text": rows[text], "label": list(map(classes.index, rows[label]))}
    return {name: rows.map(**options, batched=True, remove_columns=rows.column_names) for name, rows in splits.items()}


def _proposal(rows: Dataset) -> str:
    """Flags that name the columns, where one alone looks like labels and one alone like texts."""
    types = ("string", "large_string", "int64", "bool")  # of texts and labels
    kinds = {name: kind.dtype for name, kind in rows.features.items() if getattr(kind, "dtype", "") in types}
    labels = [name for name in kinds if len(set(rows[name][:])) <= min(50, max(2, len(rows) / 5))]
    texts = [name for name in kinds if name not in labels and "string" in kinds[name]]
    flags = f"; try --text_column {shlex.join(texts)} --label_column {shlex.join(labels)}"
    return flags if len(labels) == len(texts) == 1 else ""


def check_hub(name: str, revision: str | None, kind: str) -> None:
    """Raise UserError where the Hub says that it does not have `name` at `revision`, or not for this user. Where it
    does not answer in 10 seconds, loading takes the cache alone from here on. kind: "model" or "dataset"."""
    log_in = "log in with `hf auth login` or set HF_TOKEN" + "; no token was found" * (not get_token())
    reasons = {
        errors.GatedRepoError: f"--{kind} {name}: wants its terms accepted on its page on the Hub; then {log_in}",
        errors.RevisionNotFoundError: f"--{kind}_revision {revision}: {name} has no such commit, tag or branch",
        errors.RepositoryNotFoundError: f"--{kind} {name}: the Hub has no such {kind}; if it is private, {log_in}",
        errors.HFValidationError: f"--{kind} {name}: is no folder here, and no name that the Hub could have",
    }
    try:
        HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=10)
    except tuple(reasons) as error:
        raise UserError(reasons[type(error)]) from error
    except (errors.HTTPError, OSError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            raise UserError(f"--{kind} {name}: the Hub does not accept the token; {log_in}") from error
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
