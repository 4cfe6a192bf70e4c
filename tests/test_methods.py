"""What each method trains, freezes and quantizes, on every architecture; one test for each trap."""

import importlib

import bitsandbytes
import pytest
import torch
from conftest import ARCHITECTURES, configure
from peft import get_peft_model_state_dict
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    TrainingArguments,
    set_seed,
)

from common.cli import UserError
from common.data import load_reviews, tokenize
from common.model import (
    compute_dtype,
    count_parameters,
    head_modules,
    label_config,
    mixed_precision,
    trainable_state,
    transformer_blocks,
)
from common.preflight import check_trainable
from common.trainer import ReviewTrainer

HEADS = {
    "bert": ["bert.pooler", "classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "roberta": ["classifier"],
    "electra": ["classifier"],
    "deberta-v2": ["pooler", "classifier"],
    "llama": ["score"],
    "qwen2": ["score"],
}


def import_method(name):
    return importlib.import_module(f"{name}.train")


def build(method, folder, **changes):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(0)
    return method.build_model(configure(method, folder, **changes), label_config(["negative", "positive"], tokenizer))


@pytest.fixture(scope="module")
def tokens(demo):
    reviews, _ = load_reviews(str(demo[1]), max_train_samples=150, max_test_samples=40)
    return tokenize(reviews, AutoTokenizer.from_pretrained(demo[0]), 32)


@pytest.fixture(scope="module")
def default_shape(tmp_path_factory, demo):
    """Random weights in the shape of the default backbone."""
    folder = tmp_path_factory.mktemp("default")
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    AutoModel.from_config(BertConfig(**shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo[0]).save_pretrained(folder)
    return folder


def make_trainer(model, folder, tokens, **changes):
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "seed": 0}
    args = TrainingArguments(output_dir=str(folder), report_to="none", save_strategy="no", **settings | changes)
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    return ReviewTrainer(model=model, args=args, train_dataset=tokens["train"], processing_class=tokenizer)


@pytest.mark.parametrize(
    ("name", "trainable", "total"),
    [
        ("NEW_HEAD", 148_610, 22_713_986),
        ("LAST_LAYER", 1_923_074, 22_713_986),
        ("PEFT_LORA", 296_066, 22_861_442),
        ("PEFT_QLORA", 296_066, 22_861_442),
    ],
)
def test_exact_parameters_with_the_default_backbones_shape(name, trainable, total, default_shape):
    model, _ = build(import_method(name), default_shape)
    assert count_parameters(model) == (trainable, total)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trains_what_it_says_and_nothing_else(method, architecture, backbones, tokens, tmp_path):
    model, new = build(method, backbones[architecture])
    check_trainable(model, new)
    expected = HEADS[architecture] + {
        "LAST_LAYER": [f"{'layer' if architecture not in ('llama', 'qwen2') else 'layers'}.1"],
        "PEFT_LORA": ["lora_A", "lora_B"],
        "PEFT_QLORA": ["lora_A", "lora_B"],
    }.get(method.FOLDER.name, [])
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for name, weight in model.named_parameters():
        part = name.replace("modules_to_save.default.", "")
        inside = any(f".{module}." in f".{part}" for module in expected) and "original_module" not in part
        assert weight.requires_grad == inside, name
        assert not weight.requires_grad or weight.dtype == torch.float32
    make_trainer(model, tmp_path, tokens).train()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frozen_parts_compute_in_bf16_and_stay_in_fp32(architecture, backbones, tokens, tmp_path):
    model, _ = build(import_method("PEFT_LORA"), backbones[architecture])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = make_trainer(model, tmp_path, tokens, bf16=True, use_cpu=True, max_steps=2)
    batch = trainer.tensors_of(tokens["train"]).__getitems__([0, 1, 2, 3])
    _, blocks = transformer_blocks(model.get_base_model())
    model.eval()
    dtypes = []
    blocks[0].register_forward_hook(
        lambda block, inputs, output: dtypes.append((output[0] if isinstance(output, tuple) else output).dtype)
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch).logits
    untouched, _ = build(import_method("PEFT_LORA"), backbones[architecture])
    with torch.no_grad():
        assert torch.allclose(logits.float(), untouched.eval()(**batch).logits, atol=0.02)
    assert dtypes == [torch.bfloat16]
    trainer.train()
    for name, weight in model.state_dict().items():
        assert weight.dtype == before[name].dtype
        trains = "lora_" in name or "modules_to_save" in name
        assert torch.equal(weight, before[name]) != trains, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trap_1_the_backbone_is_in_4_bits_and_the_head_is_not(architecture, backbones):
    model, _ = build(import_method("PEFT_QLORA"), backbones[architecture])
    quantized = [name for name, part in model.named_modules() if isinstance(part, bitsandbytes.nn.Linear4bit)]
    assert quantized
    assert not [name for name in quantized if any(f".{head}" in f".{name}" for head in HEADS[architecture])]
    linear = [name for name, part in model.named_modules() if type(part) is torch.nn.Linear and "lora_" not in name]
    assert all(any(f".{head}" in f".{name}" for head in HEADS[architecture]) for name in linear)
    states = [weight.quant_state for weight in model.parameters() if hasattr(weight, "quant_state")]
    assert {(state.quant_type, state.nested) for state in states} == {("nf4", True)}


def test_trap_2_something_new_that_would_not_train_stops_the_run(method, backbones):
    model, new = build(method, backbones["bert"])
    assert sorted(new) == ["classifier.bias", "classifier.weight"]
    check_trainable(model, new)
    for name, weight in model.named_parameters():
        if name.endswith("classifier.bias") or name.endswith("classifier.modules_to_save.default.bias"):
            weight.requires_grad = False
    with pytest.raises(UserError, match=r"classifier\.bias is newly initialised, but would not train"):
        check_trainable(model, new)


def test_trap_2_a_quantized_new_weight_stops_the_run(backbones):
    model, _ = build(import_method("PEFT_QLORA"), backbones["bert"])
    with pytest.raises(UserError, match="was quantized"):
        check_trainable(model, ["bert.encoder.layer.0.output.dense.weight"])


def test_a_head_for_other_labels_is_made_anew(method, backbones, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(backbones["bert"], num_labels=3).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(backbones["bert"]).save_pretrained(tmp_path)
    model, new = build(method, tmp_path)
    check_trainable(model, new)
    assert sorted(new) == ["classifier.bias", "classifier.weight"]
    assert model(torch.arange(5, 15).unsqueeze(0)).logits.shape == (1, 2)


@pytest.mark.parametrize("name", ["PEFT_LORA", "PEFT_QLORA"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_traps_2_and_3_the_whole_head_is_saved_with_the_adapter(name, architecture, backbones):
    model, new = build(import_method(name), backbones[architecture])
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    saved = {name.removeprefix("base_model.model.") for name in get_peft_model_state_dict(model)}
    assert set(new) <= saved
    assert len(saved) == len(trainable_state(model))


def test_trap_4_no_gradient_checkpointing(method, backbones):
    model, _ = build(method, backbones["bert"])
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize(("name", "frozen_depth"), [("NEW_HEAD", 2), ("LAST_LAYER", 1)])
def test_trap_5_frozen_parts_run_without_dropout(name, frozen_depth, backbones):
    model, _ = build(import_method(name), backbones["bert"])
    ids = torch.arange(5, 15).unsqueeze(0)
    hidden = [model.train().bert(ids, output_hidden_states=True).hidden_states for _ in range(2)]
    assert torch.equal(hidden[0][frozen_depth], hidden[1][frozen_depth])
    # What trains keeps its own: the head's in both, the last block's in LAST_LAYER.
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_trap_5_a_decoders_attention_drops_nothing_in_frozen_blocks(backbones, tmp_path):
    AutoModel.from_pretrained(backbones["llama"], attention_dropout=0.5).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(backbones["llama"]).save_pretrained(tmp_path)
    model, _ = build(import_method("LAST_LAYER"), tmp_path)
    ids = torch.arange(5, 15).unsqueeze(0)
    first, again = (model.train().model(ids, output_hidden_states=True).hidden_states for _ in range(2))
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[2], again[2])  # the block that trains keeps its own


@pytest.mark.parametrize("name", ["PEFT_LORA", "PEFT_QLORA"])
def test_trap_5_dropout_stays_on_between_adapters(name, backbones):
    model, _ = build(import_method(name), backbones["bert"])
    ids = torch.arange(5, 15).unsqueeze(0)
    hidden = [model.train()(ids, output_hidden_states=True).hidden_states[1] for _ in range(2)]
    assert not torch.equal(*hidden)


def test_trap_6_a_backbone_saved_in_bf16_trains_in_fp32(method, backbones, tmp_path):
    AutoModel.from_pretrained(backbones["bert"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(backbones["bert"]).save_pretrained(tmp_path)
    model, new = build(method, tmp_path)
    check_trainable(model, new)
    model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith("classifier"))).bfloat16()
    with pytest.raises(UserError, match=r"would train in torch\.bfloat16"):
        check_trainable(model, new)


@pytest.mark.parametrize(
    ("gpu", "bf16", "precision"), [(False, False, "fp32"), (True, True, "bf16"), (True, False, "fp16")]
)
def test_trap_7_precision_follows_the_gpu(gpu, bf16, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert mixed_precision() == precision
    assert (
        str(compute_dtype()) == {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}[precision]
    )


def test_trap_7_4_bit_layers_compute_in_that_type(backbones, monkeypatch):
    monkeypatch.setattr("common.model.mixed_precision", lambda: "bf16")
    model, _ = build(import_method("PEFT_QLORA"), backbones["bert"])
    types = {part.compute_dtype for part in model.modules() if isinstance(part, bitsandbytes.nn.Linear4bit)}
    assert types == {torch.bfloat16}


def test_trap_8_every_process_loads_onto_its_own_gpu(backbones, monkeypatch):
    method, asked = import_method("PEFT_QLORA"), {}

    class Loader(method.AutoModelForSequenceClassification):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            asked.update(kwargs)
            raise InterruptedError

    monkeypatch.setattr(method, "AutoModelForSequenceClassification", Loader)
    monkeypatch.setattr(method.PartialState(), "device", torch.device("cuda", 1))
    with pytest.raises(InterruptedError):
        build(method, backbones["bert"])
    assert asked["device_map"] == {"": torch.device("cuda", 1)}


def test_trap_12_the_seed_decides_what_is_drawn(method, backbones):
    first, again = (trainable_state(build(method, backbones["bert"])[0]) for _ in range(2))
    set_seed(1)
    labels = label_config(["negative", "positive"], AutoTokenizer.from_pretrained(backbones["bert"]))
    other = trainable_state(method.build_model(configure(method, backbones["bert"]), labels)[0])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("name", ["PEFT_LORA", "PEFT_QLORA"])
def test_trap_15_the_learning_rate_is_loras_not_full_fine_tunings(name):
    assert 2e-4 <= import_method(name).Config().learning_rate <= 1e-2


def test_trap_16_merging_is_exact_in_full_precision_and_lossy_in_4_bits(backbones):
    errors = {}
    for name in ("PEFT_LORA", "PEFT_QLORA"):
        model, _ = build(import_method(name), backbones["bert"])
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.1)
        ids = torch.arange(5, 15).unsqueeze(0)
        with torch.no_grad():
            before = model.eval()(ids).logits
            errors[name] = (model.merge_and_unload()(ids).logits - before).abs().max().item()
    assert errors["PEFT_LORA"] < 1e-5 < errors["PEFT_QLORA"]


def test_an_evaluation_does_not_keep_4_bit_layers_from_training(backbones):
    model, _ = build(import_method("PEFT_QLORA"), backbones["bert"])
    ids = torch.arange(5, 15).unsqueeze(0)
    with torch.no_grad():
        model.eval()(ids)
    model.train()(ids).logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize(
    ("name", "config", "missing"),
    [
        ("LAST_LAYER", {"model_type": "albert", "num_hidden_layers": 3}, "3 Transformer blocks"),
        ("PEFT_LORA", {"model_type": "modernbert", "num_hidden_layers": 2}, "query and value"),
    ],
)
def test_an_architecture_that_a_method_cannot_serve(name, config, missing, tmp_path, demo):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "embedding_size": 32}
    shape = AutoConfig.for_model(**sizes | config, vocab_size=100, pad_token_id=0)
    AutoModel.from_config(shape).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo[0]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=missing):
        build(import_method(name), tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_is_found_by_structure(architecture, backbones):
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(backbones[architecture]))
    assert head_modules(model) == HEADS[architecture]
