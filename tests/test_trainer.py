"""Every review comes once, with little padding; what is trained and scored is what the plain way would give."""

from itertools import chain, combinations

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, make_trainer, set_dropout
from torch.utils.data import Subset

from common.blocks import transformer_blocks
from common.cli import UserError
from common.model import checkpoint_blocks, trainable_state
from common.trainer import LengthGroupedBatches, ReviewTensors, longest_first


def tensors_of_lengths(lengths) -> ReviewTensors:
    reviews = {"input_ids": [[7] * length for length in lengths], "labels": [0] * len(lengths)}
    return ReviewTensors(datasets.Dataset.from_dict(reviews), 0, torch.device("cpu"))


def test_batches_hold_the_reviews_and_nothing_else(tokens):
    batches = ReviewTensors(tokens["train"], 0, torch.device("cpu"))
    rows = [7, 3, 50]
    batch = batches.__getitems__(rows)
    longest = max(len(tokens["train"][row]["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, longest)
    for place, row in enumerate(rows):
        mask = batch["attention_mask"][place].bool()
        assert batch["input_ids"][place][mask].tolist() == tokens["train"][row]["input_ids"]
        assert not batch["input_ids"][place][~mask].any()
        assert batch["labels"][place] == tokens["train"][row]["labels"]


def test_a_batch_without_padding_has_no_mask():
    batches = tensors_of_lengths([16, 16, 17, 5, 44])
    assert batches.__getitems__([0, 1])["input_ids"].shape == (2, 16)
    assert "attention_mask" not in batches.__getitems__([0, 1]) and "attention_mask" not in batches.__getitems__([4])
    assert batches.__getitems__([0, 3])["attention_mask"].sum(1).tolist() == [16, 5]


def test_every_review_trains_once_per_epoch_in_a_new_order():
    lengths = np.random.default_rng(0).integers(20, 513, 1000)
    sampler = LengthGroupedBatches(lengths, batch_size=64, seed=0)
    epochs = []
    for epoch in (0, 1):
        sampler.epoch = epoch
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler) == 16
        assert sorted(chain(*epochs[-1])) == list(range(1000))
        assert max(map(len, epochs[-1])) <= 64
    assert {frozenset(batch) for batch in epochs[0]} != {frozenset(batch) for batch in epochs[1]}
    first_lengths = [lengths[batch].mean() for batch in epochs[0]]
    assert first_lengths != sorted(first_lengths)
    sampler.epoch = 0
    assert list(sampler) == epochs[0]
    assert list(LengthGroupedBatches(lengths, 64, seed=1)) != epochs[0]


def test_lengths_like_imdbs_leave_little_padding_and_neighbours_change():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.45, 0.65, 22_500), 512).astype(int)
    order = list(LengthGroupedBatches(lengths, 128, seed=0))
    assert 1 - lengths.sum() / sum(lengths[rows].max() * len(rows) for rows in order) < 0.02
    again = LengthGroupedBatches(lengths, 128, seed=0)
    again.epoch = 1
    first, second = ({pair for batch in epoch for pair in combinations(sorted(batch), 2)} for epoch in (order, again))
    assert len(first & second) < 0.4 * len(first)  # most reviews get other neighbours


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
        with pytest.raises(UserError, match=f"--gradient_accumulation_steps 4: a batch has {smallest} of"):
            LengthGroupedBatches(np.full(reviews, 30), size, 0, steps=4, processes=2)
    else:
        for process in (0, 1):
            assert all(LengthGroupedBatches(np.full(reviews, 30), size, 0, 4, process, 2))


def logits_alone(trainer, reviews) -> dict[int, torch.Tensor]:
    """By row, of every review without padding."""
    with torch.no_grad():
        rows = enumerate(reviews["input_ids"][:])
        return {row: trainer.model.eval()(input_ids=torch.tensor([ids])).logits[0] for row, ids in rows}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_of_each_review_once_whatever_its_padding(architecture, backbones, tokens, tmp_path):
    trainer = make_trainer("LAST_LAYER", backbones[architecture], tmp_path, tokens, per_device_eval_batch_size=7)
    prediction = trainer.predict(tokens["test"])
    order = list(chain(*longest_first(np.array([len(ids) for ids in tokens["test"]["input_ids"]]), 7)))
    assert sorted(order) == list(range(40))
    assert prediction.label_ids.tolist() == [tokens["test"]["labels"][row] for row in order]
    alone = logits_alone(trainer, tokens["test"])
    expected = torch.stack([alone[row] for row in order])
    torch.testing.assert_close(torch.tensor(prediction.predictions), expected, rtol=1e-3, atol=1e-4)


def test_a_subset_is_evaluated_on_its_own_rows(method, backbones, tokens, tmp_path):
    trainer = make_trainer(method, backbones["bert"], tmp_path, tokens)
    rows = [row for row, label in enumerate(tokens["train"]["labels"]) if label == 1][:10]
    prediction = trainer.predict(Subset(tokens["train"], rows))
    assert set(prediction.label_ids.tolist()) == {1}
    expected = torch.stack(list(logits_alone(trainer, tokens["train"].select(rows)).values()))
    ordered = [sorted(map(tuple, np.round(np.asarray(logits), 3))) for logits in (prediction.predictions, expected)]
    np.testing.assert_allclose(*ordered, atol=2e-3)


def test_accumulated_steps_train_like_one_large_batch(backbones, tokens, tmp_path):
    states = []
    for size, steps in ((16, 1), (4, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make_trainer(
            "LAST_LAYER", backbones["bert"], tmp_path, tokens, optim="sgd", learning_rate=0.1, **sizes
        )
        set_dropout(trainer.model, 0.0)
        trainer.train()
        states.append(trainable_state(trainer.model))
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-3, atol=1e-4)


def out_of_memory_above(trainer, rows: int) -> list[int]:
    """The sizes of all steps; those of more than `rows` reviews fail half-way, with some gradients already there."""
    sizes, loss, steps = [], trainer.compute_loss_func, trainer.args.gradient_accumulation_steps

    def limited(outputs, labels, num_items_in_batch=None):
        sizes.append(len(labels))
        found = loss(outputs, labels, num_items_in_batch)
        if len(labels) > rows and len(sizes) >= steps:  # not before the last step of an update
            if found.requires_grad:
                found.backward()
            raise torch.OutOfMemoryError
        return found

    trainer.compute_loss_func = limited
    return sizes


@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_out_of_memory_is_taken_in_parts_and_changes_no_result(steps, backbones, tokens, tmp_path, capsys):
    states = []
    for rows in (1000, 3):
        sizes = {"per_device_train_batch_size": 16 // steps, "gradient_accumulation_steps": steps}
        trainer = make_trainer(
            "LAST_LAYER", backbones["bert"], tmp_path, tokens, optim="sgd", learning_rate=0.1, **sizes
        )
        set_dropout(trainer.model, 0.0)
        seen = out_of_memory_above(trainer, rows)
        trainer.train()
        states.append(trainable_state(trainer.model))
    assert seen[:4] == ([15, 7, 3, 3] if steps == 1 else [8, 7, 3, 3]) and max(seen[2:]) == seen[2]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Out of GPU memory")]
    assert [line.split()[5] for line in said] == (["15", "7"] if steps == 1 else ["7"])
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-3, atol=1e-4)


def test_evaluation_out_of_memory_is_done_in_parts(backbones, tokens, tmp_path):
    trainer = make_trainer("PEFT_LORA", backbones["bert"], tmp_path, tokens)
    whole = trainer.predict(tokens["test"])
    seen = out_of_memory_above(trainer, 3)
    parts = trainer.predict(tokens["test"])
    assert seen[:4] == [8, 4, 2, 2] and sum(seen[2:]) == len(tokens["test"])
    assert np.array_equal(parts.label_ids, whole.label_ids)
    np.testing.assert_allclose(parts.predictions, whole.predictions, rtol=1e-4, atol=1e-5)


def test_one_review_out_of_memory_ends_the_run(backbones, tokens, tmp_path):
    trainer = make_trainer("PEFT_LORA", backbones["bert"], tmp_path, tokens)
    out_of_memory_above(trainer, 0)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()


def test_peak_memory_is_noted_by_phase(backbones, tokens, tmp_path, monkeypatch):
    peaks = iter([5, 30, 20, 40, 60, 10, 25, 3, 3, 3])
    monkeypatch.setattr("common.trainer.peak_memory", lambda: next(peaks))
    trainer = make_trainer("PEFT_LORA", backbones["bert"], tmp_path, tokens, num_train_epochs=1)
    trainer.train()
    trainer.predict(tokens["test"])
    trainer.predict(tokens["test"])
    assert trainer.peaks == {"loading": 5, "training": 40, "evaluation": 60}


def test_a_decoder_keeps_no_keys_and_values(backbones, tokens, tmp_path):
    trainer = make_trainer("PEFT_LORA", backbones["llama"], tmp_path, tokens)
    batch = trainer.tensors_of(tokens["test"]).__getitems__([0, 1])
    assert trainer.model(**batch).past_key_values is None


@pytest.mark.parametrize(("name", "calls"), [("PEFT_LORA", 4), ("LAST_LAYER", 3), ("PEFT_QLORA", 4)])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_gradient_checkpointing_computes_blocks_again_and_changes_no_result(
    name, calls, architecture, backbones, tokens, tmp_path
):
    """calls: of the two blocks in one step; a frozen block's output is needed once only."""
    states = []
    for on in (False, True):
        trainer = make_trainer(name, backbones[architecture], tmp_path, tokens, max_steps=3)
        if on:
            checkpoint_blocks(trainer.model)
        counted = []
        for block in transformer_blocks(trainer.model):
            part = getattr(block, "attention", None) or block.self_attn
            part.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        torch.manual_seed(0)
        trainer.train()
        assert len(counted) == 3 * (calls if on else 2)
        states.append(trainable_state(trainer.model))
    for weight, again in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(weight, again, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "as_trained"), [("NEW_HEAD", False), ("PEFT_LORA", True)])
def test_padding_is_counted_where_the_backbone_runs(name, as_trained, backbones, tokens, tmp_path):
    trainer = make_trainer(name, backbones["bert"], tmp_path, tokens, per_device_eval_batch_size=64)
    lengths = np.array([len(ids) for ids in tokens["train"]["input_ids"]])
    batches = LengthGroupedBatches(lengths, 16, seed=0) if as_trained else longest_first(lengths, 64)
    padded = sum(lengths[rows].max() * len(rows) for rows in batches)
    assert trainer.padding_percent() == pytest.approx(100 * (1 - lengths.sum() / padded))


def test_a_model_that_gives_more_than_logits_is_scored_by_its_logits(backbones, tokens, tmp_path):
    trainer = make_trainer("PEFT_LORA", backbones["bert"], tmp_path, tokens)
    alone = trainer.predict(tokens["test"]).predictions
    trainer.model.config.output_hidden_states = True
    assert np.array_equal(trainer.predict(tokens["test"]).predictions, alone)


def groups_by_name(trainer) -> dict[str, dict]:
    """The optimizer's group of every parameter that trains."""
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    return {names[id(weight)]: group for group in trainer.optimizer.param_groups for weight in group["params"]}


@pytest.mark.parametrize("method", ["NEW_HEAD", "LAST_LAYER", "PEFT_LORA", "PEFT_QLORA"])
def test_balanced_classes_weigh_as_much_as_each_other(method, backbones, tokens, tmp_path):
    """As if every text of the rare class were there five times."""
    rows = np.array(tokens["train"]["labels"][:])
    rare, frequent = np.flatnonzero(rows == 0)[:10], np.flatnonzero(rows == 1)[:50]
    lopsided = tokens | {"train": tokens["train"].select([*rare, *frequent])}
    even = tokens | {"train": tokens["train"].select([*list(rare) * 5, *frequent])}
    moved = {}
    for name, data in (("balanced", lopsided), ("none", even), ("unweighted", lopsided)):
        batch = {"per_device_train_batch_size": 128, "num_train_epochs": 1, "warmup_steps": 0}
        options = {"class_weights": name} if name == "balanced" else {}
        trainer = make_trainer(method, backbones["bert"], tmp_path, datasets.DatasetDict(data), **options, **batch)
        set_dropout(trainer.model, 0.0)
        trainer.train()
        moved[name] = trainer.predict(tokens["validation"]).predictions
    np.testing.assert_allclose(moved["balanced"], moved["none"], atol=1e-4)
    assert not np.allclose(moved["balanced"], moved["unweighted"], atol=1e-3)


def test_one_process_uses_one_gpu(demo, tokens, tmp_path, monkeypatch):
    seen = property(lambda args: vars(args).get("_n_gpu") or 2)  # two GPUs: Trainer would spread batches over both
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", seen)
    trainer = make_trainer("PEFT_LORA", demo[0], tmp_path, tokens)
    assert trainer._wrap_model(trainer.model) is trainer.model


@pytest.mark.parametrize("method", ["PEFT_LORA", "PEFT_QLORA"])
def test_the_head_has_a_rate_of_its_own(method, demo, tokens, tmp_path):
    trainer = make_trainer(method, demo[0], tmp_path, tokens, warmup_steps=0, weight_decay=0.3)
    part = next(iter(trainer.learning_rates))
    trainer.learning_rates[part] = 7e-4
    trainer.create_optimizer_and_scheduler(10)
    decays = {name: group["weight_decay"] for name, group in groups_by_name(trainer).items()}
    assert all(decay == (0 if name.endswith("bias") or "LayerNorm" in name else 0.3) for name, decay in decays.items())
    rates = {name: group["lr"] for name, group in groups_by_name(trainer).items()}
    assert set(rates) == {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    for name, rate in rates.items():
        assert rate == (5e-3 if "lora_" in name else 7e-4 if part in name else 1e-4), name
    assert {7e-4, 1e-4, 5e-3} == set(rates.values())
