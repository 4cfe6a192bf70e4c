"""Which differences between the methods are real, and whose probabilities can be trusted? From the published runs.

    python -m common.study.predictions NEW_HEAD
    python -m common.study.predictions PEFT_LORA --runs PEFT_LORA/runs

Reads what a run left in runs/seed_*/logits.npz and writes common/study/<METHOD>_predictions.json; of a run that is
not the published one, a file of this name beside the seeds. For each seed: which
test reviews it gets right, as bits (longest review first), and the log loss and expected calibration error of its
probabilities, before and after dividing its logits by one temperature, which is fitted on validation (Guo et al.,
2017). `compare` sets two such records side by side.
"""

import argparse
import base64
import json
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from common.cli import run, write_json
from common.study import full_fine_tuning
from common.study.scripts import HERE, METHODS, script

BINS = 15  # of confidence, of equal width


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log probability of the true class. logits: (reviews, classes), labels: (reviews,)."""
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error: how far confidence is from accuracy, bin by bin, on average over the reviews."""
    confidence, right = np.exp(log_softmax(logits, axis=1).max(axis=1)), logits.argmax(axis=1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, weights=confidence - right)).sum() / len(labels))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The number to divide the logits by for the lowest log loss."""
    found = minimize_scalar(lambda log: log_loss(logits / np.exp(log), labels), bounds=(-3, 3), method="bounded")
    return float(np.exp(found.x))


def describe(logits: dict[str, np.ndarray]) -> dict:
    """One seed's entry of the record, from its logits.npz."""
    test, labels = logits["test_logits"].astype(float), logits["test_labels"]
    temperature = fit_temperature(logits["validation_logits"].astype(float), logits["validation_labels"])
    right = np.packbits(test.argmax(axis=1) == labels)
    return {
        "test_reviews": len(labels),
        "right": base64.b64encode(right.tobytes()).decode(),
        "temperature": temperature,
        "log_loss": log_loss(test, labels),
        "calibration_error": calibration_error(test, labels),
        "log_loss_with_temperature": log_loss(test / temperature, labels),
        "calibration_error_with_temperature": calibration_error(test / temperature, labels),
    }


def right_answers(record: dict) -> np.ndarray:
    """Which test reviews each seed gets right, (seeds, reviews)."""
    rows = [np.frombuffer(base64.b64decode(run["right"]), np.uint8) for run in record["runs"]]
    return np.array([np.unpackbits(row)[: run["test_reviews"]] for row, run in zip(rows, record["runs"], strict=True)])


def compare(record: dict, other: dict, samples: int = 10_000) -> tuple[float, float, float]:
    """By how many points of test accuracy `record` is above `other`, and the 95% interval of a paired bootstrap.

    Reviews and seeds are both drawn anew, with replacement: the same reviews for both, the seeds for each.
    """
    random, ours, theirs = np.random.default_rng(0), right_answers(record), right_answers(other)
    # By bits of both: a sample of reviews is a sample of the patterns that occur, counted.
    patterns, counts = np.unique(np.vstack([ours, theirs]), axis=1, return_counts=True)
    drawn = random.multinomial(counts.sum(), counts / counts.sum(), size=samples)  # (samples, patterns)
    accuracies = 100 * drawn @ patterns.T / counts.sum()  # (samples, seeds of both)
    differences = np.zeros(samples)
    for part, sign in ((accuracies[:, : len(ours)], 1), (accuracies[:, len(ours) :], -1)):
        seeds = random.integers(part.shape[1], size=part.shape)
        differences += sign * np.take_along_axis(part, seeds, axis=1).mean(axis=1)
    low, high = np.percentile(differences, (2.5, 97.5))
    return 100 * float(ours.mean() - theirs.mean()), float(low), float(high)


def main(argv: list[str] | None = None) -> dict:
    """Write the record of one method; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=[*METHODS, "full_fine_tuning"])
    parser.add_argument("--runs", type=Path, help="Folder with seed_*/logits.npz. [runs/imdb beside the script]")
    args = parser.parse_args(argv)
    method = full_fine_tuning if args.method == "full_fine_tuning" else script(args.method)
    folder = args.runs or method.FOLDER / "runs" / "imdb"
    files = sorted(folder.glob("seed_*/logits.npz"))
    if not files:
        parser.error(f"--runs {folder}: has no seed_*/logits.npz; a full run of {args.method}/train.py leaves them")
    found = [json.loads((file.parent / "run.json").read_text()) for file in files]
    runs = [{"seed": one["seed"], **describe(np.load(file))} for one, file in zip(found, files, strict=True)]
    record = {"method": method.FOLDER.name, "runs": runs}
    known = HERE / "full_fine_tuning.json" if method is full_fine_tuning else method.FOLDER / "results.json"
    place = HERE if known.exists() and json.loads(known.read_text())["runs"] == found else folder
    path = place / f"{args.method}_predictions.json"
    write_json(record, path)
    for entry in runs:
        print({name: value for name, value in entry.items() if name != "right"})
    print(f"Record:   {path}")
    return record


if __name__ == "__main__":
    run(main)
