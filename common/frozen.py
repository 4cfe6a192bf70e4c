"""Frozen Transformer blocks give a review the same output in every epoch: compute it once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from common.cli import UserError
from common.model import transformer_blocks


class FrozenBlocks:
    """The blocks of `model`, none of which trains, and the place of the one token whose output the head reads."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        name, self.blocks = transformer_blocks(model)
        self.parent, self.attribute = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        self.read_place = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> "FrozenBlocks | None":
        """None where a block trains, or where the head reads more than one token (it pools by the mean, say)."""
        try:
            frozen = cls(model)
        except UserError:
            return None
        if any(weight.requires_grad for weight in frozen.blocks.parameters()):
            return None
        try:
            return frozen if frozen.find_read_place() else None
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return None  # an architecture whose blocks cannot be left out runs them in every epoch

    @torch.no_grad()
    def find_read_place(self) -> bool:
        """Find the token, first or last, whose output alone gives the model's own logits. False: neither does."""
        self.model.eval()
        device = self.model.device
        vocabulary, padding = self.model.config.vocab_size, self.model.config.pad_token_id
        tokens = torch.randint(vocabulary, (4, 12), generator=torch.Generator().manual_seed(0))
        tokens[tokens == padding] = (padding + 1) % vocabulary
        mask = (torch.arange(12) < torch.tensor([[12], [9], [6], [3]])).long()
        tokens = tokens.masked_fill(mask == 0, padding)
        batch = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
        logits = self.model(**batch).logits
        for self.read_place in (0, -1):
            stored = self.outputs(batch)
            with self.replaced_by(stored):
                alone = self.model(input_ids=batch["input_ids"][:, :1], attention_mask=batch["attention_mask"][:, :1])
            if torch.allclose(alone.logits, logits, rtol=1e-3, atol=1e-4):
                return True
        return False

    @torch.no_grad()
    def outputs(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the last block gives at the token that the head reads: (rows, hidden size) from right-padded rows."""
        captured = []
        hook = self.blocks[-1].register_forward_hook(lambda block, inputs, output: captured.append(output))
        mask = batch.get("attention_mask")  # none where no row is padded
        self.model(input_ids=batch["input_ids"], attention_mask=mask)
        hook.remove()
        self.as_tuple = isinstance(captured[0], tuple)
        hidden = captured[0][0] if self.as_tuple else captured[0]
        tokens, places = batch["input_ids"], self.read_place
        if places == -1:  # as transformers' decoders find it: a padding token at a text's own end is passed over
            numbers = torch.arange(tokens.shape[1], device=tokens.device)
            places = (numbers * (tokens != self.model.config.pad_token_id)).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), places].float()

    @contextmanager
    def replaced_by(self, stored: torch.Tensor) -> Iterator[None]:
        """Inside, the model skips its blocks and goes on from `stored`, (rows, hidden size)."""
        hidden = stored.unsqueeze(1)
        first = self.blocks[0]
        first.forward = lambda *args, **kwargs: (hidden, None) if self.as_tuple else hidden
        setattr(self.parent, self.attribute, self.blocks[:1])
        try:
            yield
        finally:
            setattr(self.parent, self.attribute, self.blocks)
            del first.forward
