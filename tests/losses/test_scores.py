"""TinyBERT's attention loss against scores written out here."""

import pytest
import torch

from kdfast.losses import AttentionScoreLoss

B, N = 2, 5
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def heads(count=2, width=4):
    return torch.randn(B, count, N, width, dtype=torch.float64)


def scores(query, key):
    return query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5


def test_masked_keys_count_as_zero_in_the_mean_over_all_entries():
    qs, ks, qt, kt = heads(), heads(), heads(2, 6), heads(2, 6)
    squares = (scores(qs, ks) - scores(qt, kt)).square() * MASK[:, None, None, :]
    loss = AttentionScoreLoss()(qs, ks, qt, kt, MASK)
    torch.testing.assert_close(loss, squares.sum() / (B * 2 * N * N))


def test_masked_padding_averages_over_valid_pairs_of_each_sample():
    layer = [heads() for _ in range(4)]
    loss = AttentionScoreLoss(padding="masked")
    short = [x[1:, :, :3] for x in layer]
    expected = (loss(*(x[:1] for x in layer)) + loss(*short)) / 2
    torch.testing.assert_close(loss(*layer, MASK), expected)
    difference = scores(*short[:2]) - scores(*short[2:])
    torch.testing.assert_close(loss(*short), difference.square().mean())


def test_causal_and_windowed_entries_count_as_zero():
    qs, ks, qt, kt = (heads() for _ in range(4))
    squares = (scores(qs, ks) - scores(qt, kt)).square()
    i, j = torch.arange(N)[:, None], torch.arange(N)
    seen = (j <= i) & (i - j <= 1)
    loss = AttentionScoreLoss()(qs, ks, qt, kt, causal=True, window=1)
    torch.testing.assert_close(loss, (squares * seen).mean())


def test_differing_head_counts_meet_in_the_teachers_average():
    qs, ks, qt, kt = heads(3), heads(3), heads(2), heads(2)
    expected = (scores(qs, ks) - scores(qt, kt).mean(1, keepdim=True)).square().mean()
    torch.testing.assert_close(AttentionScoreLoss(match_heads="mean")(qs, ks, qt, kt), expected)


def test_grouped_keys_serve_their_query_heads():
    qs, ks, qt, kt = heads(4), heads(2), heads(4), heads(1)
    dense = AttentionScoreLoss()(qs, ks[:, [0, 0, 1, 1]], qt, kt[:, [0, 0, 0, 0]])
    torch.testing.assert_close(AttentionScoreLoss()(qs, ks, qt, kt), dense)


def test_layer_pairs_are_summed_or_averaged():
    layers = [[heads(), heads()] for _ in range(4)]
    total = sum(AttentionScoreLoss()(*(x[k] for x in layers)) for k in range(2))
    torch.testing.assert_close(AttentionScoreLoss()(*layers), total)
    torch.testing.assert_close(AttentionScoreLoss(layers="mean")(*layers), total / 2)


def test_half_precision_scores_are_compared_in_fp32():
    layer = [heads().bfloat16() for _ in range(4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = AttentionScoreLoss()(*layer, MASK)
    torch.testing.assert_close(loss, AttentionScoreLoss()(*(x.float() for x in layer), MASK))


@pytest.mark.parametrize("padding", ["counted", "masked"])
def test_gradients_match_finite_differences(padding):
    qs, ks, qt, kt = (heads(2, 2) for _ in range(4))
    loss = AttentionScoreLoss(padding=padding)
    inputs = (qs.requires_grad_(), ks.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k: loss(q, k, qt, kt, MASK), inputs)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: AttentionScoreLoss(match_heads="max"), "match_heads"),
        (lambda: AttentionScoreLoss(padding="none"), "padding"),
        (lambda: AttentionScoreLoss()(heads(3), heads(3), heads(), heads()), "match_heads"),
        (lambda: AttentionScoreLoss()(heads(3), heads(2), heads(3), heads(3)), "key heads"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
