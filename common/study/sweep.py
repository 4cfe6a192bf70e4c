"""Validation accuracy of other hyperparameters, and of other choices than those written into the scripts.

    python -m common.study.sweep PEFT_LORA --learning_rate=5e-4,1e-3,2e-3 -- --seeds 0 1
    python -m common.study.sweep PEFT_LORA --variants -- --seeds 0 1
    python -m common.study.sweep PEFT_LORA --variants="as published,no warm-up" -- --seeds 0 1
    python -m common.study.sweep PEFT_LORA --lora_r=1,4 --target_modules=query+value,all-linear -- --seeds 0 1
    python -m common.study.sweep full_fine_tuning --learning_rate=5e-5,1e-4,2e-4 -- --seeds 0 1

The second trains once for every choice in `variants`, the third for some of them, the others once for every
combination of the values given; a plus joins the values of one flag. Flags after `--` go to the script. Writes
common/study/<METHOD>_sweep_learning_rate.json (or whatever the flag is) or <METHOD>_variants.json: means over the
seeds, at the epoch that validation chooses. The test reviews play no part, so --max_test_samples 100 saves time. With
other reviews, another backbone, --demo or --max_train_samples the record stays in common/study/runs/.
"""

import contextlib
import itertools
import statistics
import sys
from functools import partial
from types import ModuleType
from unittest.mock import patch

import datasets
from peft import LoraConfig
from transformers import TrainingArguments

from common.cli import run, write_json
from common.model import switch_off_dropout
from common.record import PUBLISHED, command_line, environment
from common.study import full_fine_tuning
from common.study.scripts import HERE, METHODS, script


def variants(method: ModuleType) -> dict[str, contextlib.AbstractContextManager]:
    """Choices that are no flags of the script `method`, by name: each is a context that undoes one of them."""
    build_model, load_tokenizer = method.build_model, method.load_tokenizer

    def training(**changes):
        return patch("transformers.TrainingArguments", lambda **given: TrainingArguments(**given | changes))

    def keep_the_start(*model):
        tokenizer = load_tokenizer(*model)
        tokenizer.truncation_side = "right"
        return tokenizer

    def dropout_on(config, labels):
        with patch("common.model.switch_off_dropout", lambda *parts, **named: None):
            model, new, options = build_model(config, labels)
        return model, new, options | {"run_once": None}  # stored outputs would be those without dropout

    def dropout_off(config, labels):
        model, new, options = build_model(config, labels)
        switch_off_dropout(model)
        return model, new, options

    return {
        "as published": contextlib.nullcontext(),
        "`<br />` kept": patch("common.data.clean", str),
        "long reviews cut at the end": patch.object(method, "load_tokenizer", keep_the_start),
        "dropout on in frozen parts": patch.object(method, "build_model", dropout_on),
        "dropout off everywhere": patch.object(method, "build_model", dropout_off),
        "dropout before LoRA": patch("peft.LoraConfig", partial(LoraConfig, lora_dropout=0.1)),
        "no warm-up": training(warmup_steps=0),
        "no weight decay": training(weight_decay=0.0),
        "cosine schedule": training(lr_scheduler_type="cosine"),
    }


def validation_result(record: dict) -> dict:
    """What validation says of a run, and what the run cost: means over its seeds, at their best epochs."""
    runs = record["runs"]
    best = [epoch for seed in runs for epoch in seed["epochs"] if epoch["epoch"] == seed["best_epoch"]]
    return {
        "trainable_parameters": record["model"]["trainable_parameters"],
        "train_seconds": statistics.mean(seed["train_seconds"] for seed in runs),
        "peak_memory_bytes": max(seed["peak_memory_bytes"] for seed in runs),
        "validation_accuracy": statistics.mean(epoch["validation_accuracy"] for epoch in best),
        "validation_loss": statistics.mean(epoch["validation_loss"] for epoch in best),
        "best_epoch": [epoch["epoch"] for epoch in best],
    }


def main(argv: list[str] | None = None) -> dict:
    """Train for every combination or variant, and write the record after each; returns it."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in (*METHODS, "full_fine_tuning"):
        sys.exit(__doc__)
    split = argv.index("--") if "--" in argv else len(argv)
    name, flags = argv[0], argv[split + 1 :]
    grid = {flag: values.split(",") for flag, _, values in (word.partition("=") for word in argv[1:split])}
    method = full_fine_tuning if name == "full_fine_tuning" else script(name)
    kind = "_".join(["sweep", *(flag.lstrip("-") for flag in grid)])
    combinations = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    jobs = [(combination, contextlib.nullcontext()) for combination in combinations]
    if "--variants" in grid:
        kind, known = "variants", variants(method)
        titles = known if grid["--variants"] == [""] else grid["--variants"]
        jobs = [({"variant": title}, known[title]) for title in titles]
        datasets.disable_caching()  # the cache does not see that a function was replaced
    content = {"command": command_line("-m common.study.sweep", argv), "results": [], "environment": environment()}
    for number, (title, change) in enumerate(jobs):
        chosen = [word for flag, value in title.items() if flag != "variant" for word in (flag, *value.split("+"))]
        folder = HERE / "runs" / name / kind / str(number)
        with change:
            record = method.main([*flags, *chosen, "--output_dir", str(folder)])
        content["results"].append(title | validation_result(record))
        print(content["results"][-1], flush=True)
        part = record["config"]["demo"] or record["config"]["max_train_samples"]
        part = part or (record["model"]["weights_sha256"], record["dataset"]["sha256"]) != PUBLISHED
        path = (folder.parent if part else HERE) / f"{name}_{kind}.json"
        write_json(content, path)
    print(f"Record:   {path}")
    return content


if __name__ == "__main__":
    run(main)
