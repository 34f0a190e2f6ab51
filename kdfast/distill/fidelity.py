"""How good a classifier is, and how close to its teacher: in its outputs and inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kdfast.captured import Captured, Needs
from kdfast.distill.capture import Capture
from kdfast.distill.data import DistillationCollator
from kdfast.losses import SoftLabelLoss
from kdfast.ops.cka import cka_matrix
from kdfast.recipes import Recipe
from kdfast.recipes.universal import PseudoProjectionTerm


@dataclass
class Predictions:
    """logits: [n, C], fp32 on the CPU. labels: [n]."""

    logits: torch.Tensor
    labels: torch.Tensor


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    dataset: Dataset,
    collator: DistillationCollator,
    *,
    batch_size: int = 64,
    role: str = "student",
    progress: str = "predict",
) -> Predictions:
    """Logits of every row, in the order of the data set.

    dataset: tokenised, see kdfast.distill.data.tokenize. role: "student" or "teacher"; which of the
    two sets of input columns to read.
    """
    model.eval()
    logits, labels = [], []
    # Rows of like length together: a batch is padded to its longest row.
    order = torch.tensor([len(ids) for ids in dataset["input_ids"]]).argsort()
    loader = DataLoader(dataset.select(order), batch_size=batch_size, collate_fn=collator)
    for batch in tqdm(loader, desc=f"  {progress}", leave=False):
        labels.append(batch["labels"])
        inputs = {k: v.to(model.device) for k, v in inputs_of(batch, role).items()}
        logits.append(model(**inputs).logits.float().cpu())
    back = order.argsort()
    return Predictions(torch.cat(logits)[back], torch.cat(labels)[back])


def scores(predictions: Predictions, *, regression: bool) -> dict[str, float]:
    """Accuracy and macro F1, or for regression Pearson and Spearman correlation."""
    labels = predictions.labels
    if regression:
        from scipy.stats import pearsonr, spearmanr

        values = predictions.logits.squeeze(-1)
        return {
            "pearson": float(pearsonr(values, labels).statistic),
            "spearman": float(spearmanr(values, labels).statistic),
        }
    from sklearn.metrics import f1_score

    chosen = predictions.logits.argmax(-1)
    return {
        "accuracy": float((chosen == labels).float().mean()),
        "f1_macro": float(f1_score(labels, chosen, average="macro")),
    }


def fidelity(student: Predictions, teacher: Predictions, *, regression: bool) -> dict[str, float]:
    """Agreement with the teacher's choices and KL(teacher ‖ student) at temperature 1, mean over
    rows; for regression the mean squared difference alone."""
    divergence = float(SoftLabelLoss(regression=regression)(student.logits, teacher.logits))
    if regression:
        return {"mse_to_teacher": divergence}
    same = student.logits.argmax(-1) == teacher.logits.argmax(-1)
    return {"agreement": float(same.float().mean()), "kl_to_teacher": divergence}


@torch.no_grad()
def alignment(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: Dataset,
    collator: DistillationCollator,
    *,
    shared_tokens: bool,
    batch_size: int = 64,
    recipe: Recipe | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Unbiased linear CKA between all layers, [S + 1, T + 1] with the embeddings first, and the
    mean layer-projection weights [L_s, L_t] where `recipe` has them.

    Rows are all tokens of the data set, or the [CLS] states where the two models cut the text into
    different tokens.
    """
    needs = Needs(hidden_states=True)
    kept_s: list[list[torch.Tensor]] = []
    kept_t: list[list[torch.Tensor]] = []
    weights: list[torch.Tensor] = []
    term = None if recipe is None else _projection_term(recipe)
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator)
    student.eval(), teacher.eval()
    with Capture(student, needs) as capture_s, Capture(teacher, needs) as capture_t:
        for batch in loader:
            s = _run(capture_s, batch, "student")
            t = _run(capture_t, batch, "teacher")
            kept_s.append(_rows(s, shared_tokens))
            kept_t.append(_rows(t, shared_tokens))
            if term is not None:
                weights.append(term.projection_weights(s, t).float().cpu())
    layers_s = [torch.cat(rows) for rows in zip(*kept_s, strict=True)]
    layers_t = [torch.cat(rows) for rows in zip(*kept_t, strict=True)]
    aligned = cka_matrix(layers_s, layers_t, estimator="unbiased")
    return aligned.cpu(), torch.cat(weights).mean(0) if weights else None


def inputs_of(batch: dict[str, Any], role: str) -> dict[str, Any]:
    """The model inputs of a collated batch: the teacher's own where the batch has them."""
    teacher = {k.removeprefix("teacher_"): v for k, v in batch.items() if k.startswith("teacher_")}
    if role == "teacher" and teacher:
        return teacher
    return {k: v for k, v in batch.items() if k != "labels" and not k.startswith("teacher_")}


def _run(capture: Capture, batch: dict[str, Any], role: str) -> Captured:
    inputs = {k: v.to(capture.model.device) for k, v in inputs_of(batch, role).items()}
    return capture(inputs)[1]


def _rows(captured: Captured, shared_tokens: bool) -> list[torch.Tensor]:
    mask = captured.attention_mask
    if not shared_tokens:
        return [h[:, 0].float() for h in captured.hidden_states]
    if mask is None:
        return [h.flatten(0, 1).float() for h in captured.hidden_states]
    return [h[mask.bool()].float() for h in captured.hidden_states]


def _projection_term(recipe: Recipe) -> PseudoProjectionTerm | None:
    for term in recipe.terms.values():
        if isinstance(term, PseudoProjectionTerm):
            return term
    return None
