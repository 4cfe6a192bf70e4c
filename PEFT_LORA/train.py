"""PEFT_LORA: low-rank adaptation (LoRA, Hu et al., 2021) of a pretrained Transformer classifier.

Trains: for every query and value projection W (or others: --target_modules) a low-rank update B·A, used as W + B·A;
        and the new head.
Frozen: the backbone, W included. The updates can be merged into W later, so inference costs nothing extra.

Run:   python PEFT_LORA/train.py
Demo:  python PEFT_LORA/train.py --demo    (no network, no GPU, under half a minute)
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    # Ctrl-C while libraries load; later `run` says more.
    signal.signal(signal.SIGINT, lambda *_: print("\nInterrupted.", file=sys.stderr) or os._exit(130))

import torch
from accelerate import PartialState
from transformers import AutoModelForSequenceClassification
from transformers.hf_argparser import HfArg

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))  # so that `common` is found wherever this is started from

from common.cli import fit_to_size, locked, parse_config, run, writing
from common.data import ENOUGH_TO_CHOOSE, load_reviews, tokenize, training_sample
from common.model import checkpoint_blocks, compute_dtype, label_config, load_tokenizer, preflight
from common.record import open_seed, prepare_seed, publish, run_record


@dataclass
class Config:
    """The command line: `python PEFT_LORA/train.py --help`."""

    model: str = HfArg(default="sentence-transformers/all-MiniLM-L6-v2", help="Backbone: a Hub id or a local folder.")
    model_revision: str | None = HfArg(
        default="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
        help="Commit, tag or branch of the backbone on the Hub; of another --model than the default, main.",
    )
    dataset: str = HfArg(
        default="stanfordnlp/imdb",
        help="Labelled texts: a Hub id, a file (.parquet, .csv, .tsv, .jsonl), a folder with a train file and, if "
        "there are, validation and test files, an extracted aclImdb folder, or aclImdb_v1.tar.gz.",
    )
    dataset_revision: str | None = HfArg(
        default="e6281661ce1c48d982bc483cf8a173c1bbeb5d31",
        help="Commit, tag or branch of the data set on the Hub; of another --dataset than the default, main.",
    )
    text_column: str = HfArg(default="text", help="Column with the texts.")
    label_column: str = HfArg(default="label", help="Column with the labels: integers or words.")
    class_weights: Literal["none", "balanced"] = HfArg(
        default="none", help="balanced: every class counts as much as any other, however rare it is."
    )
    max_length: int = HfArg(default=512, help="Tokens per text; longer texts are truncated at the start.")
    epochs: int | None = HfArg(
        default=None,
        help="Passes over the training texts. The best on validation is kept; with little validation, the last. "
        "[5; with few texts as many as make about 600 updates]",
    )
    batch_size: int | None = HfArg(
        default=None,
        help="Texts per update, over all processes and accumulation steps. "
        "[128; with fewer than 16,384 texts 64, 32 or 16]",
    )
    gradient_accumulation_steps: int | None = HfArg(
        default=None,
        help="Steps per update: with 4, a quarter of the batch is in memory at a time. "
        "[1 on a GPU; on a CPU as many as make steps of about 16 texts: they fit its cache]",
    )
    gradient_checkpointing: bool = HfArg(
        default=False,
        help="Compute every block again for its backward pass: less memory, more time. No gain where only the head or "
        "the last block trains.",
    )
    torch_compile: bool = HfArg(default=False, help="Compile every block first. Compare the speed: it may not pay.")
    optim: Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = HfArg(
        default="adamw_torch_fused",
        help="AdamW's states take 8 bytes per trained weight, or 2 in 8 bits; paged ones can move to the host.",
    )
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="One run for each.")
    max_train_samples: int | None = HfArg(
        default=None,
        help="A random, stratified subset of the training texts, validation included; another for every seed. [all]",
    )
    max_test_samples: int | None = HfArg(default=None, help="A random, stratified subset of the test texts. [all]")
    output_dir: str | None = HfArg(
        default=None, help="Folder for checkpoints, models and, where given, the record. [runs/ beside the script]"
    )
    save_steps: int | None = HfArg(
        default=None, help="Save a checkpoint every so many updates within an epoch too. [after epochs alone]"
    )
    resume: bool = HfArg(default=False, help="Continue an interrupted run of the same flags.")
    report_to: str = HfArg(default="none", help="Experiment tracker that Trainer logs to, such as tensorboard.")
    demo: bool = HfArg(default=False, help="Try the whole job on generated reviews with a tiny model.")

    # This method
    learning_rate: float | None = HfArg(
        default=None,
        help="Peak of the schedule. At full fine-tuning's 2e-5 LoRA hardly learns. "
        "[2e-3 for batches of 128; for smaller ones with the square root of their size]",
    )
    head_learning_rate: float = HfArg(
        default=1e-4,
        help="Peak for the head. With 100 texts LoRA's own rate costs points; with all it makes no difference.",
    )
    lora_r: int = HfArg(default=16, help="Rank of every update.")
    lora_alpha: int = HfArg(default=32, help="Updates are scaled by lora_alpha / lora_r.")
    target_modules: list[str] | None = HfArg(
        default=None,
        help="What the names of the layers with updates end in, or all-linear. [the query and value projections]",
    )

    def __post_init__(self):
        if self.batch_size and self.learning_rate is None:  # at 2e-3 some runs in small batches never learn
            self.learning_rate = 2e-3 * min(1, self.batch_size / 128) ** 0.5


def build_model(config: Config, labels: dict) -> tuple:
    """The model, the names of its newly initialised weights, and what else the trainer needs: the head's rate."""
    from peft import LoraConfig, get_peft_model

    from common.blocks import lora_targets
    from common.model import head_modules, missing_weights, weights_place

    model, loading = AutoModelForSequenceClassification.from_pretrained(
        config.model,
        revision=config.model_revision,
        dtype=compute_dtype(),  # the frozen part computes in it; 32 bits would take twice the memory
        device_map=weights_place(),  # straight to the GPU
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # a head for other labels is made anew
        **labels,
    )
    head = head_modules(model)
    for part in map(model.get_submodule, head):
        part.float()  # what trains needs 32 bits; PEFT sees to its own updates
    lora = LoraConfig(
        task_type="SEQ_CLS",  # without it PEFT neither trains nor saves the head
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=lora_targets(model, config.target_modules, config.lora_r),
        modules_to_save=[*head],  # PEFT's default misses the poolers of BERT and DeBERTa
    )
    # The revision is kept with the adapter, which is worthless on another backbone.
    model = get_peft_model(model, lora, revision=config.model_revision)
    return model, missing_weights(loading), {"learning_rates": dict.fromkeys(head, config.head_learning_rate)}


def train(config: Config, seed: int, tokenizer, data, fingerprint: str, classes: list[str]) -> dict:
    """One run: train, choose the epoch on validation, test once. Returns its record."""
    from transformers import TrainingArguments, set_seed  # here, not on top: --help need not wait for them

    from common.metrics import validation_scores
    from common.model import load_trainable_state, trainable_state
    from common.speed import speed_up
    from common.trainer import ReviewTrainer

    started = time.perf_counter()
    folder, finished = open_seed(FOLDER.name, config, seed, fingerprint)
    if finished:
        return finished
    set_seed(seed, deterministic=True)  # before the model is built, which draws its new weights
    model, new, options = build_model(config, label_config(classes, tokenizer))
    speed_up(model, config.torch_compile)
    if config.gradient_checkpointing:
        checkpoint_blocks(model)
    in_a_step = config.batch_size // config.gradient_accumulation_steps // PartialState().num_processes
    args = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=in_a_step,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        optim=config.optim,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,  # of all steps
        weight_decay=0.01,
        bf16=compute_dtype() == torch.bfloat16,  # autocast: what trains stays in fp32, matrix products take 16 bits
        fp16=compute_dtype() == torch.float16,
        eval_on_start=True,  # epoch 0 of the chart
        eval_strategy="epoch",
        per_device_eval_batch_size=2 * in_a_step,
        save_strategy="epoch",
        save_steps=config.save_steps or sys.maxsize,  # within an epoch
        save_total_limit=2,  # the best and the last
        load_best_model_at_end=len(data["validation"]) >= ENOUGH_TO_CHOOSE,  # else the last epoch stays
        metric_for_best_model="validation_rank",  # accuracy, then loss
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # it would make the host wait for the GPU in every step
        ddp_find_unused_parameters=False,  # all that trains takes part in every step; buffers never change
        ddp_broadcast_buffers=False,
        report_to=config.report_to,
    )
    trainer = ReviewTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset={"train": training_sample(data), "validation": data["validation"]},
        processing_class=tokenizer,
        compute_metrics=validation_scores,
        class_weights=config.class_weights,
        **options,
    )
    preflight(config, trainer, new)
    checkpoint = prepare_seed(FOLDER.name, config, folder, fingerprint)
    untrained = trainable_state(model)
    trainer.train(resume_from_checkpoint=checkpoint)
    with writing(folder / "model"):
        trainer.save_model(folder / "model")
        model.config.dtype = torch.float32  # what it loads in unless asked otherwise: its head was trained in it
        model.config.save_pretrained(folder / "model")  # an adapter alone forgets its label names
    validation = trainer.predict(data["validation"])
    test = trainer.predict(data["test"])  # the first look at the test reviews: every choice is made
    load_trainable_state(model, untrained)
    untrained_test = trainer.predict(data["test"])
    return run_record(trainer, validation, test, untrained_test, started)


def main(argv: list[str] | None = None) -> dict:
    """Run every seed, write the record and draw the charts. Returns the record."""
    config = parse_config(Config, FOLDER, argv)
    with locked(config.output_dir):
        tokenizer = load_tokenizer(config.model, config.model_revision, config.max_length)
        runs = []
        for seed in config.seeds:
            with PartialState().local_main_process_first():  # the other processes find its cache
                reviews, fingerprint = load_reviews(config, seed)
                data = tokenize(reviews, tokenizer, config.max_length)
            config = fit_to_size(config, len(data["train"]) + len(data["validation"]))
            classes = reviews["train"].features["label"].names
            runs.append(train(config, seed, tokenizer, data, fingerprint, classes))
        return publish(FOLDER, argv, config, data, fingerprint, runs)


if __name__ == "__main__":
    run(main)
