"""The sweeps behind the published hyperparameters; run by hand, on a GPU, from the repository's root.

    python tests/sweep.py PEFT_LORA --learning_rate=5e-4,1e-3,2e-3 -- --seeds 0
    python tests/sweep.py PEFT_LORA --variants -- --seeds 0
    python tests/sweep.py PEFT_LORA --variants="as published,no warm-up" -- --seeds 0

The first trains once for every combination of the values given; the second once for every choice that is written
into the scripts (see `variants`); the third for some of them. Flags after `--` go to the script.
<METHOD>/sweep_learning_rate.json (or whatever the flag is) and <METHOD>/variants.json keep the validation accuracy of
the chosen epoch, mean over the seeds: the test reviews play no part.
"""

import contextlib
import importlib
import itertools
import statistics
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import datasets
from peft import LoraConfig
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.files import shown, write_json
from common.record import environment


def variants(method) -> dict[str, contextlib.AbstractContextManager]:
    """Choices that are no flags, by name: each undoes one of them. method: the script, as a module."""
    arguments, build_model, load_tokenizer = method.TrainingArguments, method.build_model, method.load_tokenizer

    def training(**changes):
        return patch.object(method, "TrainingArguments", lambda **given: arguments(**given | changes))

    def keeping_the_start(*model):
        tokenizer = load_tokenizer(*model)
        tokenizer.truncation_side = "right"
        return tokenizer

    def without_backbone_dropout(config, labels):
        model, new = build_model(config, labels)
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        return model, new

    return {
        "as published": contextlib.nullcontext(),
        "`<br />` kept": patch("common.data.clean", str),
        "long reviews cut at the end": patch.object(method, "load_tokenizer", keeping_the_start),
        "dropout on in frozen parts": patch("common.model.switch_off_dropout", lambda *parts, **named: None),
        "dropout off everywhere": patch.object(method, "build_model", without_backbone_dropout),
        "dropout before LoRA": patch("peft.LoraConfig", partial(LoraConfig, lora_dropout=0.1)),
        "no warm-up": training(warmup_steps=0),
        "no weight decay": training(weight_decay=0.0),
        "cosine schedule": training(lr_scheduler_type="cosine"),
    }


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    name, grid_flags, flags = sys.argv[1], sys.argv[2:split], sys.argv[split + 1 :]
    method = importlib.import_module(f"{name}.train")
    grid = {flag: values.split(",") for flag, _, values in (word.partition("=") for word in grid_flags)}
    kind = "_".join(["sweep", *(flag.lstrip("-") for flag in grid)])
    if "--variants" in grid:
        kind = "variants"
        datasets.disable_caching()  # the cache does not see that a function was replaced
        known = variants(method)
        titles = known if grid["--variants"] == [""] else grid["--variants"]
        jobs = [({"variant": title}, [], known[title]) for title in titles]
    else:
        combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        jobs = [(chosen, list(itertools.chain(*chosen.items())), contextlib.nullcontext()) for chosen in combinations]
    results = []
    for number, (title, arguments, change) in enumerate(jobs):
        folder = ROOT / name / "runs" / kind / str(number)
        with change:
            record = method.main([*flags, *arguments, "--output_dir", str(folder)])
        best = [run["epochs"][run["best_epoch"]] for run in record["runs"]]
        results.append(
            title
            | {
                "validation_accuracy": statistics.mean(epoch["validation_accuracy"] for epoch in best),
                "validation_loss": statistics.mean(epoch["validation_loss"] for epoch in best),
                "best_epoch": [epoch["epoch"] for epoch in best],
            }
        )
        print(results[-1], flush=True)
        content = {"command": " ".join(["python", "tests/sweep.py", *map(shown, sys.argv[1:])]), "results": results}
        write_json(content | {"environment": environment()}, ROOT / name / f"{kind}.json")


if __name__ == "__main__":
    main()
