"""Classifiers: loading them, cutting a student out of one, what training asks of their parts."""

import contextlib
import copy
import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import datasets
import torch
from huggingface_hub import constants as hub
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from kdfast.distill.demo import demo_model_path
from kdfast.errors import InputError

DEMO_MODEL = "demo:minilm"


def load_classifier(
    name_or_dir: str | os.PathLike[str],
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    regression: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A sequence classifier in fp32 and eval mode, from safetensors, with SDPA where it has it.

    With neither `num_labels`, `label_names` nor `regression`, a finished classifier is expected,
    and a checkpoint without a trained head raises. With one of them, a head of another size (or
    none) is replaced by a new one, drawn from torch's global generator. `name_or_dir` is a folder,
    a Hub name or "demo:minilm". Raises InputError for a model that cannot be loaded so.
    """
    num_labels = _label_count(num_labels, label_names, regression)
    config = _from_pretrained(AutoConfig, name_or_dir, trust_remote_code=trust_remote_code)
    if num_labels is not None:
        _set_labels(config, num_labels, label_names, regression)
    model = _load_weights(
        AutoModelForSequenceClassification,
        name_or_dir,
        config,
        new_head=num_labels is not None,
        trust_remote_code=trust_remote_code,
    )
    # GPT-2 and its kin have no padding token, and refuse a batch without one.
    if getattr(config, "pad_token_id", None) is None and isinstance(
        eos := getattr(config, "eos_token_id", None), int
    ):
        model.config.pad_token_id = eos
    return model


def load_tokenizer(
    name_or_dir: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a Hub name or "demo:minilm"; without a padding token, the end
    token pads. Raises InputError if there is none."""
    folder = Path(_resolve(name_or_dir))
    # From a folder without these files transformers builds an empty vocabulary, without an error.
    files = ("tokenizer.json", "vocab.*", "*.model", "*.spm")
    if (folder / "config.json").is_file() and not any(any(folder.glob(name)) for name in files):
        raise InputError(
            f"'{folder}' holds no tokenizer: save the model's own there with save_pretrained"
        )
    tokenizer = _from_pretrained(AutoTokenizer, name_or_dir, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def cut_student(
    base_model_or_name: PreTrainedModel | str | os.PathLike[str],
    layers: int | Sequence[int],
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    regression: bool = False,
    head_from: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """A classifier made of the embeddings and some of the L encoder layers of another model.

    `layers` are the indices to keep, rising, counted from 0; an integer n keeps the layers
    i·L // n for i = 0 … n − 1 (the first of each of n equal blocks: 3 of 6 are 0, 2, 4). The head
    is new, drawn from torch's global generator, or with `head_from` the trained one of that
    classifier (with its pooler). ModernBERT's first layer has no attention norm: when layer 0 is
    not kept, that of the first kept layer is dropped.

    The result is a plain transformers model in eval mode that shares nothing with the base. Raises
    InputError for layers out of range, a model without a list of layers, a head that does not fit.
    """
    num_labels = _label_count(num_labels, label_names, regression)
    if num_labels is None:
        raise InputError("a student needs num_labels, label_names or regression=True")
    if isinstance(base_model_or_name, PreTrainedModel):
        base: Any = base_model_or_name.base_model
    else:
        config = _from_pretrained(AutoConfig, base_model_or_name)
        base = _load_weights(AutoModel, base_model_or_name, config, new_head=True)
    prefix = encoder_layers(base)[0]
    kept = _layer_indices(layers, base.config.num_hidden_layers)

    config = copy.deepcopy(base.config)
    for key, value in config.to_dict().items():
        # One entry per layer: layer_types of ModernBERT, mlp_layer_types of its younger relatives.
        if key.endswith("layer_types") and value and len(value) == config.num_hidden_layers:
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    _set_labels(config, num_labels, label_names, regression)
    # Built from the configuration, not by deleting modules: what depends on a layer's position (its
    # index, ModernBERT's missing first norm) is then what from_pretrained will build again.
    try:
        student = AutoModelForSequenceClassification.from_config(
            config, dtype=base.dtype, **_sdpa(AutoModelForSequenceClassification, config)
        )
    except ValueError as error:
        raise InputError(
            f"no classifier can be built from this model: {first_line(error)}"
        ) from error

    state = base.state_dict()
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    body = {}
    for key in student.base_model.state_dict():
        source = pattern.sub(lambda match: f"{prefix}.{kept[int(match[1])]}.", key)
        if source in state:
            body[key] = state[source]
        elif not key.startswith("pooler."):
            raise InputError(f"the base model has no parameter {source} that its student needs")
    student.base_model.load_state_dict(body, strict=False)
    if head_from is not None:
        _copy_head(head_from, student)
    return student.to(base.device).eval()


def encoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name (inside `model.base_model`) and list of a model's layers; InputError if it has none."""
    count = model.config.num_hidden_layers
    if not model.config.is_encoder_decoder:
        for name, module in model.base_model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return name, module
    raise InputError(
        f"{type(model).__name__} has no single list of {count} encoder layers to choose from "
        "(shared layers, or a decoder): use a BERT-like encoder, or give a student of your own"
    )


def freeze_embeddings(model: PreTrainedModel) -> int:
    """Takes the embeddings (words, positions, types and their norm) out of training.

    Returns the number of parameters that this leaves untrained.
    """
    base = model.base_model
    embeddings = getattr(base, "embeddings", None)
    # GPT-2 keeps its tables beside its layers.
    modules = (
        [embeddings]
        if isinstance(embeddings, nn.Module)
        else [module for module in base.children() if isinstance(module, nn.Embedding)]
    )
    parameters = [p for module in modules for p in module.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in parameters)


# What the families call the projection that makes queries, and the dropout on the attention map
# (the more specific names first: GPT-2 and ALBERT have an output dropout in the same module).
QUERY_NAMES = ("query", "q_lin", "q_proj", "query_proj", "in_proj", "Wqkv", "qkv", "c_attn", "q")
DROPOUT_NAMES = ("attn_dropout", "attention_dropout", "dropout")


def set_attention_dropout(model: nn.Module, p: float) -> int:
    """Sets the dropout of attention probabilities; hidden dropouts and the config stay.

    Returns the number of attention modules set. Raises InputError unless 0 <= p < 1.
    """
    if not 0 <= p < 1:
        raise InputError(f"attention dropout must be at least 0 and below 1, not {p}")
    count = 0
    for module in model.modules():
        if not any(isinstance(getattr(module, name, None), nn.Module) for name in QUERY_NAMES):
            continue
        for name in DROPOUT_NAMES:
            dropout = getattr(module, name, None)
            if isinstance(dropout, nn.Dropout):
                dropout.p = p
            elif isinstance(dropout, (int, float)):
                setattr(module, name, p)
            else:
                continue
            count += 1
            break
    return count


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def quick_offline() -> Iterator[None]:
    """Lets Hub clients fail at once, and use their cache, when the Hub's name does not resolve.

    Left alone they retry for 23 seconds a file. Behind a proxy names need not resolve: no check.
    """
    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        try:
            socket.getaddrinfo(urlparse(hub.ENDPOINT).hostname, 443)
        except OSError:
            hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' load report and progress bar: the keys are checked here."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _label_count(
    num_labels: int | None, label_names: Sequence[str] | None, regression: bool
) -> int | None:
    if regression:
        if num_labels not in (None, 1) or label_names is not None:
            raise InputError("a regression has one output: give no num_labels and no label_names")
        return 1
    if label_names is not None:
        if num_labels not in (None, len(label_names)):
            raise InputError(f"num_labels is {num_labels}, but label_names has {len(label_names)}")
        num_labels = len(label_names)
    if num_labels is not None and num_labels < 2:
        raise InputError(f"a classifier needs at least 2 labels, not {num_labels}")
    return num_labels


def _set_labels(
    config: PreTrainedConfig, num_labels: int, label_names: Sequence[str] | None, regression: bool
) -> None:
    if label_names is not None:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: i for i, name in enumerate(label_names)}
    elif config.num_labels != num_labels:
        config.num_labels = num_labels
    config.problem_type = "regression" if regression else "single_label_classification"


def _layer_indices(layers: int | Sequence[int], count: int) -> list[int]:
    if isinstance(layers, int) and not isinstance(layers, bool):
        if not 1 <= layers <= count:
            raise InputError(f"a student of {layers} layers: choose 1 to {count}, as the base has")
        return [i * count // layers for i in range(layers)]
    try:
        kept = [int(i) for i in layers if int(i) == i]  # type: ignore[union-attr]
    except (TypeError, ValueError):
        kept = []
    if not kept or len(kept) != len(layers):  # type: ignore[arg-type]
        raise InputError(f"layers must be a number or a list of layer indices, not {layers!r}")
    if min(kept) < 0 or max(kept) >= count:
        raise InputError(f"layers {kept}: the base model has layers 0 to {count - 1}")
    if kept != sorted(set(kept)):
        raise InputError(f"layers {kept} must rise, each taken once")
    return kept


def _copy_head(source: PreTrainedModel, student: PreTrainedModel) -> None:
    """Copies what turns hidden states into logits: all outside the base model, and its pooler."""
    state = source.state_dict()
    body, pooler = f"{student.base_model_prefix}.", f"{student.base_model_prefix}.pooler."
    head = {
        key: value
        for key, value in student.state_dict().items()
        if key.startswith(pooler) or not key.startswith(body)
    }
    for key, value in head.items():
        shape = tuple(state[key].shape) if key in state else "absent"
        if shape != tuple(value.shape):
            raise InputError(
                f"head_from does not fit the student: {key} is {shape}, not {tuple(value.shape)}"
            )
    student.load_state_dict({key: state[key] for key in head}, strict=False)


def _resolve(name_or_dir: str | os.PathLike[str]) -> str:
    name = os.fspath(name_or_dir)
    if name.startswith("demo:"):
        if name != DEMO_MODEL:
            raise InputError(f"unknown demo model '{name}': the one there is is '{DEMO_MODEL}'")
        return str(demo_model_path())
    return os.path.expanduser(name)


def _from_pretrained(auto_class: Any, name_or_dir: str | os.PathLike[str], **kwargs: Any) -> Any:
    """auto_class.from_pretrained, with every way in which a user's name can fail as one line."""
    name = _resolve(name_or_dir)
    if os.path.isfile(name):
        raise InputError(f"'{name}' is a file: give the folder that save_pretrained wrote")
    local = os.path.isdir(name)
    if not local and (name.startswith((".", os.sep)) or name.count("/") > 1 or not name):
        raise InputError(f"no model folder '{name}': give a folder with config.json, or a Hub name")
    if local and not os.path.isfile(os.path.join(name, "config.json")):
        raise InputError(f"'{name}' has no config.json: give a folder that save_pretrained wrote")
    try:
        with _quiet(), contextlib.nullcontext() if local else quick_offline():
            return auto_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        what = {AutoConfig: "configuration", AutoTokenizer: "tokenizer"}.get(auto_class, "weights")
        if local:
            raise InputError(f"cannot load the {what} in '{name}': {first_line(error)}") from error
        raise InputError(
            f"'{name}' is no folder here, and its {what} could not be had from the Hub "
            f"({first_line(error)}). Without network: copy the model's folder here (on another "
            f"machine, `hf download {name} --local-dir DIR`) and give its path"
        ) from error


def _load_weights(
    auto_class: Any,
    name_or_dir: str | os.PathLike[str],
    config: PreTrainedConfig,
    *,
    new_head: bool,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Weights in fp32, from safetensors only; new parameters are allowed in the head alone."""
    name = _resolve(name_or_dir)
    if os.path.isdir(name) and not list(Path(name).glob("*.safetensors")):
        found = ", ".join(sorted(p.name for p in Path(name).glob("*.bin"))) or "no weights at all"
        raise InputError(
            f"'{name}' has no .safetensors file ({found}), and pickled weights can run code: load "
            "it with transformers where you trust it and save_pretrained it again"
        )
    model, report = _from_pretrained(
        auto_class,
        name_or_dir,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
        **_sdpa(auto_class, config),
    )
    missing = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    body = sorted(key for key in missing if key.startswith(prefix) and "pooler." not in key)
    if body:
        raise InputError(
            f"'{name}' does not hold the {type(model).__name__} that its config.json describes: "
            f"{len(body)} parameters are missing or of another shape, {body[0]} among them"
        )
    if missing and not new_head:
        raise InputError(
            f"'{name}' has no trained classification head ({sorted(missing)[0]} is missing): "
            "fine-tune it first (`kdfast finetune`), or give a finished classifier"
        )
    return model


def _sdpa(auto_class: Any, config: PreTrainedConfig) -> dict[str, str]:
    """The argument that asks for SDPA, where the model's class has it (DeBERTa's has not)."""
    mapping = auto_class._model_mapping
    known = type(config) in mapping and getattr(mapping[type(config)], "_supports_sdpa", False)
    return {"attn_implementation": "sdpa"} if known else {}


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
