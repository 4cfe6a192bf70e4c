"""Scores against values worked out by hand; counts and bytes that add up."""

import math
import socket
import sys
import warnings
from types import SimpleNamespace

import evaluate
import numpy as np
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction

from common.metrics import ClassificationScores, peak_memory, score, split_memory, validation_scores
from common.model import count_parameters


def scores(references, predictions, num_classes):
    """With every warning an error, as of a division by zero."""
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        return ClassificationScores(keep_in_memory=True).compute(
            predictions=predictions, references=references, num_classes=num_classes
        )


def test_two_classes_are_scored_by_the_positive_one():
    assert scores([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0, 0, 0], 2) == {
        "accuracy": pytest.approx(7 / 10),
        "precision": pytest.approx(3 / 5),
        "recall": pytest.approx(3 / 4),
        "f1": pytest.approx(2 / 3),
        "confusion_matrix": [[4, 2], [1, 3]],  # a row is what was true
    }


def test_three_classes_are_scored_by_their_plain_mean():
    assert scores([0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 2, 2, 2, 2, 1], 3) == {
        "accuracy": pytest.approx(6 / 9),
        "precision": pytest.approx((1 + 1 / 3 + 3 / 4) / 3),
        "recall": pytest.approx((2 / 3 + 1 / 2 + 3 / 4) / 3),
        "f1": pytest.approx((4 / 5 + 2 / 5 + 3 / 4) / 3),
        "confusion_matrix": [[2, 1, 0], [0, 1, 1], [0, 1, 3]],
    }


@pytest.mark.parametrize(
    ("references", "predictions", "num_classes", "expected"),
    [
        ([0, 1, 1], [0, 0, 0], 2, (1 / 3, 0, 0, 0)),  # the positive class never predicted
        ([0, 0, 0], [0, 1, 0], 2, (2 / 3, 0, 0, 0)),  # or never there
        ([0, 0], [0, 0], 2, (1, 0, 0, 0)),
        ([0, 1, 2, 2], [0, 1, 1, 1], 3, (1 / 2, (1 + 1 / 3) / 3, 2 / 3, (1 + 1 / 2) / 3)),
        ([0, 1], [0, 1], 3, (1, 2 / 3, 2 / 3, 2 / 3)),
        ([1], [1], 2, (1, 1, 1, 1)),
    ],
)
def test_class_that_never_occurs_scores_nothing(references, predictions, num_classes, expected):
    result = scores(references, predictions, num_classes)
    assert [result[name] for name in ("accuracy", "precision", "recall", "f1")] == pytest.approx(list(expected))
    assert np.shape(result["confusion_matrix"]) == (num_classes, num_classes)
    assert np.sum(result["confusion_matrix"]) == len(references)


def test_scores_are_plain_numbers_for_json():
    result = scores([0, 1, 1], [0, 1, 0], 2)
    assert all(type(result[name]) is float for name in ("accuracy", "precision", "recall", "f1"))
    assert all(type(count) is int for row in result["confusion_matrix"] for count in row)


LOGITS = np.array([[2.0, -1.0], [0.5, 1.5], [3.0, -4.0], [-2.0, 2.5], [0.25, 0.0]], dtype=np.float32)
LABELS = np.array([0, 1, 1, 1, 1])


def cross_entropy(logits, labels) -> float:
    """The mean over all reviews, in plain Python."""
    losses = [
        math.log(sum(math.exp(value) for value in row)) - row[label]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    return sum(losses) / len(losses)


def test_logits_are_scored():
    prediction = EvalPrediction(predictions=LOGITS, label_ids=LABELS)
    tested, logged = score(prediction), validation_scores(prediction)
    assert tested["confusion_matrix"] == [[1, 0], [2, 2]]
    assert (tested["accuracy"], tested["f1"]) == pytest.approx((3 / 5, 2 / 3))
    assert set(logged) == {"accuracy", "f1", "loss", "rank"}
    assert (logged["accuracy"], logged["f1"]) == (tested["accuracy"], tested["f1"])
    assert logged["loss"] == pytest.approx(cross_entropy(LOGITS, LABELS), rel=1e-6)


def test_rank_goes_by_accuracy_then_by_loss():
    def rank(*margins):  # of five reviews; a negative one is a mistake
        logits = np.outer(margins, [-1.0, 1.0])
        return validation_scores(EvalPrediction(predictions=logits, label_ids=np.ones(5, int)))["rank"]

    assert (
        rank(9, 9, -9, -9, 9) < rank(0.1, 0.1, 0.1, 0.1, -9) < rank(0.1, 0.1, 0.1, 0.1, -0.1) < rank(1, 1, 1, 1, -0.1)
    )


def test_number_of_classes_is_that_of_the_logits():
    prediction = EvalPrediction(predictions=np.eye(4)[[0, 1, 1]], label_ids=np.array([0, 1, 0]))
    assert np.shape(score(prediction)["confusion_matrix"]) == (4, 4)
    expected = cross_entropy(prediction.predictions, prediction.label_ids)
    assert validation_scores(prediction)["loss"] == pytest.approx(expected)


def test_loss_of_half_precision_logits_is_computed_in_full():
    logits = (20 * LOGITS).astype(np.float16)
    loss = validation_scores(EvalPrediction(predictions=logits, label_ids=LABELS))["loss"]
    assert loss == pytest.approx(cross_entropy(logits, LABELS), rel=1e-6)


def test_no_network_is_needed(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("asked for the network")

    monkeypatch.setattr(evaluate, "load", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert score(EvalPrediction(predictions=LOGITS, label_ids=LABELS))["accuracy"] == 3 / 5


# Parameters


@pytest.fixture
def classifier():
    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    return BertForSequenceClassification(config)


def test_parameters_of_a_frozen_backbone(classifier):
    total = sum(weight.numel() for weight in classifier.parameters())
    assert count_parameters(classifier) == (total, total)
    classifier.bert.requires_grad_(False)
    assert count_parameters(classifier) == (8 * 3 + 3, total)


def test_saved_modules_count_once(classifier):
    total = sum(weight.numel() for weight in classifier.parameters())
    head = (8 * 8 + 8) + (8 * 3 + 3)  # pooler and classifier
    updates = 2 * 2 * 2 * (4 * 8)  # blocks, projections, A and B of rank 4
    model = get_peft_model(
        classifier,
        LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["bert.pooler", "classifier"]),
    )
    assert count_parameters(model) == (updates + head, total + updates)
    assert model.get_nb_trainable_parameters()[1] == total + updates + head, "PEFT counts the head twice"


def pack_in_4_bits(weight) -> torch.nn.Parameter:
    """As bitsandbytes keeps a weight: two values in a byte, and 12 bytes of scales."""
    packed = torch.nn.Parameter(torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    state = {"absmax": torch.zeros(3), "quant_type": "nf4"}
    packed.quant_state = SimpleNamespace(shape=weight.shape, as_dict=lambda packed: state)
    return packed


def test_4_bit_weights_count_as_what_they_stand_for(classifier):
    total = sum(weight.numel() for weight in classifier.parameters())
    classifier.bert.requires_grad_(False)
    dense = classifier.bert.encoder.layer[0].output.dense
    dense.weight = pack_in_4_bits(dense.weight)
    assert count_parameters(classifier) == (8 * 3 + 3, total)


# Memory


def trained(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(weight for weight in model.parameters() if weight.requires_grad)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return optimizer


def test_memory_parts_are_what_is_held_and_sum_to_the_peak():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6).eval(), torch.nn.Linear(6, 2))
    model[0].requires_grad_(False)
    optimizer = trained(model)
    trainable = (6 + 6) + (12 + 2)
    buffers = 4 * (6 + 6) + 8  # running mean and variance, and one long
    parts = split_memory(model, optimizer, peak=10_000)
    assert parts == {
        "weights": 4 * (24 + 6 + trainable) + buffers,
        "gradients": 4 * trainable,
        "optimizer": 2 * 4 * trainable + 4 * 4,  # two moments, and a step for each of four weights
        "rest": 10_000 - sum(parts[name] for name in ("weights", "gradients", "optimizer")),
    }
    assert sum(parts.values()) == 10_000


def test_memory_of_4_bit_weights_includes_their_scales():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 2, bias=False))
    optimizer = trained(model)
    model[0].weight = pack_in_4_bits(model[0].weight)
    parts = split_memory(model, optimizer, peak=1000)
    assert parts["weights"] == 16 // 2 + 3 * 4 + 4 * 8
    assert parts["gradients"] == 4 * 8


def test_peak_memory_is_in_bytes(monkeypatch):
    assert 50e6 < peak_memory() < 1e12, "PyTorch alone needs more than 50 MB"
    monkeypatch.setitem(sys.modules, "resource", None)  # there is none on Windows
    monkeypatch.setattr(psutil, "WINDOWS", True)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert peak_memory() == 123
