"""Test accuracy of what costs less than fine-tuning: majority class, TF-IDF, and linear probes on the frozen backbone.

    python -m common.study.references
    python -m common.study.references --model ~/minilm --dataset ~/imdb

It takes the flags of the scripts and the same split. The strength of regularisation is chosen on validation. The test
texts that are in the training reviews too are counted as well. A full run writes common/study/references.json; one
with other reviews, another backbone, --demo or --max_*_samples writes to its --output_dir. The probes take half an
hour without a GPU.
"""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from common.cli import parse_config, run, write_json
from common.data import clean, load_reviews, tokenize
from common.model import compute_dtype, load_tokenizer
from common.record import command_line, environment
from common.study.scripts import HERE, record_path, script
from common.trainer import ReviewTensors, longest_first

FOLDER = HERE / "runs" / "references"


@dataclass
class Config(script("NEW_HEAD").Config):
    """The command line: that of the scripts."""


def majority_class(labels: dict[str, list[int]]) -> dict:
    """Always the training reviews' most frequent class. labels: by split."""
    classifier = DummyClassifier().fit(np.zeros((len(labels["train"]), 1)), labels["train"])
    test = labels["test"]
    return {"accuracy": classifier.score(np.zeros((len(test), 1)), test)}


def logistic_regression(features: dict, labels: dict[str, list[int]], strengths: tuple, *steps) -> dict:
    """Fit with each C of `strengths`, after `steps` such as a scaler; the best on validation is tested.

    features: a matrix of (reviews, features) by split. A small C is strong regularisation.
    """
    models = [
        make_pipeline(*steps, LogisticRegression(C=strength, max_iter=1000)).fit(features["train"], labels["train"])
        for strength in strengths
    ]
    scores = [model.score(features["validation"], labels["validation"]) for model in models]
    best = int(np.argmax(scores))
    accuracy = models[best].score(features["test"], labels["test"])
    return {"accuracy": accuracy, "validation_accuracy": scores[best], "C": strengths[best]}


def tfidf(reviews: DatasetDict, labels: dict[str, list[int]]) -> dict:
    """Logistic regression on words and pairs of words of the whole reviews, each weighed by TF-IDF."""
    texts = {split: list(map(clean, rows["text"][:])) for split, rows in reviews.items()}
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit(texts["train"])
    features = {split: vectorizer.transform(part) for split, part in texts.items()}
    return logistic_regression(features, labels, (1, 3, 10, 30, 100))


@torch.no_grad()
def backbone_features(model: PreTrainedModel, reviews: Dataset, pad_token_id: int, batch_size: int) -> dict:
    """Of each review's last hidden states the first token's, "cls", and the "mean" of all, both (reviews, size).

    reviews: columns `input_ids` and `labels`.
    """
    tensors, found = ReviewTensors(reviews, pad_token_id, model.device), {"cls": [], "mean": []}
    rows = list(longest_first(tensors.lengths, batch_size))
    for part in logging.tqdm(rows, desc="Through the backbone"):
        batch = tensors.__getitems__(part)
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        with torch.autocast(model.device.type, compute_dtype(), enabled=model.device.type == "cuda"):
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (rows, width, size)
        weights = mask.unsqueeze(2)
        found["cls"].append(hidden[:, 0].cpu())
        found["mean"].append(((hidden * weights).sum(1) / weights.sum(1)).cpu())
    order = np.argsort(np.concatenate(rows))
    return {name: torch.cat(parts).numpy()[order] for name, parts in found.items()}


def frozen_backbone(config: Config) -> PreTrainedModel:
    """The backbone without a head, on the GPU where there is one."""
    model = AutoModel.from_pretrained(config.model, revision=config.model_revision, dtype=compute_dtype()).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def linear_probes(config, tokenizer, data: DatasetDict, labels: dict, kinds=("cls", "mean")) -> dict[str, dict]:
    """Logistic regression on these kinds of `backbone_features`. data: tokenised reviews by split; labels: too."""
    model = frozen_backbone(config)
    size = 256 if torch.cuda.is_available() else 32
    splits = {split: backbone_features(model, rows, tokenizer.pad_token_id, size) for split, rows in data.items()}
    return {
        name: logistic_regression(
            {split: features[name] for split, features in splits.items()},
            labels,
            (0.001, 0.01, 0.1, 1),
            StandardScaler(),
        )
        for name in kinds
    }


def test_texts_in_train(reviews: DatasetDict) -> dict:
    """How many test texts are training or validation texts too, and their share."""
    known = {*reviews["train"]["text"][:], *reviews["validation"]["text"][:]}
    count = sum(text in known for text in reviews["test"]["text"][:])
    return {"count": count, "share": count / len(reviews["test"])}


def main(argv: list[str] | None = None) -> dict:
    """Measure the references and write the record; returns it."""
    config = parse_config(Config, FOLDER, argv)
    tokenizer = load_tokenizer(config.model, config.model_revision, config.max_length)
    reviews, fingerprint = load_reviews(config)
    data = tokenize(reviews, tokenizer, config.max_length)
    labels = {split: rows["label"][:] for split, rows in reviews.items()}
    probes = linear_probes(config, tokenizer, data, labels)
    record = {
        "command": command_line("-m common.study.references", argv),
        "dataset_sha256": fingerprint,
        "max_length": config.max_length,
        "rows": [
            {"name": "majority class", **majority_class(labels)},
            {"name": "linear probe on [CLS]", **probes["cls"]},
            {"name": "linear probe on the mean", **probes["mean"]},
            {"name": "TF-IDF + logistic regression", **tfidf(reviews, labels)},
        ],
        "test_texts_in_train": test_texts_in_train(reviews),
        "environment": environment(),
    }
    for row in record["rows"]:
        print(f"{row['name']:<30}{100 * row['accuracy']:.2f}", row.get("C", ""))
    print(record["test_texts_in_train"])
    path = record_path("references", config, fingerprint, FOLDER)
    write_json(record, path)
    print(f"Record:   {path}")
    return record


if __name__ == "__main__":
    run(main)
