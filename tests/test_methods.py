"""What each method trains, freezes and quantizes, on every architecture; one test for each trap."""

import contextlib
import dataclasses
import gc
import json
import os
import pickle
import shutil

import bitsandbytes
import pytest
import torch
from conftest import (
    ARCHITECTURES,
    DECODERS,
    SIZES,
    build,
    import_method,
    make_trainer,
    watch_dtypes,
    write_random_backbone,
)
from peft import get_peft_model_state_dict
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    ModernBertConfig,
    MPNetConfig,
    Phi3Config,
    XLMConfig,
    XLMForSequenceClassification,
)

from common.blocks import transformer_blocks
from common.cli import UserError
from common.model import check_trainable, checkpoint_blocks, compute_dtype, count_parameters, trainable_state
from common.speed import speed_up

HEADS = {
    "bert": ["bert.pooler", "classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "roberta": ["classifier"],
    "electra": ["classifier"],
    "deberta-v2": ["pooler", "classifier"],
    "llama": ["score"],
    "qwen2": ["score"],
}
TEXT = torch.arange(5, 15).unsqueeze(0)


@pytest.fixture(scope="module")
def default_shape(tmp_path_factory, demo):
    """Random weights in the shape of the default backbone."""
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return write_random_backbone(tmp_path_factory.mktemp("default"), demo[0], BertConfig(**shape))


@pytest.fixture
def in_bf16(monkeypatch):
    """Every script computes in bf16, as on a GPU."""
    for name in ("NEW_HEAD", "LAST_LAYER", "PEFT_LORA", "PEFT_QLORA"):
        monkeypatch.setattr(import_method(name), "compute_dtype", lambda: torch.bfloat16)


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
    assert count_parameters(build(name, default_shape)[0]) == (trainable, total)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trains_what_it_says_in_fp32_and_keeps_the_rest_in_bf16(
    method, architecture, backbones, tokens, tmp_path, in_bf16
):
    """Hidden states, too, stay in bf16 from the embeddings on, where nothing but updates and the head train."""
    trainer = make_trainer(method, backbones[architecture], tmp_path, tokens, max_steps=3, bf16=True, use_cpu=True)
    model, name = trainer.model, method.FOLDER.name
    expected = (
        HEADS[architecture]
        + {
            "NEW_HEAD": [],
            "LAST_LAYER": ["layers.1" if architecture in DECODERS else "layer.1"],
            "PEFT_LORA": ["lora_A", "lora_B"],
            "PEFT_QLORA": ["lora_A", "lora_B"],
        }[name]
    )
    before = {path: weight.detach().clone() for path, weight in model.named_parameters()}
    for path, weight in model.named_parameters():
        if "original_module" in path:  # what PEFT keeps of the head as it was, to switch the adapter off
            continue
        part = path.replace("modules_to_save.default.", "")
        trains = any(f".{module}." in f".{part}" for module in expected)
        assert weight.requires_grad == trains, path
        assert weight.dtype == (torch.float32 if trains else torch.bfloat16), path
    seen = watch_dtypes(model, "Norm|Embeddings?$|(Block|Layer)$")
    trainer.train()
    for path, weight in model.named_parameters():
        assert weight.dtype == before[path].dtype
        # As bytes: four bits four times may be the pattern of a number that is none, and equals nothing.
        same = torch.equal(weight.view(torch.uint8), before[path].view(torch.uint8))
        assert same != weight.requires_grad, path
    assert len(seen) >= 7 and (name == "LAST_LAYER" or set(seen.values()) == {torch.bfloat16}), seen
    # One `forward` for every module of a class; accelerate alone gives the whole model its own, for autocast.
    assert not [path for path, part in model.named_modules() if path and "forward" in vars(part)]


def live_tensors() -> list[torch.Tensor]:
    """All tensors of some size that are held anywhere in this process."""
    gc.collect()
    return [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and item.numel() > 1000]


def test_every_weight_is_held_once(method, backbones, tokens, tmp_path, in_bf16):
    """Also after training: no fp32 original beside what is frozen in bf16, no bf16 copy beside an fp32 one."""
    earlier = live_tensors()
    trainer = make_trainer(method, backbones["bert"], tmp_path, tokens, max_steps=2, bf16=True, use_cpu=True)
    trainer.train()
    model = trainer.model
    model.zero_grad()
    del trainer
    known = {tensor.untyped_storage().data_ptr() for tensor in (*earlier, *model.parameters(), *model.buffers())}
    found = [tensor for tensor in live_tensors() if tensor.untyped_storage().data_ptr() not in known]
    assert not [tensor.shape for tensor in found]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trap_1_the_backbone_is_in_4_bits_and_the_head_is_not(architecture, backbones):
    model, *_ = build("PEFT_QLORA", backbones[architecture])

    def in_head(name):
        return any(f".{head}" in f".{name}" for head in HEADS[architecture])

    quantized = [name for name, part in model.named_modules() if isinstance(part, bitsandbytes.nn.Linear4bit)]
    linear = [name for name, part in model.named_modules() if type(part) is torch.nn.Linear and "lora_" not in name]
    assert quantized and not any(map(in_head, quantized)) and all(map(in_head, linear))
    states = [weight.quant_state for weight in model.parameters() if hasattr(weight, "quant_state")]
    assert {(state.quant_type, state.nested) for state in states} == {("nf4", True)}


def test_trap_2_something_new_that_would_not_train_stops_the_run(method, backbones):
    model, new, _ = build(method, backbones["bert"])
    assert sorted(new) == ["classifier.bias", "classifier.weight"]
    check_trainable(model, new)
    for name, weight in model.named_parameters():
        if name.endswith("classifier.bias") or name.endswith("classifier.modules_to_save.default.bias"):
            weight.requires_grad = False
    folder = backbones["bert"]
    expected = (
        rf"^--model {folder}: classifier\.bias is not in its weights; frozen, it would stay random, one of 1 that"
    )
    with pytest.raises(UserError, match=expected):
        check_trainable(model, new)


def test_trap_2_a_quantized_new_weight_stops_the_run(backbones):
    model, *_ = build("PEFT_QLORA", backbones["bert"])
    with pytest.raises(UserError, match="is not there; quantized, it would stay random"):
        check_trainable(model, {"bert.encoder.layer.0.output.dense.weight": "is not there"})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_hidden_layers": 3}, r"bert\.encoder\.layer\.2\.attention.* is not in its weights; .*one of 16 that"),
        ({"intermediate_size": 96}, r"bert\.encoder\.layer\.\d\.\w+\.dense.* is \[.*128.*\] there, not \[.*96.*\]; "),
    ],
)
def test_weights_that_are_not_of_the_config_are_named_with_path_and_cause(change, expected, backbones, tmp_path):
    shutil.copytree(backbones["bert"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    model, new, _ = build("NEW_HEAD", tmp_path)
    with pytest.raises(UserError, match=f"^--model {tmp_path}: {expected}.*; do config.json and weights belong toget"):
        check_trainable(model, new)


@pytest.mark.parametrize("name", ["PEFT_LORA", "PEFT_QLORA"])
def test_a_rank_above_the_width_of_the_layers_is_refused(name, backbones):
    assert build(name, backbones["bert"], lora_r=64)
    with pytest.raises(UserError, match=r"^--lora_r 65: is above 64, the width of the model's layers$"):
        build(name, backbones["bert"], lora_r=65)


def test_a_head_for_other_labels_is_made_anew(method, backbones, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(backbones["bert"], num_labels=3).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(backbones["bert"]).save_pretrained(tmp_path)
    model, new, _ = build(method, tmp_path)
    check_trainable(model, new)
    assert sorted(new) == ["classifier.bias", "classifier.weight"]
    assert model(TEXT).logits.shape == (1, 2)


@pytest.mark.parametrize("name", ["PEFT_LORA", "PEFT_QLORA"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_traps_2_and_3_the_whole_head_is_saved_with_the_adapter(name, architecture, backbones):
    model, new, _ = build(name, backbones[architecture])
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    saved = {name.removeprefix("base_model.model.") for name in get_peft_model_state_dict(model)}
    assert set(new) <= saved
    assert len(saved) == len(trainable_state(model))


def test_trap_4_no_gradient_checkpointing(method, backbones):
    assert not build(method, backbones["bert"])[0].is_gradient_checkpointing


@pytest.mark.parametrize(
    ("name", "frozen_depth"), [("NEW_HEAD", 2), ("LAST_LAYER", 1), ("PEFT_LORA", 0), ("PEFT_QLORA", 0)]
)
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_trap_5_dropout_is_on_where_something_trains_and_nowhere_else(
    name, frozen_depth, architecture, demo, tmp_path
):
    """Of a decoder: the attention's, which is a number and no module."""
    config = ARCHITECTURES[architecture]
    dropout = {"attention_dropout": 0.5} if architecture in DECODERS else {"hidden_dropout_prob": 0.5}
    write_random_backbone(tmp_path, demo[0], type(config)(**config.to_dict() | dropout))
    model, *_ = build(name, tmp_path)
    first, again = (model.train()(TEXT, output_hidden_states=True) for _ in range(2))
    equal = [torch.equal(*hidden) for hidden in zip(first.hidden_states, again.hidden_states, strict=True)]
    lowest = 0 if architecture == "bert" else 1  # embeddings of BERT have dropout, those of Llama have none
    assert equal[lowest:] == [depth <= frozen_depth and frozen_depth > 0 for depth in range(lowest, 3)]
    assert torch.equal(first.logits, again.logits) == (name == "NEW_HEAD" and architecture in DECODERS)


def test_trap_6_a_backbone_saved_in_bf16_trains_in_fp32(method, backbones, tmp_path):
    AutoModel.from_pretrained(backbones["bert"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(backbones["bert"]).save_pretrained(tmp_path)
    model, new, _ = build(method, tmp_path)
    check_trainable(model, new)
    model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith("classifier"))).bfloat16()
    with pytest.raises(UserError, match=r"would train in torch\.bfloat16"):
        check_trainable(model, new)


@pytest.mark.parametrize(
    ("gpu", "bf16", "dtype"),
    [(False, False, torch.float32), (True, True, torch.bfloat16), (True, False, torch.float16)],
)
def test_trap_7_precision_follows_the_gpu(gpu, bf16, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert compute_dtype() == dtype


def test_trap_7_4_bit_layers_compute_in_that_type(backbones, in_bf16):
    model, *_ = build("PEFT_QLORA", backbones["bert"])
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
    first, again, other = (trainable_state(build(method, backbones["bert"], seed)[0]) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("name", ["PEFT_LORA", "PEFT_QLORA"])
def test_trap_15_the_learning_rate_is_loras_not_full_fine_tunings(name):
    assert 2e-4 <= import_method(name).Config(batch_size=128).learning_rate <= 1e-2


@pytest.mark.parametrize("name", ["PEFT_LORA", "PEFT_QLORA"])
@pytest.mark.parametrize(("size", "rate"), [(16, 7.07e-4), (32, 1e-3), (64, 1.414e-3), (128, 2e-3), (256, 2e-3)])
def test_loras_learning_rate_falls_with_the_batch(name, size, rate):
    Config = import_method(name).Config
    assert Config(batch_size=size).learning_rate == pytest.approx(rate, rel=1e-3)
    assert dataclasses.replace(Config(), batch_size=size).learning_rate == pytest.approx(rate, rel=1e-3)
    assert Config(batch_size=size, learning_rate=3e-4).learning_rate == 3e-4, "what the user sets stays"


def test_trap_16_merging_is_exact_in_full_precision_and_lossy_in_4_bits(backbones):
    errors = {}
    for name in ("PEFT_LORA", "PEFT_QLORA"):
        model, *_ = build(name, backbones["bert"])
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.1)
        with torch.no_grad():
            before = model.eval()(TEXT).logits
            errors[name] = (model.merge_and_unload()(TEXT).logits - before).abs().max().item()
    assert errors["PEFT_LORA"] < 1e-5 < errors["PEFT_QLORA"]


@pytest.mark.parametrize("name", ["PEFT_LORA", "PEFT_QLORA"])
@pytest.mark.parametrize("flags", [{}, {"lora_r": 4, "lora_alpha": 12}])
def test_an_update_is_scaled_by_alpha_over_r(name, flags, backbones):
    model, *_ = build(name, backbones["bert"], **flags)
    query = model.eval().get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    down, up = query.lora_A["default"].weight, query.lora_B["default"].weight
    assert down.shape[0] == flags.get("lora_r", 16)
    torch.nn.init.normal_(up)
    states = torch.randn(3, 64)
    update = (3.0 if flags else 2.0) * states @ down.T @ up.T
    with torch.no_grad():
        torch.testing.assert_close(query(states) - query.base_layer(states), update, rtol=1e-4, atol=1e-4)


def test_an_evaluation_does_not_keep_4_bit_layers_from_training(backbones):
    model, *_ = build("PEFT_QLORA", backbones["bert"])
    with torch.no_grad():
        model.eval()(TEXT)
    model.train()(TEXT).logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize(
    ("name", "config", "missing"),
    [
        ("LAST_LAYER", {"model_type": "albert", "num_hidden_layers": 3}, "no list of 3 Transformer blocks"),
        (
            "PEFT_LORA",
            {"model_type": "modernbert", "num_hidden_layers": 2},
            "must be given for ModernBert.* some of Wi, Wo, Wqkv",
        ),
    ],
)
def test_an_architecture_that_a_method_cannot_serve(name, config, missing, tmp_path, demo):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "embedding_size": 32}
    write_random_backbone(tmp_path, demo[0], AutoConfig.for_model(**sizes | config, vocab_size=100, pad_token_id=0))
    with pytest.raises(UserError, match=missing):
        build(name, tmp_path)


def test_several_lists_of_parts_are_no_blocks():
    model = XLMForSequenceClassification(XLMConfig(vocab_size=50, emb_dim=16, n_layers=2, n_heads=2))
    with pytest.raises(UserError, match="no list of 2 Transformer blocks was found in XLM"):
        transformer_blocks(model)


# Which parts train


@pytest.mark.parametrize(("blocks", "trained"), [(1, {"1"}), (2, {"0", "1"})])
def test_the_last_blocks_train(blocks, trained, backbones):
    model, *_ = build("LAST_LAYER", backbones["bert"], blocks=blocks)
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert {name.split(".")[3] for name in names if ".layer." in name} == trained
    active = {part.p for part in model.bert.encoder.layer[-blocks:].modules() if isinstance(part, torch.nn.Dropout)}
    assert active == {0.1} and model.bert.embeddings.dropout.p == 0


def test_more_blocks_than_there_are(backbones):
    with pytest.raises(UserError, match=r"^--blocks 3: .* has 2$"):
        build("LAST_LAYER", backbones["bert"], blocks=3)


@pytest.mark.parametrize("name", ["PEFT_LORA", "PEFT_QLORA"])
@pytest.mark.parametrize(
    ("architecture", "targets", "updated"),
    [
        ("bert", None, {"query", "value"}),
        ("bert", ["key", "attention.output.dense"], {"key", "dense"}),
        ("bert", ["all-linear"], {"query", "key", "value", "dense"}),
        ("llama", ["all-linear"], {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}),
    ],
)
def test_target_modules(name, architecture, targets, updated, backbones):
    model, *_ = build(name, backbones[architecture], target_modules=targets)
    names = [name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" in name]
    assert {name.split(".lora_")[0].split(".")[-1] for name in names} == updated
    assert not [name for name in names if "pooler" in name or "classifier" in name or "score" in name]


def test_a_target_that_is_not_there(backbones):
    with pytest.raises(
        UserError, match=r"--target_modules nonsense: no linear layer ends in it; all-linear alone, or .*query"
    ):
        build("PEFT_LORA", backbones["bert"], target_modules=["query", "nonsense"])


@pytest.mark.parametrize("name", ["NEW_HEAD", "LAST_LAYER", "PEFT_LORA", "PEFT_QLORA"])
@pytest.mark.parametrize(
    ("config", "flags", "refused"),
    [
        (ModernBertConfig(**SIZES), {"target_modules": ["Wqkv"]}, None),
        (Phi3Config(**SIZES), {"target_modules": ["qkv_proj"]}, None),
        (GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128), {}, None),
        (Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16), {}, None),  # no attention but its own
        (AlbertConfig(**SIZES, embedding_size=32), {}, "LAST_LAYER"),  # its blocks are one
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_less_common_architectures_train(config, flags, refused, name, backbones, tokens, tmp_path):
    folder = write_random_backbone(tmp_path / "backbone", backbones["bert"], config)
    flags = flags if "LORA" in name else {}
    if name == refused:
        with pytest.raises(UserError, match="no list of 2 Transformer blocks"):
            build(name, folder, **flags)
        return
    trainer = make_trainer(name, folder, tmp_path / "run", tokens, flags=flags, max_steps=2)
    trainer.train()
    assert trainer.predict(tokens["test"]).predictions.shape == (len(tokens["test"]), 2)


@pytest.mark.parametrize("name", ["PEFT_LORA", "PEFT_QLORA"])
def test_where_query_and_value_are_one_the_message_says_what_to_pass(name, backbones, tmp_path):
    folder = write_random_backbone(tmp_path, backbones["bert"], ModernBertConfig(**SIZES))
    with pytest.raises(UserError, match=r"--target_modules must be given .* all-linear alone, or some of .*Wqkv"):
        build(name, folder)


def test_an_architecture_without_checkpointing_or_blocks_says_so(backbones, tmp_path):
    model, *_ = build("PEFT_LORA", write_random_backbone(tmp_path, backbones["bert"], MPNetConfig(**SIZES)))
    with pytest.raises(UserError, match="--gradient_checkpointing: mpnet cannot"):
        checkpoint_blocks(model)
    with pytest.raises(UserError, match="--torch_compile: mpnet has no blocks"):
        speed_up(model, torch_compile=True)


class Pickled:
    """Unpickling one runs a program: here it makes a folder."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_nothing_in_a_checkpoint_is_run(name, backbones, tokens, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer("NEW_HEAD", backbones["bert"], tmp_path, tokens, **settings).train()
    checkpoint = tmp_path / "checkpoint-1"
    assert (checkpoint / name).exists()
    torch.save({"state": Pickled(tmp_path / "trace")}, checkpoint / name)
    with contextlib.suppress(pickle.UnpicklingError):
        again = make_trainer("NEW_HEAD", backbones["bert"], tmp_path, tokens, **settings)
        again.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "trace").exists()
