"""Label texts with a saved model of any of the scripts, or merge an adapter into its backbone.

    python -m common.predict FOLDER "A slow start, but what an ending."
    python -m common.predict FOLDER < texts.txt
    python -m common.predict FOLDER --file texts.csv --text_column text --output labelled.csv
    python -m common.predict FOLDER --merge DEST

FOLDER is <METHOD>/runs/<data>/seed_0/model. Texts are cleaned and truncated as in training. Files are read, labelled
and written in parts, so their size does not matter. A label's probability, to six decimals, is a column of --output.
"""

import argparse
import csv
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from common import demo
from common.cli import UserError, run, whole_file
from common.data import clean
from common.model import compute_dtype, label_config, missing_weights, weights_place

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
CHUNK = 1024  # rows in memory at a time


def load(folder: Path, backbone: str | None = None, plain: bool = False) -> tuple:
    """The model in `folder`, in evaluation mode, and its tokenizer. An adapter comes on its backbone: as it was
    trained, in 4 bits too; or `plain`, in float32 in the host's memory. backbone: a Hub id or a folder; None for that
    of the run around `folder`, or without a run the one that the adapter names. Raises UserError where it cannot be
    read or is another one."""
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"  # as in training
    place = {"dtype": torch.float32} if plain else {"dtype": compute_dtype(), "device_map": weights_place()}
    if not (folder / "adapter_config.json").exists():
        model, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True, **place)
        if missing := missing_weights(loading):
            raise UserError(f"{folder}: has no trained head; {', '.join(missing)} would be random")
    else:
        from peft import PeftConfig, PeftModel  # slow to import

        saved = PeftConfig.from_pretrained(folder)
        flags = folder.parent / "flags.json"  # of the run: the adapter, fit to share, names no folder of this machine
        trained_on = json.loads(flags.read_text())["model"] if flags.exists() else saved.base_model_name_or_path
        trained_on = trained_on.split(" with SHA-256 ")[0]  # as flags.json has it
        name, revision = (backbone, None) if backbone else (trained_on, saved.revision)
        if not plain and hasattr(config, "quantization_config"):  # trained on a GPU, it may be used on a CPU
            place["quantization_config"] = config.quantization_config | {"bnb_4bit_compute_dtype": compute_dtype()}
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                name,
                revision=revision,
                use_safetensors=True,  # pickles could run code
                ignore_mismatched_sizes=True,  # the adapter brings its own head
                **label_config([*config.id2label.values()], tokenizer),
                **place,
            )
            model = PeftModel.from_pretrained(model, folder)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{folder}: its backbone {name} is not there or does not fit ({reason}); "
                "name the right folder or Hub id with --backbone"
            ) from error
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):  # 4-bit layers, which would compute in bf16 where a CPU can
            part.support_avx512bf16_for_cpu = False
    model.config.use_cache = False  # decoders would keep keys and values for texts to come
    return model.eval(), tokenizer


@torch.inference_mode()
def probabilities(model, tokenizer, texts: list[str], batch_size: int | None = None, bar=None) -> np.ndarray:
    """Of each class for each text, (texts, classes), float32. batch_size: texts at a time; None suits the device.
    bar: a tqdm that counts texts. Raises UserError where the GPU's memory is too small."""
    rows = tokenizer([clean(text) for text in texts], truncation=True)["input_ids"]
    rows = [ids or [tokenizer.pad_token_id] for ids in rows]  # a model needs a token
    by_length = np.argsort([-len(ids) for ids in rows], kind="stable")  # hardly any padding
    size = batch_size or (16 if model.device.type == "cpu" else 128)  # on a CPU 16 fit its cache
    found, dtype = np.empty((len(texts), model.config.num_labels), np.float32), compute_dtype()
    for part in (by_length[start : start + size] for start in range(0, len(rows), size)):
        batch = tokenizer.pad({"input_ids": [rows[row] for row in part]}, return_tensors="pt").to(model.device)
        try:
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                logits = model(**batch).logits
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of GPU memory; --batch_size {max(1, size // 2)} may help") from error
        found[part] = logits.float().softmax(-1).cpu()
        if bar is not None:
            bar.update(len(part))
    return found


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a .csv, .tsv, .jsonl or .parquet file. Cells of the first two stay strings as they are written.
    Raises UserError where the file cannot be read."""
    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow.parquet import ParquetFile

            with ParquetFile(path) as file:
                for batch in file.iter_batches(CHUNK):
                    yield from batch.to_pylist()
            return
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel starts its files with a mark
            if path.suffix.lower() == ".jsonl":
                yield from (json.loads(line) for line in file if line.strip())
            else:
                csv.field_size_limit(2**31 - 1)  # characters; by default a text has at most 131,072
                yield from csv.DictReader(file, delimiter=_delimiter(path, path), strict=True)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--file {path}: cannot be read ({str(error).splitlines()[0]})") from error


def write_rows(chunks: Iterable[list[dict]], columns: list[str], path: Path, source: Path | None) -> None:
    """Write to `path`, in the format of its suffix, whole or not at all. source: the file that the rows are from; a
    CSV file's separator and a Parquet file's types are kept. Raises UserError where a column has values of different
    types."""
    with whole_file(path) as temporary:
        if path.suffix.lower() == ".parquet":
            import pyarrow as pa
            from pyarrow import parquet

            known = parquet.read_schema(source) if source and source.suffix.lower() == ".parquet" else pa.schema([])
            chunks = iter(chunks)
            first = [{name: row.get(name) for name in columns} for row in next(chunks)]
            new = pa.Table.from_pylist(first).schema
            schema = pa.schema([(known if name in known.names else new).field(name) for name in columns])
            with parquet.ParquetWriter(temporary, schema) as file:
                try:
                    for chunk in chain([first], chunks):
                        file.write_table(pa.Table.from_pylist(chunk, schema))
                except pa.ArrowException as error:
                    raise UserError(f"--output {path}: {error}; .jsonl takes every value") from error
            return
        with temporary.open("w", newline="", encoding="utf-8") as file:
            if path.suffix.lower() == ".jsonl":
                for chunk in chunks:
                    file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in chunk)
            else:
                table = csv.DictWriter(file, columns, delimiter=_delimiter(path, source), lineterminator="\n")
                table.writeheader()
                for chunk in chunks:
                    table.writerows(chunk)


def _delimiter(path: Path, source: Path | None) -> str:
    """Of `source` if that is such a file too, by its header, else the usual one."""
    usual = "\t,;" if path.suffix.lower() == ".tsv" else ",;\t"
    if not source or source.suffix.lower() != path.suffix.lower():
        return usual[0]
    with source.open(encoding="utf-8-sig") as file:
        return max(usual, key=file.readline().count)


def checked(rows: Iterable[dict], column: str, source: str) -> Iterator[dict]:
    """`rows`, each with a text in `column`. source: how messages name them. Raises UserError where one has none."""
    number = 0
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or None in row:  # where csv puts fields beyond the header
            raise UserError(f"{source}: row {number} has more fields than the header, or none")
        if column not in row:
            raise UserError(f"{source}: row {number} has no column {column}; it has: {', '.join(row)}")
        if not isinstance(row[column], str) or not clean(row[column]).strip():
            raise UserError(f"{source}: row {number} has no text in column {column}")
        yield row
    if not number:
        raise UserError(f"{source}: has no rows")


def predict(
    args, folder: Path, backbone: str | None, rows: Iterable[dict], count: int | None = None
) -> Iterator[tuple]:
    """For part after part of `rows`, the rows and what the model in `folder` makes of them: probabilities,
    (rows, classes). count: of all rows, for a progress bar; None shows none."""
    model, tokenizer = load(folder, backbone)
    rows = iter(rows)
    with tqdm(total=count, unit=" texts", disable=count is None) as bar:
        while chunk := list(islice(rows, CHUNK)):
            texts = [row[args.text_column] for row in chunk]
            yield chunk, probabilities(model, tokenizer, texts, args.batch_size, bar)


def merge(args, read: Callable[[], Iterable[dict]], count: int) -> None:
    """Write an adapter and its backbone as one checkpoint to `args.merge`, and print how its answers to the rows that
    `read` gives differ from those of the adapter as it was trained. count: of these rows."""
    model, tokenizer = load(args.folder, args.backbone, plain=True)  # merged into 4 bits, the update would be rounded
    model.merge_and_unload().save_pretrained(args.merge)
    tokenizer.save_pretrained(args.merge)
    del model  # before two others are loaded
    apart, whole = (
        np.concatenate([found for _, found in predict(args, *place, read(), count)])
        for place in ((args.folder, args.backbone), (args.merge, None))
    )
    changed, most = (apart.argmax(1) != whole.argmax(1)).sum(), np.abs(apart - whole).max()
    print(f"Merged:  {args.merge}, a plain checkpoint in float32")
    print(f"Check:   {changed} of {len(apart)} labels changed, largest change of a probability {most:.4f}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises UserError for what cannot be used."""
    parser = argparse.ArgumentParser("python -m common.predict", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="A saved model.")
    add("texts", nargs="*", metavar="TEXT", help="Without any, and without --file: the lines of standard input.")
    add("--file", type=Path, help="Texts: .csv, .tsv, .jsonl or .parquet.")
    add("--text_column", "--text-column", default="text", help="Where they are in --file. [text]")
    add("--output", type=Path, help="For the rows with their labels: .csv, .tsv, .jsonl or .parquet.")
    add("--json", action="store_true", help="Print one JSON object per text.")
    add("--batch_size", "--batch-size", type=int, help="Texts at a time. [128 on a GPU, 16 on a CPU]")
    add("--backbone", help="A Hub id or a folder: where an adapter's backbone is now.")
    add("--merge", type=Path, metavar="DEST", help="Write an adapter and its backbone as one checkpoint, in float32.")
    args = parser.parse_intermixed_args(argv)
    saved = args.folder / "config.json"
    if not saved.exists() or not any(args.folder.glob("*model*.safetensors")):
        scripts = [script.relative_to(ROOT) for script in sorted(ROOT.glob("*/train.py"))]
        scripts = [script for script in scripts if script.parent.name in args.folder.parts] or scripts
        ways = " or ".join(f"python {script}" for script in scripts)
        raise UserError(f"{args.folder}: has no trained model; this leaves one in runs/imdb/seed_0/model: {ways}")
    for name, path in (("file", args.file), ("output", args.output)):
        if path and path.suffix.lower() not in SUFFIXES:
            raise UserError(f"--{name} {path}: must be one of {', '.join(SUFFIXES)}")
    if args.file and (args.texts or not args.file.is_file()):
        raise UserError(f"--file {args.file}: " + ("goes without texts" if args.texts else "no such file"))
    if args.output and not args.output.absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: no such folder")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: must be 1 or more")
    if args.merge and not (args.folder / "adapter_config.json").exists():
        raise UserError(f"--merge: {args.folder} already is a plain checkpoint")
    if args.merge and args.merge.exists() and (not args.merge.is_dir() or any(args.merge.iterdir())):
        raise UserError(f"--merge {args.merge}: is there already, and is not an empty folder")
    return args


def source(args) -> tuple[str, Callable[[], Iterable[dict]]]:
    """What messages call the place that the texts come from, and a function that reads their rows from its start."""
    if args.file:
        return f"--file {args.file}", lambda: read_rows(args.file)
    if args.texts or args.merge:
        texts = args.texts or [row["text"] for row in demo.write_corpus()[1]]
        return "the command line", lambda: [{args.text_column: text} for text in texts]
    return "standard input", lambda: ({args.text_column: line.rstrip("\n")} for line in sys.stdin)


def main(argv: list[str] | None = None) -> None:
    """Label the texts, or merge."""
    args = parse(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading the weights
    (place, read), columns, count = source(args), {}, 0
    if place != "standard input":  # all of it is checked before long work
        for row in checked(read(), args.text_column, place):
            columns, count = columns | row, count + 1
    if args.merge:
        return merge(args, read, count)
    names = [*AutoConfig.from_pretrained(args.folder).id2label.values()]
    new = ["predicted_label" if "label" in columns else "label", *(f"probability_{name}" for name in names)]
    if args.output and (taken := [name for name in new if name in columns]):
        raise UserError(f"--file {args.file}: already has what would be new: {', '.join(taken)}")
    rows = checked(read(), args.text_column, place)
    parts = predict(args, args.folder, args.backbone, rows, count if args.file else None)
    labelled = (
        [(row, names[one.argmax()], *one.astype(float).round(6).tolist()) for row, one in zip(*part, strict=True)]
        for part in parts
    )
    if args.output:
        chunks = ([row | dict(zip(new, answer, strict=True)) for row, *answer in part] for part in labelled)
        return write_rows(chunks, [*columns, *new], args.output, args.file)
    for row, label, *shares in chain.from_iterable(labelled):
        text, shares = row[args.text_column], dict(zip(names, shares, strict=True))
        if args.json:
            print(json.dumps({"text": text, "label": label, "probabilities": shares}, ensure_ascii=False))
        else:
            listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            print(f"{label:{max(map(len, names))}}  {listed}  {textwrap.shorten(text, 80)}")


if __name__ == "__main__":
    run(main)
