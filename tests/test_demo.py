"""The demo's reviews and model: always the same bytes, learnable, and not by counting words alone."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.demo import POSITIVE, build_demo


def read_rows(data_folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (data_folder / f"{split}.jsonl").read_text().splitlines()]


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def rows(demo):
    return {split: read_rows(demo[1], split) for split in ("train", "test")}


def test_same_bytes_in_another_process(demo, tmp_path):
    # Another hash seed changes the order of sets of strings, another torch seed that of random weights.
    command = "import sys, torch; from pathlib import Path; from common.demo import POSITIVE, build_demo; "
    command += "torch.manual_seed(99); build_demo(Path(sys.argv[1]))"
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    subprocess.run(
        [sys.executable, "-c", command, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        check=True,
    )
    assert read_bytes(tmp_path) == read_bytes(demo[0].parent)


def test_global_random_state_is_untouched(tmp_path):
    def draws():  # what a caller would draw next
        return random.random(), numpy.random.random(), torch.rand(1).item()

    def seed():
        random.seed(1)
        numpy.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    build_demo(tmp_path)
    assert draws() == expected


@pytest.mark.parametrize(("split", "count"), [("train", 2000), ("test", 500)])
def test_labels_are_balanced(rows, split, count):
    labels = [row["label"] for row in rows[split]]
    assert labels.count("negative") == labels.count("positive") == count / 2 == len(labels) / 2


def test_no_text_comes_twice(rows):
    texts = [row["text"] for row in rows["train"] + rows["test"]]
    assert len(set(texts)) == len(texts) == 2500


def test_reviews_look_like_reviews(rows):
    for row in rows["train"] + rows["test"]:
        text = row["text"]
        assert 20 <= len(text.split()) <= 40
        assert re.fullmatch(r"[A-Z][^{}]*(\.|!<br /><br />)", text), text


def test_the_word_after_but_decides(rows):
    last = [
        (row["label"], word in POSITIVE)
        for row in rows["train"] + rows["test"]
        for word in re.findall(r", but the \w+ is (\w+)\.", row["text"])
    ]
    assert len(last) > 500 and all((label == "positive") == positive for label, positive in last)


@pytest.mark.parametrize("phrase", [" not .* at all", ", but ", " called it ", "<br /><br />"])
@pytest.mark.parametrize("label", ["negative", "positive"])
def test_phrase_occurs_with_both_labels(rows, phrase, label):
    assert sum(bool(re.search(phrase, row["text"])) for row in rows["test"] if row["label"] == label) >= 10


def test_counting_words_is_not_enough(rows):
    """Logistic regression on word counts: learnable, so that the charts show learning, yet not trivial."""
    texts, labels = ({split: [row[name] for row in rows[split]] for split in rows} for name in ("text", "label"))
    counts = CountVectorizer().fit(texts["train"])
    model = LogisticRegression(max_iter=1000).fit(counts.transform(texts["train"]), labels["train"])
    assert 0.6 < model.score(counts.transform(texts["test"]), labels["test"]) < 0.95


def test_only_the_classifier_is_newly_initialised(demo):
    _, loading = AutoModelForSequenceClassification.from_pretrained(demo[0], output_loading_info=True)
    assert set(loading["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"]


def test_linear_sizes_suit_4_bit_blocks(demo):
    model = AutoModelForSequenceClassification.from_pretrained(demo[0])
    linears = [module for module in model.bert.modules() if isinstance(module, torch.nn.Linear)]
    assert all(size % 64 == 0 for linear in linears for size in linear.weight.shape)


def test_tokenizer_knows_every_word(demo, rows):
    tokenizer = AutoTokenizer.from_pretrained(demo[0])
    model = AutoModelForSequenceClassification.from_pretrained(demo[0])
    assert tokenizer.is_fast and len(tokenizer) == model.config.vocab_size
    for ids in tokenizer([row["text"] for row in rows["train"] + rows["test"]])["input_ids"]:
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= model.config.max_position_embeddings == tokenizer.model_max_length
    assert tokenizer("GOOD good")["input_ids"][1] == tokenizer("GOOD good")["input_ids"][2]
    assert tokenizer("unheard")["input_ids"][1] == tokenizer.unk_token_id
