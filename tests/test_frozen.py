"""Training a head on stored outputs is training it on the frozen backbone that gave them."""

import datasets
import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, DECODERS, make_trainer, set_dropout
from torch import nn
from transformers.models.bert.modeling_bert import BertPooler

from common.frozen import StoredOutputs
from common.model import trainable_state


def logits_one_by_one(model: nn.Module, reviews) -> torch.Tensor:
    """Of each review alone, without padding, through the whole model."""
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=torch.tensor([ids])).logits for ids in reviews["input_ids"][:]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stored_outputs_give_the_models_own_logits(architecture, backbones, tokens, tmp_path):
    trainer = make_trainer("NEW_HEAD", backbones[architecture], tmp_path, tokens)
    stored = trainer.inputs_of(tokens["test"])
    assert isinstance(stored, StoredOutputs) and stored.outputs.shape == (40, 64)
    rows = [5, 3, *range(20, 40)]
    batch = stored.__getitems__(rows)
    assert batch.pop("labels").tolist() == [tokens["test"]["labels"][row] for row in rows]
    with torch.no_grad():
        logits = trainer.model(**batch).logits
    expected = logits_one_by_one(trainer.model, tokens["test"].select(rows))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", DECODERS)
def test_decoders_pass_over_padding_tokens_at_a_texts_own_end(architecture, backbones, tokens, tmp_path):
    trainer = make_trainer("NEW_HEAD", backbones[architecture], tmp_path, tokens)
    padding = trainer.processing_class.pad_token_id
    ids = [[11, 12, 13, padding], [11, 12, 13, 14], [11, padding, 12, padding, padding], [padding, 11]]
    reviews = datasets.Dataset.from_dict({"input_ids": ids, "labels": [0, 1, 0, 1]})
    batch = trainer.inputs_of(reviews).__getitems__([0, 1, 2, 3])
    logits = trainer.model(inputs_embeds=batch["inputs_embeds"]).logits
    torch.testing.assert_close(logits, logits_one_by_one(trainer.model, reviews), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_each_review_passes_the_frozen_backbone_once(architecture, backbones, tokens, tmp_path):
    trainer = make_trainer(
        "NEW_HEAD", backbones[architecture], tmp_path, tokens, eval_on_start=True, eval_strategy="epoch"
    )
    rows, backbone = [], trainer.model.base_model
    last = backbone.layers[-1] if architecture in DECODERS else backbone.encoder.layer[-1]
    last.register_forward_hook(lambda block, inputs, output: rows.append(len(inputs[0])))
    trainer.train()
    trainer.predict(tokens["test"])
    trainer.predict(tokens["test"])
    reviews = [len(tokens[split]) for split in ("train", "validation", "test")]
    # Besides, 8 of each of the three, twice: to see whether the model's own logits come from what is stored.
    assert sum(rows) == sum(reviews) + sum(2 * min(8, count) for count in reviews)
    assert trainer.run_once_seconds > 0


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_training_on_stored_outputs_is_training_the_frozen_model(architecture, backbones, tokens, tmp_path):
    states = []
    for stored in (True, False):
        trainer = make_trainer("NEW_HEAD", backbones[architecture], tmp_path, tokens, logging_strategy="epoch")
        set_dropout(trainer.model, 0.0)  # the head's own, drawn for other shapes
        if stored:  # the same order in both
            trainer.inputs_of(tokens["train"]).lengths = trainer.tensors_of(tokens["train"]).lengths
        else:
            trainer.inputs_of = trainer.tensors_of
        untrained = trainable_state(trainer.model)
        trainer.train()
        states.append(trainable_state(trainer.model))
    for name, weight in states[0].items():
        assert not torch.equal(weight, untrained[name])
        torch.testing.assert_close(weight, states[1][name], rtol=1e-3, atol=1e-4)


class MeanPooler(BertPooler):
    def forward(self, hidden):
        return self.activation(self.dense(hidden.mean(dim=1)))


def test_a_head_that_reads_every_token_trains_on_the_whole_model(backbones, tokens, tmp_path):
    trainer = make_trainer("NEW_HEAD", backbones["bert"], tmp_path, tokens)
    trainer.model.bert.pooler.__class__ = MeanPooler
    assert trainer.inputs_of(tokens["train"]) is trainer.tensors_of(tokens["train"])
    ids = tokens["test"].select([0])
    prediction = trainer.predict(ids).predictions
    torch.testing.assert_close(torch.tensor(prediction), logits_one_by_one(trainer.model, ids), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["LAST_LAYER", "PEFT_LORA", "PEFT_QLORA"])
def test_a_backbone_that_trains_runs_in_every_epoch(name, backbones, tokens, tmp_path):
    trainer = make_trainer(name, backbones["bert"], tmp_path, tokens)
    assert trainer.inputs_of(tokens["train"]) is trainer.tensors_of(tokens["train"])


def test_predictions_come_in_one_order_whether_outputs_are_stored_or_not(backbones, tokens, tmp_path):
    stored, whole = (
        make_trainer(name, backbones["bert"], tmp_path / name, tokens).predict(tokens["test"])
        for name in ("NEW_HEAD", "PEFT_LORA")
    )
    longest_first = np.argsort([-len(ids) for ids in tokens["test"]["input_ids"]], kind="stable")
    assert stored.label_ids.tolist() == whole.label_ids.tolist()
    assert stored.label_ids.tolist() == np.array(tokens["test"]["labels"])[longest_first].tolist()
