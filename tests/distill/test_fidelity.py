"""Predictions, embeddings and their likeness to the teacher's, for models of every kind."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
)

from kdfast.distill.data import DataConfig, DistillationCollator, load_data, tokenize
from kdfast.distill.fidelity import (
    Predictions,
    alignment,
    embed,
    embedding_fidelity,
    fidelity,
    predict,
    scores,
)
from kdfast.distill.scoring import embedding_pool
from kdfast.errors import InputError
from kdfast.recipes.recipe import Recipe

SIZES = {"teacher_train": 40, "student_train": 40, "dev": 20, "test": 37}


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture
def texts(csv_file):
    return load_data(DataConfig(path=str(csv_file), kind="embedding", **SIZES)).test


def test_embeddings_are_the_mean_over_tokens_in_the_order_of_the_data(tiny_bert, tokenizer, texts):
    model = AutoModel.from_pretrained(tiny_bert)
    collator = DistillationCollator(tokenizer)
    tokens = tokenize(texts, tokenizer, 32)
    found = embed(model, tokens, collator, batch_size=8)
    first = embed(model, tokens, collator, pool="cls", batch_size=8)
    assert found.shape == first.shape == (37, 32) and found.dtype == torch.float32
    for i, text in enumerate(texts["text"]):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(found[i], states.mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(first[i], states[0], atol=1e-5, rtol=1e-5)


def test_a_pool_that_nobody_knows_is_named(tiny_bert, tokenizer, texts):
    tokens = tokenize(texts, tokenizer, 32)
    with pytest.raises(InputError, match="pool must be one of auto, cls, mean, last, was 'max'"):
        embed(
            AutoModel.from_pretrained(tiny_bert),
            tokens,
            DistillationCollator(tokenizer),
            pool="max",
        )


@pytest.mark.parametrize(
    ("recipe", "options", "pool"),
    [
        ("embedding", {}, "mean"),
        ("embedding", {"pool": "cls"}, "cls"),
        ("rkd", {"pool": "cls"}, None),
        (None, {}, None),
        ("custom", {"losses": [{"loss": "cosine"}, {"loss": "pooled", "pool": "last"}]}, "last"),
        ("custom", {"losses": [{"recipe": "embedding"}]}, "mean"),
    ],
)
def test_a_recipe_says_how_its_embeddings_are_pooled(recipe, options, pool):
    assert embedding_pool(recipe, options) == pool


def test_a_classifiers_embeddings_are_those_of_its_encoder(tiny_bert, tokenizer, texts):
    collator, tokens = DistillationCollator(tokenizer), tokenize(texts, tokenizer, 32)
    plain = embed(AutoModel.from_pretrained(tiny_bert), tokens, collator)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    torch.testing.assert_close(embed(classifier, tokens, collator), plain)


def test_a_model_without_logits_is_told_apart(tiny_bert, tokenizer, texts):
    tokens = tokenize(texts, tokenizer, 32)
    with pytest.raises(InputError, match="BertModel has no logits: choose data.kind=embedding"):
        predict(AutoModel.from_pretrained(tiny_bert), tokens, DistillationCollator(tokenizer))


def test_a_classifier_predicts_texts_without_labels(tiny_bert, tokenizer, texts):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    tokens = tokenize(texts, tokenizer, 32)
    found = predict(model, tokens, DistillationCollator(tokenizer))
    assert found.logits.shape == (37, 2) and found.labels.tolist() == [-100] * 37
    assert not found.logits.requires_grad
    assert fidelity(found, found, regression=False)["agreement"] == 1


def test_embedding_fidelity_is_one_for_equal_embeddings_and_compares_other_widths():
    torch.manual_seed(0)
    x = torch.randn(40, 8)
    assert embedding_fidelity(x, x) == {
        "cka_to_teacher": pytest.approx(1, abs=1e-5),
        "cosine_to_teacher": pytest.approx(1, abs=1e-5),
    }
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    rotated = embedding_fidelity(x @ rotation, x)
    assert rotated["cka_to_teacher"] == pytest.approx(1, abs=1e-5)
    assert rotated["cosine_to_teacher"] < 0.9
    assert set(embedding_fidelity(x[:, :5], x)) == {"cka_to_teacher"}


def test_words_are_predicted_one_row_each_in_the_order_of_the_data(tiny_bert, tokenizer, tmp_path):
    rest = ["good A\n", "film B\n", "bad C\n"]
    text = "\n".join("".join([f"x{i} A\n", *rest[i % 3 :]]) for i in range(60))
    (tmp_path / "words.conll").write_text(text)
    config = DataConfig(
        path=str(tmp_path / "words.conll"),
        kind="token_classification",
        **{**SIZES, "teacher_train": 10, "student_train": 10, "dev": 10, "test": 20},
    )
    splits = load_data(config)
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(tiny_bert, id2label=dict(enumerate(splits.label_names)))
    model = BertForTokenClassification(config)
    collator = DistillationCollator(tokenizer)
    tokens = tokenize(splits.test, tokenizer, 32)
    found = predict(model, tokens, collator, batch_size=7)
    expected = [label for row in splits.test["label"] for label in row]
    assert found.labels.tolist() == expected and found.logits.shape == (len(expected), 3)
    teacher = predict(model, tokens, collator, batch_size=3, role="teacher")
    torch.testing.assert_close(found.logits, teacher.logits, atol=1e-5, rtol=1e-5)
    accuracy = (found.logits.argmax(-1) == found.labels).float().mean()
    assert scores(found, regression=False)["accuracy"] == pytest.approx(float(accuracy))


def test_scores_leave_out_rows_without_a_label():
    logits = torch.eye(2)[[0, 1, 0, 1]]
    found = scores(Predictions(logits, torch.tensor([0, 1, -100, 0])), regression=False)
    assert found["accuracy"] == pytest.approx(2 / 3)


def test_alignment_takes_the_projection_weights_of_whatever_term_has_them(
    tiny_bert, tokenizer, texts
):
    class Weights(torch.nn.Module):
        weight = 1.0

        def projection_weights(self, student, teacher):
            return torch.full((len(student.hidden_states[0]), 3, 4), 0.25)

    class Other(torch.nn.Module):
        weight = 1.0

    recipe = Recipe.__new__(Recipe)
    torch.nn.Module.__init__(recipe)
    recipe.terms = torch.nn.ModuleDict({"other": Other(), "projection": Weights()})
    model = AutoModel.from_pretrained(tiny_bert)
    aligned, weights = alignment(
        *(model, AutoModel.from_pretrained(tiny_bert), tokenize(texts, tokenizer, 32)),
        DistillationCollator(tokenizer),
        shared_tokens=True,
        recipe=recipe,
    )
    np.testing.assert_allclose(aligned.diagonal(), 1, atol=1e-4)
    assert aligned.shape == (5, 5) and torch.equal(weights, torch.full((3, 4), 0.25))
