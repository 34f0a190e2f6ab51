"""Feature Structure Distillation with Centered Kernel Alignment (Jung et al. 2023).

L_I: alignment of the tokens within each sample (Eq. 6); L_L: of the samples within the batch
(Eq. 7); L_G: of the samples with a memory of the whole data set (Eq. 8-10); beside soft labels.
"""

from collections.abc import Sequence
from typing import Any

import torch

from kdfast.captured import Captured, ModelShape, Needs
from kdfast.errors import InputError
from kdfast.losses import CentroidFit, CKALoss, ClusteredMemoryLoss, flat_states, memory_bytes
from kdfast.losses.memory import FIRST_SAMPLES
from kdfast.recipes.layer_map import LayerMap
from kdfast.recipes.layer_map import layer_map as resolve_layer_map
from kdfast.recipes.recipe import Fitted, Recipe, Term
from kdfast.recipes.schedule import Moment, Weight
from kdfast.recipes.terms import HiddenTerm, active_pairs, needs_of_pairs, output_terms
from kdfast.system import free_memory


class Memory(Fitted):
    """The memories of one layer pair and their loss; the teacher's by k-means on training data."""

    limited_by = "clusters"

    def __init__(self, layer: int, loss: ClusteredMemoryLoss, *, epochs: int, seed: int) -> None:
        super().__init__()
        self.layer = layer
        self.loss = loss
        self.epochs = epochs
        self.seed = seed
        self.passes = epochs + 1
        self.least_rows = len(loss.teacher_memory)
        self.what = f"the memory of teacher layer {layer}"
        self._fit: CentroidFit | None = None

    def needs_of_teacher(self) -> Needs:
        return Needs(hidden_states=[self.layer])

    def settings(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "clusters": len(self.loss.teacher_memory),
            "max_length": self.loss.max_length,
            "padding": self.loss.padding,
            "epochs": self.epochs,
            "seed": self.seed,
        }

    def begin(self) -> None:
        self._fit = CentroidFit(len(self.loss.teacher_memory), epochs=self.epochs, seed=self.seed)

    def see(self, teacher: Captured, labels: torch.Tensor | None) -> None:
        assert self._fit is not None
        features = flat_states(
            teacher.hidden_states[self.layer],
            teacher.attention_mask,
            max_length=self.loss.max_length,
            padding=self.loss.padding,
        )
        try:
            self._fit.see(features)
        except ValueError as error:
            raise InputError(f"{self.what}: {error}") from error

    def end_pass(self) -> None:
        try:
            assert self._fit is not None
            self._fit.end_pass()
        except ValueError as error:
            raise InputError(f"{self.what}: {error}") from error
        if self._fit.centroids is not None:
            self.loss.set_teacher_memory(self._fit.centroids)
            self._fit = None

    def fitted_state(self) -> dict[str, torch.Tensor]:
        return {"teacher_memory": self.loss.teacher_memory}

    def load_fitted(self, state: dict[str, torch.Tensor]) -> None:
        self.loss.set_teacher_memory(state["teacher_memory"])

    def stand_in(self) -> None:
        self.loss.set_teacher_memory(torch.randn_like(self.loss.teacher_memory))


class MemoryTerm(Term):
    """L_G of every mapped layer pair, mean over pairs."""

    token_aligned = True

    def __init__(self, weight: Any, memories: list[Memory], pairs: LayerMap, clusters: int) -> None:
        super().__init__(weight, f"samples with {clusters} centroids of the training data")
        self.memories = torch.nn.ModuleList(memories)
        self.pairs = pairs
        self.layers = tuple(i for i, _ in pairs)

    def needs(self, layers: Sequence[int] | None = None) -> tuple[Needs, Needs]:
        return needs_of_pairs(self.pairs, layers, "hidden_states")

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None, at: Moment
    ) -> torch.Tensor:
        losses = []
        for k in active_pairs(self.pairs, at):
            i, j = self.pairs[k]
            loss: Any = self.memories[k].loss
            mask = student.attention_mask if loss.padding == "masked" else None
            losses.append(loss(student.masked_states(i, mask), teacher.masked_states(j, mask)))
        return torch.stack(losses).mean()


def fsd(
    student: ModelShape,
    teacher: ModelShape,
    *,
    layer_map: Any = "penultimate",
    intra_weight: float = 1.0,
    local_weight: float = 1.0,
    global_weight: float = 1.0,
    estimator: str = "biased",
    form: str = "neg_log",
    padding: str = "masked",
    clusters: int = 100,
    cluster_epochs: int = 3,
    cluster_seed: int = 0,
    memory_balance: float = 1e-4,
    memory_init: str = "normal",
    max_length: int | None = None,
    soft_label_weight: float = 1.0,
    label_weight: float = 0.0,
    temperature: float = 2.0,
) -> Recipe:
    """Intra-feature, local and global structure by CKA + soft labels.

    The paper's total is α·labels + (1 − α)·soft labels + β·(γ_i L_I + γ_l L_L + γ_g L_G); the
    weights here are those products. Its final values for each task are not printed; the defaults
    are 1 for every structure, soft labels alone (α = 0, as in the other recipes here; the paper
    searches 0.2 to 0.7), and temperature 2 (the paper: 5 to 20).

    Args:
        layer_map: of L_I, L_L and L_G alike; for a layer each take recipe "custom". "penultimate"
            (the paper, and its code for all three: student layer S − 1 from teacher layer T − 1;
            the only layer of a one-layer student), or as in kdfast.recipes.layer_map, mean over
            pairs, one memory a pair. The code's layer-wise mode is "skip" (12 → 6: 2, 4, ..., 10)
            for L_I and L_L, its L_G stays with the penultimate layer; its script for L_L alone
            takes the last one.
        estimator, form: of L_I and L_L, see kdfast.losses.CKALoss. The paper's are "biased" and
            "neg_log", the mean over samples of the logarithms; its code has the logarithm of the
            mean in L_I, "neg_log_of_mean".
        padding: "masked" (the default: padded positions say nothing of a sentence) or "counted",
            the paper's, whose batches are all padded to max_length; then pad them so.
        clusters: centroids of the memories; the paper has 300 for QQP and MNLI, 100 otherwise.
        cluster_epochs: passes of k-means over the training data, 3 as in the paper.
        memory_balance: γ_m, the Euclidean share of the distances to the memory. The paper's search
            goes from 1e-7 to 1 and ends near 1e-6 to 1e-2 on most tasks; squared differences of
            distances between long vectors dwarf those of cosines.
        memory_init: of the student's memory, "normal" (the paper) or "teacher" (equal widths).
        temperature: τ. Soft labels are multiplied by τ², as in the paper's code and not in its
            Eq. 1: the size of their gradient then does not depend on τ.
        max_length: tokens of the longest batch, padding and all: the memories' width. Known to the
            trainer where the data set is held whole.
    """
    if layer_map == "penultimate":
        layer_map = [[max(1, student.layers - 1), max(1, teacher.layers - 1)]]
    pairs = resolve_layer_map(layer_map, student, teacher)
    terms = output_terms(student, teacher, label_weight, soft_label_weight, temperature)
    terms["intra"] = HiddenTerm(
        intra_weight,
        CKALoss("tokens", estimator=estimator, form=form, padding=padding),
        pairs,
        f"tokens of each sample by {estimator} CKA",
        token_aligned=True,
    )
    # Token states side by side make the sample's row, so both must be cut into the same tokens
    # for padding to mean the same, though CKA itself would not mind.
    terms["local"] = HiddenTerm(
        local_weight,
        CKALoss(
            "samples",
            estimator=estimator,
            form="neg_log" if form == "neg_log_of_mean" else form,
            padding=padding,
        ),
        pairs,
        f"samples of the batch by {estimator} CKA",
        token_aligned=True,
        zero_padding=padding == "masked",
    )
    notes = []
    if Weight(global_weight, "global_weight").maximum > 0:
        if max_length is None:
            raise InputError(
                "the memories of recipe 'fsd' are as wide as the longest input: give max_length "
                "in tokens, or global_weight=0"
            )
        notes.append(_check_memory(clusters, max_length, student.width, teacher.width, len(pairs)))
        memories = [
            Memory(
                j,
                ClusteredMemoryLoss(
                    clusters,
                    max_length,
                    student.width,
                    teacher.width,
                    balance=memory_balance,
                    padding=padding,
                    init=memory_init,
                ),
                epochs=cluster_epochs,
                seed=cluster_seed,
            )
            for _, j in pairs
        ]
        terms["global"] = MemoryTerm(global_weight, memories, pairs, clusters)
    return Recipe("fsd", terms, pairs, notes=notes)


def _check_memory(clusters: int, length: int, width_s: int, width_t: int, pairs: int) -> str:
    """How large the memories are; InputError where they do not fit into the memory that is free."""
    values = pairs * clusters * length * width_s
    # All pairs are fitted at once, from 3 samples a centroid, which one of them at a time joins up.
    fit = (FIRST_SAMPLES * pairs + 4) * 4 * clusters * length * width_t
    size = max(pairs * memory_bytes(clusters, length, width_s, width_t), fit)
    free = free_memory()
    shown = (
        f"student memory {clusters} × {length} × {width_s}"
        + (f" for each of {pairs} pairs" if pairs > 1 else "")
        + f" = {values / 1e6:.1f} M values"
    )
    if free is not None and size > free:
        raise InputError(
            f"{shown}: the memories, with gradient and optimizer state, take {size / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free: lower the recipe's clusters or data.max_length"
        )
    return f"{shown}; the memories take {size / 1e6:.0f} MB in training"
