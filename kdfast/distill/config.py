"""Configurations: YAML read by safe_load, overridden by key=value, checked before anything runs."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from transformers import TrainingArguments

from kdfast.distill import data
from kdfast.errors import InputError, nearest
from kdfast.recipes import check_recipe

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Seed = Annotated[int, Field(ge=0, lt=2**32)]

# Set by the run itself, or contradicting it.
_OWN_ARGUMENTS = {
    *("output_dir", "max_steps", "recipe", "recipe_options", "seed", "use_cpu"),
    *("push_to_hub", "load_best_model_at_end", "eval_strategy", "do_eval"),
}

DataConfig = dataclass(data.DataConfig, config=STRICT)


@dataclass(config=STRICT)
class TrainingConfig:
    """How a model is trained. Either steps or epochs.

    arguments: any other field of transformers.TrainingArguments.
    """

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=32, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    bf16: bool = False
    save_every: int = Field(default=100, ge=1)
    log_every: int = Field(default=10, ge=1)
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.steps is None and self.epochs is None:
            self.epochs = 3.0
        known = {
            f.name: f.default
            for f in dataclasses.fields(TrainingArguments)
            if f.name not in _OWN_ARGUMENTS
        }
        for key, value in self.arguments.items():
            if key not in known:
                raise ValueError(
                    f"arguments.{key} is not a field of transformers.TrainingArguments that can be "
                    f"set here{nearest(key, known)}"
                )
            number = isinstance(known[key], (int, float)) and not isinstance(known[key], bool)
            if number and not isinstance(value, (int, float)):
                raise ValueError(f"arguments.{key} must be a number, was {value!r}")


@dataclass(config=STRICT)
class StudentConfig:
    """Where the student comes from.

    base: a model to take layers of: a folder, a hub name, "demo:minilm", or "teacher".
    layers: how many evenly spaced layers, or which (counted from 0).
    attention_dropout: while distilling; null keeps the model's own.
    """

    base: str = "teacher"
    layers: int | list[int] = 2
    freeze_embeddings: bool = False
    attention_dropout: float | None = Field(default=0.0, ge=0, lt=1)


def _named_recipe(value: Any, where: str) -> dict[str, Any]:
    section = {"name": value} if isinstance(value, str) else dict(value)
    if not isinstance(section.get("name"), str):
        raise ValueError(f"{where} needs a name, was {value!r}")
    check_recipe(section["name"], {k: v for k, v in section.items() if k != "name"})
    return section


@dataclass(config=STRICT)
class DistillConfig:
    """One distillation, or several side by side: every recipe of `baselines` and `recipe`, for
    every seed, with the same student, data and budget.

    teacher: a folder or hub name; null fine-tunes `teacher_base` on data.teacher_train rows and
        keeps the result in teacher_dir for the next run.
    recipe, baselines: a recipe's name, or a mapping with its name and options.
    quick_overrides: what quick=true changes.
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)  # type: ignore[valid-type]
    teacher: str | None = None
    teacher_base: str = "demo:minilm"
    teacher_training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    teacher_dir: str = "runs/teachers"
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    recipe: str | dict[str, Any] = "internal"
    baselines: list[str | dict[str, Any]] = dataclasses.field(default_factory=list)
    seeds: list[Seed] = Field(default_factory=lambda: [0], min_length=1)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    tfidf: bool = True
    cka_sentences: int = Field(default=512, ge=8)
    output_dir: str = "runs/distill"
    overwrite: bool = False
    trust_remote_code: bool = False
    quick: bool = False
    quick_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recipe = _named_recipe(self.recipe, "recipe")
        self.baselines = [_named_recipe(b, "each of baselines") for b in self.baselines]
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, were {self.seeds}")
        names = [way["name"] for way in self.ways()]
        if len(set(names)) < len(names):
            raise ValueError(f"recipe and baselines must differ by name, were {', '.join(names)}")

    def ways(self) -> list[dict[str, Any]]:
        """The baselines, then the recipe: mappings with a name and the recipe's options."""
        return [*self.baselines, self.recipe]  # type: ignore[list-item]


@dataclass(config=STRICT)
class FinetuneConfig:
    """Fine-tuning a teacher on data.teacher_train rows.

    model: a folder, a hub name or "demo:minilm".
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)  # type: ignore[valid-type]
    model: str = "demo:minilm"
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    seed: Seed = 0
    output_dir: str = "runs/teacher"
    overwrite: bool = False
    trust_remote_code: bool = False


@dataclass(config=STRICT)
class EvaluateConfig:
    """Scoring a classifier on one part of a data set; against a teacher if one is given."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)  # type: ignore[valid-type]
    part: str = "test"
    teacher: str | None = None
    batch_size: int = Field(default=64, ge=1)
    trust_remote_code: bool = False


Config = TypeVar("Config", DistillConfig, FinetuneConfig, EvaluateConfig)


def shipped() -> list[str]:
    """Names of the configurations that come with the package."""
    folder = importlib.resources.files("kdfast") / "configs"
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def read_config(kind: type[Config], source: str | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration `source` (a shipped name or a YAML file; None for defaults), overridden.

    Raises InputError, one line, for anything unreadable, unknown (naming the nearest key) or out of
    range.
    """
    values: dict[str, Any] = {} if source is None else _load(source)
    own: list[tuple[str, Any]] = [_parse_override(text) for text in overrides]
    quick: Any = {}
    wanted = dict(own).get("quick", values.get("quick", False))
    if wanted is not False:
        if wanted is not True:
            raise InputError(f"quick must be true or false, was {wanted!r}")
        quick = values.get("quick_overrides") or {}
        if not isinstance(quick, Mapping) or not all(isinstance(key, str) for key in quick):
            raise InputError("quick_overrides must map keys to values")
    # The user's own words come last: quick=true data.test=500 keeps the 500.
    for key, value in [*quick.items(), *own]:
        _set(values, key, value)
    return build_config(kind, values)


def build_config(kind: type[Config], values: Mapping[str, Any]) -> Config:
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(values))
    except pydantic.ValidationError as error:
        raise InputError(_explain(kind, error)) from None


def dump_config(config: Any) -> str:
    """YAML that read_config turns into the same configuration."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _load(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        if source not in shipped():
            raise InputError(
                f"configuration '{source}' is neither a YAML file nor one that is shipped"
                f"{nearest(source, shipped())}: {', '.join(shipped())}"
            )
        text = (importlib.resources.files("kdfast") / "configs" / f"{source}.yaml").read_text()
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"configuration {source} cannot be read: {error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{source} must be a mapping of keys to values")
    return values


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"'{text}' should be key=value, such as data.path=my.csv")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value
    if isinstance(parsed, str):
        # YAML 1.1 reads 1e-4 as text; people write it.
        try:
            return key, float(parsed) if any(c.isdigit() for c in parsed) else parsed
        except ValueError:
            return key, parsed
    return key, parsed


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    section = values
    for name in path:
        inner = section.get(name)
        if isinstance(inner, str) and name == "recipe":
            inner = {"name": inner}
        section[name] = inner if isinstance(inner, dict) else {}
        section = section[name]
    # recipe=fsd replaces the whole section: another recipe's options would not fit.
    section[last] = value


def _explain(kind: type, error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    known = _keys(kind)
    unknown = first["type"] in ("unexpected_keyword_argument", "extra_forbidden")
    parts: list[str] = []
    for part in map(str, first["loc"]):
        # After a key, the location also names the alternative of a union that was tried.
        if unknown or ".".join([*parts, part]) in known:
            parts.append(part)
    where = ".".join(parts)
    if unknown:
        return f"unknown key '{where}'{nearest(where, known) or _known_at(where, known)}"
    message = first["msg"].removeprefix("Value error, ").split(" or an instance of ")[0]
    at = f"{where}: " if where else ""
    given = "" if first["type"] == "value_error" else f", was {first['input']!r}"
    return f"{at}{message[0].lower()}{message[1:]}{given}"


def _known_at(where: str, known: Iterable[str]) -> str:
    prefix = where.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == prefix]
    return f": known here are {', '.join(siblings)}" if siblings else ""


def _keys(kind: type, prefix: str = "") -> list[str]:
    keys = []
    for field in dataclasses.fields(kind):
        keys.append(prefix + field.name)
        factory = field.default_factory
        if dataclasses.is_dataclass(factory):
            keys += _keys(factory, f"{prefix}{field.name}.")
    return keys
