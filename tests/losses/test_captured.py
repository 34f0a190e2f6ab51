"""What is captured reaches the operators as it is: neither copied nor cast."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast import losses
from kdfast.ops import dispatch

B, N, D, HEADS, LAYERS = 2, 24, 64, 4, 3
COPIES = {"_to_copy", "clone", "copy_", "cat", "stack", "index_select", "masked_fill", "where"}


class Copies(TorchDispatchMode):
    """Names of what copies as many numbers as a layer has."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if name in COPIES and isinstance(result, torch.Tensor) and result.numel() >= B * N * D:
            self.found.append(name)
        return result


def hidden(dtype):
    return [torch.randn(B, N, D).to(dtype) for _ in range(LAYERS)]


def heads(dtype):
    """As projections give them: [B, N, H, d] seen as [B, H, N, d]."""
    return [x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in hidden(dtype)]


MASK = torch.arange(N) < torch.tensor([[N], [N - 5]])
LOSSES = {
    # A loss, and what each model gives it: what is made of a layer, and how often.
    "attention": (losses.AttentionKLLoss(), heads, 2),
    "relations": (losses.RelationKLLoss(), heads, 3),
    "cosine": (losses.CosineLoss(rows="tokens"), hidden, 1),
    "mse": (losses.HiddenMSELoss(), hidden, 1),
    "cka over tokens": (losses.CKALoss(rows="tokens"), hidden, 1),
    "cka over all tokens": (losses.CKALoss(rows="all_tokens", padding="counted"), hidden, 1),
    "layer projection": (losses.LayerProjectionLoss(), hidden, 1),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype_t", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype_s", [torch.float32, torch.bfloat16])
def test_captured_tensors_are_neither_copied_nor_cast(name, dtype_s, dtype_t):
    if reason := dispatch.explain("attention_kl")[dispatch.BACKENDS.index("cpp")].reason:
        pytest.skip(reason)
    loss, of_layers, count = LOSSES[name]
    students, teachers = ([of_layers(dtype) for _ in range(count)] for dtype in (dtype_s, dtype_t))
    for layers in students:
        for x in layers:
            x.requires_grad_()
    with Copies() as copies:
        loss(*students, *teachers, MASK)
    assert copies.found == []


@pytest.mark.parametrize("loss", [losses.AttentionKLLoss(), losses.AttentionScoreLoss()])
def test_a_model_whose_own_tensors_differ_in_dtype_is_brought_to_one(loss):
    """Of a teacher under autocast, say, queries may come in half precision and keys not."""
    student, wide = ([heads(torch.float32) for _ in range(2)] for _ in "12")
    keys = [x.double() for x in wide[1]]
    mixed = [[x.bfloat16() for x in wide[0]], keys]
    same = [[x.bfloat16().double() for x in wide[0]], keys]
    assert torch.equal(loss(*student, *mixed, MASK), loss(*student, *same, MASK))
    relations = losses.RelationKLLoss(relations=("query",))
    layers = student[0], None, None
    first = [wide[0][0].bfloat16(), *wide[0][1:]]
    loss = relations(*layers, first, None, None, MASK)
    assert torch.equal(loss, relations(*layers, [x.float() for x in first], None, None, MASK))
