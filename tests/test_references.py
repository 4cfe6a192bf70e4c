"""What the methods are compared with, on reviews whose answer is known."""

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from common.references import majority_class, tfidf_logistic_regression


@pytest.fixture
def data():
    """Token 1 makes a review positive, token 2 negative, the others say nothing; two thirds are positive."""
    random = np.random.default_rng(0)

    def reviews(size):
        labels = [int(row % 3 > 0) for row in range(size)]
        return Dataset.from_dict(
            {"input_ids": [[2 - label, *random.integers(3, 20, 6).tolist()] for label in labels], "labels": labels}
        )

    return DatasetDict(train=reviews(120), validation=reviews(30), test=reviews(60))


def test_majority_class(data):
    assert majority_class(data) == pytest.approx(2 / 3)


def test_tfidf_finds_the_words_that_decide(data):
    assert tfidf_logistic_regression(data, 20) == 1.0


def test_tfidf_chooses_without_the_test_reviews(data):
    flipped = data["test"].map(lambda review: {"labels": 1 - review["labels"]})
    assert tfidf_logistic_regression(DatasetDict(data | {"test": flipped}), 20) == 0.0
