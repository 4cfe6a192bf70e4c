"""The data path and the stored outputs of frozen blocks give what the plain way gives."""

import importlib
import math
from itertools import chain

import datasets
import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, configure
from torch import nn
from torch.utils.data import Subset
from transformers import (
    AutoTokenizer,
    SqueezeBertConfig,
    SqueezeBertForSequenceClassification,
    TrainingArguments,
    XLMConfig,
    XLMForSequenceClassification,
    set_seed,
)

from common.cli import UserError
from common.data import load_reviews, tokenize, training_sample
from common.frozen import FrozenBlocks
from common.metrics import validation_scores
from common.model import label_config, switch_off_dropout, trainable_state, transformer_blocks
from common.trainer import LengthGroupedBatches, ReviewTensors, ReviewTrainer, flash_attention, sequence_ends


@pytest.fixture(scope="module")
def tokens(demo):
    reviews, _ = load_reviews(str(demo[1]), max_train_samples=200, max_test_samples=40)
    return tokenize(reviews, AutoTokenizer.from_pretrained(demo[0]), 48)


def make_trainer(name, backbone, folder, tokens, **changes):
    method, tokenizer = importlib.import_module(f"{name}.train"), AutoTokenizer.from_pretrained(backbone)
    set_seed(0)
    labels = label_config(["negative", "positive"], tokenizer)
    model, _ = method.build_model(configure(method, backbone), labels)
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 5e-3, "seed": 0}
    return ReviewTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), report_to="none", save_strategy="no", logging_strategy="no", **settings | changes
        ),
        train_dataset=tokens["train"],
        eval_dataset={"train": training_sample(tokens), "validation": tokens["validation"]},
        processing_class=tokenizer,
        compute_metrics=validation_scores,
    )


def test_batches_hold_the_reviews_and_nothing_else(tokens):
    batches = ReviewTensors(tokens["train"], 0, torch.device("cpu"))
    rows = [7, 3, 50]
    batch = batches.__getitems__(rows)
    longest = max(len(tokens["train"][row]["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 8 * math.ceil(longest / 8))
    for place, row in enumerate(rows):
        mask = batch["attention_mask"][place].bool()
        assert batch["input_ids"][place][mask].tolist() == tokens["train"][row]["input_ids"]
        assert not batch["input_ids"][place][~mask].any()
        assert batch["labels"][place] == tokens["train"][row]["labels"]


def tensors_of_lengths(lengths):
    reviews = {"input_ids": [[7] * length for length in lengths], "labels": [0] * len(lengths)}
    return ReviewTensors(datasets.Dataset.from_dict(reviews), 0, torch.device("cpu"))


def test_widths_are_few_and_a_batch_without_padding_has_no_mask():
    batches = tensors_of_lengths([16, 16, 17, 5, 44])
    assert [batches.width([row]) for row in range(5)] == [16, 16, 24, 8, 44]  # never more than the longest review
    assert batches.__getitems__([0, 1])["input_ids"].shape == (2, 16)
    assert "attention_mask" not in batches.__getitems__([0, 1]) and "attention_mask" not in batches.__getitems__([4])
    assert batches.__getitems__([0, 3])["attention_mask"].sum(1).tolist() == [16, 5]


def test_every_review_trains_once_per_epoch_in_a_new_order():
    lengths = np.random.default_rng(0).integers(20, 513, 1000)
    sampler = LengthGroupedBatches(lengths, batch_size=64, seed=0)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler) == 16
        assert sorted(chain(*epochs[-1])) == list(range(1000))
        assert max(map(len, epochs[-1])) <= 64
    assert {frozenset(batch) for batch in epochs[0]} != {frozenset(batch) for batch in epochs[1]}
    first_lengths = [lengths[batch].mean() for batch in epochs[0]]
    assert first_lengths != sorted(first_lengths)
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0]
    assert list(LengthGroupedBatches(lengths, 64, seed=1)) != epochs[0]


def test_padding_stays_under_3_percent_for_lengths_like_imdbs():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.45, 0.65, 22_500), 512).astype(int)
    reviews = datasets.Dataset.from_dict(
        {"input_ids": [[7] * length for length in lengths], "labels": [0] * len(lengths)}
    )
    batches = ReviewTensors(reviews, 0, torch.device("cpu"))
    order = list(LengthGroupedBatches(lengths, 128, seed=0))
    assert 1 - lengths.sum() / sum(batches.width(rows) * len(rows) for rows in order) < 0.03
    assert len({batches.width(rows) for rows in order}) <= 64


def test_processes_and_accumulation_steps_share_the_same_global_batches():
    lengths = np.random.default_rng(0).integers(20, 513, 500)
    whole = list(LengthGroupedBatches(lengths, 64, seed=0))
    parts = [list(LengthGroupedBatches(lengths, 64, 0, 2, process, 4)) for process in range(4)]
    for update, batch in enumerate(whole):
        dealt = [part[2 * update + step] for part in parts for step in range(2)]
        assert sorted(chain(*dealt)) == sorted(batch)
        assert min(map(len, dealt)) >= 1


@pytest.mark.parametrize(("reviews", "size", "smallest"), [(8, 128, 8), (7, 128, 7), (16, 8, 8), (17, 8, 5)])
def test_too_few_reviews_for_the_steps_are_refused(reviews, size, smallest):
    if smallest < 8:
        with pytest.raises(UserError, match=f"--gradient_accumulation_steps 4: .* one with {smallest} of them"):
            LengthGroupedBatches(np.full(reviews, 30), size, 0, steps=4, processes=2)
    else:
        for process in (0, 1):
            assert all(LengthGroupedBatches(np.full(reviews, 30), size, 0, 4, process, 2))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stored_outputs_give_the_models_own_logits(architecture, backbones, tokens, tmp_path):
    trainer = make_trainer("NEW_HEAD", backbones[architecture], tmp_path, tokens)
    prediction = trainer.predict(tokens["test"])
    assert trainer.frozen_blocks is not None
    order = np.argsort([-len(ids) for ids in tokens["test"]["input_ids"]], kind="stable")
    batches = ReviewTensors(tokens["test"], 0, torch.device("cpu"))
    with torch.no_grad():
        for place, row in enumerate(order.tolist()):
            batch = batches.__getitems__([row])
            logits = trainer.model.eval()(input_ids=batch["input_ids"][:, : batches.lengths[row]]).logits[0]
            # Outputs are stored once for all epochs: by the place of the review, whatever the order.
            stored = trainer.batches_of(tokens["test"]).outputs[row]
            assert torch.equal(stored, trainer.batches_of(tokens["test"]).__getitems__([row])["stored"][0])
            if place < 5:
                assert prediction.label_ids.shape == (40,)
                with trainer.frozen_blocks.replaced_by(stored.unsqueeze(0)):
                    alone = trainer.model(input_ids=batch["input_ids"][:, :1]).logits[0]
                torch.testing.assert_close(alone, logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_does_not_change_the_logits(architecture, backbones, tokens, tmp_path):
    trainer = make_trainer("LAST_LAYER", backbones[architecture], tmp_path, tokens)
    rows = tokens["test"].with_format("torch")[:]["input_ids"]
    prediction = trainer.predict(tokens["test"])
    longest_first = np.argsort([-len(ids) for ids in rows], kind="stable")
    with torch.no_grad():
        alone = [trainer.model.eval()(input_ids=rows[row].unsqueeze(0)).logits[0] for row in longest_first]
    torch.testing.assert_close(torch.tensor(prediction.predictions), torch.stack(alone), rtol=1e-3, atol=1e-4)


def attention_one_by_one(query, key, value, ends, ends_of_keys, longest, _, dropout, causal, debug, scale):
    """What PyTorch's flash attention, which needs a GPU, does with sequences one after another."""
    assert torch.equal(ends, ends_of_keys) and ends.dtype == torch.int32 and not dropout and not causal and not debug
    assert ends[0] == 0 and ends[-1] == len(query) and ends.diff().min() >= 0 and ends.diff().max() <= longest
    lengths = ends.diff().tolist()
    parts = [part.transpose(0, 1).split(lengths, dim=1) for part in (query, key, value)]
    outputs = [
        nn.functional.scaled_dot_product_attention(*sequence, scale=scale) for sequence in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1), None, None, None, None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_as_a_sequence_gives_the_same_logits(architecture, backbones, tokens, tmp_path, monkeypatch):
    trainer = make_trainer("LAST_LAYER", backbones[architecture], tmp_path, tokens)
    masked = trainer.predict(tokens["test"]).predictions
    calls = []
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda case: not calls.append(case))
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", attention_one_by_one)
    torch.testing.assert_close(trainer.predict(tokens["test"]).predictions, masked, rtol=1e-3, atol=1e-4)
    encoders = {"bert", "distilbert", "roberta", "electra"}  # DeBERTa has attention of its own, decoders a causal mask
    assert bool(calls) == (architecture in encoders)


def test_padding_as_a_sequence_trains_the_same(backbones, tokens, tmp_path, monkeypatch):
    trainer = make_trainer("PEFT_LORA", backbones["bert"], tmp_path, tokens)
    switch_off_dropout(trainer.model)
    batch = trainer.tensors_of(tokens["train"]).__getitems__(list(range(16)))
    trainer.model.train()

    def gradients() -> dict[str, torch.Tensor]:
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        return {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.requires_grad}

    masked, dropouts = gradients(), []

    def attention(query, key, value, ends, ends_of_keys, longest, _, dropout, *rest, **named):
        dropouts.append(dropout)
        return attention_one_by_one(query, key, value, ends, ends_of_keys, longest, _, 0.0, *rest, **named)

    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda case: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", attention)
    torch.testing.assert_close(gradients(), masked, rtol=1e-3, atol=1e-5)
    assert any(gradient.any() for name, gradient in masked.items() if "layer.0" in name)
    trainer.model.bert.encoder.layer[0].attention.self.dropout.p = 0.25
    gradients()
    trainer.predict(tokens["test"])
    assert dropouts[2:4] == [0.25, 0.0] and not any(dropouts[4:])


def test_heads_that_flash_attention_does_not_take_go_the_usual_way(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda case: True)  # it would pad them
    attention_mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    mask = attention_mask[:, None, None, :]
    mask.sequence_ends = sequence_ends(attention_mask)
    query, key, value = torch.randn(3, 2, 4, 3, 26)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
    output, _ = flash_attention(nn.Module(), query, key, value, mask)
    torch.testing.assert_close(output, expected)


def test_each_review_passes_the_frozen_blocks_once(backbones, tokens, tmp_path):
    trainer = make_trainer("NEW_HEAD", backbones["bert"], tmp_path, tokens, eval_on_start=True, eval_strategy="epoch")
    rows = []
    trainer.model.bert.encoder.layer[-1].register_forward_hook(lambda block, inputs, output: rows.append(len(output)))
    trainer.train()
    trainer.predict(tokens["test"])
    trainer.predict(tokens["test"])
    assert sum(rows) == len(tokens["train"]) + len(tokens["validation"]) + len(tokens["test"])
    assert len(trainer.model.bert.encoder.layer) == 2


def test_training_on_stored_outputs_is_training_the_frozen_model(backbones, tokens, tmp_path):
    states = []
    for stored in (True, False):
        trainer = make_trainer("NEW_HEAD", backbones["bert"], tmp_path, tokens)
        trainer.model.dropout.p = 0.0  # the head's own, drawn in another order
        if not stored:
            trainer.frozen_blocks = None
        batches = trainer.batches_of(tokens["train"])
        batches.lengths = ReviewTensors(tokens["train"], 0, torch.device("cpu")).lengths  # the same order in both
        trainer.train()
        states.append(trainable_state(trainer.model))
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-3, atol=1e-4)


def test_padding_with_the_last_token_of_the_vocabulary_is_no_obstacle(backbones):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(backbones["llama"]).requires_grad_(False)
    for vocabulary in range(2, 6):  # small enough for the probe to draw the padding token
        model.config.vocab_size, model.config.pad_token_id = vocabulary, vocabulary - 1
        model.model.embed_tokens = torch.nn.Embedding(vocabulary, model.config.hidden_size).requires_grad_(False)
        assert FrozenBlocks.of(model) is not None


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_decoders_pass_over_a_padding_token_at_a_texts_own_end(architecture, backbones):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(backbones[architecture]).requires_grad_(False).eval()
    frozen, padding = FrozenBlocks.of(model), model.config.pad_token_id
    tokens = torch.tensor([[11, 12, 13, padding], [11, 12, 13, 14], [11, 12, padding, padding]])
    batch = {"input_ids": tokens, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])}
    logits = model(**batch).logits
    with frozen.replaced_by(frozen.outputs(batch)):
        torch.testing.assert_close(model(input_ids=tokens[:, :1]).logits, logits, rtol=1e-3, atol=1e-4)


def test_blocks_that_cannot_be_left_out_run_in_every_epoch():
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    groups = dict.fromkeys(("q_groups", "k_groups", "v_groups", "intermediate_groups", "output_groups"), 2)
    config = SqueezeBertConfig(vocab_size=50, hidden_size=16, embedding_size=16, **sizes, **groups)
    model = SqueezeBertForSequenceClassification(config).requires_grad_(False)
    assert transformer_blocks(model)[0] == "transformer.encoder.layers"
    assert FrozenBlocks.of(model) is None


def test_lists_of_parts_are_no_blocks():
    model = XLMForSequenceClassification(XLMConfig(vocab_size=50, emb_dim=16, n_layers=2, n_heads=2))
    with pytest.raises(UserError, match="no list of 2 Transformer blocks was found in XLM"):
        transformer_blocks(model)


def test_a_head_that_reads_every_token_is_not_stored(backbones):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(backbones["bert"]).requires_grad_(False)
    assert FrozenBlocks.of(model) is not None
    model.bert.pooler.forward = lambda hidden: hidden.mean(dim=1)
    assert FrozenBlocks.of(model) is None


@pytest.mark.parametrize("name", ["LAST_LAYER", "PEFT_LORA", "PEFT_QLORA"])
def test_blocks_that_train_are_not_stored(name, backbones, tokens, tmp_path):
    assert make_trainer(name, backbones["bert"], tmp_path, tokens).frozen_blocks is None


def test_accumulated_steps_train_like_one_large_batch(backbones, tokens, tmp_path):
    states = []
    for size, steps in ((16, 1), (4, 4)):
        trainer = make_trainer(
            "LAST_LAYER", backbones["bert"], tmp_path, tokens,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        for part in trainer.model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        trainer.train()
        states.append(trainable_state(trainer.model))
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-3, atol=1e-4)


def test_scores_are_of_all_the_reviews_and_of_each_once(backbones, tokens, tmp_path):
    trainer = make_trainer("PEFT_LORA", backbones["bert"], tmp_path, tokens, per_device_eval_batch_size=7)
    prediction = trainer.predict(tokens["test"])
    assert sorted(prediction.label_ids.tolist()) == sorted(tokens["test"]["labels"])
    order = np.argsort([-len(ids) for ids in tokens["test"]["input_ids"]], kind="stable")
    row = int(order[3])
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=torch.tensor([tokens["test"][row]["input_ids"]])).logits[0]
    np.testing.assert_allclose(prediction.predictions[3], logits.numpy(), rtol=1e-3, atol=1e-4)


def test_a_subset_is_evaluated_on_its_own_rows(backbones, tokens, tmp_path):
    trainer = make_trainer("NEW_HEAD", backbones["bert"], tmp_path, tokens)
    rows = [row for row, label in enumerate(tokens["train"]["labels"]) if label == 1][:10]
    assert set(trainer.predict(Subset(tokens["train"], rows)).label_ids.tolist()) == {1}
