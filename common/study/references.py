"""What the methods are compared with: the majority class, TF-IDF with logistic regression, full fine-tuning.

    python -m common.references [--dataset ...] [--model ...] [--skip_full_fine_tuning]

writes common/references.json: test accuracies on the same split, at the same length, with the same tokens.
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from common.cli import parse_config, run
from common.data import load_reviews, tokenize, training_sample
from common.files import shown, write_json
from common.metrics import score, validation_scores
from common.model import label_config, load_tokenizer, mixed_precision
from common.record import environment
from common.trainer import ReviewTrainer


@dataclass
class Config:
    """The command line; the same values as in the four scripts."""

    model: str = HfArg(default="sentence-transformers/all-MiniLM-L6-v2", help="Backbone: a Hub id or a folder.")
    model_revision: str | None = HfArg(default="1110a243fdf4706b3f48f1d95db1a4f5529b4d41", help="Of the backbone.")
    dataset: str = HfArg(default="stanfordnlp/imdb", help="Reviews, as the scripts take them.")
    dataset_revision: str | None = HfArg(default="e6281661ce1c48d982bc483cf8a173c1bbeb5d31", help="Of the data set.")
    max_length: int = HfArg(default=512, help="Tokens per review.")
    epochs: int = HfArg(default=5, help="Passes over the training reviews; validation chooses the best of them.")
    batch_size: int = HfArg(default=128, help="Reviews per update of the weights.")
    gradient_accumulation_steps: int | None = HfArg(default=None, help="Steps that share one update.")
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="Of full fine-tuning, one run for each.")
    learning_rate: float = HfArg(default=1e-4, help="Of full fine-tuning.")
    output_dir: str | None = HfArg(default=None, help="Where --demo puts what it generates.")
    demo: bool = HfArg(default=False, help="Generated reviews and a tiny model; prints, writes nothing.")
    skip_full_fine_tuning: bool = HfArg(default=False, help="It wants a GPU.")


def majority_class(data: DatasetDict) -> float:
    """Test accuracy of always answering the training reviews' most frequent class."""
    most_frequent = np.bincount(data["train"]["labels"]).argmax()
    return float(np.mean(np.array(data["test"]["labels"]) == most_frequent))


def tfidf_logistic_regression(data: DatasetDict, vocabulary: int) -> float:
    """Test accuracy of logistic regression on TF-IDF of the backbone's own tokens, L2 chosen on validation.

    Terms count as 1 + log(count), times log(reviews / reviews with the term), rows of length 1.
    """

    def counts(reviews: Dataset) -> torch.Tensor:
        rows = np.repeat(np.arange(len(reviews)), [len(ids) for ids in reviews["input_ids"]])
        pairs = torch.tensor(np.stack([rows, np.concatenate(reviews["input_ids"][:])]))
        return torch.sparse_coo_tensor(pairs, torch.ones(len(rows)), (len(reviews), vocabulary)).coalesce()

    reviews_with = torch.bincount(counts(data["train"]).indices()[1], minlength=vocabulary)
    idf = torch.log(len(data["train"]) / reviews_with.clamp(min=1))

    def features(reviews: Dataset) -> torch.Tensor:
        terms = counts(reviews)
        values = (1 + terms.values().log()) * idf[terms.indices()[1]]
        norms = torch.zeros(len(reviews)).index_add_(0, terms.indices()[0], values**2).sqrt()
        values = values / norms[terms.indices()[0]].clamp(min=1e-12)
        return torch.sparse_coo_tensor(terms.indices(), values, terms.shape).coalesce().to_sparse_csr()

    inputs = {split: features(reviews) for split, reviews in data.items()}
    labels = {split: torch.tensor(reviews["labels"][:]) for split, reviews in data.items()}
    classes = len(labels["train"].unique())
    fits = []
    for penalty in (1e-6, 3e-6, 1e-5, 3e-5, 1e-4):
        weights = torch.zeros(vocabulary, classes, requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights, bias], max_iter=100, line_search_fn="strong_wolfe")

        def loss(weights=weights, bias=bias, optimizer=optimizer, penalty=penalty):
            optimizer.zero_grad()
            logits = inputs["train"] @ weights + bias
            value = nn.functional.cross_entropy(logits, labels["train"]) + penalty * weights.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        fits.append((weights.detach(), bias.detach()))

    def accuracy(split: str, fit: tuple[torch.Tensor, torch.Tensor]) -> float:
        return ((inputs[split] @ fit[0] + fit[1]).argmax(1) == labels[split]).float().mean().item()

    return accuracy("test", max(fits, key=lambda fit: accuracy("validation", fit)))


def full_fine_tuning(config: Config, seed: int, tokenizer, data: DatasetDict, classes: list[str]) -> float:
    """Test accuracy with every weight trained, at the epoch that validation chooses."""
    set_seed(seed, deterministic=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        config.model, revision=config.model_revision, dtype=torch.float32, **label_config(classes, tokenizer)
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            seed=seed,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size // config.gradient_accumulation_steps,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            learning_rate=config.learning_rate,
            warmup_steps=0.1,
            weight_decay=0.01,
            bf16=mixed_precision() == "bf16",
            fp16=mixed_precision() == "fp16",
            eval_on_start=True,
            eval_strategy="epoch",
            per_device_eval_batch_size=2 * config.batch_size // config.gradient_accumulation_steps,
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="validation_accuracy",
            logging_strategy="epoch",
            logging_nan_inf_filter=False,
            report_to="none",
        )
        trainer = ReviewTrainer(
            model=model,
            args=args,
            train_dataset=data["train"],
            eval_dataset={"train": training_sample(data), "validation": data["validation"]},
            processing_class=tokenizer,
            compute_metrics=validation_scores,
        )
        trainer.train()
        return score(trainer.predict(data["test"]))["accuracy"]


def main(argv: list[str] | None = None) -> dict:
    """Measure the references, write and return them."""
    config = parse_config(Config, Path(tempfile.gettempdir()) / "references", argv)
    tokenizer = load_tokenizer(config.model, config.model_revision, config.max_length)
    with PartialState().local_main_process_first():
        reviews, fingerprint = load_reviews(config.dataset, config.dataset_revision)
        data = tokenize(reviews, tokenizer, config.max_length)
    classes = reviews["train"].features["label"].names
    accuracy = {
        "majority class": majority_class(data),
        "TF-IDF + logistic regression": tfidf_logistic_regression(data, len(tokenizer)),
    }
    if not config.skip_full_fine_tuning:
        runs = [full_fine_tuning(config, seed, tokenizer, data, classes) for seed in config.seeds]
        accuracy["full fine-tuning"] = statistics.mean(runs)
    record = {
        "command": " ".join(["python -m common.references", *map(shown, sys.argv[1:] if argv is None else argv)]),
        "dataset_sha256": fingerprint,
        "max_length": config.max_length,
        "accuracy": accuracy,
        "environment": environment(),
    }
    print(accuracy)
    if not config.demo:
        write_json(record, Path(__file__).with_name("references.json"))
    return record


if __name__ == "__main__":
    run(main)
