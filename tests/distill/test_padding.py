"""Padding that was put on beforehand is cut where batches are made."""

import pytest
import torch
from transformers import DataCollatorWithPadding

from kdfast.distill.data import DistillationCollator
from kdfast.distill.padding import PADDED_MASKS, PaddingCollator
from kdfast.distill.teacher_cache import ROW
from kdfast.recipes import RECIPES

OPTIONS = {"fsd": {"clusters": 8, "max_length": 24}}


def pad(row, width=24):
    more = width - len(row["input_ids"])
    zeros = {"input_ids", "attention_mask", "token_type_ids"} & row.keys()
    return {name: [*row[name], *[0] * more] for name in zeros}


@pytest.fixture
def padded(make_trainer):
    """make_trainer with texts padded to 24 tokens beforehand, and a collator that leaves them."""

    def make(recipe="internal", **changes):
        trainer = make_trainer(recipe, recipe_options=OPTIONS.get(recipe), **changes)
        trainer.train_dataset = trainer.train_dataset.map(pad)
        trainer.data_collator = DataCollatorWithPadding(trainer.processing_class)
        return trainer

    return make


def first_batch(trainer):
    torch.manual_seed(5)
    return next(iter(trainer.get_train_dataloader()))


def loss_and_gradients(trainer, batch):
    trainer.model.train().zero_grad()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    named = dict(trainer.model.named_parameters())
    return loss.detach(), {n: p.grad.clone() for n, p in named.items() if p.grad is not None}


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"custom"}))
def test_losses_and_gradients_are_those_of_the_longer_batch(recipe, padded):
    trainer = padded(recipe)
    trainer._prepare_recipe()
    batch = first_batch(trainer)
    width = int(batch["attention_mask"].sum(1).max())
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert all(batch[name].shape[1] == width < 24 for name in names)
    longer = {name: torch.nn.functional.pad(batch[name], (0, 24 - width)) for name in names}
    longer = {**batch, **longer, PADDED_MASKS: frozenset({"attention_mask"})}
    if recipe != "universal":  # whose pseudo classifiers read fp32
        for module in (trainer.model, trainer.teacher, trainer.recipe):
            if module is not None:  # angles of rkd would be rounded by more than the tolerance
                module.double()
    loss, gradients = loss_and_gradients(trainer, batch)
    expected, of_longer = loss_and_gradients(trainer, longer)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == of_longer.keys()
    torch.testing.assert_close(gradients, of_longer, rtol=1e-3, atol=1e-5)


def test_a_cache_gives_what_the_teacher_says_of_the_cut_batch(padded, tmp_path):
    trainer = padded(teacher_cache=str(tmp_path))
    trainer._fill_cache()
    batch = first_batch(trainer)
    assert batch[ROW].mask.shape == batch["input_ids"].shape and batch["input_ids"].shape[1] < 24
    cached = loss_and_gradients(trainer, batch)
    trainer._cache = None
    torch.testing.assert_close(cached, loss_and_gradients(trainer, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("why", ["pad_to", "counted", "compiled", "recorded"])
def test_nothing_is_cut_where_one_length_is_wanted(why, padded, monkeypatch):
    monkeypatch.setattr("kdfast.distill.trainer._check_graphs", lambda args: None)
    trainer = padded(cuda_graphs=why == "recorded")
    if why == "pad_to":
        trainer.data_collator = DistillationCollator(trainer.processing_class, pad_to=24)
    if why == "counted":
        next(iter(trainer.recipe.terms.values())).padding = "counted"
    trainer.args.torch_compile = why == "compiled"
    assert first_batch(trainer)["input_ids"].shape[1] == 24


def collator(**columns):
    return PaddingCollator(lambda rows: columns, cut=True)


MASK = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])


def test_all_columns_of_that_model_are_cut_and_no_others():
    labels = MASK * 101 - 100
    made = collator(
        attention_mask=MASK,
        input_ids=MASK * 7,
        labels=labels,
        teacher_attention_mask=torch.ones(2, 3),
        teacher_input_ids=torch.ones(2, 3),
        number=torch.arange(2),
        grades=torch.ones(2, 3),
    )([])
    assert torch.equal(made["attention_mask"], MASK[:, :2])
    assert torch.equal(made["input_ids"], MASK[:, :2] * 7)
    assert torch.equal(made["labels"], labels[:, :2])
    assert made["teacher_input_ids"].shape == made["grades"].shape == (2, 3)
    assert made[PADDED_MASKS] == {"attention_mask"}
    full = collator(attention_mask=MASK[:1], input_ids=MASK[:1])([])
    assert full[PADDED_MASKS] == frozenset() and full["input_ids"].shape == (1, 2)


def test_widths_that_were_equal_stay_so():
    made = collator(attention_mask=MASK, teacher_attention_mask=MASK.roll(1, 1))([])
    assert made["attention_mask"].shape == made["teacher_attention_mask"].shape == (2, 3)
    made = collator(attention_mask=MASK, teacher_input_ids=MASK)([])
    assert made["attention_mask"].shape == made["teacher_input_ids"].shape == (2, 4)


def test_one_column_stays_and_multiples_and_labels_too():
    assert collator(attention_mask=MASK * 0)([])["attention_mask"].shape == (2, 1)
    labelled = torch.tensor([[-100, -100, 1, -100]] * 2)
    assert collator(attention_mask=MASK, labels=labelled)([])["labels"].shape == (2, 3)

    class Multiple:
        pad_to_multiple_of = 3

        def __call__(self, rows):
            return {"attention_mask": torch.cat([MASK, MASK * 0], 1)}

    assert PaddingCollator(Multiple(), cut=True)([])["attention_mask"].shape == (2, 3)


def test_what_has_further_dimensions_is_left_as_it_is():
    made = collator(attention_mask=MASK, boxes=torch.ones(2, 4, 4))([])
    assert made["attention_mask"].shape == (2, 4)
