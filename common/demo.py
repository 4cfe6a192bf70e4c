"""What --demo runs on, without a network: generated reviews and a tiny BERT with random weights."""

import json
import random
import re
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

TRAIN_REVIEWS, TEST_REVIEWS = 2000, 500
# {same} becomes a word of the review's own sentiment, {other} one of the opposite: counting words is not enough.
SENTENCES = [
    "The {thing} is {same} and the {thing} is {same}.",
    "What a {same} film, and how {same} the {thing} is!<br /><br />",
    "The {thing} is not {other} at all.",
    "The {thing} may be {other}, but the {thing} is {same}.",
    "My friends called it {other}, I found it {same}.",
]
NEGATIVE = "bad boring dull weak flat silly clumsy predictable".split()
POSITIVE = "good great funny clever moving gripping charming brilliant".split()
THINGS = "acting plot script music dialogue ending direction pacing photography humour story".split()


def write_corpus() -> tuple[list[dict], list[dict]]:
    """Train and test rows {"text", "label"}, sorted by label as IMDb is, so that a missing shuffle shows."""
    rng, train, test = random.Random(0), [], []
    for label, same, other in (("negative", NEGATIVE, POSITIVE), ("positive", POSITIVE, NEGATIVE)):
        words, texts = {"same": same, "other": other, "thing": THINGS}, {}
        while len(texts) < (TRAIN_REVIEWS + TEST_REVIEWS) // 2:
            text = " ".join(rng.sample(SENTENCES, 3))
            text = re.sub(r"{(\w+)}", lambda slot, words=words: rng.choice(words[slot[1]]), text)
            texts[text] = label  # as keys, so that no review comes twice
        rows = [{"text": text, "label": label} for text in texts]
        train, test = train + rows[: TRAIN_REVIEWS // 2], test + rows[TRAIN_REVIEWS // 2 :]
    return train, test


def build_demo(folder: Path) -> None:
    """Write both to `folder`, always the same bytes: the model to tiny-bert, the reviews to generated-reviews."""
    model_folder, data_folder = folder / "tiny-bert", folder / "generated-reviews"
    data_folder.mkdir(parents=True, exist_ok=True)
    train, test = write_corpus()
    for name, rows in (("train", train), ("test", test)):
        (data_folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {word for row in train + test for word in re.findall(r"\w+|[^\w\s]", row["text"].lower())}
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
    tokenizer = BertTokenizer({token: index for index, token in enumerate(tokens)}, model_max_length=128)
    tokenizer.save_pretrained(model_folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    # BERT's own settings suit pretraining: weights of 0.02 pass little of the words on to [CLS], dropout is noise.
    settings = {"initializer_range": 0.15, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=len(tokens), max_position_embeddings=128, **sizes, **settings)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(2)  # torch.manual_seed would also reseed the GPUs, for good
        model = BertModel(config)  # as in the real backbone's checkpoint: a pooler, but no classifier
        model.embeddings.position_embeddings.weight *= 0.1
        model.embeddings.token_type_embeddings.weight *= 0.1
    model.save_pretrained(model_folder)
