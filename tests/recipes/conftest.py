"""Two models of random internals, as a capture would leave them."""

import pytest
import torch

from kdfast.captured import Captured, LayerAttention, ModelShape

B, N = 4, 5


def captured_of(shape, *, grad=False, rows=B, tokens=N):
    """Random internals of a model of this shape; the first sentence has three tokens."""

    def tensor(*size):
        return torch.randn(*size, requires_grad=grad)

    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, 3:] = 0
    head = (rows, shape.heads, tokens, shape.width // max(1, shape.heads))
    logits = (rows, tokens, shape.classes) if shape.token_logits else (rows, shape.classes)
    return Captured(
        logits=None if shape.classes is None else tensor(*logits),
        hidden_states={i: tensor(rows, tokens, shape.width) for i in range(shape.layers + 1)},
        attention={
            i: LayerAttention(tensor(*head), tensor(*head), tensor(*head), scale=0.5)
            for i in range(1, shape.layers + 1 if shape.heads else 1)
        },
        attention_mask=mask,
    )


@pytest.fixture
def captured():
    return captured_of


@pytest.fixture
def shapes():
    """A 2-layer student and a 6-layer teacher, width 8, 2 heads, 3 classes."""
    return (
        ModelShape(layers=2, width=8, heads=2, classes=3),
        ModelShape(layers=6, width=8, heads=2, classes=3),
    )
