"""Relational distillation: distances and angles among the samples of a batch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.losses.distances import root, squared_distances
from kdfast.losses.distributed import gather_batches
from kdfast.losses.layers import (
    LAYER_REDUCTIONS,
    Layers,
    as_pairs,
    choose,
    of_one_dtype,
    over_layers,
    statistics,
)
from kdfast.ops import arguments


class RKDLoss(nn.Module):
    """Huber distance between the pairwise distances, and the triplet angles, of two embeddings.

    With d_ij = ‖x_i − x_j‖ divided by the mean of the non-zero ones, and
    cos_ijk = ⟨x_i − x_j, x_k − x_j⟩ / (‖x_i − x_j‖ ‖x_k − x_j‖), 0 where a side is 0:

        distance = mean_ij huber(d_ij(s), d_ij(t)),  angle = mean_ijk huber(cos_ijk(s), cos_ijk(t))

    Args:
        distance_weight, angle_weight: ≥ 0; 1 and 2, the paper's ratio, by default. Beside a
            cross-entropy both are taken larger (FSD's grid: 100 and 200 upwards).
        layers: "sum" or "mean" over layer pairs, where sequences are given.

    Both means run over all B² pairs and B³ triplets, equal indices (which add nothing) included, as
    in the authors' code. Fewer than 2 samples have no distance, fewer than 3 no angle: 0.

    unit: "samples". couples_samples: True; under torch.distributed it sees the batch of all ranks
    (see gather_batch), so that every rank must call it.

    Memory: distances come from B × B inner products; angles are B³ numbers, some eight tensors of
    them while training (B = 128: 64 MiB in fp32, B = 320: 1 GiB). angle_weight=0 leaves them out.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, Eq. 4-8.
    """

    couples_samples = True
    unit = "samples"

    def __init__(
        self, distance_weight: float = 1.0, angle_weight: float = 2.0, *, layers: str = "sum"
    ) -> None:
        super().__init__()
        self.distance_weight = arguments.finite("RKDLoss", "distance_weight", distance_weight)
        self.angle_weight = arguments.finite("RKDLoss", "angle_weight", angle_weight)
        if min(self.distance_weight, self.angle_weight) < 0:
            raise ValueError(
                "RKDLoss: distance_weight and angle_weight must not be negative, were "
                f"{distance_weight} and {angle_weight}"
            )
        self.layers = choose("layers", layers, LAYER_REDUCTIONS)

    def forward(self, states_s: Layers, states_t: Layers) -> torch.Tensor:
        """
        states_s: [B, D_s]; states_t: [B, D_t]; or sequences of them, one per layer pair.
        Returns a scalar. Raises ValueError when shapes disagree.
        """
        losses = []
        for student, teacher in as_pairs(states_s, states_t):
            if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
                raise ValueError(
                    f"student states {list(student.shape)} and teacher states "
                    f"{list(teacher.shape)} should be [B, D_s] and [B, D_t] of the same samples"
                )
            gathered = gather_batches((student, teacher.detach()))
            student, teacher = of_one_dtype(statistics(x) for x in gathered)
            # Under autocast distances would be of half-precision products.
            with torch.autocast(student.device.type, enabled=False):
                losses.append(self._loss(_squared(student), _squared(teacher)))
        return over_layers(torch.stack(losses), self.layers)

    def _loss(self, squared_s: torch.Tensor, squared_t: torch.Tensor) -> torch.Tensor:
        loss = squared_s.sum() * 0
        if self.distance_weight and len(squared_s) >= 2:
            pair = F.smooth_l1_loss(_distances(squared_s), _distances(squared_t))
            loss = loss + self.distance_weight * pair
        if self.angle_weight and len(squared_s) >= 3:
            triplet = F.smooth_l1_loss(_angles(squared_s), _angles(squared_t))
            loss = loss + self.angle_weight * triplet
        return loss


def _squared(states: torch.Tensor) -> torch.Tensor:
    """‖x_i − x_j‖² [B, B], exactly 0 on the diagonal."""
    return squared_distances(states, states).fill_diagonal_(0)


def _distances(squared: torch.Tensor) -> torch.Tensor:
    """‖x_i − x_j‖ over the mean of those that are not 0; 0 where all are."""
    distances = root(squared)
    mean = distances.sum() / (squared > 0).sum().clamp(min=1)
    return distances / mean.clamp(min=torch.finfo(mean.dtype).tiny)


def _angles(squared: torch.Tensor) -> torch.Tensor:
    """cos_ijk [j, i, k] by the law of cosines: (d_ij² + d_kj² − d_ik²) / (2 d_ij d_kj)."""
    zero = squared == 0
    inverse = squared.masked_fill(zero, 1).rsqrt().masked_fill(zero, 0)
    opposite = squared[:, :, None] + squared[:, None, :] - squared
    return opposite * (inverse[:, :, None] * inverse[:, None, :]) / 2
