"""Captured internals against what transformers itself computes."""

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

from kdfast import AttentionKLLoss
from kdfast.captured import Needs
from kdfast.distill.capture import Capture, attention_map
from kdfast.distill.models import encoder_layers
from kdfast.errors import InputError

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
HIDDEN = Needs(logits=True, hidden_states=range(4))
ATTENTION = Needs(logits=True, attention=range(1, 4))
BOTH = HIDDEN | ATTENTION


def config_of(family):
    if family == "DistilBert":
        return transformers.DistilBertConfig(
            dim=32, n_layers=3, n_heads=4, hidden_dim=64, vocab_size=100, pad_token_id=0
        )
    extra = {
        "ModernBert": {
            "local_attention": 4,
            "global_attn_every_n_layers": 2,
            **{f"{k}_token_id": 1 for k in ("cls", "sep", "bos", "eos")},
        },
        "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "Llama": {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2},
        "Albert": {"embedding_size": 16},
    }.get(family, {})
    return getattr(transformers, family + "Config")(**SMALL, **extra)


def tiny(family="Bert", **changes):
    config = config_of(family)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def batch():
    ids = torch.randint(3, 100, (3, 10))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


INTERFACE = ["Bert", "Roberta", "DistilBert", "Electra", "ModernBert", "Albert", "Llama"]
HOOKS = ["MegatronBert", "RemBert"]


@pytest.mark.parametrize("family", INTERFACE + HOOKS)
def test_recomputed_maps_equal_eager_attention(family):
    model, inputs = tiny(family).eval(), batch()
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model.base_model(**inputs, output_attentions=True).attentions
        if family in INTERFACE:
            model.set_attn_implementation("sdpa")
        with Capture(model, BOTH) as capture:
            _, captured = capture(inputs)
    valid = inputs["attention_mask"].bool()
    for layer, eager_map in zip(captured.attention.values(), expected, strict=True):
        difference = attention_map(layer, valid) - eager_map
        assert difference.transpose(1, 2)[valid].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("family", "mechanism"),
    [(f, "interface") for f in INTERFACE] + [(f, "hooks") for f in HOOKS],
)
def test_families_use_the_attention_interface_where_they_have_it(family, mechanism):
    with Capture(tiny(family), ATTENTION) as capture:
        assert capture.mechanism == mechanism


@pytest.mark.parametrize("family", ["DebertaV2", "MPNet", "RoFormer"])
def test_maps_that_are_no_query_key_product_are_refused_by_name(family):
    with pytest.raises(InputError, match=rf"{family}ForSequenceClassification cannot be captured"):
        Capture(tiny(family), ATTENTION)


def test_hidden_states_of_a_model_without_capturable_attention_can_be_captured():
    with Capture(tiny("DebertaV2"), HIDDEN) as capture:
        assert len(capture(batch())[1].hidden_states) == 4


@pytest.mark.parametrize("family", INTERFACE + HOOKS)
def test_captured_outputs_equal_the_uncaptured_models(family):
    model, inputs = tiny(family).eval(), batch()
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        with Capture(model, BOTH) as capture:
            outputs, captured = capture(inputs)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=0)
    for layer, theirs in enumerate(expected.hidden_states):
        torch.testing.assert_close(captured.hidden_states[layer], theirs, rtol=0, atol=0)


def test_attention_kl_from_queries_and_keys_equals_that_of_eager_maps():
    teacher, student, inputs = tiny(num_hidden_layers=3).eval(), tiny().eval(), batch()
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    valid = inputs["attention_mask"].bool()
    expected = 0.0
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        maps_t = teacher(**inputs, output_attentions=True).attentions
        maps_s = student(**inputs, output_attentions=True).attentions
    for p, q in zip(maps_t, maps_s, strict=True):
        rows = torch.where(p > 0, p * (p / q).log(), 0).sum(-1)
        expected += rows.transpose(1, 2)[valid].mean()
    for model in (teacher, student):
        model.set_attn_implementation("sdpa")
    layers = []
    for model in (student, teacher):
        with Capture(model, BOTH) as capture, torch.no_grad():
            layers.append(list(capture(inputs)[1].attention.values()))
    loss = AttentionKLLoss()(
        [a.query for a in layers[0]],
        [a.key for a in layers[0]],
        [a.query for a in layers[1]],
        [a.key for a in layers[1]],
        inputs["attention_mask"],
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)


def test_capture_leaves_no_trace_after_close():
    model = tiny()
    with Capture(model, BOTH):
        pass
    hooks = [
        hook
        for module in model.modules()
        for kind in (module._forward_hooks, module._forward_pre_hooks)
        for hook in kind.values()
    ]
    assert not any(hook.__module__.startswith("kdfast") for hook in hooks)
    assert model.config._attn_implementation == "sdpa"
    assert model(**batch(), output_hidden_states=True).hidden_states is not None


def test_outputs_carry_no_hidden_states_for_wrappers_to_cast_or_evaluation_to_collect():
    with Capture(tiny(), BOTH) as capture:
        outputs, _ = capture(batch())
    assert outputs.hidden_states is None and "hidden_states" not in outputs


def test_the_attention_function_name_is_not_saved_with_the_model(tmp_path):
    model = tiny()
    with Capture(model, BOTH):
        model.save_pretrained(tmp_path)
    assert "kdfast" not in (tmp_path / "config.json").read_text()


def test_probing_restores_training_mode_and_random_state():
    model = tiny()
    model.train()
    model.bert.encoder.layer[1].eval()
    state = torch.get_rng_state()
    with Capture(model, BOTH):
        assert model.training and not model.bert.encoder.layer[1].training
        assert torch.equal(torch.get_rng_state(), state)


def test_gradients_flow_through_captured_queries():
    model = tiny()
    model.train()
    with Capture(model, BOTH) as capture:
        _, captured = capture(batch())
    captured.attention[2].query.sum().backward()
    assert model.bert.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0


def test_non_reentrant_checkpointing_keeps_gradients_and_records_each_layer_once():
    model = tiny()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with Capture(model, ATTENTION) as capture:
        _, captured = capture(batch())
        captured.attention[2].query.sum().backward()
        assert len(captured.attention) == 3
        assert model.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
        capture(batch())  # and the recomputation in backward has left nothing behind


def test_reentrant_checkpointing_is_refused_instead_of_training_nothing():
    model = tiny()
    model.train()
    with Capture(model, ATTENTION) as capture:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(RuntimeError, match="use_reentrant"):
            capture(batch())
    with pytest.raises(InputError, match="reentrant"):
        Capture(model, HIDDEN)


def test_a_frozen_student_layer_is_no_reentrant_checkpointing():
    model = tiny()
    model.train().requires_grad_(False)
    model.bert.encoder.layer[2].requires_grad_(True)
    with Capture(model, ATTENTION) as capture:
        _, captured = capture(batch())
    assert [a.query.requires_grad for a in captured.attention.values()] == [False, False, True]


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions"])
def test_flags_left_in_the_config_are_refused(flag):
    model = tiny()
    model.set_attn_implementation("eager")
    setattr(model.config, flag, True)
    with pytest.raises(InputError, match=flag):
        Capture(model, BOTH)


def test_changing_the_attention_implementation_after_capture_is_noticed():
    model = tiny()
    with Capture(model, BOTH) as capture:
        model.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match="changed after capture"):
            capture(batch())


def test_a_compiled_model_is_refused():
    with pytest.raises(InputError, match="compiled"):
        Capture(torch.compile(tiny()), BOTH)


def test_an_encoder_decoder_is_refused():
    config = transformers.BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    with pytest.raises(InputError, match="encoder-decoder"):
        Capture(transformers.BartModel(config), BOTH)


def test_a_model_compiled_after_capture_gives_the_same_internals():
    model, inputs = tiny().eval(), batch()
    with Capture(model, BOTH) as capture, torch.no_grad():
        _, expected = capture(inputs)
        compiled = torch.compile(model, backend="aot_eager")
        _, captured = capture(inputs, forward=compiled)
    for layer, theirs in expected.attention.items():
        torch.testing.assert_close(captured.attention[layer].query, theirs.query)
    for layer, states in expected.hidden_states.items():
        torch.testing.assert_close(captured.hidden_states[layer], states)


@pytest.mark.parametrize("family", INTERFACE + HOOKS)
def test_only_the_layers_that_are_needed_run_and_are_kept(family):
    """Up to the last one of them where the layers stand in a list (ALBERT shares its only one)."""
    model, inputs = tiny(family).eval(), batch()
    needs = Needs(hidden_states=[1], attention=[2])
    ran = []
    with torch.no_grad(), Capture(model, BOTH) as capture:
        _, expected = capture(inputs)
        for layer, module in enumerate(encoder_layers(model)[1] if capture.can_stop else (), 1):
            module.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        outputs, captured = capture(inputs, needs=needs)
        assert capture.can_stop is (family != "Albert")
        if capture.can_stop:
            assert outputs is None and captured.logits is None and ran == [1, 2]
        _, again = capture(inputs)
        assert capture(inputs, needs=needs, whole=True)[1].logits is not None
    assert set(captured.hidden_states) == {1} and set(captured.attention) == {2}
    assert torch.equal(captured.hidden_states[1], expected.hidden_states[1])
    assert torch.equal(captured.attention[2].key, expected.attention[2].key)
    assert torch.equal(again.logits, expected.logits)


def test_a_forward_that_stops_early_gives_the_gradients_of_the_whole_one():
    inputs, found = batch(), []
    for whole in (False, True):
        model = tiny().train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        with Capture(model, Needs(hidden_states=[2], attention=[1])) as capture:
            _, captured = capture(inputs, whole=whole)
            (
                captured.hidden_states[2].sum() + captured.attention[1].query.square().sum()
            ).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_needs_add_up():
    both = Needs(hidden_states=[0, 2]) | Needs(logits=True, attention=[3])
    assert both == Needs(True, {2, 0}, {3}) and both.last == 3
    assert not Needs() and Needs(hidden_states=[0]) and Needs(logits=True)
