"""Ranking of queries, entities of sentences, and their tests, against loops written here."""

import math
import random

import pytest
import torch

from kdfast.distill.fidelity import Predictions, scores
from kdfast.distill.grouped import (
    bio_tags,
    entity_counts,
    mean_by_group,
    ranking,
    ratio_by_group,
)
from kdfast.distill.significance import per_sentence
from kdfast.distill.significance import test as paired_test

NAMES = ["O", "B-loc", "I-loc", "B-per", "I-per"]


def ranked(values, labels, queries=None):
    queries = [0] * len(labels) if queries is None else queries
    return ranking(*map(torch.tensor, (values, labels, queries)))


def test_a_query_is_ranked_by_ndcg_and_by_its_first_relevant_candidate():
    found = ranked([0.2, 0.9, 0.1], [1.0, 0.0, 0.0])
    assert found["ndcg_at_10"].tolist() == [pytest.approx(1 / math.log2(3))]
    assert found["mrr_at_10"].tolist() == [0.5]
    # Graded: 1, 3 instead of 3, 1.
    found = ranked([2.0, 1.0, 0.0], [1.0, 3.0, 0.0])
    expected = (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))
    assert found["ndcg_at_10"].tolist() == [pytest.approx(expected)]
    # The only relevant one of twelve comes eleventh.
    found = ranked([float(-i) for i in range(12)], [0.0] * 10 + [1.0, 0.0])
    assert {k: v.tolist() for k, v in found.items()} == {"ndcg_at_10": [0.0], "mrr_at_10": [0.0]}


def test_only_queries_with_two_candidates_and_a_relevant_one_are_ranked():
    queries = [7, 3, 3, 5, 5, 7, 1]
    labels = [0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    found = ranked([1.0, 1.0, 0.0, 2.0, 1.0, 0.0, 1.0], labels, queries)
    assert found["mrr_at_10"].tolist() == [1.0, 0.5]  # of queries 3 and 7
    assert ranked([1.0, 2.0], [0.0, 0.0]) == {} == ranked([1.0, 2.0], [1.0, 1.0], [0, 1])
    assert ranked([1.0, 2.0], [-1.0, 1.0]) == {}


def test_ndcg_of_many_lists_is_that_of_a_loop_over_them():
    torch.manual_seed(0)
    queries = torch.randint(40, (600,))
    labels, values = torch.randint(4, (600,)).float(), torch.randn(600)
    found = ranking(values, labels, queries)
    expected = []
    for query in range(40):
        rows = [(v, y) for v, y, q in zip(values, labels, queries, strict=True) if q == query]
        gains = [float(y) for _, y in sorted(rows, key=lambda row: -row[0])]
        dcg, ideal = (
            sum(gain / math.log2(2 + r) for r, gain in enumerate(order[:10]))
            for order in (gains, sorted(gains, reverse=True))
        )
        expected.append(dcg / ideal)
    assert found["ndcg_at_10"].tolist() == pytest.approx(expected)


def test_equal_values_earn_nothing_and_broken_ones_are_no_number():
    found = ranked([0.5] * 4, [1.0, 0.0, 0.0, 0.0])
    assert found["mrr_at_10"].tolist() == [0.25] and 0.25 < found["ndcg_at_10"] < 1
    assert ranked([math.nan, 1.0], [1.0, 0.0])["ndcg_at_10"].isnan().all()


def spans(tags):
    """(type, first, last) of one sentence's tags, word by word, as conlleval reads them."""
    found, before = [], "O"
    for i, tag in enumerate(tags):
        if tag != "O" and (tag[0] == "B" or before == "O" or before[2:] != tag[2:]):
            found.append([tag[2:], i, i])
        elif tag != "O":
            found[-1][2] = i
        before = tag
    return {tuple(each) for each in found}


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("I-per I-per O", {("per", 0, 1)}),
        ("B-per I-loc I-loc", {("per", 0, 0), ("loc", 1, 2)}),
        ("B-loc B-loc I-loc", {("loc", 0, 0), ("loc", 1, 2)}),
        ("B-loc O I-loc", {("loc", 0, 0), ("loc", 2, 2)}),
        ("O O O", set()),
    ],
)
def test_entities_begin_at_b_and_at_i_after_o_or_another_type(tags, expected):
    assert spans(tags.split()) == expected
    # A sentence before that ends in I-loc is another one.
    numbers = torch.tensor([NAMES.index(tag) for tag in ("I-loc", *tags.split())])
    sentences = torch.tensor([0, 1, 1, 1])
    found = entity_counts(bio_tags(NAMES), numbers, numbers, sentences)
    assert found[1].tolist() == [len(expected)] * 3 and found[0].tolist() == [1, 1, 1]


def words(rows=80, seed=0, right=0.8):
    """Logits, labels and sentences of words with random tags, and both as lists of names."""
    draw = random.Random(seed)
    labels = [[draw.randrange(5) for _ in range(draw.randint(1, 9))] for _ in range(rows)]
    chosen = [[y if draw.random() < right else draw.randrange(5) for y in row] for row in labels]
    predictions = Predictions(
        torch.eye(5)[[x for row in chosen for x in row]],
        torch.tensor([x for row in labels for x in row]),
        groups=torch.tensor([i for i, row in enumerate(labels) for _ in row]),
        tags=bio_tags(NAMES),
    )
    return predictions, *([[NAMES[x] for x in row] for row in side] for side in (chosen, labels))


def test_entity_scores_are_micro_averages_over_exact_spans():
    predictions, chosen, labels = words()
    own, true = ([spans(row) for row in side] for side in (chosen, labels))
    right = sum(len(a & b) for a, b in zip(own, true, strict=True))
    precision, recall = right / sum(map(len, own)), right / sum(map(len, true))
    found = scores(predictions, regression=False)
    assert list(found) == [
        *("entity_f1", "entity_precision", "entity_recall"),
        *("accuracy", "f1_macro"),
    ]
    assert found["entity_precision"] == pytest.approx(precision)
    assert found["entity_recall"] == pytest.approx(recall)
    assert found["entity_f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_models_that_find_nothing_score_zero():
    nothing = Predictions(
        torch.eye(5)[[0, 0]], torch.tensor([0, 1]), torch.tensor([0, 0]), bio_tags(NAMES)
    )
    assert scores(nothing, regression=False)["entity_f1"] == 0
    nothing.labels[1] = 0
    assert scores(nothing, regression=False)["entity_recall"] == 0


@pytest.mark.parametrize("names", [["NOUN", "VERB"], ["O", "GOOD"], ["O", "B-", "I-x"], None, []])
def test_other_tags_have_no_entities(names):
    assert bio_tags(names) is None


def test_tags_keep_their_meaning_in_any_order_of_the_classes():
    assert bio_tags(["I-per", "B-loc", "O", "I-loc", "B-per"]).tolist() == [-2, 1, 0, -1, 2]


def test_what_is_tested_by_sentence_has_the_mean_of_the_score():
    predictions, _, _ = words()
    teacher, _, _ = words(right=0.9)
    as_saved = [{k: v for k, v in vars(p).items() if v is not None} for p in (predictions, teacher)]
    found, scored = per_sentence(*as_saved), scores(predictions, regression=False)
    for name in ("entity_f1", "accuracy"):
        assert found[name].shape == (80,)
        assert float(found[name].mean()) == pytest.approx(scored[name])
    agreement = predictions.logits.argmax(-1) == teacher.logits.argmax(-1)
    assert float(found["agreement"].mean()) == pytest.approx(float(agreement.float().mean()))


def test_the_error_of_a_difference_in_entity_f1_is_that_of_sentences_drawn_again():
    counts = []
    for right in (0.8, 0.85):
        p, _, _ = words(rows=300, right=right)
        counts.append(entity_counts(p.tags, p.logits.argmax(-1), p.labels, p.groups))
    values = [ratio_by_group(2 * c[:, 0], c[:, 1] + c[:, 2]) for c in counts]
    tested = paired_test((values[0] - values[1])[None])
    draws = torch.randint(300, (2000, 300), generator=torch.Generator().manual_seed(0))
    f1 = [2 * c[draws, 0].sum(1) / c[draws][..., 1:].sum((1, 2)) for c in counts]
    assert tested["standard_error"] == pytest.approx(float((f1[0] - f1[1]).std()), rel=0.1)


def test_rows_of_a_query_are_drawn_together():
    values, queries = torch.tensor([1.0, 3.0, 8.0]), torch.tensor([4, 4, 2])
    assert float(mean_by_group(values, queries).mean()) == pytest.approx(4)
    torch.testing.assert_close(mean_by_group(values, torch.arange(3)), values.double())
    scored = {"logits": torch.tensor([[2.0], [1.0], [0.0]]), "labels": torch.tensor([0.0, 1, 1])}
    found = per_sentence({**scored, "groups": queries}, {**scored, "logits": torch.zeros(3, 1)})
    assert found["mrr_at_10"].tolist() == [0.5] and len(found["mse_to_teacher"]) == 2
    assert float(found["mse_to_teacher"].mean()) == pytest.approx(5 / 3)
