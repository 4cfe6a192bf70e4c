"""What a run measures: accuracy and F1, training time, memory."""

import resource
import sys
import time

import datasets
import evaluate
import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, ProgressCallback


class ClassificationScores(evaluate.Metric):
    """Accuracy, precision, recall and F1 as fractions, and the confusion matrix (rows: true, columns: predicted).

    For two classes precision, recall and F1 are of class 1, the positive one; for more, their plain mean over the
    classes (macro). Written as a local `evaluate.Metric` because `evaluate.load` needs a network.
    """

    def _info(self) -> evaluate.MetricInfo:
        labels = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            features=datasets.Features(predictions=labels, references=labels),
        )

    def _compute(self, predictions, references, num_classes: int) -> dict:
        pairs = np.asarray(references) * num_classes + np.asarray(predictions)
        confusion = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
        hits = confusion.diagonal()
        # A class that was never predicted, or never occurs, scores 0.
        precision = hits / np.maximum(confusion.sum(axis=0), 1)
        recall = hits / np.maximum(confusion.sum(axis=1), 1)
        f1 = 2 * hits / np.maximum(confusion.sum(axis=0) + confusion.sum(axis=1), 1)
        averaged = slice(1, 2) if num_classes == 2 else slice(None)
        return {
            "accuracy": float(hits.sum() / confusion.sum()),
            "f1": float(f1[averaged].mean()),
            "precision": float(precision[averaged].mean()),
            "recall": float(recall[averaged].mean()),
            "confusion_matrix": confusion.tolist(),
        }


def score(prediction: EvalPrediction) -> dict:
    """Every score of logits of shape (reviews, classes) against labels of shape (reviews,)."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return ClassificationScores(keep_in_memory=True).compute(
        predictions=logits.argmax(axis=-1), references=prediction.label_ids, num_classes=logits.shape[-1]
    )


def validation_scores(prediction: EvalPrediction) -> dict[str, float]:
    """What Trainer logs after every epoch: accuracy, F1, and the mean cross-entropy over the reviews.

    Trainer's own loss is a mean over batches, which counts a review in a small last batch for more.
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    loss = nn.functional.cross_entropy(torch.tensor(logits).float(), torch.tensor(prediction.label_ids))
    scores = score(prediction)
    return {"accuracy": scores["accuracy"], "f1": scores["f1"], "loss": loss.item()}


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


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """Bytes: of the GPU since its last reset, or of this process since its start where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def split_memory(model: nn.Module, optimizer: torch.optim.Optimizer, peak: int) -> dict[str, int]:
    """`peak` bytes by what holds them; activations are what is left: batches, tokens, workspace and the copies that
    frozen weights compute with included."""

    def size(tensors) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))

    weights = [*model.parameters(), *model.buffers()]
    quantization = [
        value
        for weight in weights
        if getattr(weight, "quant_state", None) is not None
        for value in weight.quant_state.as_dict(packed=True).values()
    ]
    parts = {
        "weights": size(weights) + size(quantization),
        "gradients": size(weight for weight in weights if weight.requires_grad),
        "optimizer": size(value for state in optimizer.state.values() for value in state.values()),
    }
    return parts | {"activations": peak - sum(parts.values())}
