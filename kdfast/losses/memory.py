"""Feature structure distillation through memories: centroids that stand for the whole data set.

With a sample's features h = its token states side by side, zero where padded, [W·D], and memories
M_T [C, W·D_t] (k-means centroids of the teacher's features, frozen) and M_S [C, W·D_s] (trained):

    F_Mh = mean_ij (ψ(h_T_i, M_T_j) − ψ(h_S_i, M_S_j))²        ψ: Euclidean (E), cosine (C)
    F_MM = −log |CKA(M_T, M_S)|
    L_G  = γ_m F_Mh^E + (1 − γ_m) F_Mh^C + F_MM

Source: Jung et al. 2023, Eq. 8-10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from kdfast.losses.distances import SamplesAndMemory
from kdfast.losses.layers import PADDINGS, choose, statistics
from kdfast.losses.structure import alignment_loss
from kdfast.ops import arguments
from kdfast.ops.cka import CKATeacher

# k-means++ draws the first centroids from so many samples per cluster.
FIRST_SAMPLES = 3


def flat_states(
    hidden: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_length: int | None = None,
    padding: str = "masked",
) -> torch.Tensor:
    """A sample's token states side by side: [B, N, D] to [B, N·D], or [B, max_length·D].

    Args:
        hidden: [B, N, D]; half precision comes out as fp32.
        attention_mask: [B, N], 1 = token.
        max_length: W ≥ N; shorter batches are extended by zeros. None: N.
        padding: "masked": the states of padded tokens are zero; "counted": they stay.

    Raises: ValueError when N exceeds max_length.
    """
    if attention_mask is not None and padding == "masked":
        # Before the conversion, where a copy is half as large.
        hidden = hidden.masked_fill(~attention_mask.bool()[..., None], 0)
    flat = statistics(hidden).flatten(1)
    if max_length is None:
        return flat
    _check_length(hidden, max_length)
    if hidden.shape[1] == max_length:
        return flat
    return nn.functional.pad(flat, (0, max_length * hidden.shape[2] - flat.shape[1]))


class CentroidFit:
    """Centroids of features that need not fit in memory, by k-means under Euclidean distance.

    `epochs` passes of scikit-learn's MiniBatchKMeans, then one that puts every centroid at the
    exact mean of the samples nearest to it (a step of Lloyd's; a centroid without samples stays).
    The same samples and seed give the same bits. The authors' published code instead keeps an
    average dominated by a cluster's last samples, which is not reproduced.

    Feed all samples by `see`, in batches of any sizes, then call `end_pass`; `passes` times over.
    Then `centroids` is [C, F], float32, on the CPU, until then None.

    Args:
        clusters: C ≥ 1, at most the number of samples.
        epochs: passes of mini-batch k-means; 3 as in the paper.
        seed: of the draws of first centroids and of those put in place of nearly empty ones.

    Memory beside a batch: some 6·C samples for the first draw, less later.

    Source: Jung et al. 2023, section 3 (stage 1: 3 clustering epochs, C = 100 or 300).
    """

    def __init__(self, clusters: int, *, epochs: int = 3, seed: int = 0) -> None:
        from sklearn.cluster import MiniBatchKMeans

        self.clusters = arguments.integer("fit_centroids", "clusters", clusters, at_least=1)
        self.epochs = arguments.integer("fit_centroids", "epochs", epochs, at_least=1)
        self.passes = self.epochs + 1
        self.centroids: torch.Tensor | None = None
        self._kmeans = MiniBatchKMeans(clusters, random_state=seed, compute_labels=False)
        self._first: list[Any] = []
        self._width: int | None = None
        self._done = 0
        self._seen = self._count = 0
        self._sums: Any = None
        self._members: Any = None

    def see(self, batch: Any) -> None:
        """batch: samples [B, F], an array or tensor, read as float32. Raises ValueError for widths
        that differ and values that are not finite."""
        import numpy

        if isinstance(batch, torch.Tensor):
            batch = batch.detach().float().cpu().numpy()
        batch = numpy.ascontiguousarray(batch, dtype=numpy.float32)
        if batch.ndim != 2 or batch.shape[1] != (self._width or batch.shape[1]):
            wanted = f"[B, {self._width or 'F'}]"
            raise ValueError(
                f"fit_centroids: a batch has shape {list(batch.shape)}, should be {wanted}"
            )
        self._width = batch.shape[1]
        if not len(batch):
            return
        self._seen += len(batch)
        if self._done == self.epochs:
            self._add(batch)
        elif hasattr(self._kmeans, "cluster_centers_"):
            self._kmeans.partial_fit(batch)
        else:
            self._first.append(batch.copy())  # the caller may fill its buffer anew
            if self._seen >= FIRST_SAMPLES * self.clusters:
                self._begin()

    def end_pass(self) -> None:
        """All samples were seen. Raises ValueError for fewer samples than clusters, and when a
        later pass had not as many as the first."""
        import numpy

        if not self._done:
            self._count = self._seen
            if self._count < self.clusters:
                raise ValueError(
                    f"fit_centroids: clusters is {self.clusters}, should be at most the number of "
                    f"samples, {self._count}"
                )
            if self._first:
                self._begin()
        self._done += 1
        if self._seen != self._count:
            raise ValueError(
                f"fit_centroids: batches gave {self._count} samples in pass 1 and {self._seen} in "
                f"pass {self._done}; every call should give all samples again (a function, not one "
                "iterator)"
            )
        self._seen = 0
        if self._done == self.epochs:
            self._sums = numpy.zeros((self.clusters, self._width or 0))
            self._members = numpy.zeros(self.clusters, dtype=numpy.int64)
        elif self._done == self.passes:
            members = self._members[:, None]
            means = (self._sums / numpy.maximum(members, 1)).astype(numpy.float32)
            centroids = numpy.where(members > 0, means, self._kmeans.cluster_centers_)
            self.centroids = torch.from_numpy(centroids)

    def _begin(self) -> None:
        import numpy

        self._kmeans.partial_fit(numpy.concatenate(self._first))
        self._first.clear()

    def _add(self, batch: Any) -> None:
        import numpy

        nearest = self._kmeans.predict(batch)
        for cluster in numpy.unique(nearest):
            own = batch[nearest == cluster]
            self._sums[cluster] += own.sum(0, dtype=numpy.float64)
            self._members[cluster] += len(own)


def fit_centroids(
    batches: Callable[[], Iterable[Any]], clusters: int, *, epochs: int = 3, seed: int = 0
) -> torch.Tensor:
    """CentroidFit's centroids [C, F] of the samples that `batches` gives, each time it is called.

    Args:
        batches: called once a pass, epochs + 1 times; gives the same samples each time, in batches
            [B, F] of any sizes (see flat_states).
        clusters, epochs, seed: see CentroidFit, also for what raises ValueError.
    """
    fit = CentroidFit(clusters, epochs=epochs, seed=seed)
    for _ in range(fit.passes):
        for batch in batches():
            fit.see(batch)
        fit.end_pass()
    assert fit.centroids is not None
    return fit.centroids


def memory_bytes(clusters: int, max_length: int, width_s: int, width_t: int) -> int:
    """Bytes that L_G's memories take in training, float32: the teacher's once; the student's four
    times, with its gradient and Adam's two moments."""
    return 4 * clusters * max_length * (width_t + 4 * width_s)


class ClusteredMemoryLoss(nn.Module):
    """L_G: distances of samples to a memory as the teacher has them to its own, both memories
    aligned by CKA.

    Args:
        clusters: C ≥ 2 (the paper: 300 for QQP and MNLI, 100 otherwise).
        max_length: W, the tokens of the longest sample.
        student_width, teacher_width: D_s, D_t. They may differ, though Euclidean distances then
            do in size too; the cosine term and F_MM do not.
        balance: γ_m in [0, 1], weight of the Euclidean term, 1 − γ_m that of the cosine. Euclidean
            distances of W·D features are large, so the paper's search takes it from 1e-7 up; the
            default 0.5 is the official code's.
        memory_alignment: weight of F_MM; 1 in the paper. Its CKA is the biased one, near 1 (and
            F_MM near 0) from the start where C is far below W·D.
        padding: "masked" (default: a padded position says nothing of its sample): its states are
            zero; "counted" is the paper's unmasked form. Make the teacher memory in the same way.
        init: of the student memory: "normal", N(0, 1) (the official code), or "teacher", a copy of
            the teacher memory once that is first set; needs equal widths.
        eps: added to squared distances under the root. 1e-8 as in the official code for the
            teacher's; here for both sides, so that equal features have equal distances.

    Parameters and buffers: student_memory [C, W·D_s], trained with the student; teacher_memory
    [C, W·D_t], frozen, NaN until set_teacher_memory or a loaded state gives it. See memory_bytes.

    Batches shorter than W count as extended by zeros. No sample is coupled with another: F_Mh is a
    mean over samples, F_MM does not depend on the batch. So micro-batches weighted by their samples
    (weights that add up to 1), and equal batches averaged over ranks, give exactly the loss and
    gradient of the joined batch, nothing gathered; student_memory's gradient must then be averaged
    over ranks as the student's is, and every rank must set the same teacher memory.

    Source: Jung et al. 2023, Eq. 8-10, and its official code (plain means over samples and
    centroids).
    """

    couples_samples = False
    unit = "samples"

    def __init__(
        self,
        clusters: int,
        max_length: int,
        student_width: int,
        teacher_width: int,
        *,
        balance: float = 0.5,
        memory_alignment: float = 1.0,
        padding: str = "masked",
        init: str = "normal",
        eps: float = 1e-8,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        op = "ClusteredMemoryLoss"
        clusters = arguments.integer(op, "clusters", clusters, at_least=2)
        self.max_length = arguments.integer(op, "max_length", max_length, at_least=1)
        self.student_width = arguments.integer(op, "student_width", student_width, at_least=1)
        self.teacher_width = arguments.integer(op, "teacher_width", teacher_width, at_least=1)
        self.balance = arguments.finite(op, "balance", balance)
        if not 0 <= self.balance <= 1:
            raise ValueError(f"{op}: balance is {balance}, should be between 0 and 1")
        self.memory_alignment = arguments.finite(op, "memory_alignment", memory_alignment)
        if self.memory_alignment < 0:
            raise ValueError(f"{op}: memory_alignment is {memory_alignment}, should be at least 0")
        self.padding = choose("padding", padding, PADDINGS)
        self.init = choose("init", init, ("normal", "teacher"))
        if init == "teacher" and student_width != teacher_width:
            raise ValueError(
                f'{op}: init="teacher" copies the teacher memory and needs equal widths, were '
                f'{student_width} and {teacher_width}; use init="normal"'
            )
        self.eps = arguments.finite(op, "eps", eps)
        if self.eps < 0:
            raise ValueError(f"{op}: eps is {eps}, should be at least 0")
        self.backend = backend
        self.student_memory = nn.Parameter(torch.randn(clusters, max_length * student_width))
        self.teacher_memory: torch.Tensor
        self.register_buffer(
            "teacher_memory", torch.full((clusters, max_length * teacher_width), torch.nan)
        )
        self._known = False
        self._alignment: tuple[torch.Tensor, CKATeacher] | None = None
        self.register_load_state_dict_post_hook(_notice_loaded_memory)

    @torch.no_grad()
    def set_teacher_memory(self, memory: torch.Tensor) -> None:
        """memory: [C, W·D_t], finite, see fit_centroids. ValueError when it is not."""
        if memory.shape != self.teacher_memory.shape:
            raise ValueError(
                f"teacher memory has shape {list(memory.shape)}, should be [clusters, max_length · "
                f"teacher_width] = {list(self.teacher_memory.shape)}"
            )
        if not memory.isfinite().all():
            raise ValueError("teacher memory has values that are not finite")
        self.teacher_memory.copy_(memory)
        if self.init == "teacher" and not self._known:
            self.student_memory.copy_(memory)
        self._known, self._alignment = True, None

    def parts(
        self,
        hidden_s: torch.Tensor,
        hidden_t: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The unweighted terms by name: "euclidean", "cosine", "memory"; those of weight 0 left
        out. Arguments as forward's."""
        if not self._known:
            raise ValueError(
                "ClusteredMemoryLoss has no teacher memory yet: call set_teacher_memory (with "
                "centroids from fit_centroids) or load a state that holds one"
            )
        if hidden_s.shape[:2] != hidden_t.shape[:2]:
            raise ValueError(
                f"student states {list(hidden_s.shape)} and teacher states {list(hidden_t.shape)} "
                "must agree in batch and tokens"
            )
        weights = self._weights()
        found: dict[str, torch.Tensor] = {}
        # Distances under autocast would be of half-precision products.
        with torch.autocast(hidden_s.device.type, enabled=False):
            if weights.keys() & {"euclidean", "cosine"}:
                sides = [
                    SamplesAndMemory.of(self._features(hidden, width, attention_mask), memory)
                    for hidden, width, memory in (
                        (hidden_s, self.student_width, self.student_memory),
                        (hidden_t.detach(), self.teacher_width, self.teacher_memory),
                    )
                ]
                for name, psi in (("euclidean", self._euclidean), ("cosine", _cosine)):
                    if name in weights:
                        student, teacher = map(psi, sides)
                        found[name] = (student - teacher.to(student.dtype)).square().mean()
            if "memory" in weights:
                found["memory"] = self._aligned()
        return found

    def forward(
        self,
        hidden_s: torch.Tensor,
        hidden_t: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        hidden_s: [B, N, D_s]; hidden_t: [B, N, D_t], N ≤ W; half precision is read as fp32.
        attention_mask: [B, N], 1 = token. Returns a scalar, float32, float64 for float64.
        Raises ValueError before a teacher memory is set, and when shapes disagree.
        """
        weights = self._weights()
        found = self.parts(hidden_s, hidden_t, attention_mask)
        return torch.stack([weights[name] * loss for name, loss in found.items()]).sum()

    def _weights(self) -> dict[str, float]:
        weights = {
            "euclidean": self.balance,
            "cosine": 1 - self.balance,
            "memory": self.memory_alignment,
        }
        return {name: weight for name, weight in weights.items() if weight}

    def _features(
        self, hidden: torch.Tensor, width: int, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        _check_length(hidden, self.max_length)
        if hidden.shape[2] != width:
            raise ValueError(f"states {list(hidden.shape)} should have width {width}")
        return flat_states(hidden, attention_mask, padding=self.padding)

    def _euclidean(self, side: SamplesAndMemory) -> torch.Tensor:
        return side.distances(self.eps)

    def _aligned(self) -> torch.Tensor:
        # The teacher's Gram matrix is made once; a moved or converted buffer is another tensor.
        memory = self.teacher_memory
        if self._alignment is None or self._alignment[0] is not memory:
            self._alignment = memory, CKATeacher(memory, backend=self.backend)
        return alignment_loss(self._alignment[1].cka(self.student_memory), "neg_log")


def _notice_loaded_memory(module: ClusteredMemoryLoss, _: Any) -> None:
    module._known = not bool(module.teacher_memory.isnan().any())
    module._alignment = None


def _cosine(side: SamplesAndMemory) -> torch.Tensor:
    return side.cosines()


def _check_length(hidden: torch.Tensor, max_length: int) -> None:
    if hidden.dim() != 3 or hidden.shape[1] > max_length:
        raise ValueError(
            f"states {list(hidden.shape)} should be [B, N, D] with N at most max_length, "
            f"{max_length}"
        )
