"""A bidirectional LSTM as student, the recurrent one of Universal-KD and of Tang et al. (2019).

    h_i[t] = [forward LSTM over h_{i−1}[1 … t] ; backward LSTM over h_{i−1}[n … t]]

Each direction has half of hidden_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from transformers import initialization as init

from kdfast.errors import InputError
from kdfast.students.encoder import (
    StudentConfig,
    StudentForSequenceClassification,
    StudentForTokenClassification,
    StudentModel,
)


class BiLSTMConfig(StudentConfig):
    """Sizes of a BiLSTM; see StudentConfig. hidden_size is that of both directions together."""

    model_type = "kdfast_bilstm"

    def __init__(self, num_hidden_layers: int = 2, hidden_size: int = 512, **kwargs: Any) -> None:
        super().__init__(num_hidden_layers=num_hidden_layers, hidden_size=hidden_size, **kwargs)
        if hidden_size % 2:
            raise InputError(
                f"hidden_size of a BiLSTM must be even, one half a direction, was {hidden_size}"
            )


class BiLSTMModel(StudentModel):
    """Word embeddings and bidirectional LSTM layers."""

    config_class = BiLSTMConfig
    base_model_prefix = "bilstm"

    def make_layer(self, config: BiLSTMConfig) -> nn.Module:
        return nn.LSTM(
            config.hidden_size, config.hidden_size // 2, batch_first=True, bidirectional=True
        )

    def layer_states(
        self, states: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        passed = []
        if mask is None:
            for layer in self.layers:
                states = layer(self.dropout(states))[0]
                passed.append(states)
            return tuple(passed)
        # Real positions first, in their order: both directions then start at a real position,
        # wherever the padding is. A row of padding alone counts as one position of zeros.
        order = mask.int().argsort(dim=1, descending=True, stable=True)
        back = order.argsort(dim=1)[..., None].expand_as(states)
        packed = pack_padded_sequence(
            states.gather(1, order[..., None].expand_as(states)),
            # cuDNN takes lengths from the CPU: the one synchronisation of a forward pass.
            mask.sum(1).clamp(min=1).cpu(),
            batch_first=True,
            enforce_sorted=False,
        )
        for layer in self.layers:
            packed = layer(PackedSequence(self.dropout(packed.data), *packed[1:]))[0]
            states, _ = pad_packed_sequence(packed, batch_first=True, total_length=mask.shape[1])
            passed.append(states.gather(1, back).masked_fill(~mask[..., None], 0.0))
        return tuple(passed)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, nn.LSTM):
            return
        for name, parameter in module.named_parameters():
            if name.startswith("weight"):
                init.xavier_uniform_(parameter)
            elif name.startswith("bias_ih"):
                # Gates lie in the order input, forget, cell, output. A forget gate that starts
                # open lets gradients reach far (Jozefowicz et al. 2015).
                bias = torch.zeros_like(parameter)
                bias[module.hidden_size : 2 * module.hidden_size] = 1.0
                init.copy_(parameter, bias)
            else:
                init.zeros_(parameter)


class BiLSTMForSequenceClassification(StudentForSequenceClassification):
    """A BiLSTM with a linear head on its pooled states."""

    config_class = BiLSTMConfig
    base_model_prefix = "bilstm"
    body_class = BiLSTMModel


class BiLSTMForTokenClassification(StudentForTokenClassification):
    """A BiLSTM with a linear head on each state."""

    config_class = BiLSTMConfig
    base_model_prefix = "bilstm"
    body_class = BiLSTMModel
