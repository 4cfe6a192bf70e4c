"""Test accuracy, time and memory of full fine-tuning, the training of every weight.

    python -m common.study.full_fine_tuning
    python -m common.study.full_fine_tuning --dataset ~/imdb --seeds 0

It is the flow of the four scripts with another `build_model`, and takes their flags. A full run writes
common/study/full_fine_tuning.json; one with other reviews, another backbone, --demo or --max_*_samples writes to its
--output_dir.
"""

from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModelForSequenceClassification
from transformers.hf_argparser import HfArg

from common.cli import run, write_json
from common.model import missing_weights
from common.record import command_line, make_record, spread
from common.study.scripts import HERE, record_path, script

FOLDER = HERE / "runs" / "full fine-tuning"  # its name is the method's in the record
SCRIPT = script("NEW_HEAD")


@dataclass
class Config(SCRIPT.Config):
    """The command line: that of the script, with a learning rate of its own."""

    learning_rate: float = HfArg(default=1e-4, help="Peak of the schedule, chosen on validation.")


def build_model(config: Config, labels: dict) -> tuple:
    """The model, all of it in float32 and trained, the names of its new weights, and nothing else for the trainer."""
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        config.model,
        revision=config.model_revision,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **labels,
    )
    return model, missing_weights(loading), {}


def publish(folder: Path, argv: list[str] | None, config, data, fingerprint: str, runs: list[dict]) -> dict:
    """Write the record, without charts; returns it."""
    record = make_record(folder.name, argv, config, data, fingerprint, runs)
    record["command"] = command_line("-m common.study.full_fine_tuning", argv)
    path = record_path("full_fine_tuning", config, fingerprint, folder)
    write_json(record, path)
    print(f"Record:   {path}\nTest:     accuracy {spread(record['summary']['test_accuracy'])} (percent)")
    return record


def main(argv: list[str] | None = None) -> dict:
    """Run every seed through the script's own flow; returns the record."""
    with patch.multiple(SCRIPT, Config=Config, FOLDER=FOLDER, build_model=build_model, publish=publish):
        return SCRIPT.main(argv)


if __name__ == "__main__":
    run(main)
