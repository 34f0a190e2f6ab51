"""Models: loading them, making students of them, what training asks of their parts."""

import contextlib
import copy
import inspect
import os
import re
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import datasets
import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from kdfast.distill.demo import demo_model_path
from kdfast.errors import InputError, nearest
from kdfast.students import BiLSTMConfig, GatedCNNConfig, initialise_embeddings

DEMO_MODEL = "demo:minilm"

# What a model is loaded or made for, and the transformers class that gives it its head.
TASKS: dict[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "reranking": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "embedding": AutoModel,
}
ONE_OUTPUT = ("regression", "reranking")
# What a new head is trained by: a relevance in [0, 1] by the binary cross-entropy of its logit.
PROBLEM_TYPES: dict[str, Any] = {
    "classification": "single_label_classification",
    "regression": "regression",
    "reranking": "multi_label_classification",
}


def load_model(
    name_or_dir: str | os.PathLike[str],
    task: str = "classification",
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    new_head: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model for a task, in fp32 and eval mode, from safetensors, with SDPA where it has it.

    `name_or_dir` is a folder, a Hub name or "demo:minilm". `task` is "classification",
    "token_classification", "regression" or "reranking" (both: one output, see PROBLEM_TYPES), or
    "embedding": the model without a head, all of its body but a pooler from the checkpoint.

    A finished model is expected, and a checkpoint without a trained head raises. With `num_labels`,
    `label_names` or new_head=True a head of another size (or none) is replaced by a new one, drawn
    from torch's global generator. Raises InputError for a model that cannot be loaded so.
    """
    auto_class = _auto_class(task)
    count = _label_count(task, num_labels, label_names)
    config = _from_pretrained(AutoConfig, name_or_dir, trust_remote_code=trust_remote_code)
    if new_head or (count is not None and task not in ONE_OUTPUT):
        new_head = True
        _set_labels(config, task, count, label_names)
    elif count is not None and config.num_labels != count:
        raise InputError(
            f"'{name_or_dir}' has {config.num_labels} outputs, and {task} needs one: fine-tune it "
            "for that first (new_head=True gives it a new head), or give a finished model"
        )
    model = _load_weights(
        auto_class,
        name_or_dir,
        config,
        new_head=new_head or task == "embedding",
        trust_remote_code=trust_remote_code,
    )
    # GPT-2 and its kin have no padding token, and refuse a batch without one.
    if getattr(config, "pad_token_id", None) is None and isinstance(
        eos := getattr(config, "eos_token_id", None), int
    ):
        model.config.pad_token_id = eos
    return model


def load_classifier(
    name_or_dir: str | os.PathLike[str],
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    regression: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A sequence classifier, as load_model loads it.

    With neither `num_labels`, `label_names` nor `regression`, a finished classifier is expected;
    with one of them, a head of another size (or none) is replaced by a new one.
    """
    return load_model(
        name_or_dir,
        "regression" if regression else "classification",
        num_labels=num_labels,
        label_names=label_names,
        new_head=regression,
        trust_remote_code=trust_remote_code,
    )


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


# Encoders whose every matrix has a narrower one as its leading slice, heads included.
SLICED = ("bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")
# Those whose configuration we know how to scale: weights are then drawn at random.
SCALED = (*SLICED, "gpt2", "modernbert")
KINDS: dict[str, Any] = {
    "transformer": None,
    "bilstm": BiLSTMConfig,
    "gated_cnn": GatedCNNConfig,
}


def build_student(
    base: PreTrainedModel | str | os.PathLike[str],
    *,
    kind: str = "transformer",
    layers: int | str | Sequence[int] | None = None,
    width: int | None = None,
    init: str | None = None,
    embeddings: str | None = None,
    options: Mapping[str, Any] | None = None,
    task: str = "classification",
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    head_from: PreTrainedModel | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A student on the tokens of `base`, in eval mode, that shares no tensor with it.

    Args:
        base: the teacher, its pre-trained base, or the name of either (see load_model).
        kind: "transformer", of the base's architecture, or "bilstm", "gated_cnn" (kdfast.students).
        init: "copy" chosen layers of the base (default for a transformer; see cut_student for
            `layers` and `width`), or draw all weights at "random", by transformers from torch's
            global generator (default, and all there is, for the other kinds).
        layers: of a random student their number. Default: the base's, or the kind's own.
        width: hidden size; of a random transformer its feed-forward width follows in proportion and
            its heads keep their width, where `options` says nothing else.
        embeddings: words start from the "base"'s, or at "random" (default where init is random;
            copied layers have copied embeddings). For "base", a transformer needs the base's width;
            the other kinds project.
        options: further entries of a random student's configuration.
        task, num_labels, label_names: the student's head; see load_model.
        head_from: see cut_student; for init="copy" alone.

    Raises:
        InputError: an unknown name, or a combination that makes no student.
    """
    options = dict(options or {})
    _check_choice("kind", kind, KINDS)
    init = init or ("copy" if kind == "transformer" else "random")
    _check_choice("init", init, ("copy", "random") if kind == "transformer" else ("random",))
    embeddings = embeddings or ("base" if init == "copy" else "random")
    _check_choice("embeddings", embeddings, ("base",) if init == "copy" else ("base", "random"))
    if init == "copy":
        if options:
            raise InputError(
                f"options {', '.join(options)}: a student of copied layers has the base's "
                "configuration; options are for init='random'"
            )
        return cut_student(
            base,
            layers,
            width=width,
            task=task,
            num_labels=num_labels,
            label_names=label_names,
            head_from=head_from,
            trust_remote_code=trust_remote_code,
        )
    if head_from is not None:
        raise InputError("head_from is for copied layers (init='copy'), not for a random student")
    if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int)):
        raise InputError(f"layers of a random student must be their number, not {layers!r}")
    if layers is not None and layers < 1:
        raise InputError(f"a student needs at least 1 layer, not {layers}")
    auto_class = _auto_class(task)
    count = _needed_label_count(task, num_labels, label_names)

    if embeddings == "base" and not isinstance(base, PreTrainedModel):
        base = load_model(base, "embedding", trust_remote_code=trust_remote_code)
    base_config = (
        base.config
        if isinstance(base, PreTrainedModel)
        else _from_pretrained(AutoConfig, base, trust_remote_code=trust_remote_code)
    )
    if kind == "transformer":
        config = _scaled_config(base_config, layers, width, options)
    else:
        if embeddings == "base":
            assert isinstance(base, PreTrainedModel)
            table: Any = base.get_input_embeddings()
            options.setdefault("embedding_size", table.weight.shape[1])
        config = _other_config(KINDS[kind], base_config, layers, width, options)
    _set_labels(config, task, count, label_names)
    student = _from_config(auto_class, config)
    if embeddings == "base":
        assert isinstance(base, PreTrainedModel)
        initialise_embeddings(student, base)
    if isinstance(base, PreTrainedModel):
        student.to(device=base.device, dtype=base.dtype)
    return student.eval()


def cut_student(
    base_model_or_name: PreTrainedModel | str | os.PathLike[str],
    layers: int | str | Sequence[int] | None,
    *,
    width: int | None = None,
    task: str = "classification",
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    regression: bool = False,
    head_from: PreTrainedModel | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A student made of the embeddings and some of the L encoder layers of another model.

    `layers` are the indices to keep, rising, counted from 0, or one of

    - an integer n: layers i·L // n for i = 0 … n − 1, the first of each of n equal blocks (3 of 6
      are 0, 2, 4);
    - "first:k", "last:k": the first or the last k;
    - "every:n": every n-th, which are n − 1, 2n − 1, … ("every:2" of 6 are 1, 3, 5: those that the
      uniform map pairs the student's layers with);
    - None: all.

    `width` narrows all hidden states to their first `width` entries: every matrix and norm keeps
    its leading slice, the attention its first heads, at their own width (so `width` is a multiple
    of that), the feed-forward its first width / D. Such a student is a start for training only:
    what it computes is no longer what the base did.

    The head is that of `task` (see load_model; regression=True is task="regression"), new, drawn
    from torch's global generator, or with `head_from` the trained one of that model (with its
    pooler). ModernBERT's first layer has no attention norm: when layer 0 is not kept, that of the
    first kept layer is dropped.

    The result is a plain transformers model in eval mode that shares nothing with the base. Raises
    InputError for layers out of range, a model without a list of layers, a width that the base's
    heads or its family do not allow, a head that does not fit.
    """
    if regression:
        if task not in ("classification", "regression"):
            raise InputError(f"regression=True is task='regression', but task is '{task}'")
        task = "regression"
    auto_class = _auto_class(task)
    count = _needed_label_count(task, num_labels, label_names)
    if head_from is not None and task == "embedding":
        raise InputError("head_from: an embedding model has no head to copy to")
    base: Any = (
        base_model_or_name.base_model
        if isinstance(base_model_or_name, PreTrainedModel)
        else load_model(base_model_or_name, "embedding", trust_remote_code=trust_remote_code)
    )
    prefix = encoder_layers(base)[0]
    kept = layer_indices(layers, base.config.num_hidden_layers)

    config = copy.deepcopy(base.config)
    for key, value in config.to_dict().items():
        # One entry per layer: layer_types of ModernBERT, mlp_layer_types of its younger relatives.
        if key.endswith("layer_types") and value and len(value) == config.num_hidden_layers:
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    if width is not None and width != config.hidden_size:
        if config.model_type not in SLICED:
            raise InputError(
                f"width: {type(base).__name__} cannot be narrowed by slices (of {', '.join(SLICED)}"
                " that is known to work): leave width out, or draw the weights (init='random')"
            )
        if getattr(config, "embedding_size", None) == width:
            raise InputError(
                f"width {width} is that of the embeddings of {type(base).__name__}, which then "
                "would not be projected: choose another one"
            )
        _scale(config, width, most=config.hidden_size)
    _set_labels(config, task, count, label_names)
    # Built from the configuration, not by deleting modules: what depends on a layer's position (its
    # index, ModernBERT's missing first norm) is then what from_pretrained will build again.
    student = _from_config(auto_class, config, dtype=base.dtype)

    state = base.state_dict()
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    body = {}
    for key, value in student.base_model.state_dict().items():
        source = pattern.sub(lambda match: f"{prefix}.{kept[int(match[1])]}.", key)
        if source in state:
            body[key] = state[source][tuple(slice(size) for size in value.shape)]
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


def _check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise InputError(
            f"{name} must be one of {', '.join(allowed)} here, was {value!r}"
            f"{nearest(str(value), allowed)}"
        )


def _auto_class(task: str) -> Any:
    _check_choice("task", task, TASKS)
    return TASKS[task]


def _label_count(
    task: str, num_labels: int | None, label_names: Sequence[str] | None
) -> int | None:
    if task == "embedding":
        if num_labels is not None or label_names is not None:
            raise InputError("an embedding model has no head: give no num_labels, no label_names")
        return None
    if task in ONE_OUTPUT:
        if num_labels not in (None, 1) or label_names is not None:
            raise InputError(f"{task} has one output: give no num_labels and no label_names")
        return 1
    if label_names is not None:
        if num_labels not in (None, len(label_names)):
            raise InputError(f"num_labels is {num_labels}, but label_names has {len(label_names)}")
        num_labels = len(label_names)
    if num_labels is not None and num_labels < 2:
        raise InputError(f"a classifier needs at least 2 labels, not {num_labels}")
    return num_labels


def _needed_label_count(
    task: str, num_labels: int | None, label_names: Sequence[str] | None
) -> int | None:
    count = _label_count(task, num_labels, label_names)
    if count is None and task != "embedding":
        raise InputError(
            "a student needs num_labels or label_names, or a task without them: "
            f"{', '.join((*ONE_OUTPUT, 'embedding'))}"
        )
    return count


def _set_labels(
    config: PreTrainedConfig, task: str, count: int | None, label_names: Sequence[str] | None
) -> None:
    if label_names is not None:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: i for i, name in enumerate(label_names)}
    elif count is not None and config.num_labels != count:
        config.num_labels = count
    config.problem_type = PROBLEM_TYPES.get(task)


def layer_indices(layers: int | str | Sequence[int] | None, count: int) -> list[int]:
    """The layers of `count` that a choice stands for, see cut_student."""
    if layers is None:
        return list(range(count))
    if isinstance(layers, int) and not isinstance(layers, bool):
        if not 1 <= layers <= count:
            raise InputError(f"a student of {layers} layers: choose 1 to {count}, as the base has")
        return [i * count // layers for i in range(layers)]
    if isinstance(layers, str) and (
        match := re.fullmatch(r"\s*(first|last|every)\s*:\s*(\d+)\s*", layers)
    ):
        which, n = match[1], int(match[2])
        if not 1 <= n <= count:
            raise InputError(f"layers '{layers}': choose {which}:1 to {which}:{count}")
        chosen = {
            "first": range(n),
            "last": range(count - n, count),
            "every": range(n - 1, count, n),
        }
        return list(chosen[which])
    try:
        kept = [int(i) for i in layers if int(i) == i]  # type: ignore[union-attr]
    except (TypeError, ValueError):
        kept = []
    if not kept or len(kept) != len(layers):  # type: ignore[arg-type]
        raise InputError(
            "layers must be a number or a list of layer indices, or first:K, last:K or every:N, "
            f"not {layers!r}"
        )
    if min(kept) < 0 or max(kept) >= count:
        raise InputError(f"layers {kept}: the base model has layers 0 to {count - 1}")
    if kept != sorted(set(kept)):
        raise InputError(f"layers {kept} must rise, each taken once")
    return kept


def _scale(
    config: PreTrainedConfig, width: int, *, heads: int | None = None, most: int | None = None
) -> None:
    """Sets the hidden size, and what follows from it: heads of the same width, feed-forward."""
    before, each = config.hidden_size, config.hidden_size // config.num_attention_heads
    highest = "" if most is None else f" up to {most}"
    if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= (most or width):
        raise InputError(f"width must be a multiple of {each}{highest}, was {width!r}")
    if heads is None and width % each:
        raise InputError(
            f"width {width}: the base's heads are {each} wide and stay whole, so width must be a "
            f"multiple of {each}{highest}"
        )
    for name in ("intermediate_size", "hidden_dim", "n_inner"):
        if isinstance(inner := getattr(config, name, None), int):
            setattr(config, name, max(1, inner * width // before))
    # ELECTRA projects embeddings of another width; those of the same width have no projection.
    if getattr(config, "embedding_size", None) == before:
        config.embedding_size = width
    config.num_attention_heads = width // each if heads is None else heads
    config.hidden_size = width


def _scaled_config(
    base: PreTrainedConfig, layers: int | None, width: int | None, options: dict[str, Any]
) -> PreTrainedConfig:
    """The base's configuration with other sizes and options."""
    known = {key for key in base.to_dict() if not key.endswith("layer_types")}
    # DistilBERT's `dim` is known as hidden_size too.
    names = {**{name: name for name in known}, **base.attribute_map}
    elsewhere = {"num_hidden_layers": "layers", "hidden_size": "width"}
    for name in options:
        if name not in names:
            raise InputError(
                f"options: the configuration of {base.model_type} has no '{name}'"
                f"{nearest(name, names)}"
            )
        for general, argument in elsewhere.items():
            if names[name] == names.get(general):
                raise InputError(f"options {name}: give it as {argument}")
    config = copy.deepcopy(base)
    before = config.num_hidden_layers
    if layers is not None:
        for key, value in config.to_dict().items():
            if key.endswith("layer_types") and value and len(value) == before:
                setattr(config, key, [value[i % before] for i in range(layers)])
        config.num_hidden_layers = layers
    if width is not None and width != config.hidden_size:
        if config.model_type not in SCALED:
            raise InputError(
                f"width: no other width is known for {config.model_type} (it is for "
                f"{', '.join(SCALED)}): leave width out, or use a base of one of these"
            )
        _scale(config, width, heads=options.get("num_attention_heads"))
    for name, value in options.items():
        try:
            setattr(config, name, value)
        except (TypeError, ValueError, StrictDataclassError) as error:
            why = " ".join(str(error).split())
            raise InputError(f"options {name}={value!r}: {why}") from error
    heads = config.num_attention_heads
    if (
        isinstance(heads, bool)
        or not isinstance(heads, int)
        or heads < 1
        or (config.hidden_size % heads and not getattr(config, "head_dim", None))
    ):
        raise InputError(f"options: {heads!r} heads do not divide the width {config.hidden_size}")
    return config


def _other_config(
    config_class: Any,
    base: PreTrainedConfig,
    layers: int | None,
    width: int | None,
    options: dict[str, Any],
) -> PreTrainedConfig:
    """The configuration of another architecture, on the base's vocabulary."""
    known = {
        name
        for each in config_class.__mro__
        if issubclass(each, PreTrainedConfig) and each is not PreTrainedConfig
        for name in inspect.signature(each.__init__).parameters
    } - {"self", "kwargs", "vocab_size", "pad_token_id", "num_hidden_layers", "hidden_size"}
    for name in options:
        if name not in known:
            raise InputError(
                f"options: {config_class.__name__} takes {', '.join(sorted(known))} here, not "
                f"'{name}'{nearest(name, known)}"
            )
    text = base.get_text_config()
    pad = getattr(text, "pad_token_id", None)
    if pad is None and isinstance(eos := getattr(text, "eos_token_id", None), int):
        pad = eos
    sizes = {"num_hidden_layers": layers, "hidden_size": width}
    return config_class(
        vocab_size=text.vocab_size,
        pad_token_id=pad,
        **{name: size for name, size in sizes.items() if size is not None},
        **options,
    )


def _from_config(
    auto_class: Any, config: PreTrainedConfig, dtype: torch.dtype = torch.float32
) -> Any:
    try:
        return auto_class.from_config(config, dtype=dtype, **_sdpa(auto_class, config))
    except (ValueError, RuntimeError) as error:
        raise InputError(f"no model can be built so: {first_line(error)}") from error


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
        what = (
            "token classification"
            if auto_class is TASKS["token_classification"]
            else ("classification")
        )
        raise InputError(
            f"'{name}' has no trained {what} head ({sorted(missing)[0]} is missing): "
            "fine-tune it first (`kdfast finetune`), or give a finished model"
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
