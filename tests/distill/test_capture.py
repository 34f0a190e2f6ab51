"""Captured internals against what transformers itself computes."""

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

from kdfast import AttentionKLLoss
from kdfast.captured import Needs
from kdfast.distill.capture import Capture, attention_map
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
BOTH = Needs(hidden_states=True, attention=True)


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
    for layer, eager_map in zip(captured.attention, expected, strict=True):
        difference = attention_map(layer, valid) - eager_map
        assert difference.transpose(1, 2)[valid].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("family", "mechanism"),
    [(f, "interface") for f in INTERFACE] + [(f, "hooks") for f in HOOKS],
)
def test_families_use_the_attention_interface_where_they_have_it(family, mechanism):
    with Capture(tiny(family), Needs(attention=True)) as capture:
        assert capture.mechanism == mechanism


@pytest.mark.parametrize("family", ["DebertaV2", "MPNet", "RoFormer"])
def test_maps_that_are_no_query_key_product_are_refused_by_name(family):
    with pytest.raises(InputError, match=rf"{family}ForSequenceClassification cannot be captured"):
        Capture(tiny(family), Needs(attention=True))


def test_hidden_states_of_a_model_without_capturable_attention_can_be_captured():
    with Capture(tiny("DebertaV2"), Needs(hidden_states=True)) as capture:
        assert len(capture(batch())[1].hidden_states) == 4


@pytest.mark.parametrize("family", INTERFACE + HOOKS)
def test_captured_outputs_equal_the_uncaptured_models(family):
    model, inputs = tiny(family).eval(), batch()
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        with Capture(model, BOTH) as capture:
            outputs, captured = capture(inputs)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=0)
    for ours, theirs in zip(captured.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


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
            layers.append(capture(inputs)[1].attention)
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
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
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
    with Capture(model, Needs(attention=True)) as capture:
        _, captured = capture(batch())
        captured.attention[2].query.sum().backward()
        assert len(captured.attention) == 3
        assert model.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
        capture(batch())  # and the recomputation in backward has left nothing behind


def test_reentrant_checkpointing_is_refused_instead_of_training_nothing():
    model = tiny()
    model.train()
    with Capture(model, Needs(attention=True)) as capture:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(RuntimeError, match="use_reentrant"):
            capture(batch())
    with pytest.raises(InputError, match="reentrant"):
        Capture(model, Needs(hidden_states=True))


def test_a_frozen_student_layer_is_no_reentrant_checkpointing():
    model = tiny()
    model.train().requires_grad_(False)
    model.bert.encoder.layer[2].requires_grad_(True)
    with Capture(model, Needs(attention=True)) as capture:
        _, captured = capture(batch())
    assert [a.query.requires_grad for a in captured.attention] == [False, False, True]


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
    for ours, theirs in zip(captured.attention, expected.attention, strict=True):
        torch.testing.assert_close(ours.query, theirs.query)
    torch.testing.assert_close(captured.hidden_states[-1], expected.hidden_states[-1])
