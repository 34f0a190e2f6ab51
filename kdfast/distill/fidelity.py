"""How good a model is, and how close to its teacher: in its outputs and inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kdfast.captured import Captured, Needs
from kdfast.distill import glue
from kdfast.distill.capture import Capture, model_shape
from kdfast.distill.data import NO_LABEL, DistillationCollator
from kdfast.distill.grouped import entity_counts, entity_scores, ranking
from kdfast.errors import InputError
from kdfast.losses import SoftLabelLoss
from kdfast.ops.cka import cka, cka_matrix
from kdfast.recipes import Recipe
from kdfast.recipes.terms import POOLS, pool_of, pooled


@dataclass
class Predictions:
    """logits: [n, C], fp32 on the CPU. labels: [n], -100 where the data has none. A row is a text,
    or for token classification a word.

    groups: [n], the query of a reranker's row, the sentence of a word; None where rows stand alone.
    tags: [C], what the classes are as BIO tags, see kdfast.distill.grouped; None for others.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor | None = None
    tags: torch.Tensor | None = None


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
    """Logits of every row (of every labelled token, where tokens have logits), in the order of the
    data set.

    dataset: tokenised, see kdfast.distill.data.tokenize. role: "student" or "teacher"; which of the
    two sets of input columns to read. Raises InputError for a model without logits: see `embed`.
    """
    logits: list[torch.Tensor] = [torch.empty(0)] * len(dataset)
    labels: list[torch.Tensor] = [torch.empty(0)] * len(dataset)
    for places, batch, inputs in _batches(model, dataset, collator, batch_size, role, progress):
        output = model(**inputs)
        if output.get("logits") is None:
            raise InputError(
                f"{type(model).__name__} has no logits: choose data.kind=embedding, or a model "
                "with a classifier"
            )
        rows = output.logits.float().cpu()
        targets = batch.get("labels", torch.full(rows.shape[:1], NO_LABEL))
        for place, row, target in zip(places, rows, targets, strict=True):
            if row.dim() == 2:
                row, target = row[target != NO_LABEL], target[target != NO_LABEL]
            logits[place], labels[place] = row, target
    if logits[0].dim() == 1:
        return Predictions(torch.stack(logits), torch.stack(labels))
    words = torch.tensor([len(row) for row in logits])
    sentences = torch.arange(len(words)).repeat_interleave(words)
    return Predictions(torch.cat(logits), torch.cat(labels), groups=sentences)


@torch.no_grad()
def embed(
    model: PreTrainedModel,
    dataset: Dataset,
    collator: DistillationCollator,
    *,
    pool: str = "mean",
    batch_size: int = 64,
    role: str = "student",
    progress: str = "embed",
) -> torch.Tensor:
    """[n, D] fp32 on the CPU: the last hidden state of every row, of one token or their mean.

    pool: "mean", "cls" for the first token's, "last" for the last one's, or "auto" for what a head
    on this model would read; InputError for another. The others as in `predict`.
    """
    if pool not in POOLS:
        raise InputError(f"pool must be one of {', '.join(POOLS)}, was {pool!r}")
    pool = pool_of(model_shape(model), pool)
    states: list[torch.Tensor] = [torch.empty(0)] * len(dataset)
    for places, _, inputs in _batches(model, dataset, collator, batch_size, role, progress):
        last = model.base_model(**inputs, return_dict=True)[0].float()
        (rows,) = pooled([last], inputs.get("attention_mask"), pool)
        for place, state in zip(places, rows.cpu(), strict=True):
            states[place] = state
    return torch.stack(states)


def _batches(
    model: PreTrainedModel,
    dataset: Dataset,
    collator: DistillationCollator,
    batch_size: int,
    role: str,
    progress: str,
) -> Iterator[tuple[list[int], dict[str, Any], dict[str, Any]]]:
    """(places in the data set, batch, the model's inputs), rows of like length together: a batch
    is padded to its longest row."""
    model.eval()
    order = torch.tensor([len(ids) for ids in dataset["input_ids"]]).argsort()
    loader = DataLoader(dataset.select(order), batch_size=batch_size, collate_fn=collator)
    places = order.split(batch_size)
    for some, batch in zip(places, tqdm(loader, desc=f"  {progress}", leave=False), strict=True):
        inputs = {k: v.to(model.device) for k, v in inputs_of(batch, role).items()}
        yield some.tolist(), batch, inputs


# Metrics of data without a task; the first is the primary one.
CLASSIFICATION_METRICS = ("accuracy", "f1_macro")
REGRESSION_METRICS = ("pearson", "spearman")


def metrics(task: str | None, regression: bool) -> tuple[str, ...]:
    """Names of what `scores` gives, the primary one first. task: a GLUE task."""
    if task is not None:
        return glue.glue_task(task).metrics
    return REGRESSION_METRICS if regression else CLASSIFICATION_METRICS


def primary_metric(task: str | None, regression: bool) -> str:
    """The metric that models are chosen by: accuracy or Pearson correlation, or the task's own."""
    return metrics(task, regression)[0]


def scores(
    predictions: Predictions,
    *,
    regression: bool,
    task: str | None = None,
    label_names: Sequence[str] | None = None,
) -> dict[str, float]:
    """The official metrics of a GLUE task (see kdfast.distill.glue), in [−1, 1].

    Without a task accuracy and macro F1 (of words, for token classification), or for regression
    Pearson and Spearman correlation. Rows without a label do not count.

    Before them, of predictions with `tags` F1, precision and recall of entities, and of a
    reranker's with `groups` nDCG@10 and MRR@10, where it has queries to rank; see
    kdfast.distill.grouped. Words that truncation cut off, and their entities, do not count.

    label_names: in the order of the logits, where that may not be the task's (a teacher's own
    order): F1 needs to know which class is the positive one.

    What is undefined is 0: F1 of a class neither predicted nor right, Matthews correlation when one
    class only is predicted, and correlations of a constant prediction, which orders nothing.
    """
    kept = predictions.labels != NO_LABEL
    labels = predictions.labels[kept].numpy()
    if regression:
        # In float64: scipy takes the mean off, and fp32 scores that hardly differ would be noise.
        chosen = predictions.logits[kept].squeeze(-1).double().numpy()
    else:
        chosen = predictions.logits[kept].argmax(-1).numpy()
    first: dict[str, float] = {}
    if regression and predictions.groups is not None:
        rows = (predictions.logits[:, 0], predictions.labels, predictions.groups)
        first = {name: float(v.mean()) for name, v in ranking(*(x[kept] for x in rows)).items()}
    elif predictions.tags is not None and predictions.groups is not None:
        words = (predictions.logits.argmax(-1), predictions.labels, predictions.groups)
        first = entity_scores(entity_counts(predictions.tags, *(x[kept] for x in words)))
    names = None if task is None else glue.glue_task(task).label_names
    if names is not None and len(names) == 2:
        ours = [name.strip().casefold() for name in label_names or names]
        positive = ours.index(names[1]) if names[1] in ours else 1
        labels, chosen = labels == positive, chosen == positive
    return first | {name: glue.METRICS[name](labels, chosen) for name in metrics(task, regression)}


def fidelity(student: Predictions, teacher: Predictions, *, regression: bool) -> dict[str, float]:
    """Agreement with the teacher's choices and KL(teacher ‖ student) at temperature 1, mean over
    rows; for regression the mean squared difference alone."""
    divergence = float(SoftLabelLoss(regression=regression)(student.logits, teacher.logits))
    if regression:
        return {"mse_to_teacher": divergence}
    same = student.logits.argmax(-1) == teacher.logits.argmax(-1)
    return {"agreement": float(same.float().mean()), "kl_to_teacher": divergence}


def embedding_fidelity(student: torch.Tensor, teacher: torch.Tensor) -> dict[str, float]:
    """How close embeddings [n, D_s] are to the teacher's [n, D_t] of the same texts.

    cka_to_teacher: unbiased linear CKA of the two (n ≥ 4). cosine_to_teacher: mean cosine of the
    pairs, where the widths agree.
    """
    result = {"cka_to_teacher": float(cka(student, teacher, estimator="unbiased"))}
    if student.shape == teacher.shape:
        result["cosine_to_teacher"] = float(F.cosine_similarity(student, teacher).mean())
    return result


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
    kept_s: list[list[torch.Tensor]] = []
    kept_t: list[list[torch.Tensor]] = []
    weights: list[torch.Tensor] = []
    projection_weights = None if recipe is None else _projection(recipe)
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator)
    student.eval(), teacher.eval()
    needs = [
        Needs(logits=True, hidden_states=range(model_shape(model).layers + 1))
        for model in (student, teacher)
    ]
    with Capture(student, needs[0]) as capture_s, Capture(teacher, needs[1]) as capture_t:
        for batch in loader:
            s = _run(capture_s, batch, "student")
            t = _run(capture_t, batch, "teacher")
            kept_s.append(_rows(s, shared_tokens))
            kept_t.append(_rows(t, shared_tokens))
            if projection_weights is not None:
                weights.append(projection_weights(s, t).float().cpu())
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


def _by_layer(captured: Captured) -> list[torch.Tensor]:
    return [captured.hidden_states[i] for i in sorted(captured.hidden_states)]


def _rows(captured: Captured, shared_tokens: bool) -> list[torch.Tensor]:
    mask = captured.attention_mask
    if not shared_tokens:
        return [h[:, 0].float() for h in _by_layer(captured)]
    if mask is None:
        return [h.flatten(0, 1).float() for h in _by_layer(captured)]
    return [h[mask.bool()].float() for h in _by_layer(captured)]


def _projection(recipe: Recipe) -> Callable[[Captured, Captured], torch.Tensor] | None:
    """The recipe's projection_weights(student, teacher) -> [B, L_s, L_t], if a term has them."""
    for term in recipe.terms.values():
        if callable(method := getattr(term, "projection_weights", None)):
            return method
    return None
