"""A frozen backbone gives a text the same output in every epoch: compute it once, train the head on what is stored.
Measured on one H200 (all-MiniLM-L6-v2, 5 epochs, the one pass included): 1.6 times the speed."""

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import logging

from common.trainer import ReviewTensors, ReviewTrainer, longest_first


class StoredOutputs(TensorDataset):
    """outputs: (texts, hidden size), what the backbone gave at the one token that the head reads. labels: (texts,).
    A list of rows gives one batch: `inputs_embeds` of shape (rows, 1, hidden size), and `labels`."""

    def __init__(self, outputs: torch.Tensor, labels: torch.Tensor):
        super().__init__(outputs, labels)
        self.outputs, self.lengths = outputs, np.ones(len(outputs))

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        outputs, labels = self[torch.tensor(rows).to(self.outputs.device, non_blocking=True)]
        return {"inputs_embeds": outputs.unsqueeze(1), "labels": labels}


@torch.no_grad()
def store_outputs(run_backbone: Callable, trainer: ReviewTrainer, texts: ReviewTensors) -> Dataset:
    """Send every text through `run_backbone` once; returns what the head trains on from then on: the texts themselves
    where a head reads more than one token. run_backbone: of the model and batches it makes (texts, hidden size)."""
    model = trainer.model.eval()

    class Passing(type(model.base_model)):  # returns what it is given as `inputs_embeds`, with its pooler's output
        def forward(self, *args, inputs_embeds=None, **kwargs):
            if inputs_embeds is None:
                return super().forward(*args, **kwargs)
            pooled = self.pooler(inputs_embeds) if getattr(self, "pooler", None) else None
            return BaseModelOutputWithPoolingAndCrossAttentions(inputs_embeds, pooled)

    def stored(parts: list[list[int]]) -> StoredOutputs:
        progress = logging.tqdm(parts, desc="Through the backbone, once", disable=len(parts) == 1)
        outputs = run_backbone(model, map(texts.__getitems__, progress)).float()
        order = torch.tensor(np.argsort(np.concatenate(parts)), device=outputs.device)
        return StoredOutputs(outputs[order], texts.labels[: len(order)])

    model.base_model.__class__ = Passing
    with trainer.accelerator.autocast():
        few = list(range(min(8, len(texts))))
        whole, alone = (model(**source.__getitems__(few)).logits for source in (texts, stored([few])))
        if alone.shape == whole.shape and torch.allclose(alone, whole, rtol=0.02, atol=0.01):
            return stored(list(longest_first(texts.lengths, trainer.args.eval_batch_size)))
    return texts
