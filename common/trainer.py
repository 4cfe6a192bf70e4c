"""Trainer, fed with padded batches that already are on the device.

A small backbone trains faster on a GPU than loader processes can collate and copy batches: here the tokens of all
reviews stay on the device, and a batch is cut out of them there, without waiting for the host.

`set_seed(seed, deterministic=True)` is enough for the same numbers twice. CUBLAS_WORKSPACE_CONFIG, which older
versions of PyTorch want besides, should stay unset: where it is set, 2.11 reads it anew at every matrix product, which
then takes the host 60 to 140 microseconds instead of 25.
"""

import math
import time

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, Subset
from transformers import AttentionInterface, AttentionMaskInterface, PrinterCallback, ProgressCallback, Trainer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask
from transformers.utils import logging

from common.cli import UserError
from common.frozen import FrozenBlocks
from common.metrics import EpochProgress, synchronize
from common.model import compute_frozen_parts_in

torch.utils.deterministic.fill_uninitialized_memory = False  # a search for bugs, at the cost of a write per tensor

WIDTH_STEP = 8  # batches are a multiple of it wide: with every new shape cuBLAS takes a while to choose its kernels


class ReviewTensors(Dataset):
    """Tokenised reviews on `device`; a list of rows gives one padded batch, with no copy from the host's memory.

    reviews: columns `input_ids` (lists of tokens), `labels` (int). A batch has `input_ids` of shape (rows, width),
    `labels` of shape (rows,), and where a row is padded `attention_mask` of shape (rows, width).
    """

    def __init__(self, reviews: datasets.Dataset, pad_token_id: int, device: torch.device):
        columns = reviews.with_format("arrow")[:]
        tokens = columns["input_ids"].combine_chunks()
        self.lengths = tokens.value_lengths().to_numpy(zero_copy_only=False)
        padded = np.full((len(self.lengths), self.lengths.max()), pad_token_id, dtype=np.int32)
        padded[np.arange(padded.shape[1]) < self.lengths[:, None]] = tokens.flatten()
        self.input_ids = torch.from_numpy(padded).to(device)
        self.token_counts = torch.tensor(self.lengths, device=device)
        self.labels = torch.tensor(columns["labels"].to_numpy(), device=device)

    def __len__(self) -> int:
        return len(self.lengths)

    def width(self, rows: list[int]) -> int:
        """Tokens per row of a batch, padding included."""
        longest = int(self.lengths[rows].max())
        return min(math.ceil(longest / WIDTH_STEP) * WIDTH_STEP, self.input_ids.shape[1])

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        width = self.width(rows)  # lengths are known on the host: nothing here waits for the device
        index = torch.tensor(rows).to(self.labels.device, non_blocking=True)
        batch = {"input_ids": self.input_ids[:, :width][index].long(), "labels": self.labels[index]}
        if self.lengths[rows].min() < width:
            places = torch.arange(width, device=index.device)
            batch["attention_mask"] = (places < self.token_counts[index].unsqueeze(1)).long()
        return batch


class StoredOutputs(Dataset):
    """What frozen blocks gave for each review at the one token that the head reads.

    outputs: (reviews, hidden size). A batch has them as `stored`, and one token per review in place of its text.
    """

    def __init__(self, reviews: ReviewTensors, outputs: torch.Tensor):
        self.reviews, self.outputs = reviews, outputs
        self.lengths = np.ones_like(reviews.lengths)

    def __len__(self) -> int:
        return len(self.reviews)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        index = torch.tensor(rows).to(self.outputs.device, non_blocking=True)
        return {
            "input_ids": self.reviews.input_ids[index, :1].long(),
            "labels": self.reviews.labels[index],
            "stored": self.outputs[index],
        }


class LengthGroupedBatches(Sampler):
    """Rows of every batch of an epoch: reviews of similar length together, in an order drawn from (seed, epoch).

    lengths: tokens per review. Every global batch, of at most `batch_size` reviews, is dealt out to `steps`
    accumulation steps and in each of them to `processes` processes; this one takes the share of `process`.
    Raises UserError where there are too few reviews for every step to get one.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, steps=1, process=0, processes=1):
        self.lengths, self.seed, self.epoch = lengths, seed, 0
        self.updates = math.ceil(len(lengths) / batch_size)
        self.steps, self.process, self.processes = steps, process, processes
        smallest = len(lengths) // self.updates
        if smallest < steps * processes:
            raise UserError(
                f"--gradient_accumulation_steps {steps}: {len(lengths)} training reviews in {self.updates} batches "
                f"leave one with {smallest} of them; it needs {steps * processes}, one for every step of every process"
            )

    def __len__(self) -> int:
        return self.updates * self.steps

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        random = np.random.default_rng((self.seed, self.epoch))
        # Among reviews that need the same width the order is random: most get other neighbours in every epoch.
        by_length = np.lexsort((random.random(len(self.lengths)), np.ceil(self.lengths / WIDTH_STEP)))
        batches = np.array_split(by_length, self.updates)
        for update in random.permutation(self.updates):
            for part in np.array_split(random.permutation(batches[update]), self.steps):
                yield np.array_split(part, self.processes)[self.process].tolist()


def longest_first(lengths: np.ndarray, size: int) -> BatchSampler:
    """Batches of at most `size` rows of similar length; the one that needs most memory is the first."""
    return BatchSampler(np.argsort(-lengths, kind="stable").tolist(), size, drop_last=False)


class ReviewTrainer(Trainer):
    """Trainer for tokenised reviews: data sets with columns `input_ids` and `labels`, or a `Subset` of one.

    Where no Transformer block trains, every review goes through the blocks once, and the head then trains on what
    came out: the same numbers as doing it in every epoch, given that the frozen blocks run without dropout.
    """

    def __init__(self, *args, **kwargs):
        AttentionMaskInterface.register("sdpa", mask_without_waiting)
        AttentionInterface.register("sdpa", flash_attention)
        super().__init__(*args, compute_loss_func=mean_cross_entropy, **kwargs)
        self.on_device, self.stored = {}, {}  # by fingerprint of the data set
        for verbose in (ProgressCallback, PrinterCallback):  # Trainer adds one of them
            self.remove_callback(verbose)
        self.add_callback(EpochProgress)
        self.stored_seconds = 0.0  # of the training reviews' one pass through frozen blocks
        self.frozen_blocks = FrozenBlocks.of(self.model)
        if self.args.bf16:
            compute_frozen_parts_in(torch.bfloat16, self.model)

    def tensors_of(self, reviews: datasets.Dataset) -> ReviewTensors:
        """The reviews on the device."""
        key = reviews._fingerprint
        if key not in self.on_device:
            self.on_device[key] = ReviewTensors(reviews, self.processing_class.pad_token_id, self.args.device)
        return self.on_device[key]

    def batches_of(self, reviews: datasets.Dataset) -> ReviewTensors | StoredOutputs:
        """The reviews on the device; where the blocks are frozen, what the blocks make of them."""
        tensors, key = self.tensors_of(reviews), reviews._fingerprint
        if self.frozen_blocks is None:
            return tensors
        if key not in self.stored:
            self.stored[key] = self.run_blocks(tensors)
        return self.stored[key]

    def training_batches(self) -> LengthGroupedBatches:
        args = self.args
        return LengthGroupedBatches(
            self.batches_of(self.train_dataset).lengths,
            args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            args.seed,
            args.gradient_accumulation_steps,
            args.process_index,
            args.world_size,
        )

    def get_train_dataloader(self) -> DataLoader:
        synchronize()
        start = time.perf_counter()
        batches, sampler = self.batches_of(self.train_dataset), self.training_batches()
        synchronize()
        if self.frozen_blocks:
            self.stored_seconds = time.perf_counter() - start
        loader = DataLoader(batches, batch_sampler=sampler, collate_fn=as_it_is)
        loader.set_epoch = sampler.set_epoch  # Trainer calls it before every epoch, also when it resumes
        return loader

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        reviews = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        if not isinstance(reviews, Subset):
            reviews = Subset(reviews, range(len(reviews)))
        batches = Subset(self.batches_of(reviews.dataset), reviews.indices)
        sampler = longest_first(batches.dataset.lengths[batches.indices], self.args.eval_batch_size)
        return self.accelerator.prepare(DataLoader(batches, batch_sampler=sampler, collate_fn=as_it_is))

    get_test_dataloader = get_eval_dataloader

    def compute_loss(self, model, inputs, **kwargs):
        stored = inputs.pop("stored", None)
        if stored is None:
            return super().compute_loss(model, inputs, **kwargs)
        with self.frozen_blocks.replaced_by(stored):
            return super().compute_loss(model, inputs, **kwargs)

    def run_blocks(self, tensors: ReviewTensors) -> StoredOutputs:
        """Send every review through the frozen blocks once."""
        self.model.eval()
        outputs = torch.empty(len(tensors), self.model.config.hidden_size, device=self.args.device)
        for rows in logging.tqdm(
            longest_first(tensors.lengths, self.args.eval_batch_size), desc="Frozen blocks, once"
        ):
            with self.accelerator.autocast():
                outputs[rows] = self.frozen_blocks.outputs(tensors.__getitems__(rows))
        return StoredOutputs(tensors, outputs)

    def padding_percent(self) -> float:
        """Share of the tokens in this process's batches: of the first epoch, or of the pass through frozen blocks."""
        tensors = self.tensors_of(self.train_dataset)
        once = longest_first(tensors.lengths, self.args.eval_batch_size)
        batches = list(once if self.frozen_blocks else self.training_batches())
        tokens = sum(tensors.lengths[rows].sum() for rows in batches)
        return 100 * (1 - tokens / sum(tensors.width(rows) * len(rows) for rows in batches))

    def floating_point_ops(self, inputs) -> int:
        return 0  # Trainer's own count walks over all weights in every step


def mask_without_waiting(*args, mask_function=None, attention_mask=None, **kwargs) -> torch.Tensor | None:
    """transformers' mask for attention, without asking the device in every step whether there is any padding at all.

    attention_mask: (rows, width), right-padded; for an encoder it is as good as a mask for every pair of tokens.
    """
    if mask_function is not bidirectional_mask_function or attention_mask is None:
        return sdpa_mask(*args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    mask = attention_mask[:, None, None, :]
    mask.sequence_ends = sequence_ends(attention_mask)  # once, for all blocks
    return mask


def sequence_ends(attention_mask: torch.Tensor) -> torch.Tensor:
    """Where sequences end when right-padded rows stand one after another, each as two: its text, then its padding.

    attention_mask: (rows, width). Returns (1 + 2 * rows,), from 0 to rows * width.
    """
    rows, width = attention_mask.shape
    starts = torch.arange(0, rows * width, width, device=attention_mask.device)
    ends = torch.stack([starts + attention_mask.sum(1), starts + width], dim=1)
    return nn.functional.pad(ends.flatten(), (1, 0)).int()


def flash_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """transformers' attention by PyTorch, but padded batches go through flash attention too, where the GPU has it.

    Flash attention takes no mask, so PyTorch would choose a kernel that needs three times as long on an H200. It takes
    sequences of any length, though, and padding can be such a sequence. query, key, value: (rows, heads, width, size).
    """
    ends = getattr(attention_mask, "sequence_ends", None)
    rows, heads, width, size = query.shape
    fits = ends is not None and size % 8 == 0 and kwargs.get("position_bias") is None
    case = torch.backends.cuda.SDPAParams(query, key, value, None, dropout, False, False)
    if not (fits and torch.backends.cuda.can_use_flash_attention(case)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    query, key, value = (part.transpose(1, 2).reshape(rows * width, heads, size) for part in (query, key, value))
    # What torch.nn.attention.varlen_attn calls, which has no dropout
    output, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, ends, ends, width, width, dropout, False, False, scale=scaling
    )
    return output.view(rows, width, heads, size), None


def mean_cross_entropy(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Mean over the global batch: classifiers' own loss is a mean per step, wrong under gradient accumulation."""
    loss = nn.functional.cross_entropy(outputs["logits"].float(), labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def as_it_is(batch):
    """In place of a collate function: the data set gives whole batches already."""
    return batch
