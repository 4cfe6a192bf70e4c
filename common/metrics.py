"""What a run measures: accuracy and F1, and memory."""

import datasets
import evaluate
import psutil
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import EvalPrediction


class ClassificationScores(evaluate.Metric):
    """Accuracy, precision, recall and F1 as fractions, and the confusion matrix (rows: true, columns: predicted).
    For two classes precision, recall and F1 are of class 1, the positive one; for more, their plain mean over the
    classes (macro). Written as a local `evaluate.Metric` because `evaluate.load` needs a network."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(predictions=datasets.Value("int64"), references=datasets.Value("int64"))
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions, references, num_classes: int) -> dict:
        pair, classes = (references, predictions), list(range(num_classes))
        options = {"labels": [1] if num_classes == 2 else classes, "average": "macro", "zero_division": 0}
        precision, recall, f1 = map(float, precision_recall_fscore_support(*pair, **options)[:3])
        scores = {"accuracy": accuracy_score(*pair), "f1": f1, "precision": precision, "recall": recall}
        return scores | {"confusion_matrix": confusion_matrix(*pair, labels=classes).tolist()}


def score(prediction: EvalPrediction) -> dict:
    """Every score of logits of shape (reviews, classes) against labels of shape (reviews,), and as "loss" the mean
    cross-entropy over the reviews. Trainer's own is a mean over batches, where a small one counts for too much."""
    logits, labels = prediction.predictions, prediction.label_ids
    given = {"predictions": logits.argmax(axis=-1), "references": labels, "num_classes": logits.shape[-1]}
    scores = ClassificationScores(keep_in_memory=True).compute(**given)
    loss = nn.functional.cross_entropy(torch.tensor(logits).float(), torch.tensor(labels))
    return scores | {"loss": loss.item()}


def validation_scores(prediction: EvalPrediction) -> dict[str, float]:
    """What Trainer logs after every epoch; it keeps that of the highest "rank": accuracy, then the lower loss."""
    scores = score(prediction)
    hits = round(scores["accuracy"] * len(prediction.label_ids))
    return {name: scores[name] for name in ("accuracy", "f1", "loss")} | {"rank": hits + 1 / (1 + scores["loss"])}


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """Bytes: of the GPU since its last reset, or of this process since its start where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if psutil.WINDOWS:
        return psutil.Process().memory_info().peak_wset
    import resource  # there is none on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if psutil.MACOS else 1024)


def split_memory(model: nn.Module, optimizer: torch.optim.Optimizer, peak: int) -> dict[str, int]:
    """`peak` bytes by what holds them. The rest: activations above all, and batches, all tokens, workspace."""

    def size(tensors) -> int:
        parts = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)  # FSDP's share
        return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))

    weights = [*model.parameters(), *model.buffers()]
    scales = [weight.quant_state.as_dict(packed=True) for weight in weights if getattr(weight, "quant_state", None)]
    parts = {
        "weights": size(weights) + size(value for scale in scales for value in scale.values()),
        "gradients": size(weight for weight in weights if weight.requires_grad),
        "optimizer": size(value for state in optimizer.state.values() for value in state.values()),
    }
    return parts | {"rest": peak - sum(parts.values())}
