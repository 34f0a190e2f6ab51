"""A step of training asks the device nothing, so that the host can run ahead of it."""

import traceback
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, DataCollatorWithPadding

from kdfast import DistillationArguments, DistillationTrainer, InputError
from kdfast.captured import Needs
from kdfast.distill.capture import Capture
from kdfast.distill.models import cut_student
from kdfast.distill.padding import PADDED_MASKS, PaddingCollator
from kdfast.distill.profile import step_parts
from kdfast.recipes import RECIPES

# What reads a number of the device, or makes a tensor of a size that only the device knows.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::repeat_interleave.Tensor",
}
# What of kdfast looks at numbers of a CPU alone: masks of its tensors, the upstream gradient of
# losses whose gradients are made in their forward pass, the masks and labels of a batch that is
# made, and a reranker's labels where the recipe is given them.
OF_A_CPU = {
    ("arguments.py", "_zeros_and_ones"),
    ("attention_kl.py", "_scaled"),
    ("layer_projection.py", "_scaled"),
    ("padding.py", "__call__"),
    ("terms.py", "label_loss"),
}
OPTIONS = {"fsd": {"clusters": 8}}


class Waits(TorchDispatchMode):
    """Notes the operations that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        by_mask = name.startswith("aten::index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool
            for part in args
            if isinstance(part, (list, tuple))
            for x in part
        )
        if name in WAITING or by_mask:
            stack = traceback.extract_stack()[-9:-1]
            if not OF_A_CPU & {(Path(frame.filename).name, frame.name) for frame in stack}:
                self.found.append(f"{name} in {' < '.join(map(_place, reversed(stack)))}")
        return function(*args, **(kwargs or {}))


def _place(frame):
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"


def run_step(trainer, batch):
    trainer.training_step(trainer.model.train(), dict(batch))
    learned = [*trainer.model.parameters(), *trainer.recipe.parameters()]
    trainer.accelerator.clip_grad_norm_(learned, trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    trainer.model.zero_grad()


def ready(trainer):
    """As before the first step of a training, and a batch for it."""
    trainer._prepare_recipe()
    trainer.create_optimizer_and_scheduler(9)
    trainer.current_gradient_accumulation_steps = 1
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("full", [False, True], ids=["padded", "full"])
@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"custom"}))
def test_a_step_waits_for_nothing(make_trainer, recipe, full):
    trainer = make_trainer(recipe, recipe_options=OPTIONS.get(recipe), optim="sgd")
    batch = ready(trainer)
    assert batch[PADDED_MASKS] == {"attention_mask"}
    if full:
        batch = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
        batch[PADDED_MASKS] = frozenset()
    run_step(trainer, batch)  # what is made once is made here
    with Waits() as waits:
        run_step(trainer, batch)
    assert waits.found == []


@pytest.mark.parametrize("recipe", ["internal", "fsd", "universal", "minilmv2"])
def test_a_training_waits_for_nothing_that_grows_with_its_steps(recipe, make_trainer):
    found = []
    for steps in (5, 10):
        trainer = make_trainer(
            recipe, recipe_options=OPTIONS.get(recipe), max_steps=steps, logging_steps=100,
            save_strategy="no",
        )  # fmt: skip
        with Waits() as waits:
            trainer.train()
        found.append(waits.found)
    # An epoch has six steps: the second one begins a new loader, which draws a seed.
    assert len(found[1]) - len(found[0]) <= 2, found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"custom"}))
def test_a_step_waits_for_nothing_on_a_gpu(make_trainer, recipe):
    trainer = make_trainer(recipe, recipe_options=OPTIONS.get(recipe), use_cpu=False)
    batch = ready(trainer)
    trainer.model_wrapped, trainer.optimizer, trainer.lr_scheduler = trainer.accelerator.prepare(
        trainer.model, trainer.optimizer, trainer.lr_scheduler
    )
    run_step(trainer, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_step(trainer, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("needs", [{"logits": True}, {"attention": (1, 2), "logits": True}])
@pytest.mark.parametrize("full", [False, True], ids=["padded", "full"])
def test_who_is_told_of_padding_gives_the_same_without_looking(teacher, needs, full):
    ids = torch.arange(24).view(3, 8) % 12
    mask = torch.ones_like(ids)
    if not full:
        mask[1, 5:] = 0
    with Capture(teacher.eval(), Needs(**needs)) as capture, torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": mask}
        looked, _ = capture(inputs)
        with Waits() as waits:
            told, captured = capture(inputs, padded=not full)
    assert waits.found == []
    torch.testing.assert_close(told["logits"], looked["logits"])
    assert (captured.attention_mask is None) == full
    assert teacher.config._attn_implementation == "sdpa"


def test_a_full_batch_gives_the_same_losses_whether_its_mask_is_there_or_not(make_trainer):
    trainer = make_trainer("internal", recipe_options={"cosine_rows": "tokens"})
    batch = ready(trainer)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    losses = []
    for padded in (frozenset(), frozenset({"attention_mask"}), None):
        torch.manual_seed(0)
        given = {**batch, PADDED_MASKS: padded}
        losses.append(trainer.compute_loss(trainer.model.train(), given))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_collator_names_the_masks_that_leave_tokens_out():
    def collate(rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    rows = [{"attention_mask": [1, 1], "teacher_attention_mask": [1, k]} for k in (0, 1)]
    assert PaddingCollator(collate)(rows)[PADDED_MASKS] == {"teacher_attention_mask"}
    assert PaddingCollator(collate)(rows[1:])[PADDED_MASKS] == frozenset()
    assert PaddingCollator(lambda rows: rows)(rows) == rows


@pytest.mark.parametrize("dispatch", [None, True])
def test_data_without_numbers_wait_for_nothing_either(make_trainer, dispatch):
    config = {"dispatch_batches": dispatch}
    trainer = make_trainer("internal", accelerator_config=config, optim="sgd")
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    batch = ready(trainer)
    assert PADDED_MASKS in batch
    run_step(trainer, batch)
    with Waits() as waits:
        run_step(trainer, batch)
    assert waits.found == []
    trainer.train()


def test_batches_that_go_from_one_process_to_the_others_are_tensors_alone(
    make_trainer, monkeypatch
):
    trainer = make_trainer("internal")
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    own = trainer.data_collator
    monkeypatch.setattr(
        transformers.Trainer, "get_train_dataloader", lambda self: self.data_collator
    )
    assert isinstance(trainer.get_train_dataloader(), PaddingCollator)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    assert trainer.get_train_dataloader() is own


@pytest.fixture
def reranker(teacher, tiny_bert, tmp_path):
    """Trainers on labels of a plain collator, by these labels."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)

    def make(labels):
        texts = ["good film", "bad", "the film is fine", "awful film"]
        rows = [{**tokenizer(t), "labels": x} for t, x in zip(texts, labels, strict=True)]
        return DistillationTrainer(
            model=cut_student(teacher, 2, task="reranking"),
            args=DistillationArguments(
                str(tmp_path), recipe="labels", use_cpu=True, report_to="none", optim="sgd",
                max_steps=1,
            ),
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
        )  # fmt: skip

    return make


def test_a_rerankers_step_waits_for_nothing(reranker):
    trainer = reranker([0.0, 1.0, 0.5, 1.0])
    batch = ready(trainer)
    run_step(trainer, batch)
    with Waits() as waits:
        run_step(trainer, batch)
    assert waits.found == []


def test_a_rerankers_labels_are_looked_at_where_the_batch_is_made(reranker):
    trainer = reranker([0.0, 3.0, 1.0, 2.0])
    with pytest.raises(InputError, match="from 0 to 3: divide .*data.kind=regression"):
        next(iter(trainer.get_train_dataloader()))
    batch = DataCollatorWithPadding(trainer.processing_class)(trainer.train_dataset)
    with pytest.raises(InputError, match="from 0 to 3: divide"):
        trainer.compute_loss(trainer.model.train(), batch)


SHAPE = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize("family", ["Llama", "ModernBert", "Roberta"])
@pytest.mark.parametrize("full", [False, True], ids=["padded", "full"])
def test_causal_and_local_attention_is_the_same_when_told(family, full):
    config = getattr(transformers, f"{family}Config")(
        **SHAPE, **({"local_attention": 4} if family == "ModernBert" else {})
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    ids = torch.arange(24).view(3, 8) % 50 + 5
    mask = torch.ones_like(ids)
    if not full:
        mask[1, 5:], ids[1, 5:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        own = model(**inputs).logits
        for needs in (Needs(logits=True), Needs(logits=True, attention=(1, 2))):
            with Capture(model, needs) as capture:
                told, _ = capture(inputs, padded=not full)
            torch.testing.assert_close(told["logits"], own)


def test_a_model_that_cannot_be_tried_out_runs_as_it_is(teacher, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no such inputs")

    monkeypatch.setattr(teacher.bert, "forward", refuse)
    with Capture(teacher, Needs(logits=True)) as capture:
        assert capture.replaced is None
        assert teacher.config._attn_implementation == "sdpa"


def test_students_that_take_no_other_inputs_are_profiled(make_trainer):
    """As kdfast's own: nothing that the host found out goes to the model."""
    trainer = make_trainer("soft_labels")
    forward = trainer.model.forward

    def strict(input_ids=None, attention_mask=None, token_type_ids=None, return_dict=None):
        return forward(input_ids, attention_mask, token_type_ids, return_dict=return_dict)

    trainer.model.forward = strict
    trainer.train()
    assert step_parts(trainer, batches=1)
