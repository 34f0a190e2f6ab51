"""Recipes of one's own: losses by name, whole recipes, stages, and what is refused."""

import pytest
import torch

from kdfast.errors import InputError
from kdfast.recipes import build_recipe
from kdfast.recipes.custom import LOSSES
from kdfast.recipes.schedule import Moment

LABELS = torch.tensor([0, 2, 1, 1])


def custom(shapes, losses, **options):
    return build_recipe("custom", *shapes, losses=losses, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_can_be_had_alone(name, shapes, captured):
    recipe = custom(shapes, [{"loss": name, "weight": 0.5}], max_length=5)
    assert list(recipe.terms) == [name]
    for part in recipe.fitted.values():
        part.stand_in()
    losses = recipe(captured(shapes[0]), captured(shapes[1]), LABELS)
    torch.testing.assert_close(recipe.total(losses), 0.5 * losses[name])


def test_losses_are_those_of_their_recipes(shapes, captured):
    student, teacher = (captured(shape) for shape in shapes)
    recipe = custom(
        shapes,
        [
            {"loss": "cosine", "cosine_rows": "tokens", "layer_map": [[1, 2]]},
            {"loss": "soft_labels", "temperature": 4.0},
        ],
    )
    losses = recipe(student, teacher, None)
    whole = build_recipe(
        "internal", *shapes, cosine_rows="tokens", layer_map=[[1, 2]], temperature=4.0
    )
    expected = whole(student, teacher, None)
    for name in ("cosine", "soft_labels"):
        torch.testing.assert_close(losses[name], expected[name])


def test_whole_recipes_join_with_their_weights(shapes, captured):
    student, teacher = (captured(shape) for shape in shapes)
    recipe = custom(
        shapes,
        [
            {"recipe": "universal", "label_share": 0.0},
            {"recipe": "internal", "weight": 0.25, "soft_label_weight": 0.0, "cosine_weight": 2.0},
        ],
    )
    assert set(recipe.terms) == {
        "universal_soft_labels",
        "universal_projection",
        "internal_attention_kl",
        "internal_cosine",
    }
    assert recipe.terms["internal_cosine"].weight(0) == 0.5
    assert recipe.layers == ((1, 3), (2, 6)) and list(recipe.fitted)
    losses = recipe(student, teacher, LABELS)
    torch.testing.assert_close(
        losses["internal_cosine"],
        build_recipe("internal", *shapes)(student, teacher, None)["cosine"],
    )


def test_the_stages_of_one_recipe_hold_for_the_others_too(shapes):
    recipe = custom(
        shapes,
        [
            {"recipe": "internal", "schedule": "progressive", "cosine_threshold": 0.2},
            {"loss": "intra", "layer_map": "uniform"},
            {"loss": "local"},  # of student layer 1 alone
        ],
    )
    assert [stage.terms for stage in recipe.stages] == [
        ("internal_attention_kl", "internal_cosine", "intra", "local"),
        ("internal_attention_kl", "internal_cosine", "intra"),
        ("internal_soft_labels",),
    ]
    assert recipe.stages[0].until.term == "internal_cosine"


def test_joint_pseudo_classifiers_bring_their_labels_along(shapes):
    recipe = custom(shapes, [{"loss": "pseudo_projection", "pseudo_classifiers": "joint"}])
    assert set(recipe.terms) == {
        "pseudo_projection_projection",
        "pseudo_projection_pseudo_labels",
    }


def test_stages_of_ones_own(shapes, captured):
    recipe = custom(
        shapes,
        [{"loss": "attention_kl"}, {"loss": "soft_labels"}, {"loss": "labels"}],
        stages=[
            {
                "name": "maps",
                "losses": ["attention_kl"],
                "layers": [2],
                "share": 0.5,
                "until": {"loss": "attention_kl", "below": 0.1, "every": 5},
            },
            {"name": "end", "losses": ["soft_labels", "labels"], "restart": True},
        ],
    )
    student, teacher = (captured(shape) for shape in shapes)
    one = recipe(student, teacher, LABELS, Moment(stage=0))
    alone = build_recipe("internal", *shapes, layer_map=[[2, 6]])(student, teacher, None)
    torch.testing.assert_close(one["attention_kl"], alone["attention_kl"])
    assert set(recipe(student, teacher, LABELS, Moment(stage=1))) == {"soft_labels", "labels"}
    assert recipe.stages[0].until.every == 5 and recipe.stages[1].restart


@pytest.mark.parametrize(
    ("losses", "stages", "message"),
    [
        ([], [], "needs losses"),
        ([{"loss": "cosin"}], [], "did you mean 'cosine'"),
        ([{"recipe": "internl"}], [], "did you mean 'internal'"),
        ([{"loss": "cosine", "recipe": "fsd"}], [], 'with "loss" or "recipe"'),
        (["cosine"], [], "must be a mapping"),
        ([{"loss": "cosine", "cosine_weight": 2}], [], "takes its weight as"),
        ([{"loss": "cosine", "layer_map": [[9, 1]]}], [], "student layer 9"),
        ([{"loss": "cosine", "weight": -1}], [], "must not be negative"),
        ([{"loss": "cosine"}, {"loss": "cosine"}], [], "two losses named 'cosine'"),
        ([{"recipe": "custom", "losses": []}], [], "cannot list itself"),
        (
            [{"recipe": "takd", "assistants": [4]}],
            [],
            r"assistants \[4\] .*make it the run's recipe",
        ),
        ([{"loss": "cosine", "name": "a.b"}], [], "must be a word"),
        ([{"loss": "cosine"}], [{"losses": ["cosin"]}], "did you mean 'cosine'"),
        ([{"loss": "cosine"}], [{"layers": [3]}], "student layer 3"),
        ([{"loss": "cosine"}], [{"shares": 1}], "did you mean 'share'"),
        ([{"loss": "cosine", "layer_map": [[1, 2]]}], [{"layers": [2]}], "is of 1"),
        ([{"loss": "cosine"}], [{"until": {"loss": "cosine"}}], "below"),
        ([{"loss": "cosine"}], [{"until": {"loss": "cosine", "below": 1, "evry": 3}}], "every"),
        ([{"loss": "cosine"}], [{"losses": "cosine"}], "must be a list"),
        ([{"loss": "cosine"}], [{"until": {"loss": "labels", "below": 1}}], "does not train"),
        (
            [{"loss": "cosine"}, {"loss": "labels"}],
            [{"losses": ["cosine"]}],
            "labels of recipe 'custom' has a weight and is in no stage",
        ),
    ],
)
def test_what_it_cannot_do_is_said(shapes, losses, stages, message):
    with pytest.raises(InputError, match=message):
        custom(shapes, losses, stages=stages)


def test_the_table_tells_each_losses_layers_apart_where_they_differ(shapes):
    recipe = custom(shapes, [{"loss": "intra", "layer_map": [[1, 2]]}, {"loss": "attention_kl"}])
    assert "intra: student layer  1\n" in recipe.table() and "attention_kl: s" in recipe.table()
    alike = custom(shapes, [{"loss": "cosine"}, {"loss": "attention_kl"}])
    assert alike.table().count("student layer") == 1
