"""Recipes by name: which losses, on which layers, with which weights."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from kdfast.captured import ModelShape
from kdfast.errors import InputError, nearest
from kdfast.recipes.alp import alp
from kdfast.recipes.annealing import annealing
from kdfast.recipes.custom import custom
from kdfast.recipes.distilbert import distilbert
from kdfast.recipes.embedding import embedding
from kdfast.recipes.fsd import fsd
from kdfast.recipes.hidden import hidden
from kdfast.recipes.internal import internal
from kdfast.recipes.labels import labels, soft_labels
from kdfast.recipes.minilm import minilm
from kdfast.recipes.minilmv2 import minilmv2
from kdfast.recipes.pkd import pkd
from kdfast.recipes.recipe import Recipe, Term
from kdfast.recipes.rkd import rkd
from kdfast.recipes.schedule import Weight
from kdfast.recipes.takd import takd
from kdfast.recipes.tinybert import tinybert
from kdfast.recipes.universal import universal

RECIPES: dict[str, Callable[..., Recipe]] = {
    "labels": labels,
    "soft_labels": soft_labels,
    "internal": internal,
    "fsd": fsd,
    "alp": alp,
    "universal": universal,
    "minilm": minilm,
    "minilmv2": minilmv2,
    "tinybert": tinybert,
    "pkd": pkd,
    "distilbert": distilbert,
    "hidden": hidden,
    "rkd": rkd,
    "annealing": annealing,
    "takd": takd,
    "embedding": embedding,
    "custom": custom,
}

__all__ = ["RECIPES", "Recipe", "Term", "build_recipe", "check_recipe", "options_of"]


def check_recipe(name: str, options: dict[str, Any], beside: Iterable[str] = ()) -> None:
    """Raise InputError for an unknown recipe or option, naming the nearest one.

    beside: other keys that may stand where the options do, and may have been meant.
    """
    if not isinstance(name, str) or name not in RECIPES:
        raise InputError(
            f"recipe '{name}' is unknown{nearest(name, RECIPES)}: it must be one of "
            f"{', '.join(RECIPES)}"
        )
    known = options_of(name)
    for key, value in options.items():
        if key not in known:
            raise InputError(
                f"recipe '{name}' has no option '{key}'{nearest(key, [*beside, *known])}: it has "
                f"{', '.join(known) or 'none'}"
            )
        if key.endswith("_weight"):
            Weight(value, f"{key} of recipe '{name}'")
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        kind = str(known[key].annotation)
        if "int" in kind and "float" not in kind and "Any" not in kind:
            whole = type(value) is int or (value is None and "None" in kind)
            if not whole and "Sequence" not in kind:
                raise InputError(f"{key} of recipe '{name}' must be a whole number, was {value!r}")
        if known[key].annotation in (bool, "bool") and not isinstance(value, bool):
            raise InputError(f"{key} of recipe '{name}' must be true or false, was {value!r}")
        number = known[key].annotation in (float, "float")
        if number and not (is_number and math.isfinite(value)):
            raise InputError(f"{key} of recipe '{name}' must be a finite number, was {value!r}")


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The options that the recipe `name` takes."""
    return {
        key: parameter
        for key, parameter in inspect.signature(RECIPES[name]).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def build_recipe(name: str, student: ModelShape, teacher: ModelShape, **options: Any) -> Recipe:
    """The recipe `name` for this pair of models; InputError for anything it cannot do."""
    check_recipe(name, options)
    try:
        return assemble(name, student, teacher, options)
    except InputError as error:
        message = str(error)
        # Names of two words: one like "layers" may just be a word.
        named = [
            k for k in options_of(name) if "_" in k and re.search(rf"(?<![\w.]){k}\b", message)
        ]
        if not named or name == "custom":
            raise
        raise InputError(f"{message} (recipe option {named[0]})") from error


def assemble(
    name: str, student: ModelShape, teacher: ModelShape, options: dict[str, Any]
) -> Recipe:
    """build_recipe for a part of another recipe, checked: no word of where options are set."""
    try:
        recipe = RECIPES[name](student, teacher, **options)
        recipe.options = options
        return recipe
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"recipe '{name}': {error}") from error
