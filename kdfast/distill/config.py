"""Configurations: YAML read by safe_load, overridden by key=value, checked before anything runs."""

from __future__ import annotations

import dataclasses
import importlib.resources
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from transformers import TrainingArguments

from kdfast.distill import data
from kdfast.distill.models import layer_indices
from kdfast.distill.trained_on import data_below
from kdfast.errors import InputError, nearest
from kdfast.recipes import check_recipe

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Seed = Annotated[int, Field(ge=0, lt=2**32)]

NAMED_LAYERS = r"(first|last|every):[1-9]\d*"

# Set by the run itself, or contradicting it.
_OWN_ARGUMENTS = {
    *("output_dir", "max_steps", "recipe", "recipe_options", "seed", "use_cpu"),
    *("push_to_hub", "load_best_model_at_end", "eval_strategy", "do_eval"),
}

DataConfig = dataclass(data.DataConfig, config=STRICT)


@dataclass(config=STRICT)
class TrainingConfig:
    """How a model is trained. Either steps or epochs.

    group_by_length: batches of texts of about one length, so that little padding is computed.
    cuda_graphs: see DistillationArguments.
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
    group_by_length: bool = False
    cuda_graphs: bool = False
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
    """Where the student comes from; the middle ones as in kdfast.distill.models.build_student.

    base: a model to take layers of: a folder, a hub name, "demo:minilm", or "teacher".
    kind: "transformer", or another architecture on the base's tokens: "bilstm", "gated_cnn".
    layers: which; by default 2 of a transformer (see cut_student), else the kind's own number.
    width: hidden size; null keeps the base's, or the kind's own.
    init: "copy" the base's weights, or draw "random" ones; null is what the kind allows.
    embeddings: of a random student: the "base"'s, or "random" ones.
    options: further fields of a random student's configuration.
    attention_dropout: while distilling; null keeps the model's own.
    """

    base: str = "teacher"
    kind: Literal["transformer", "bilstm", "gated_cnn"] = "transformer"
    layers: int | list[int] | str | None = None
    width: int | None = Field(default=None, ge=1)
    init: Literal["copy", "random"] | None = None
    embeddings: Literal["base", "random"] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    freeze_embeddings: bool = False
    attention_dropout: float | None = Field(default=0.0, ge=0, lt=1)

    def __post_init__(self) -> None:
        if self.layers is None and self.kind == "transformer":
            self.layers = 2
        if isinstance(self.layers, str) and not re.fullmatch(NAMED_LAYERS, self.layers):
            raise ValueError(
                f"layers must be a number, a list of them, first:K, last:K or every:N, was "
                f"{self.layers!r}"
            )

    def describe(self, of: int) -> str:
        """One line: what it is made of. of: the layers that the base has."""
        if self.kind != "transformer" or self.init == "random":
            words = {
                "base": f"words of {self.base}",
                None: "random words",
                "random": "random words",
            }
            return f"{self.kind} with {words[self.embeddings]}"
        width = f", first {self.width} features," if self.width else ""
        kept = ", ".join(map(str, layer_indices(self.layers, of)))
        return f"layers {kept} (of 0 to {of - 1}){width} of {self.base}"


@dataclasses.dataclass(frozen=True)
class Way:
    """One row of a table: a recipe with its options, its student and its training.

    label: the row's name, and its folder's. reference: the label of the row it is compared with.
    trials: variants of this way, of which the best on the dev part takes its place; changes: what
    each of them changes.
    """

    label: str
    recipe: str
    options: dict[str, Any]
    student: StudentConfig
    training: TrainingConfig
    seeds: tuple[int, ...]
    reference: str | None = None
    trials: tuple[Way, ...] = ()
    changes: tuple[dict[str, Any], ...] = ()

    def settings(self) -> dict[str, Any]:
        """All that makes its students what they are, but their seeds; JSON."""
        return {
            "recipe": self.recipe,
            "options": self.options,
            "student": dataclasses.asdict(self.student),
            "training": dataclasses.asdict(self.training),
        }


# What an entry of a list of ways may say beside its recipe's options.
OF_A_WAY = ("name", "label", "student", "training")
OF_A_COMPARED_WAY = (*OF_A_WAY, "seeds", "reference", "tuning")


@dataclass(config=STRICT)
class _Job:
    """What every distillation says.

    teacher: a folder or hub name; null fine-tunes `teacher_base` on data.teacher_train rows and
        keeps the result in teacher_dir for the next run.
    teacher_cache: a folder where what the recipes read of the teacher on the training sentences is
        kept for all students and further runs, see DistillationArguments; null keeps nothing.
    output_dir: with {task} for the name of the GLUE task.
    quick_overrides: what quick=true changes.
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)  # type: ignore[valid-type]
    teacher: str | None = None
    teacher_base: str = "demo:minilm"
    teacher_training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    teacher_dir: str = "runs/teachers"
    teacher_cache: str | None = None
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    seeds: list[Seed] = Field(default_factory=lambda: [0], min_length=1)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    tfidf: bool = True
    cka_sentences: int = Field(default=512, ge=8)
    output_dir: str = "runs/distill"
    overwrite: bool = False
    trust_remote_code: bool = False
    quick: bool = False
    quick_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)

    def _way(self, section: Mapping[str, Any], own: Sequence[str] = OF_A_WAY) -> Way:
        name, label = section["name"], section.get("label", section["name"])
        if not isinstance(label, str) or not re.fullmatch(r"\w[\w.+-]*", label):
            raise ValueError(
                f"label must be made of letters, digits and _ . + -, as it names a folder, was "
                f"{label!r}"
            )
        options = {key: value for key, value in section.items() if key not in own}
        check_recipe(name, options, beside=own)
        built: dict[str, Any] = {}
        for key, base in (("student", self.student), ("training", self.training)):
            changed = section.get(key) or {}
            if not isinstance(changed, Mapping):
                raise ValueError(f"{key} of {label} must map keys to values, was {changed!r}")
            below = dataclasses.asdict(base)
            if changed.get("kind", below.get("kind")) != below.get("kind"):
                # Another architecture: what the section says of the first one's shape is not meant.
                for part in ("layers", "width", "init", "embeddings", "options"):
                    del below[part]
            try:
                built[key] = build_config(type(base), _merged(below, changed))
            except InputError as error:
                raise ValueError(f"{key} of {label}: {error}") from None
        own_seeds = "seeds" in own and "seeds" in section
        seeds = section["seeds"] if own_seeds else self.seeds
        _check_seeds(seeds, f"seeds of {label}" if own_seeds else "seeds")
        return Way(label, name, options, **built, seeds=tuple(seeds))


def _for_task(output_dir: str, data: Any) -> str:
    """The directory with the GLUE task's name where it says {task}."""
    if "{task}" in output_dir and data.task is None:
        raise ValueError("output_dir names a {task}, and data.task is not set")
    return output_dir.replace("{task}", data.task or "")


@dataclass(config=STRICT)
class DistillConfig(_Job):
    """One distillation, or several side by side: every recipe of `baselines` and `recipe`, for
    every seed, with the same data and budget.

    recipe, baselines: a recipe's name, or a mapping with its name, its options and, if wanted, the
        `label` of its row (default: the name) and what it changes of `student` and `training`.
    The rest as in kdfast.distill.config._Job.
    """

    recipe: str | dict[str, Any] = "internal"
    baselines: list[str | dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.output_dir = _for_task(self.output_dir, self.data)
        self.recipe = _named(self.recipe, "recipe")
        self.baselines = [_named(b, "each of baselines") for b in self.baselines]
        _check_labels(self.ways(), "recipe and baselines")

    def ways(self) -> list[Way]:
        """The baselines, then the recipe."""
        sections: list[Any] = [*self.baselines, self.recipe]
        return [self._way(section) for section in sections]


def _soft_labels() -> list[str | dict[str, Any]]:
    return ["soft_labels"]


@dataclass(config=STRICT)
class CompareConfig(_Job):
    """Ways of distilling side by side, each tuned on the dev part, over seeds.

    ways: as `recipe` of a DistillConfig, and beside: `tuning`, a list of changes (of options,
        student or training) of which the best on the dev part is taken; `seeds`, where they are not
        the common ones; `reference`, the label of the way it is compared with.
    reference: the label that all others are compared with, on the seeds they have in common.
    tuning_seed: of the trials; not one of the seeds, so that no student is seen twice.
    keep_students: false drops the weights of a scored student, and keeps its predictions.
    most_seeds, most_trials: what lies beyond in each way is left out.
    The rest as in kdfast.distill.config._Job.
    """

    ways: list[str | dict[str, Any]] = Field(default_factory=_soft_labels, min_length=1)
    reference: str = "soft_labels"
    tuning_seed: Seed = 0
    keep_students: bool = True
    most_seeds: int | None = Field(default=None, ge=1)
    most_trials: int | None = Field(default=None, ge=1)
    output_dir: str = "runs/compare"

    def __post_init__(self) -> None:
        self.output_dir = _for_task(self.output_dir, self.data)
        self.ways = [_named(way, "each of ways") for way in self.ways]
        chosen = self.chosen()
        _check_labels(chosen, "ways")
        seeds = {way.label: way.seeds for way in chosen}
        for way in chosen:
            if way.trials and self.tuning_seed in way.seeds:
                raise ValueError(
                    f"tuning_seed must not be one of the seeds of {way.label}, was "
                    f"{self.tuning_seed}"
                )
            if way.reference not in seeds:
                raise ValueError(
                    f"reference of {way.label} must be the label of a way"
                    f"{nearest(str(way.reference), seeds)}, was {way.reference!r}"
                )
            if not set(way.seeds) & set(seeds[way.reference]):
                raise ValueError(
                    f"{way.label} and its reference {way.reference} have no seed in common"
                )

    def chosen(self) -> list[Way]:
        """The ways as they are to be run."""
        return [self._compared(section) for section in self.ways]  # type: ignore[arg-type]

    def _compared(self, section: dict[str, Any]) -> Way:
        way = self._way(section, OF_A_COMPARED_WAY)
        tuning = section.get("tuning") or []
        if not isinstance(tuning, list) or not all(isinstance(t, Mapping) for t in tuning):
            raise ValueError(f"tuning of {way.label} must be a list of mappings, was {tuning!r}")
        trials = []
        for changes in tuning:
            if fixed := set(changes) & {"name", "label", "seeds", "reference", "tuning"}:
                raise ValueError(f"tuning of {way.label} cannot change {', '.join(sorted(fixed))}")
            trials.append(self._way(_merged(section, changes), OF_A_COMPARED_WAY))
        return dataclasses.replace(
            way,
            seeds=way.seeds[: self.most_seeds],
            reference=section.get("reference", self.reference),
            trials=tuple(trials[: self.most_trials]),
            changes=tuple(dict(t) for t in tuning[: self.most_trials]),
        )


def _named(value: Any, where: str) -> dict[str, Any]:
    section = {"name": value} if isinstance(value, str) else dict(value)
    if not isinstance(section.get("name"), str):
        raise ValueError(f"{where} needs a name, was {value!r}")
    return section


def _check_labels(ways: Sequence[Way], where: str) -> None:
    labels = [way.label for way in ways]
    if len(set(labels)) < len(labels):
        raise ValueError(
            f"{where} must differ by name or label, were {', '.join(labels)}: give one a label of "
            "its own"
        )


def _check_seeds(seeds: Any, where: str) -> None:
    whole = isinstance(seeds, (list, tuple)) and all(
        type(seed) is int and 0 <= seed < 2**32 for seed in seeds
    )
    if not whole or not seeds:
        raise ValueError(f"{where} must be a list of whole numbers, 0 or more, was {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{where} must differ, were {list(seeds)}")


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


@dataclass(config=STRICT)
class AnalyzeConfig:
    """Comparing the layers of two models on the first `sentences` rows of data.test.

    recipe: a recipe with layer projection whose weights are shown as well; null takes the one whose
        learned state lies beside the first model, if any.
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)  # type: ignore[valid-type]
    sentences: int = Field(default=512, ge=8)
    batch_size: int = Field(default=64, ge=1)
    recipe: str | dict[str, Any] | None = None
    output_dir: str = "runs/analyze"
    overwrite: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.recipe is not None:
            section = self.recipe = _named(self.recipe, "recipe")
            check_recipe(section["name"], {k: v for k, v in section.items() if k != "name"})


COMMANDS: dict[str, Any] = {
    "distill": DistillConfig,
    "compare": CompareConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "analyze": AnalyzeConfig,
}

Config = TypeVar("Config")


def shipped() -> list[str]:
    """Names of the configurations that come with the package."""
    folder = importlib.resources.files("kdfast") / "configs"
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def read_config(
    kind: type[Config],
    source: str | None,
    overrides: Sequence[str] = (),
    *,
    data_of: str | None = None,
) -> Config:
    """The configuration `source` (a shipped name or a YAML file; None for defaults), overridden.

    Its key `extends` names another one, shipped or a file (relative to its own), whose keys it
    takes over where it does not set them itself. `data_of` names a model whose data is taken over
    in the same way, if kdfast trained it. Raises InputError, one line, for anything unreadable,
    unknown (naming the nearest key) or out of range.
    """
    values: dict[str, Any] = {} if source is None else _load(source)
    own: list[tuple[str, Any]] = [_parse_override(text) for text in overrides]
    if data_of is not None:
        below = {"data": data_below(data_of, dict(own))}
        values = _merged(below, values)
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
        # One budget takes the place of the other, unless the user asks for both.
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            replaced = key.removesuffix(one) + other
            if key.endswith(f"training.{one}") and value is not None and replaced not in dict(own):
                _set(values, replaced, None)
    return build_config(kind, values)


def build_config(kind: type[Config], values: Mapping[str, Any]) -> Config:
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(values))
    except pydantic.ValidationError as error:
        raise InputError(_explain(kind, error)) from None


def dump_config(config: Any) -> str:
    """YAML that read_config turns into the same configuration."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _load(source: str, extended: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in `source`, on top of what it extends; `extended`: the files on the way here."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        if source not in shipped():
            raise InputError(
                f"configuration '{source}' is neither a YAML file nor one that is shipped"
                f"{nearest(source, shipped())}: {', '.join(shipped())}"
            )
        text = (importlib.resources.files("kdfast") / "configs" / f"{source}.yaml").read_text()
        here = source
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise InputError(
                f"there is no configuration file '{source}'{nearest(path.stem, shipped())}: those "
                f"that are shipped are named without .yaml: {', '.join(shipped())}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"configuration {source} cannot be read: {error}") from None
        here = str(path.resolve())
    if here in extended:
        raise InputError(f"configurations extend one another: {' -> '.join([*extended, here])}")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{source} must be a mapping of keys to values")
    below = values.pop("extends", None)
    if below is None:
        return values
    if not isinstance(below, str):
        raise InputError(f"extends in {source} must be a configuration's name or file, was {below}")
    if Path(below).suffix in (".yaml", ".yml"):
        below = str(path.parent / Path(below).expanduser())
    return _merged(_load(below, [*extended, here]), values)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` on top of `below`, section by section."""
    merged = dict(below)
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if above.get(given) is not None:  # one budget takes the place of the other
            merged.pop(other, None)
    for key, value in above.items():
        inner = merged.get(key)
        sections = isinstance(inner, Mapping) and isinstance(value, Mapping)
        # A recipe that is named replaces the section: another's options would not fit.
        merged[key] = _merged(inner, value) if sections and "name" not in value else value  # type: ignore[arg-type]
    return merged


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
        others = [c for c, k in COMMANDS.items() if k is not kind and where in _keys(k)]
        own = next((c for c, k in COMMANDS.items() if k is kind), None)
        if others and own and not nearest(where, known):
            return (
                f"key '{where}' is of a configuration for kdfast {' or '.join(others)}, and this "
                f"is read as one for kdfast {own}"
            )
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
