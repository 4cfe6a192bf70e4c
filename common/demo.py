"""The embedded default: a generated review corpus and a tiny random BERT, for runs without a network."""

import json
import random
import re
from pathlib import Path

TRAIN_REVIEWS, TEST_REVIEWS = 2000, 500

# Sentences are written once for both labels: a {same...} slot takes words of the review's own sentiment and
# {other} a word of the opposite one. Most opinions hold an {other}, so that counting words is not enough.
SENTENCES = {
    "review": [
        "{opinion}",
        "{opinion}{gap}{opinion}",
        "{opener}{gap}{opinion}",
        "{opinion}{gap}{same_verdict}",
        "{opinion}{gap}{opinion}{gap}{same_verdict}",
        "{opener}{gap}{opinion}{gap}{same_verdict}",
        "{opener}{gap}{opinion}{gap}{opinion}{gap}{same_verdict}",
    ],
    "gap": [" ", " ", " ", " ", " ", " ", "<br /><br />"],
    "opener": [
        "I saw this {genre} {occasion}.",
        "My {friend} chose this {genre} {occasion}.",
        "We rented the {genre} {occasion}, and my {friend} stayed to the end.",
        "This {genre} is about a {hero} and a {hero}.",
        "A {hero} comes home and meets a {hero}.",
    ],
    "opinion": [
        "The {thing} is {same} and the {thing} is {same}.",
        "What a {same} {film} this is, and how {same} the {thing} is.",
        "The {thing} is not {other} at all.",
        "The {film} is never {other}, and the {thing} is {same}.",
        "The {thing} is anything but {other}.",
        "Nobody could call the {thing} {other}, or the {thing} {other}.",
        "The {thing} is {other}, but the {thing} {same_effect}.",
        "Although the {thing} is {other}, the {thing} {same_effect}.",
        "The {thing} may be {other}, yet the {film} as a whole is {same}.",
        "My {friend} called it {other}, but I found it {same}.",
        "The {thing} is {other} and the {thing} is {other}, but in the end the {film} is {same}.",
        "The {film} is much {same_comparison} than the {other} trailer suggests.",
        "After so many {other} {film}s, this one is {same}.",
    ],
}
# The (negative, positive) fillings of a slot. Verdicts share most words, for the same reason as above.
SENTIMENT = {
    "same": (
        "bad boring dull weak flat silly clumsy predictable".split(),
        "good great funny clever moving gripping charming brilliant".split(),
    ),
    "same_comparison": (
        "worse slower duller sillier weaker".split(),
        "better funnier smarter warmer fresher".split(),
    ),
    "same_effect": (
        ["ruins it", "drags it down", "makes it hard to watch", "spoils the whole {film}"],
        ["saves it", "lifts it up", "makes it easy to enjoy", "rescues the whole {film}"],
    ),
    "same_verdict": (
        [
            "I would not watch it again.",
            "It is not worth the ticket.",
            "I cannot recommend it to anyone.",
            "I looked at my watch all the time.",
            "I was bored for two hours.",
            "You will not miss anything if you skip it.",
        ],
        [
            "I would watch it again.",
            "It is worth the ticket.",
            "I can recommend it to anyone.",
            "I never looked at my watch.",
            "I was not bored for a minute.",
            "You will miss a lot if you skip it.",
        ],
    ),
}
WORDS = {
    "thing": "acting plot script music dialogue ending direction pacing photography humour story".split(),
    "film": "film movie picture".split(),
    "genre": "comedy thriller drama western romance musical mystery".split(),
    "hero": "detective teacher pilot singer doctor soldier farmer widow lawyer".split(),
    "friend": "sister brother neighbour father wife husband daughter".split(),
    "occasion": ["last night", "on a plane", "on a rainy Sunday", "at a festival", "with the whole family"],
}


def write_review(label: int, rng: random.Random) -> str:
    """One review of 1-4 sentences; `label` is 0 for negative, 1 for positive."""
    sentiment = {slot: fillings[label] for slot, fillings in SENTIMENT.items()}
    grammar = SENTENCES | WORDS | sentiment | {"other": SENTIMENT["same"][1 - label]}
    # Shuffled, then used up, so that nothing comes twice ("the plot is dull, but the plot saves it").
    unused = {slot: rng.sample(fillings, len(fillings)) for slot, fillings in grammar.items()}
    text = "{review}"
    while "{" in text:
        text = re.sub(r"{(\w+)}", lambda slot: unused[slot[1]].pop(), text)
    return text


def write_corpus() -> tuple[list[dict], list[dict]]:
    """Train and test rows {"text", "label"}, sorted by label as IMDb is, so that a missing shuffle shows."""
    rng, train, test = random.Random(0), [], []
    for label in (0, 1):
        rows = {}  # keyed by text, so that no review comes twice
        while len(rows) < (TRAIN_REVIEWS + TEST_REVIEWS) // 2:
            text = write_review(label, rng)
            if 8 <= len(text.split()) <= 40:
                rows[text] = {"text": text, "label": label}
        train += list(rows.values())[: TRAIN_REVIEWS // 2]
        test += list(rows.values())[TRAIN_REVIEWS // 2 :]
    return train, test


def demo_folders(folder: Path) -> tuple[Path, Path]:
    """Where `build_demo` puts the model and the reviews."""
    return folder / "tiny-bert", folder / "generated-reviews"


def build_demo(folder: Path) -> tuple[Path, Path]:
    """Write <folder>/tiny-bert and <folder>/generated-reviews/{train,test}.jsonl, always the same bytes.

    Returns both folders.
    """
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    model_folder, data_folder = demo_folders(folder)
    data_folder.mkdir(parents=True, exist_ok=True)
    train, test = write_corpus()
    for name, rows in (("train", train), ("test", test)):
        (data_folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    words = {word for row in train + test for word in re.findall(r"\w+|[^\w\s]", row["text"].lower())}
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
    tokenizer = BertTokenizer({token: index for index, token in enumerate(tokens)}, model_max_length=128)
    tokenizer.save_pretrained(model_folder)

    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=64,  # as all layer sizes a multiple of 64, the block in which 4-bit weights are stored
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        # Without pretraining, BERT's own settings hide from [CLS] which words were read: weights of 0.02 pass
        # little on, dropout is noise, and a position weighs as much as a word (hence the factor below).
        initializer_range=0.15,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(2)  # torch.manual_seed would also reseed the GPUs, for good
        model = BertModel(config)  # as in the real backbone's checkpoint: a pooler, but no classifier
        model.embeddings.position_embeddings.weight *= 0.1
        model.embeddings.token_type_embeddings.weight *= 0.1
    model.save_pretrained(model_folder)
    return model_folder, data_folder
