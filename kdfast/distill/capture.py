"""Teacher and student internals from a transformers model, with SDPA left on.

Attention maps are never asked for (`output_attentions` would force eager attention and N×N memory);
the queries and keys that make them are. Families that call transformers' attention interface hand
their queries and keys to a registered function that records them and lets SDPA do the work. The
others fall back on forward hooks on their query, key and value projections. Which of the two a
model gets is found by trying: a forward pass of two short sentences, one padded, must give the
hidden states of eager attention, and softmax(scale · query keyᵀ) must give its maps. A model where
neither holds (DeBERTa: its scores contain position terms that are no query-key product) is refused
by name.

Tensors are recorded inside the model's forward, so under mixed precision they keep the model's own
dtype; what leaves the model through accelerate would come back as fp32, twice the memory.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import logging as transformers_logging

from kdfast.captured import Captured, LayerAttention, ModelShape, Needs
from kdfast.distill.models import encoder_layers
from kdfast.errors import InputError

ATTENTION_NAME = "kdfast_sdpa"
PROJECTION_NAMES = (
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
)


class _Recorder:
    """Where the attention function and the hooks put what they see while a capture is running."""

    def __init__(self) -> None:
        self.enabled = False
        self.wants = Needs()
        self.stop: int | None = None  # the layer (from 0) that is not to run any more
        self.padded: bool | None = None  # whether the attention mask leaves tokens out
        self.attentions = 0  # attention layers that have run
        self.attention: dict[int, LayerAttention] = {}
        self.modules: list[nn.Module] = []
        self.hidden_states: dict[int, torch.Tensor] = {}

    def attended(self, module: nn.Module, layer: Callable[[], LayerAttention]) -> None:
        self.attentions += 1
        if self.attentions in self.wants.attention:
            self.attention[self.attentions] = layer()
            self.modules.append(module)

    def wanted_value(self, value: torch.Tensor) -> torch.Tensor | None:
        """Kept only where it is read: nothing else would hold a teacher's."""
        return value if self.attentions in self.wants.values else None


class _Stopped(Exception):
    """All that is needed of a forward pass is there."""


# One for the process: torch.compile can guard a module global, not a context variable. Captures do
# not nest and models of one process run one after the other.
_recorder = _Recorder()

# How many captures hold a model (two trainers may share a teacher), and what attention it had.
_held: weakref.WeakKeyDictionary[nn.Module, tuple[int, str]] = weakref.WeakKeyDictionary()


def _recording_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if _recorder.enabled and _recorder.wants.attention:
        if kwargs.get("position_bias") is not None:
            raise InputError(
                f"{type(module).__name__} adds a position bias to its attention scores, which "
                "queries and keys alone do not give: use a recipe without attention losses"
            )
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
        window = kwargs.get("sliding_window")
        _recorder.attended(
            module,
            lambda: LayerAttention(
                query,
                key,
                _recorder.wanted_value(value),
                scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
                causal=bool(causal),
                # The module's window counts the token itself; ours is the largest |i − j|.
                window=None if window is None else window - 1,
            ),
        )
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )


def _told_mask(**kwargs: Any) -> Any:
    """transformers leaves out a mask that is not needed, and waits for the device to see whether it
    is. Where that is known it need not look; a compiled graph does not, and serves any mask."""
    padded = None if torch.compiler.is_compiling() else _recorder.padded
    if padded is False:
        kwargs["attention_mask"] = None
    elif padded:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(**kwargs)


# Without the mask function of the same name transformers drops padding masks silently.
AttentionInterface.register(ATTENTION_NAME, _recording_sdpa)
AttentionMaskInterface.register(ATTENTION_NAME, _told_mask)


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Layers, width, heads and classes as the configuration states them.

    A sequence classifier of one output is a regression, and with problem_type
    "multi_label_classification" a binary one, as in transformers.

    Without a [CLS] state to read (a student without attention, ModernBERT's mean pooling) `pool`
    is "mean"; that of a causal model, whose first token sees itself alone, is "last".
    """
    config = model.config.get_text_config()
    has_head = model.base_model is not model
    token_logits = has_head and "ForTokenClassification" in type(model).__name__
    heads = config.num_attention_heads
    problem = getattr(config, "problem_type", None)
    one = has_head and not token_logits and config.num_labels == 1
    mean = heads == 0 or getattr(config, "classifier_pooling", "cls") == "mean"
    causal = any(getattr(m, "is_causal", False) is True for m in model.modules())
    return ModelShape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=heads,
        classes=config.num_labels if has_head else None,
        regression=one or (has_head and not token_logits and problem == "regression"),
        token_logits=token_logits,
        pool="last" if causal else "mean" if mean else "cls",
        key_value_heads=getattr(config, "num_key_value_heads", None),
        binary=one and problem == "multi_label_classification",
        head_width=getattr(config, "head_dim", None),
    )


def is_compiled(model: Any) -> bool:
    """Whether torch.compile(model) or model.compile() was called: hooks then come too late."""
    return isinstance(model, torch._dynamo.OptimizedModule) or bool(
        getattr(model, "_compiled_call_impl", None)
    )


class Capture:
    """Runs a model and returns its outputs with the internals that `needs` names.

    Args:
        model: a transformers ≥ 5 encoder or decoder, not compiled yet (compile after capturing).
        needs: what to record.

    Raises:
        InputError: an encoder-decoder, a compiled model, a model whose configuration already asks
            for hidden states or attentions (evaluation would keep them all), or, when attention is
            needed, a model whose maps its queries and keys do not give.

    Calling it runs the model: `outputs, captured = capture(inputs)`. `replaced` is the attention
    implementation that captured SDPA stands in for, or None; `close()` gives it back. `can_stop`:
    whether it can end a forward pass after the last layer that is needed.
    """

    def __init__(self, model: PreTrainedModel, needs: Needs) -> None:
        name = type(model).__name__
        if is_compiled(model):
            raise InputError(
                f"{name} is already compiled: hooks added now would be ignored; give the plain "
                "model, and compile it afterwards"
            )
        if not isinstance(model, PreTrainedModel):
            raise InputError(f"model must be a transformers PreTrainedModel, was {name}")
        if model.config.is_encoder_decoder:
            raise InputError(
                f"{name} is an encoder-decoder: only encoders and decoders are captured"
            )
        for flag in ("output_hidden_states", "output_attentions"):
            if getattr(model.config, flag, False):
                raise InputError(
                    f"{name}.config.{flag} is set: every evaluation would keep all of them in "
                    f"memory; set it to False, kdfast asks for what it needs call by call"
                )
        if _reentrant(model):
            raise InputError(
                f"{name} was set to reentrant gradient checkpointing: captured tensors would carry "
                "no gradient and the internal losses train nothing; call "
                'gradient_checkpointing_enable({"use_reentrant": False})'
            )
        self.model = model
        self.needs = needs
        self.shape = model_shape(model)
        if needs.attention and self.shape.heads == 0:
            raise InputError(
                f"{name} has no attention to capture: use a recipe without attention losses "
                "(hidden states and logits can be captured), or a transformer"
            )
        self.layers = self.shape.layers
        self._handles: list[Any] = []
        self.replaced: str | None = None
        if needs.attention:
            self.mechanism = self._install_attention()
        else:
            self._install_masks()
        self.can_stop = False
        if needs.hidden_states or needs.attention:
            self.can_stop = self._install_hidden_states()

    def __call__(
        self,
        inputs: Mapping[str, Any],
        forward: Callable[..., Any] | None = None,
        needs: Needs | None = None,
        *,
        whole: bool = False,
        padded: bool | None = None,
    ) -> tuple[Any, Captured]:
        """Run `forward` (default: the model; a wrapped model such as DDP otherwise) on `inputs`.

        needs: less than what was asked for at the start, for a call that reads less. whole: run all
        of the model, also where its last layers and its head are not needed; otherwise the outputs
        may be None. padded: whether the attention mask leaves tokens out, where that is known: then
        captured SDPA does not look, and a mask that leaves out none is not captured.
        """
        needs = self.needs if needs is None else needs
        stop = None
        if self.can_stop and not whole and not needs.logits and needs.last < self.layers:
            stop = needs.last
        outputs: Any = None
        with self._recording(needs, stop, padded):
            asked = bool(needs.hidden_states) and not self.can_stop
            kwargs = {"output_hidden_states": True} if asked else {}
            with contextlib.suppress(_Stopped):
                outputs = (self.model if forward is None else forward)(
                    **inputs, return_dict=True, **kwargs
                )
            attention, modules = dict(_recorder.attention), tuple(_recorder.modules)
            hidden_states = dict(_recorder.hidden_states)
            ran = _recorder.attentions
        expected = self.layers if stop is None else stop
        if needs.attention and ran != expected:
            raise RuntimeError(
                f"captured the queries and keys of {ran} layers where "
                f"{type(self.model).__name__} has {expected}; was its attention implementation "
                f"changed after capture began (now '{self.model.config._attn_implementation}')?"
            )
        if missing := set(needs.hidden_states) - set(hidden_states):
            raise RuntimeError(
                f"{type(self.model).__name__} with {self.layers} layers gave no hidden states of "
                f"{', '.join(map(str, sorted(missing)))}"
            )
        if torch.is_grad_enabled():
            _refuse_detached(modules, tuple(attention.values()))
        captured = Captured(
            logits=None if outputs is None else outputs.get("logits"),
            hidden_states=hidden_states,
            attention=attention,
            attention_mask=None if padded is False else inputs.get("attention_mask"),
        )
        return outputs, captured

    def close(self) -> None:
        """Remove the hooks and, with the model's last capture, restore its attention function."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.replaced is not None:
            self.replaced = None
            holders, own = _held[self.model]
            _held[self.model] = (holders - 1, own)
            if holders == 1:
                del _held[self.model]
                if self.model.config._attn_implementation == ATTENTION_NAME:
                    self.model.set_attn_implementation(own)

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _recording(
        self, needs: Needs, stop: int | None = None, padded: bool | None = None
    ) -> Iterator[None]:
        _recorder.enabled = True
        _recorder.wants = needs
        _recorder.stop = stop
        _recorder.padded = padded
        try:
            yield
        finally:
            _recorder.enabled = False
            _recorder.padded = None
            _recorder.attentions = 0
            _recorder.attention.clear()
            _recorder.modules.clear()
            _recorder.hidden_states.clear()

    def _install_hidden_states(self) -> bool:
        """Hooks that keep what goes into each layer, and what comes out of the last; True if they
        give the model's own hidden states. Otherwise those are asked for, all of them."""
        model = self.model
        try:
            layers: Any = encoder_layers(model)[1]
        except InputError:
            layers = ()
        handles = [
            layer.register_forward_pre_hook(_keep_input(i), with_kwargs=True)
            for i, layer in enumerate(layers)
        ]
        # On the inner model: its tensors are still the model's own dtype there, and what the hook
        # takes away accelerate does not cast to fp32 and the evaluation does not collect.
        handles.append(model.base_model.register_forward_hook(_keep_last(self.layers)))
        if layers:
            with _probing(model), self._recording(Needs(hidden_states=range(self.layers + 1))):
                outputs = model.base_model(
                    **_probe_inputs(model), return_dict=True, output_hidden_states=True
                )
                kept = dict(_recorder.hidden_states)
            own = dict(enumerate(outputs.hidden_states or ()))
            # A recurrent layer's input may be packed, and no tensor.
            if kept.keys() == own.keys() and all(
                isinstance(kept[i], torch.Tensor) and torch.equal(kept[i], own[i]) for i in own
            ):
                self._handles += handles
                return True
        for handle in handles:
            handle.remove()
        self._handles.append(model.base_model.register_forward_hook(_take_hidden_states))
        return False

    def _install_masks(self) -> None:
        """The model's own SDPA under our name, whose masks need no look at the device."""
        model = self.model
        own = getattr(model.config, "_attn_implementation", None)
        if own not in ("sdpa", ATTENTION_NAME) or self.shape.heads == 0:
            return
        same = False
        # A model that cannot be tried out runs as it is, and waits as ever.
        with _probing(model), contextlib.suppress(Exception):
            inputs = _probe_inputs(model)
            before = model.base_model(**inputs, return_dict=True)[0]
            if self._use_interface():
                after = model.base_model(**inputs, return_dict=True)[0]
                same = torch.equal(before, after)
        if not same:
            self.close()

    def _install_attention(self) -> str:
        """Choose the mechanism that reproduces eager attention on a probe; raise if none does."""
        model, name = self.model, type(self.model).__name__
        with _probing(model):
            inputs = _probe_inputs(model)
            expected, maps = _eager_attentions(model, inputs)
            for mechanism, install in (
                ("interface", self._use_interface),
                ("hooks", self._use_hooks),
            ):
                if install() and self._reproduces(inputs, expected, maps):
                    return mechanism
                self.close()
        raise InputError(
            f"the attention of {name} cannot be captured: its maps are not "
            "softmax(scale · query keyᵀ) of the queries and keys it projects (relative positions, "
            "as in DeBERTa or MPNet, or a fused projection); use a recipe without attention losses "
            "(hidden states can be captured), or a model of the attention interface (BERT, "
            "RoBERTa, DistilBERT, ELECTRA, ModernBERT, ...)"
        )

    def _use_interface(self) -> bool:
        if not getattr(self.model, "_supports_sdpa", False):
            return False
        own = self.model.config._attn_implementation
        try:
            self.model.set_attn_implementation(ATTENTION_NAME)
        except ValueError:  # families before the attention interface refuse unknown names
            return False
        if self.model.config._attn_implementation != ATTENTION_NAME:
            return False
        holders, self.replaced = _held.get(self.model, (0, own))
        _held[self.model] = (holders + 1, self.replaced)
        return True

    def _use_hooks(self) -> bool:
        attention_modules = [
            (module, names)
            for module in self.model.modules()
            for names in PROJECTION_NAMES
            if all(isinstance(getattr(module, n, None), nn.Linear) for n in names)
        ]
        if len(attention_modules) != self.layers:
            return False
        for module, names in attention_modules:
            self._handles += _hook_projections(module, names, self.shape.heads)
        return True

    def _reproduces(
        self,
        inputs: dict[str, torch.Tensor],
        expected: torch.Tensor,
        maps: tuple[torch.Tensor, ...],
    ) -> bool:
        """Whether this mechanism gives eager attention's last hidden state and maps."""
        with self._recording(Needs(attention=range(1, self.layers + 1))):
            last = self.model.base_model(**inputs, return_dict=True)[0]
            attention = tuple(_recorder.attention.values())
        if len(attention) != self.layers or len(maps) != self.layers:
            return False
        mask = inputs["attention_mask"].bool()
        tolerance = 1e-3 if last.dtype in (torch.float32, torch.float64) else 5e-2
        close = bool(
            ((last - expected)[mask].abs() <= tolerance * (1 + expected[mask].abs())).all()
        )
        for layer, eager_map in zip(attention, maps, strict=True):
            difference = (attention_map(layer, mask) - eager_map).abs()
            close &= bool(difference.transpose(1, 2)[mask].max() <= tolerance)
        return close


def attention_map(layer: LayerAttention, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The [B, H, N, N] attention probabilities of a captured layer: quadratic, for looking at."""
    groups = layer.query.shape[1] // layer.key.shape[1]
    key = layer.key.repeat_interleave(groups, dim=1)
    scores = layer.query @ key.transpose(-1, -2) * layer.scale
    n = scores.shape[-1]
    distance = torch.arange(n, device=scores.device)[:, None] - torch.arange(
        n, device=scores.device
    )
    allowed = torch.ones(n, n, dtype=torch.bool, device=scores.device)
    if layer.causal:
        allowed &= distance >= 0
    if layer.window is not None:
        allowed &= distance.abs() <= layer.window
    if attention_mask is not None:
        allowed = allowed & attention_mask.bool()[:, None, None, :]
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1)


def _keep_input(layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not _recorder.enabled:
            return
        if layer in _recorder.wants.hidden_states:
            states = args[0] if args else kwargs.get("hidden_states")
            _recorder.hidden_states[layer] = states  # None only in the probe, which then says no
        if layer == _recorder.stop:
            raise _Stopped

    return hook


def _keep_last(layers: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if _recorder.enabled and layers in _recorder.wants.hidden_states:
            _recorder.hidden_states[layers] = output[0]

    return hook


def _take_hidden_states(module: nn.Module, args: Any, output: Any) -> None:
    if _recorder.enabled and output.hidden_states is not None:
        for layer, states in enumerate(output.hidden_states):
            if layer in _recorder.wants.hidden_states:
                _recorder.hidden_states[layer] = states
        output["hidden_states"] = None
        output.hidden_states = None


def _hook_projections(module: nn.Module, names: tuple[str, str, str], heads: int) -> list[Any]:
    """Hooks that record a layer's attention when its three projections have been computed."""
    seen: dict[str, torch.Tensor] = {}

    def record(part: str) -> Callable[..., None]:
        def hook(projection: nn.Module, args: Any, output: torch.Tensor) -> None:
            if not (_recorder.enabled and _recorder.wants.attention):
                return
            seen[part] = output
            if len(seen) == 3:
                width = seen[names[0]].shape[-1] // heads
                query, key, value = (
                    seen[n].unflatten(-1, (-1, width)).transpose(1, 2) for n in names
                )
                seen.clear()
                causal = bool(getattr(module, "is_causal", False))
                _recorder.attended(
                    module,
                    lambda: LayerAttention(
                        query,
                        key,
                        _recorder.wanted_value(value),
                        scale=width**-0.5,
                        causal=causal,
                    ),
                )

        return hook

    return [getattr(module, n).register_forward_hook(record(n)) for n in names]


def _reentrant(model: nn.Module) -> bool:
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and function is not None:
            return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
    return False


def _refuse_detached(modules: tuple[nn.Module, ...], attention: tuple[LayerAttention, ...]) -> None:
    """Reentrant checkpointing runs the forward without a graph: the loss would train nothing."""
    for module, layer in zip(modules, attention, strict=True):
        trainable = any(p.requires_grad for p in module.parameters())
        if trainable and module.training and not layer.query.requires_grad:
            raise RuntimeError(
                f"the queries captured from {type(module).__name__} carry no gradient, so an "
                "attention loss would silently train nothing: reentrant gradient checkpointing "
                "does this; use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


@contextlib.contextmanager
def _probing(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradient, transformers' warnings silenced; all restored afterwards."""
    training = {module: module.training for module in model.modules()}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for module, mode in training.items():
            module.training = mode


def _probe_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    vocabulary = model.config.get_text_config().vocab_size
    length, device = 8, model.device
    ids = torch.arange(2 * length, device=device).view(2, length) * 7 % (vocabulary - 1)
    mask = torch.ones(2, length, dtype=torch.long, device=device)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _eager_attentions(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Last hidden state and maps under eager attention, where the family can switch to it."""
    own = model.config._attn_implementation
    switched = own not in ("eager", None)
    if switched:
        with contextlib.suppress(ValueError):
            model.set_attn_implementation("eager")
    try:
        outputs = model.base_model(**inputs, output_attentions=True, return_dict=True)
    finally:
        if switched and model.config._attn_implementation != own:
            model.set_attn_implementation(own)
    return outputs[0], tuple(outputs.attentions or ())
