"""A gated convolutional network as student (Dauphin et al. 2017, as encoder of a sentence).

    h_i = √½ (h_{i−1} + (h_{i−1} ∗ W + b) ⊗ σ(h_{i−1} ∗ V + c))

Where this differs from the paper's language model: convolutions look both ways, since nothing is
predicted here. √½ keeps the variance of a residual sum, and W, V start from N(0, 4(1 − p) / (k·D))
with dropout p and kernel width k, which keeps that of the gated branch: both from Gehring et al.
(2017), the same group's next model. Weight normalisation, there for training by plain SGD, is left
out: Adam does not need it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from kdfast.errors import InputError
from kdfast.students.encoder import (
    StudentConfig,
    StudentForSequenceClassification,
    StudentForTokenClassification,
    StudentModel,
)


class GatedCNNConfig(StudentConfig):
    """Sizes of a gated CNN; see StudentConfig. kernel_size: positions a convolution reads, odd.

    A state of layer i has read 1 + i (kernel_size − 1) positions: 17 with the defaults.
    """

    model_type = "kdfast_gated_cnn"

    def __init__(
        self,
        num_hidden_layers: int = 4,
        hidden_size: int = 512,
        kernel_size: int = 5,
        **kwargs: Any,
    ) -> None:
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1:
            raise InputError(f"kernel_size must be an odd whole number, was {kernel_size!r}")
        if kernel_size % 2 == 0:
            raise InputError(
                f"kernel_size must be odd, as many positions to each side, was {kernel_size}"
            )
        self.kernel_size = kernel_size
        super().__init__(num_hidden_layers=num_hidden_layers, hidden_size=hidden_size, **kwargs)


class GatedConvolution(nn.Module):
    """One residual block; x [B, N, D] → [B, N, D]."""

    def __init__(self, config: GatedCNNConfig) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(
            config.hidden_size,
            2 * config.hidden_size,
            config.kernel_size,
            padding=config.kernel_size // 2,
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        both = self.convolution(self.dropout(states).transpose(1, 2))
        return math.sqrt(0.5) * (states + F.glu(both, dim=1).transpose(1, 2))


class GatedCNNModel(StudentModel):
    """Word embeddings and gated convolutions."""

    config_class = GatedCNNConfig
    base_model_prefix = "gated_cnn"

    def make_layer(self, config: GatedCNNConfig) -> nn.Module:
        return GatedConvolution(config)

    def layer_states(
        self, states: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        passed = []
        for layer in self.layers:
            states = layer(states)
            if mask is not None:
                # What a convolution reads beyond the sentence is then what it reads beyond the
                # tensor: zeros.
                states = states.masked_fill(~mask[..., None], 0.0)
            passed.append(states)
        return tuple(passed)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d) and module.bias is not None:
            inputs = module.in_channels * module.kernel_size[0]
            kept = 1 - self.config.hidden_dropout_prob
            init.normal_(module.weight, std=math.sqrt(4 * kept / inputs))
            init.zeros_(module.bias)


class GatedCNNForSequenceClassification(StudentForSequenceClassification):
    """A gated CNN with a linear head on its pooled states."""

    config_class = GatedCNNConfig
    base_model_prefix = "gated_cnn"
    body_class = GatedCNNModel


class GatedCNNForTokenClassification(StudentForTokenClassification):
    """A gated CNN with a linear head on each state."""

    config_class = GatedCNNConfig
    base_model_prefix = "gated_cnn"
    body_class = GatedCNNModel
