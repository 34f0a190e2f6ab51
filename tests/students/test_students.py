"""BiLSTM and gated CNN: formula, padding, saving, capture."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
)

from kdfast import students
from kdfast.captured import Needs
from kdfast.distill.capture import Capture, model_shape
from kdfast.distill.models import freeze_embeddings, load_classifier
from kdfast.errors import InputError

CONFIGS = {"bilstm": students.BiLSTMConfig, "gated_cnn": students.GatedCNNConfig}
SIZES = {"vocab_size": 40, "hidden_size": 16, "embedding_size": 12, "num_hidden_layers": 3}
kinds = pytest.mark.parametrize("kind", CONFIGS)
poolings = pytest.mark.parametrize("pooling", ["mean", "max"])


def build(kind, auto_class=AutoModelForSequenceClassification, **changes):
    return auto_class.from_config(CONFIGS[kind](**{**SIZES, "num_labels": 3, **changes})).eval()


def batch(lengths=(7, 4, 1), padded_to=7):
    ids = torch.randint(1, 40, (len(lengths), padded_to))
    mask = (torch.arange(padded_to) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def assert_same_model(loaded, model):
    """Equal in every bit, but the logits nearly so: a loaded tensor lies where its file put it, and
    the matrix product of a recurrent layer rounds by its operands' alignment."""
    assert type(loaded) is type(model)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    inputs = batch()
    expected = model(**inputs)[0]
    torch.testing.assert_close(loaded(**inputs)[0], expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(copy.deepcopy(loaded)(**inputs)[0], expected)


@kinds
def test_saved_student_is_the_same_when_loaded(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    assert_same_model(AutoModelForSequenceClassification.from_pretrained(tmp_path).eval(), model)
    assert_same_model(load_classifier(tmp_path), model)
    body = AutoModel.from_pretrained(tmp_path).eval().state_dict()
    for key, value in model.base_model.state_dict().items():
        assert torch.equal(value, body[key])


@kinds
def test_hidden_states_are_the_embeddings_and_one_per_layer(kind):
    outputs = build(kind, AutoModel)(**batch(), output_hidden_states=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(3, 7, 16)] * 4
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert build(kind, AutoModel)(**batch()).hidden_states is None


def everything(model, inputs):
    """Logits, and the hidden states of the real positions, sentence after sentence."""
    outputs = model(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    return [outputs.logits, *(h[real] for h in outputs.hidden_states)]


@kinds
@poolings
@pytest.mark.parametrize("side", ["left", "right", "around"])
def test_padding_changes_nothing(kind, pooling, side):
    model, inputs = build(kind, pooling=pooling), batch()
    before, after = {"left": (5, 0), "right": (0, 5), "around": (2, 3)}[side]
    more = {
        "input_ids": F.pad(inputs["input_ids"], (before, after), value=9),
        "attention_mask": F.pad(inputs["attention_mask"], (before, after)),
    }
    for plain, padded in zip(everything(model, inputs), everything(model, more), strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)


@kinds
@poolings
def test_sentence_in_a_batch_gives_what_it_gives_alone(kind, pooling):
    model, inputs = build(kind, pooling=pooling), batch()
    together = model(**inputs).logits
    for i, length in enumerate((7, 4, 1)):
        alone = model(inputs["input_ids"][i : i + 1, :length]).logits
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-6)


@kinds
@poolings
def test_states_of_padding_are_zero_and_nothing_but_padding_is_finite(kind, pooling):
    model, inputs = build(kind, pooling=pooling).train(), batch((7, 3, 0))
    outputs = model(**inputs, output_hidden_states=True, labels=torch.tensor([0, 1, 2]))
    for states in outputs.hidden_states:
        assert not states[inputs["attention_mask"] == 0].any() and states.isfinite().all()
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_bilstm_reads_forwards_and_backwards():
    model = build("bilstm", AutoModel, num_hidden_layers=1, embedding_size=16)
    ids = torch.randint(1, 40, (1, 6))
    lstm, x = model.layers[0], model.embeddings(ids)[0]

    def run(inputs, suffix):
        h = c = torch.zeros(8)
        weight_ih, weight_hh, bias_ih, bias_hh = (
            getattr(lstm, f"{name}_l0{suffix}")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        states = []
        for row in inputs:
            i, f, g, o = (weight_ih @ row + bias_ih + weight_hh @ h + bias_hh).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        return torch.stack(states)

    expected = torch.cat([run(x, ""), run(x.flip(0), "_reverse").flip(0)], -1)
    torch.testing.assert_close(model(ids).last_hidden_state[0], expected)


def test_gated_cnn_is_a_gated_residual_convolution():
    model = build("gated_cnn", AutoModel, num_hidden_layers=1, embedding_size=16, kernel_size=3)
    ids = torch.randint(1, 40, (1, 6))
    convolution, x = model.layers[0].convolution, model.embeddings(ids)[0]
    nn.init.normal_(convolution.bias)
    around = F.pad(x, (0, 0, 1, 1))
    rows = []
    for t in range(6):
        both = sum(convolution.weight[:, :, k] @ around[t + k] for k in range(3))
        value, gate = (both + convolution.bias).chunk(2)
        rows.append((x[t] + value * gate.sigmoid()) / math.sqrt(2))
    torch.testing.assert_close(model(ids).last_hidden_state[0], torch.stack(rows))


@kinds
def test_gated_and_recurrent_weights_start_from_their_own_distributions(kind):
    for model in (build(kind, AutoModel), build(kind)):
        for layer in model.base_model.layers:
            if kind == "bilstm":
                for bias in (layer.bias_ih_l0, layer.bias_ih_l0_reverse):
                    assert bias.chunk(4)[1].eq(1).all() and bias.sum() == 8
            else:
                std = math.sqrt(4 * 0.9 / (16 * 5))
                assert layer.convolution.weight.std().item() == pytest.approx(std, rel=0.1)


@kinds
def test_loss_follows_the_problem_type(kind):
    inputs = batch()
    single, several, number = (
        build(kind, num_labels=labels, problem_type=problem)
        for labels, problem in (
            (3, "single_label_classification"),
            (3, "multi_label_classification"),
            (1, "regression"),
        )
    )
    for model, labels, loss in (
        (single, torch.tensor([0, 2, 1]), F.cross_entropy),
        (several, torch.rand(3, 3).round(), F.binary_cross_entropy_with_logits),
        (number, torch.rand(3, 1), F.mse_loss),
    ):
        outputs = model(**inputs, labels=labels)
        torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))


@kinds
def test_token_classifier_answers_every_token(kind, tmp_path):
    model, inputs = build(kind, AutoModelForTokenClassification), batch()
    labels = torch.where(inputs["attention_mask"].bool(), 1, -100)
    outputs = model(**inputs, labels=labels)
    assert outputs.logits.shape == (3, 7, 3)
    expected = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(outputs.loss, expected)
    model.save_pretrained(tmp_path)
    assert_same_model(AutoModelForTokenClassification.from_pretrained(tmp_path).eval(), model)


@kinds
def test_token_types_are_ignored(kind):
    model, inputs = build(kind), batch()
    types = torch.ones_like(inputs["input_ids"])
    assert torch.equal(model(**inputs).logits, model(**inputs, token_type_ids=types).logits)


@kinds
def test_tuple_is_returned_when_asked_for(kind):
    model, inputs = build(kind), batch()
    (logits,) = model(**inputs, return_dict=False)
    assert torch.equal(logits, model(**inputs).logits)


@kinds
def test_hidden_states_are_captured(kind):
    model, inputs = build(kind), batch()
    expected = model(**inputs, output_hidden_states=True)
    with Capture(model, Needs(logits=True, hidden_states=range(4))) as capture:
        outputs, captured = capture(inputs)
    assert outputs.hidden_states is None and torch.equal(captured.logits, expected.logits)
    for layer, theirs in enumerate(expected.hidden_states):
        assert torch.equal(captured.hidden_states[layer], theirs)


@kinds
def test_attention_losses_are_refused_with_the_name_of_the_model(kind):
    model = build(kind)
    with pytest.raises(InputError, match=f"{type(model).__name__} has no attention to capture"):
        Capture(model, Needs(attention=[1]))


@kinds
def test_shape_has_no_heads_and_pools_by_the_mean(kind):
    shape = model_shape(build(kind))
    assert (shape.layers, shape.width, shape.heads, shape.classes) == (3, 16, 0, 3)
    assert shape.pool == "mean" and not shape.regression and not shape.token_logits


@kinds
def test_embeddings_of_another_model_are_copied_and_can_be_frozen(kind):
    base = BertModel(
        BertConfig(
            vocab_size=40,
            hidden_size=12,
            num_attention_heads=2,
            num_hidden_layers=1,
            intermediate_size=8,
        )
    )
    model = build(kind).train()
    students.initialise_embeddings(model, base)
    words, theirs = model.get_input_embeddings().weight, base.get_input_embeddings().weight
    assert torch.equal(words, theirs) and words.data_ptr() != theirs.data_ptr()
    assert freeze_embeddings(model) == 40 * 12 + 2 * 12
    model(**batch(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert words.grad is None
    assert model.base_model.embeddings_project.weight.grad.abs().sum() > 0


@kinds
def test_embeddings_of_another_size_are_refused(kind):
    with pytest.raises(InputError, match="40 × 12, .* 40 × 16: they must be alike"):
        students.initialise_embeddings(build(kind), build(kind, AutoModel, embedding_size=16))


@kinds
def test_student_runs_under_autocast_and_in_bf16(kind):
    model, inputs = build(kind), batch()
    exact = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.train()(**inputs, labels=torch.tensor([0, 1, 2]))
    mixed.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    half = model.eval().to(torch.bfloat16)(**inputs).logits
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.05)


@kinds
@poolings
def test_student_learns_which_word_is_in_the_sentence(kind, pooling):
    model = build(kind, pooling=pooling, num_labels=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids, lengths = torch.randint(3, 40, (64, 9)), torch.randint(2, 10, (64,))
    mask = (torch.arange(9) < lengths[:, None]).long()
    labels = torch.randint(0, 2, (64,))
    ids[torch.arange(64), (torch.rand(64) * lengths).long()] = 1 + labels
    for _ in range(60):
        loss = model(ids, mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model.eval()(ids, mask).logits.argmax(-1) == labels).float().mean() > 0.95


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bilstm", {"hidden_size": 15}, "hidden_size of a BiLSTM must be even"),
        ("gated_cnn", {"kernel_size": 4}, "kernel_size must be odd, .* was 4"),
        ("gated_cnn", {"kernel_size": 0}, "kernel_size must be an odd whole number, was 0"),
        ("bilstm", {"num_hidden_layers": 0}, "num_hidden_layers must be a whole number"),
        ("gated_cnn", {"embedding_size": 2.5}, "embedding_size must be a whole number"),
        ("bilstm", {"hidden_dropout_prob": 1}, "below 1, was 1"),
        ("bilstm", {"hidden_dropout_prob": "no"}, "below 1, was 'no'"),
        ("gated_cnn", {"pooling": "means"}, r"mean, max, was 'means' \(did you mean 'mean'\?\)"),
    ],
)
def test_impossible_configurations_are_refused(kind, options, message):
    with pytest.raises(InputError, match=message):
        CONFIGS[kind](**options)
