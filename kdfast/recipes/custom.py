"""A recipe of one's own: any losses of the other recipes, weighted, on any layers, in stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kdfast.captured import ModelShape
from kdfast.errors import InputError, nearest
from kdfast.recipes.recipe import Recipe, Term, has_pair
from kdfast.recipes.schedule import Stage, Threshold, Weight

# A loss is a recipe of which all weights but one are 0, with what else must then be left out.
LOSSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "labels": ("soft_labels", "label_weight", {}),
    "soft_labels": ("soft_labels", "soft_label_weight", {}),
    "attention_kl": ("internal", "attention_weight", {}),
    "cosine": ("internal", "cosine_weight", {}),
    "intra": ("fsd", "intra_weight", {}),
    "local": ("fsd", "local_weight", {}),
    "global": ("fsd", "global_weight", {}),
    "layer_projection": ("alp", "projection_weight", {}),
    "pseudo_projection": ("universal", "projection_weight", {"label_share": 0.0}),
    "value_relations": ("minilm", "value_weight", {}),
    "relations": ("minilmv2", "relation_weight", {}),
    "attention_scores": ("tinybert", "attention_weight", {"schedule": "simultaneous"}),
    "hidden_mse": ("tinybert", "hidden_weight", {"schedule": "simultaneous"}),
    "cls_mse": ("pkd", "patience_weight", {}),
    "hidden_cka": ("hidden", "cka_weight", {}),
    "rkd_distance": ("rkd", "distance_weight", {}),
    "rkd_angle": ("rkd", "angle_weight", {}),
    "annealing": ("annealing", "annealing_weight", {"label_share": 0.0}),
    "pooled": ("embedding", "pooled_weight", {}),
}
# What an entry of `losses` may say beside the options of the recipe that the loss is from.
ENTRY_KEYS = ("loss", "recipe", "weight", "name")
STAGE_KEYS = ("name", "losses", "layers", "steps", "epochs", "share", "until", "restart")


def custom(
    student: ModelShape,
    teacher: ModelShape,
    *,
    losses: Sequence[Mapping[str, Any]] = (),
    stages: Sequence[Mapping[str, Any]] = (),
    max_length: int | None = None,
) -> Recipe:
    """A weighted list of losses, or of whole recipes, and the stages they are trained in.

    Args:
        losses: each {"loss": NAME, "weight": w} (LOSSES has the names) or {"recipe": NAME,
            "weight": w}, which takes all of a recipe's terms times w, and any option of the recipe
            that the loss is from ("layer_map", "temperature", "cosine_rows", ...). "name": the
            term's own, where one loss is there twice; several terms of one entry are NAME_TERM.
        stages: each {"name", "losses": [names], "layers": [student layers], one of "steps",
            "epochs" and "share", "until": {"loss", "below", "every"}, "restart": true}; see
            kdfast.recipes.schedule.Stage. Without them: those of the one listed recipe that has
            stages, its last for its own losses alone and the others for all losses that have a pair
            in the stage's layers; otherwise one stage.
        max_length: tokens of the longest input, where a loss asks for it.

    Weights may be points over the run, see kdfast.recipes.schedule.Weight.

    Raises:
        InputError: an unknown loss, recipe, option, stage key or layer, naming what is allowed.
    """
    if not losses:
        raise InputError(
            'recipe \'custom\' needs losses, a list of {"loss": NAME, "weight": w}: '
            f"{', '.join(LOSSES)}"
        )
    terms: dict[str, Term] = {}
    layers: list[tuple[int, int]] = []
    notes: list[str] = []
    staged: list[Stage] = []
    for entry in losses:
        part, prefix, factor = _part(entry, student, teacher, max_length)
        names = {}
        for own, module in part.terms.items():
            term: Any = module
            term.weight = factor.times(term.weight)
            names[own] = name = f"{prefix}_{own}" if len(part.terms) > 1 else prefix
            if name in terms:
                raise InputError(
                    f"recipe 'custom' has two losses named '{name}': give one of them another "
                    '"name"'
                )
            terms[name] = term
        layers += [pair for pair in part.layers if pair not in layers]
        notes += part.notes
        if len(part.stages) > 1:
            if staged and not stages:
                raise InputError(
                    "recipe 'custom' lists two recipes with stages of their own: give it stages"
                )
            staged = [
                replace(
                    stage,
                    terms=tuple(names[term] for term in stage.terms),
                    until=stage.until and replace(stage.until, term=names[stage.until.term]),
                )
                for stage in part.stages
            ]
    if stages:
        staged = [_stage(entry, terms, student) for entry in stages]
    elif staged:
        scheduled = {term for stage in staged for term in stage.terms}
        others = tuple(name for name in terms if name not in scheduled)
        staged = [
            *(replace(stage, terms=stage.terms + others) for stage in staged[:-1]),
            staged[-1],
        ]
    return Recipe("custom", terms, tuple(sorted(layers)), stages=staged, notes=notes)


def _part(
    entry: Mapping[str, Any], student: ModelShape, teacher: ModelShape, max_length: int | None
) -> tuple[Recipe, str, Weight]:
    """The recipe that an entry of `losses` stands for, the name of its terms, and their factor."""
    from kdfast.recipes import assemble, check_recipe, options_of

    if not isinstance(entry, Mapping) or ("loss" in entry) == ("recipe" in entry):
        raise InputError(f'each of losses must be a mapping with "loss" or "recipe", was {entry!r}')
    options = {k: v for k, v in entry.items() if k not in ENTRY_KEYS}
    if "recipe" in entry:
        recipe, weight = entry["recipe"], Weight(entry.get("weight", 1.0))
        if recipe == "custom":
            raise InputError("recipe 'custom' cannot list itself")
    else:
        if entry["loss"] not in LOSSES:
            raise InputError(
                f"loss '{entry['loss']}' is unknown{nearest(entry['loss'], LOSSES)}: it must be "
                f"one of {', '.join(LOSSES)}"
            )
        recipe, own, fixed = LOSSES[entry["loss"]]
        weights = [option for option in options_of(recipe) if option.endswith("_weight")]
        for option in options:
            if (option in weights and option != "pseudo_label_weight") or option in fixed:
                raise InputError(
                    f"loss '{entry['loss']}' takes its weight as \"weight\", not {option}"
                )
        zero = dict.fromkeys((w for w in weights if w != "pseudo_label_weight"), 0.0)
        options |= {**zero, **fixed, own: entry.get("weight", 1.0)}
        weight = Weight(1.0)
    check_recipe(recipe, options, beside=ENTRY_KEYS)
    if options.get("assistants"):
        raise InputError(
            f"assistants {options['assistants']!r} of recipe '{recipe}' make it train a chain of "
            "models, and recipe 'custom' trains one: make it the run's recipe, or leave assistants "
            "out, and the teacher teaches by itself"
        )
    if "max_length" in options_of(recipe):
        options.setdefault("max_length", max_length)
    name = entry.get("name", entry.get("loss", entry.get("recipe")))
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"the name of a loss must be a word, was {name!r}")
    return assemble(recipe, student, teacher, options), name, weight


def _stage(entry: Mapping[str, Any], terms: Mapping[str, Term], student: ModelShape) -> Stage:
    if not isinstance(entry, Mapping):
        raise InputError(f"each of stages must be a mapping, was {entry!r}")
    for key in entry:
        if key not in STAGE_KEYS:
            raise InputError(
                f"a stage has no '{key}'{nearest(key, STAGE_KEYS)}: it has {', '.join(STAGE_KEYS)}"
            )
    values = dict(entry)
    name = str(values.pop("name", "stage"))
    listed = values.pop("losses", None) or list(terms)
    layers = values.pop("layers", None)
    for key, value in {"losses": listed, "layers": layers}.items():
        if value is not None and not isinstance(value, (list, tuple)):
            raise InputError(f"{key} of stage '{name}' must be a list, was {value!r}")
    for layer in layers or ():
        if type(layer) is not int or not 1 <= layer <= student.layers:
            raise InputError(
                f"stage '{name}' names student layer {layer!r}; the student has layers 1 to "
                f"{student.layers}"
            )
    until = values.pop("until", None)
    if until is not None:
        if not isinstance(until, Mapping) or not {"loss", "below"} <= set(until) <= {
            "loss",
            "below",
            "every",
        }:
            raise InputError(
                f'until of stage \'{name}\' must be {{"loss", "below"}} and perhaps "every", was '
                f"{until!r}"
            )
        until = Threshold(until["loss"], until["below"], until.get("every", 20))
    stage = Stage(
        name,
        tuple(listed),
        layers=None if layers is None else tuple(layers),
        until=until,
        **values,
    )
    for loss in listed:
        if loss in terms and not has_pair(terms[loss], stage):
            raise InputError(
                f"stage '{name}' trains student layers {', '.join(map(str, layers or ()))}, and "
                f"the loss '{loss}' is of {', '.join(map(str, terms[loss].layers))}"
            )
    return stage
