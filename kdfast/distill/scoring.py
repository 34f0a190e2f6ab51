"""How models are measured on given data, whatever kind it is: against labels, against a teacher."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Scoring:
    """task: the GLUE task, if it is one."""

    splits: Splits
    task: str | None

    @property
    def primary(self) -> str:
        """The measure by which models are chosen and compared."""
        if self.splits.kind == "embedding":
            return "embedding_cka_to_teacher"
        return primary_metric(self.task, self.splits.regression)

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
            return predict(
                model, part, collator, role=role, progress=progress, batch_size=batch_size
            )
        states = embed(model, part, collator, role=role, progress=progress, batch_size=batch_size)
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
