"""Models whose heads are not width / heads wide."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3Model

from kdfast.distill.capture import Capture, model_shape
from kdfast.errors import InputError
from kdfast.recipes import build_recipe


@pytest.fixture
def models():
    """A 1-layer student and a 2-layer teacher: width 32, 4 heads of 16, 2 key-value heads."""
    made = []
    for layers in (1, 2):
        torch.manual_seed(layers)
        config = Qwen3Config(
            vocab_size=40,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=48,
            num_hidden_layers=layers,
            pad_token_id=0,
        )
        made.append(Qwen3Model(config).eval())
    return made


INPUTS = {
    "input_ids": torch.arange(1, 13).view(2, 6),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
}


def rows_kl(scores_s, scores_t, causal):
    """KL(t ‖ s) of [B, H, N, N] scores, mean over valid rows."""
    hidden = ~INPUTS["attention_mask"].bool()[:, None, None, :]
    if causal:
        hidden = hidden | torch.ones(6, 6).triu(1).bool()
    log_s, log_t = (x.masked_fill(hidden, -1e9).log_softmax(-1) for x in (scores_s, scores_t))
    rows = (log_t.exp() * (log_t - log_s)).sum(-1)
    return rows.transpose(1, 2)[INPUTS["attention_mask"].bool()].mean()


def regrouped(states, count):
    return states.transpose(1, 2).flatten(2).unflatten(2, (count, -1)).transpose(1, 2)


def losses(models, name, **options):
    shapes = [model_shape(m) for m in models]
    recipe = build_recipe(name, *shapes, soft_label_weight=0, **options)
    found = []
    for model, needs in zip(models, recipe.needs(), strict=True):
        with torch.no_grad(), Capture(model, needs) as capture:
            found.append(capture(INPUTS)[1])
    layers = found[0].attention[1], found[1].attention[2]
    return recipe, recipe(*found, None), layers


def test_relation_heads_divide_what_the_queries_have_not_the_width(models):
    options = {"relation_heads": 64, "cosine_weight": 0, "layer_map": "last"}
    _, found, (s, t) = losses(models, "internal", **options)
    # 64 relation heads of one feature each; shared keys stand for each of their query heads.
    maps = [
        regrouped(x.query, 64) @ regrouped(x.key.repeat_interleave(2, 1), 64).mT for x in (s, t)
    ]
    torch.testing.assert_close(found["attention_kl"], rows_kl(*maps, causal=True))


def test_minilm_v2_regroups_queries_of_64_and_keys_of_32(models):
    recipe, found, (s, t) = losses(models, "minilmv2", relation_heads=32)
    expected = 0
    for part in ("query", "key", "value"):
        x, y = (regrouped(getattr(layer, part), 32) for layer in (s, t))
        d = x.shape[-1]
        expected += rows_kl(x @ x.mT / d**0.5, y @ y.mT / d**0.5, causal=False)
    torch.testing.assert_close(found["relations"], expected)
    # The default is of the keys' width here, 16 features each.
    default = build_recipe("minilmv2", *map(model_shape, models), soft_label_weight=0)
    assert default.terms["relations"].loss.relation_heads == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("internal", {"relation_heads": 24, "cosine_weight": 0}, "the student's queries' width 64"),
        ("minilmv2", {"relation_heads": 64}, "the student's keys and values, 32"),
    ],
)
def test_relation_heads_that_do_not_divide_it_are_refused(models, name, options, message):
    with pytest.raises(InputError, match=message):
        losses(models, name, **options)
