"""What the methods are compared with, on reviews whose answer is known."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModel, AutoTokenizer

from common.study import references
from common.study.references import backbone_features, logistic_regression, majority_class, test_texts_in_train, tfidf

test_texts_in_train.__test__ = False  # no test, though it is called like one


def labels_of(reviews: DatasetDict) -> dict[str, list[int]]:
    return {split: rows["label"][:] for split, rows in reviews.items()}


@pytest.fixture
def reviews():
    """Two thirds are positive: "not bad" makes a review so, "not good" does not. No single word tells them apart."""
    random = np.random.default_rng(0)

    def some(size):
        labels = [int(row % 3 > 0) for row in range(size)]
        texts = []
        for label in labels:
            right, wrong = ("bad", "good") if label else ("good", "bad")
            words = random.choice(["plot", "actor", "music", "film"], 4)
            texts.append(f"{words[0]} not {right} {words[1]}<br />{words[2]} very {wrong} {words[3]}")
        return Dataset.from_dict({"text": texts, "label": labels})

    return DatasetDict(train=some(120), validation=some(30), test=some(60))


def test_majority_class(reviews):
    assert majority_class(labels_of(reviews)) == {"accuracy": pytest.approx(2 / 3)}


def test_tfidf_reads_pairs_of_words(reviews):
    assert tfidf(reviews, labels_of(reviews))["accuracy"] == 1.0


def test_regularisation_is_chosen_on_validation_not_on_test():
    random = np.random.default_rng(0)
    label = {
        split: random.integers(0, 2, size).tolist()
        for split, size in (("train", 60), ("validation", 400), ("test", 400))
    }
    # The first column has the signal, the others are noise: strong regularisation is better.
    features = {
        split: np.column_stack(
            [2 * np.array(rows) + random.normal(size=len(rows)), random.normal(size=(len(rows), 50))]
        )
        for split, rows in label.items()
    }
    chosen = logistic_regression(features, label, (0.01, 100))
    assert chosen["C"] == 0.01
    assert chosen["accuracy"] > 0.7
    turned = label | {"test": [1 - answer for answer in label["test"]]}
    again = logistic_regression(features, turned, (0.01, 100))
    assert again == chosen | {"accuracy": pytest.approx(1 - chosen["accuracy"])}


def test_features_are_of_the_text_without_its_padding(demo, tokens):
    model, tokenizer = AutoModel.from_pretrained(demo[0]).eval(), AutoTokenizer.from_pretrained(demo[0])
    found = backbone_features(model, tokens["test"], tokenizer.pad_token_id, batch_size=16)
    assert found["cls"].shape == found["mean"].shape == (len(tokens["test"]), 64)
    for row in (0, 7, 39):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([tokens["test"][row]["input_ids"]])).last_hidden_state[0]
        np.testing.assert_allclose(found["cls"][row], hidden[0], atol=1e-4)
        np.testing.assert_allclose(found["mean"][row], hidden.mean(0), atol=1e-4)


def test_texts_of_the_training_reviews_are_counted_in_the_test_reviews():
    def rows(*texts):
        return Dataset.from_dict({"text": list(texts)})

    reviews = DatasetDict(train=rows("a", "b"), validation=rows("c"), test=rows("a", "c", "c", "d"))
    assert test_texts_in_train(reviews) == {"count": 3, "share": 0.75}


def test_a_demo_leaves_the_published_record_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("common.study.scripts.HERE", tmp_path / "published")
    flags = ["--demo", "--max_train_samples", "300", "--max_test_samples", "60", "--output_dir", str(tmp_path)]
    record = references.main(flags)
    assert [row["name"] for row in record["rows"]] == [
        "majority class",
        "linear probe on [CLS]",
        "linear probe on the mean",
        "TF-IDF + logistic regression",
    ]
    assert (tmp_path / "references.json").exists()
    assert not (tmp_path / "published").exists()
