"""Trainer, fed with padded batches that already are on the device.

A small backbone trains faster on a GPU than loader processes can collate and copy batches: here the tokens of all
reviews stay on the device, and a batch is cut out of them there, without waiting for the host.

Measured on one H200 (all-MiniLM-L6-v2, LoRA, batch 128): MEASURED

`set_seed(seed, deterministic=True)` is enough for the same numbers twice. CUBLAS_WORKSPACE_CONFIG, which older
versions of PyTorch want besides, should stay unset: where it is set, 2.11 reads it anew at every matrix product, which
then takes the host 60 to 140 microseconds instead of 25.
"""

import math
import time
from collections.abc import Callable, Iterable

import datasets
import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, Subset
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.utils import logging

from common.cli import UserError
from common.frozen import StoredOutputs, pass_stored_outputs_on
from common.metrics import synchronize

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


class EpochProgress(ProgressCallback):
    """Progress bars, a line after every evaluation, and each epoch's training seconds in the log history.

    The seconds leave out evaluation and saving.
    """

    def on_epoch_begin(self, args, state, control, **kwargs):
        synchronize()
        self.start = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        synchronize()
        state.log_history.append({"epoch": state.epoch, "seconds": time.perf_counter() - self.start})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "eval_validation_accuracy" in logs:
            accuracy, loss = logs["eval_validation_accuracy"], logs["eval_validation_loss"]
            self.training_bar.write(
                f"epoch {state.epoch or 0:.0f}  validation accuracy {100 * accuracy:.2f}%, loss {loss:.4f}"
            )


class ReviewTrainer(Trainer):
    """Trainer for tokenised reviews: data sets with columns `input_ids` and `labels`, or a `Subset` of one.

    run_once: what of the model runs once for every review, before the first epoch (see `common/frozen.py`). Called with
    the model and an iterator over batches, it returns (reviews, hidden size): the last hidden state that the head reads.
    None, or a head that reads more than one token: every epoch runs the whole model.
    """

    def __init__(self, *args, run_once: Callable | None = None, **kwargs):
        super().__init__(*args, compute_loss_func=mean_cross_entropy, **kwargs)
        self.on_device, self.stored = {}, {}  # by fingerprint of the data set
        for verbose in (ProgressCallback, PrinterCallback):  # Trainer adds one of them
            self.remove_callback(verbose)
        self.add_callback(EpochProgress)
        self.run_once, self.run_once_seconds = run_once, 0.0  # the seconds are those of the training reviews
        if run_once:
            pass_stored_outputs_on(self.model.base_model)
            self.run_once = run_once if self.head_reads_one_token() else None

    def train(self, *args, **kwargs):
        with disable_input_dtype_casting(self.model):  # PEFT would cast to fp32 what autocast then casts back
            return super().train(*args, **kwargs)

    def tensors_of(self, reviews: datasets.Dataset) -> ReviewTensors:
        """The reviews on the device."""
        key = reviews._fingerprint
        if key not in self.on_device:
            self.on_device[key] = ReviewTensors(reviews, self.processing_class.pad_token_id, self.args.device)
        return self.on_device[key]

    def inputs_of(self, reviews: datasets.Dataset) -> ReviewTensors | StoredOutputs:
        """What every epoch reads: the reviews on the device, or what came out of their one pass."""
        tensors, key = self.tensors_of(reviews), reviews._fingerprint
        if self.run_once and key not in self.stored:
            rows = list(longest_first(tensors.lengths, self.args.eval_batch_size))
            progress = logging.tqdm(rows, desc="Through the backbone, once")
            outputs = self.outputs_of(tensors.__getitems__(part) for part in progress)
            order = torch.tensor(np.argsort(np.concatenate(rows)), device=outputs.device)
            self.stored[key] = StoredOutputs(outputs[order], tensors.labels)
        return self.stored[key] if self.run_once else tensors

    @torch.no_grad()
    def outputs_of(self, batches: Iterable[dict]) -> torch.Tensor:
        """What `run_once` makes of batches without their labels."""
        self.model.eval()
        unlabelled = ({name: part for name, part in batch.items() if name != "labels"} for batch in batches)
        with self.accelerator.autocast():
            return self.run_once(self.model, unlabelled).float()

    @torch.no_grad()
    def head_reads_one_token(self) -> bool:
        """Whether what `run_once` returns is enough for the model's own logits, on a few reviews."""
        tensors = self.tensors_of(self.train_dataset)
        rows = list(range(min(8, len(tensors))))
        batch = tensors.__getitems__(rows)
        outputs = StoredOutputs(self.outputs_of([batch]), batch["labels"])
        with self.accelerator.autocast():
            whole, stored = (self.model(**inputs).logits for inputs in (batch, outputs.__getitems__(rows)))
        return torch.allclose(stored, whole, rtol=0.02, atol=0.01)

    def training_batches(self) -> LengthGroupedBatches:
        args = self.args
        return LengthGroupedBatches(
            self.inputs_of(self.train_dataset).lengths,
            args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            args.seed,
            args.gradient_accumulation_steps,
            args.process_index,
            args.world_size,
        )

    def get_train_dataloader(self) -> DataLoader:
        synchronize()
        start = time.perf_counter()
        inputs, sampler = self.inputs_of(self.train_dataset), self.training_batches()
        synchronize()
        self.run_once_seconds = time.perf_counter() - start if self.run_once else 0.0
        loader = DataLoader(inputs, batch_sampler=sampler, collate_fn=whole_batch)
        loader.set_epoch = sampler.set_epoch  # Trainer calls it before every epoch, also when it resumes
        return loader

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        reviews = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        if not isinstance(reviews, Subset):
            reviews = Subset(reviews, range(len(reviews)))
        inputs = Subset(self.inputs_of(reviews.dataset), reviews.indices)
        sampler = longest_first(inputs.dataset.lengths[inputs.indices], self.args.eval_batch_size)
        return self.accelerator.prepare(DataLoader(inputs, batch_sampler=sampler, collate_fn=whole_batch))

    get_test_dataloader = get_eval_dataloader

    def padding_percent(self) -> float:
        """Share of the tokens in this process's batches: of the first epoch, or of the one pass."""
        tensors = self.tensors_of(self.train_dataset)
        once = longest_first(tensors.lengths, self.args.eval_batch_size)
        batches = list(once if self.run_once else self.training_batches())
        tokens = sum(tensors.lengths[rows].sum() for rows in batches)
        return 100 * (1 - tokens / sum(tensors.width(rows) * len(rows) for rows in batches))

    def floating_point_ops(self, inputs) -> int:
        return 0  # Trainer's own count walks over all weights in every step


def mean_cross_entropy(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Mean over the global batch: classifiers' own loss is a mean per step, wrong under gradient accumulation."""
    loss = nn.functional.cross_entropy(outputs["logits"].float(), labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def whole_batch(batch: dict) -> dict:
    """In place of a collate function: the data sets give whole batches already."""
    return batch
