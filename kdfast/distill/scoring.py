"""How models are measured on given data, whatever kind it is: against labels, against a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from kdfast.distill.data import NO_LABEL, DistillationCollator, Splits
from kdfast.distill.fidelity import (
    Predictions,
    embed,
    embedding_fidelity,
    fidelity,
    predict,
    primary_metric,
    scores,
)
from kdfast.distill.grouped import ENTITY_F1, NDCG, bio_tags, lists


@dataclass(frozen=True)
class Scoring:
    """task: the GLUE task, if it is one. pool: of embedders, see `embed`."""

    splits: Splits
    task: str | None
    pool: str = "mean"

    @property
    def primary(self) -> str:
        """The measure by which models are chosen and compared; the data alone decide.

        nDCG@10 of a reranker where the test part, and the dev part if there is one, have queries to
        rank; F1 of entities where words have BIO tags; else see primary_metric.
        """
        if self.splits.kind == "embedding":
            return "embedding_cka_to_teacher"
        parts = (self.splits.test, self.splits.dev)
        if self.splits.kind == "reranking" and all(_ranked(part) for part in parts if len(part)):
            return NDCG
        if self._tags is not None:
            return ENTITY_F1
        return primary_metric(self.task, self.splits.regression)

    @property
    def _tags(self) -> torch.Tensor | None:
        return (
            bio_tags(self.splits.label_names)
            if self.splits.kind == "token_classification"
            else None
        )

    def predict(
        self,
        model: PreTrainedModel,
        part: Dataset,
        collator: DistillationCollator,
        *,
        role: str = "student",
        progress: str = "predict",
        batch_size: int = 64,
    ) -> Predictions:
        """The logits of a tokenised part; of an embedder its embeddings, without labels."""
        if self.splits.kind != "embedding":
            found = predict(
                model, part, collator, role=role, progress=progress, batch_size=batch_size
            )
            found.tags = self._tags
            if self.splits.kind == "reranking" and "query" in part.column_names:
                found.groups = torch.tensor(part["query"])
            return found
        states = embed(
            *(model, part, collator),
            pool=self.pool,
            role=role,
            progress=progress,
            batch_size=batch_size,
        )
        return Predictions(states, torch.full((len(states),), NO_LABEL))

    def scores(self, predictions: Predictions) -> dict[str, float]:
        """What the labels say of predictions; of embeddings nothing."""
        if self.splits.kind == "embedding":
            return {}
        return scores(
            predictions,
            regression=self.splits.regression,
            task=self.task,
            label_names=self.splits.label_names,
        )

    def fidelity(self, student: Predictions, teacher: Predictions) -> dict[str, float]:
        """How close the student's outputs are to the teacher's."""
        if self.splits.kind != "embedding":
            return fidelity(student, teacher, regression=self.splits.regression)
        # cka_to_teacher is that of the layers, everywhere.
        found = embedding_fidelity(student.logits, teacher.logits)
        return {"embedding_cka_to_teacher": found.pop("cka_to_teacher"), **found}


def embedding_pool(recipe: str | None, options: Mapping[str, Any]) -> str | None:
    """How the embeddings are pooled that a recipe trains; None of one that leaves it open."""
    listed = options.get("losses", ()) if recipe == "custom" else [{"recipe": recipe, **options}]
    for entry in listed:
        if entry.get("recipe") == "embedding" or entry.get("loss") == "pooled":
            return entry.get("pool", "mean")
    return None


def _ranked(part: Dataset) -> bool:
    """Whether a part has a query to rank candidates of."""
    queries = torch.from_numpy(pd.factorize(np.array(part["text"], dtype=object))[0])
    return bool(lists(torch.tensor(part["label"]), queries))
