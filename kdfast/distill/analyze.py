"""How alike the layers of two models are by CKA, and what a layer projection learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from kdfast.distill import report
from kdfast.distill.capture import model_shape
from kdfast.distill.config import AnalyzeConfig
from kdfast.distill.data import DistillationCollator, load_data, same_vocabulary, tokenize
from kdfast.distill.fidelity import alignment
from kdfast.distill.models import load_model, load_tokenizer
from kdfast.distill.provenance import code_version, environment
from kdfast.distill.run_directory import say, write_text
from kdfast.distill.student import check_length, to_device
from kdfast.distill.trainer import STATE_FILE, saved_recipe
from kdfast.errors import InputError
from kdfast.recipes import Recipe, build_recipe

RESULTS_FILE = "analysis.json"
# Recipes that may have learned how much a student layer takes from each teacher layer.
PROJECTING = ("alp", "universal", "custom")


def analyze(model_a: str, model_b: str, config: AnalyzeConfig) -> dict[str, Any]:
    """Unbiased linear CKA of all layers of two models over the tokens of data.test, as JSON and
    PNG; after a layer-projection run (`model_a` the student, `model_b` its teacher) also the
    weights. Returns what analysis.json holds.

    Models whose tokenisers differ are compared on the states of the first token ([CLS] in BERT's
    family), which is said. Raises InputError for models, data or a recipe that do not fit.
    """
    data: Any = config.data
    remote = config.trust_remote_code
    target = Path(config.output_dir).expanduser()
    if target.exists() and not target.is_dir():
        raise InputError(f"output_dir {target} is a file: choose another")
    if (target / RESULTS_FILE).is_file() and not config.overwrite:
        raise InputError(
            f"output_dir {target} already has an analysis: choose another output_dir, or set "
            "overwrite=true to replace it"
        )
    first, second = (to_device(_load(name, remote)) for name in (model_a, model_b))
    tokenizers = [load_tokenizer(name, trust_remote_code=remote) for name in (model_a, model_b)]
    shared = same_vocabulary(tokenizers[0], tokenizers[1])
    asked: Any = config.recipe
    recipe = _recipe(model_a, first, second, asked, shared_tokens=shared)
    splits = load_data(data)
    for note in splits.notes:
        say(f"data: {note}")
    if len(splits.test) < 4:
        raise InputError(f"data.test has {len(splits.test)} rows and needs at least 4 for CKA")
    for model in (first, second):
        check_length(model, data.max_length)
    extra = None if shared else tokenizers[1]
    sentences = splits.test.select(range(min(config.sentences, len(splits.test))))
    matrix, weights = alignment(
        first,
        second,
        tokenize(sentences, tokenizers[0], data.max_length, extra),
        DistillationCollator(tokenizers[0], extra, data.pad_to),
        shared_tokens=shared,
        batch_size=config.batch_size,
        recipe=recipe,
    )
    rows = (
        "all tokens"
        if shared
        else "the first token's states ([CLS] in BERT's family), as the tokenisers differ"
    )
    results = {
        "model_a": {"name": model_a, "shape": model_shape(first).describe()},
        "model_b": {"name": model_b, "shape": model_shape(second).describe()},
        "data": data.path,
        "sentences": len(sentences),
        "rows": rows,
        "estimator": "unbiased linear CKA; row i, column j: layer i of model_a, j of model_b, "
        "0 the embeddings",
        "cka": matrix.tolist(),
        "recipe": None if recipe is None else {"name": recipe.name, **recipe.options},
        "projection_weights": None if weights is None else weights.tolist(),
        "code": code_version(),
        "environment": environment(),
    }
    target.mkdir(parents=True, exist_ok=True)
    _plot_cka(target, results)
    if weights is not None:
        _plot_weights(target, results)
    write_text(target / RESULTS_FILE, json.dumps(results, indent=1))
    say(f"CKA over {rows} of {len(sentences)} sentences")
    header = ["", *(f"{j}" for j in range(matrix.shape[1]))]
    say(
        report.table(header, [[f"{i}", *(f"{v:.3f}" for v in row)] for i, row in enumerate(matrix)])
    )
    say(f"rows: layers of {model_a}; columns: of {model_b}; 0: embeddings")
    say(f"written: {target / RESULTS_FILE}, {', '.join(p.name for p in target.glob('*.png'))}")
    return results


def _load(name: str, remote: bool) -> PreTrainedModel:
    """With its head if it has a trained one: a recipe may need to know of its classes."""
    try:
        return load_model(name, "classification", trust_remote_code=remote)
    except InputError:
        return load_model(name, "embedding", trust_remote_code=remote)


def _recipe(
    folder: str,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    asked: dict[str, Any] | None,
    *,
    shared_tokens: bool,
) -> Recipe | None:
    """The recipe that was asked for, else the one whose state lies in `folder`, as it was left."""
    file = Path(folder).expanduser() / STATE_FILE
    kept, kept_options = saved_recipe(folder)
    name = kept if asked is None else asked["name"]
    options = {k: v for k, v in (asked or {}).items() if k != "name"}
    if not options and kept == name:
        options = kept_options
    if name not in PROJECTING:
        if asked is not None:
            raise InputError(
                f"recipe {name} has no layer projection to show: choose {', '.join(PROJECTING)}"
            )
        return None
    try:
        recipe = build_recipe(name, model_shape(student), model_shape(teacher), **options)
        terms = [t for t in recipe.terms.values() if hasattr(t, "projection_weights")]
        if not terms:
            if asked is not None:
                raise InputError(
                    f"recipe {name} with these options has no layer projection to show"
                )
            return None
        if terms[0].token_aligned and not shared_tokens:
            raise InputError(f"recipe {name} compares token by token, and the tokenisers differ")
        if recipe.state_dict():
            if kept != name:
                raise InputError(
                    f"recipe {name} has learned parts, and {folder} has no {STATE_FILE} of it: "
                    "give the folder of a student that it trained"
                )
            try:
                recipe.load_state_dict(load_file(file))
            except RuntimeError as error:
                first = str(error).splitlines()[0]
                raise InputError(f"{file} does not fit these two models: {first}") from None
    except InputError as error:
        if asked is not None:
            raise
        # The second model need not be the one that taught the first.
        say(f"no layer-projection weights: {error}")
        return None
    return recipe.to(student.device).eval()


def _plot_cka(folder: Path, results: dict[str, Any]) -> Path:
    matrix = results["cka"]
    size = (2.2 + 0.42 * len(matrix[0]), 1.6 + 0.36 * len(matrix))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = report.heat_map(axis, matrix)
    axis.set_xlabel(f"layer of {Path(results['model_b']['name']).name} (0: embeddings)")
    axis.set_ylabel(f"layer of {Path(results['model_a']['name']).name}")
    figure.colorbar(image, ax=axis, label="unbiased CKA")
    return report.finish(figure, folder / "cka.png")


def _plot_weights(folder: Path, results: dict[str, Any]) -> Path:
    matrix = torch.tensor(results["projection_weights"])
    size = (2.2 + 0.42 * matrix.shape[1], 1.8 + 0.36 * len(matrix))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = report.weight_map(axis, matrix)
    axis.set_title(f"{results['recipe']['name']}: layer-projection weights", fontsize=10)
    figure.colorbar(image, ax=axis)
    return report.finish(figure, folder / "projection_weights.png")
