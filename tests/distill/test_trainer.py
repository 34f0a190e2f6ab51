"""DistillationTrainer: what it trains, logs, saves, resumes and refuses."""

import json
import shutil

import datasets
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    RobertaConfig,
)

import kdfast
from kdfast import DistillationArguments, DistillationTrainer, InputError
from kdfast.distill.data import DistillationCollator, tokenize
from kdfast.distill.models import cut_student
from kdfast.distill.trainer import STATE_FILE, last_whole_checkpoint
from kdfast.recipes import RECIPES


@pytest.fixture
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture
def train(tokenizer, make_sentences):
    texts, labels = zip(*make_sentences(48), strict=True)
    rows = datasets.Dataset.from_dict(
        {"text": list(texts), "label": [int(label == "pos") for label in labels]}
    )
    return tokenize(rows, tokenizer, 32)


def student_of(teacher, layers=2):
    torch.manual_seed(1)
    return cut_student(teacher, layers, label_names=["neg", "pos"])


def without_dropout(student):
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return student


def arguments(tmp_path, **changes):
    values = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return DistillationArguments(**values)


# Memories of as many centroids as 48 sentences allow.
OPTIONS = {"fsd": {"clusters": 8}}


def trainer_for(tmp_path, teacher, tokenizer, train, student=None, **changes):
    changes.setdefault("recipe_options", OPTIONS.get(changes.get("recipe")))
    return DistillationTrainer(
        model=student_of(teacher) if student is None else student,
        teacher=teacher,
        args=arguments(tmp_path, **changes),
        train_dataset=train,
        data_collator=DistillationCollator(tokenizer),
        processing_class=tokenizer,
    )


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_trainer_is_reached_from_the_package():
    assert kdfast.DistillationTrainer is DistillationTrainer


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"custom"}))
def test_training_moves_the_student_and_leaves_the_teacher(
    recipe, tmp_path, teacher, tokenizer, train
):
    trainer = trainer_for(tmp_path, teacher, tokenizer, train, recipe=recipe)
    before_t, before_s = weights(teacher), weights(trainer.model)
    trainer.train()
    assert all(torch.equal(v, before_t[k]) for k, v in teacher.state_dict().items())
    moved = [not torch.equal(v, before_s[k]) for k, v in trainer.model.state_dict().items()]
    assert sum(moved) > len(moved) / 2


def test_internal_losses_go_down_on_one_repeated_batch(tmp_path, teacher, tokenizer, train):
    trainer = trainer_for(
        *(tmp_path, teacher, tokenizer, train.select(range(8))), max_steps=30, logging_steps=1
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    for term in ("loss_attention_kl", "loss_cosine", "loss_soft_labels"):
        assert log[-1][term] < log[0][term]


def test_loss_terms_are_logged_apart_and_add_up(tmp_path, teacher, tokenizer, train):
    trainer = trainer_for(
        *(tmp_path, teacher, tokenizer, train), recipe_options={"cosine_weight": 3.0}
    )
    trainer.train()
    for entry in [e for e in trainer.state.log_history if "loss" in e]:
        total = entry["loss_attention_kl"] + 3 * entry["loss_cosine"] + entry["loss_soft_labels"]
        assert entry["loss"] == pytest.approx(total, rel=1e-3)


def test_recipe_options_may_come_as_json_from_a_command_line(tmp_path, teacher, tokenizer, train):
    trainer = trainer_for(
        *(tmp_path, teacher, tokenizer, train), recipe_options='{"cosine_weight": 0.0}'
    )
    assert "cosine" not in trainer.recipe.terms


def first_gradient(trainer):
    """Student gradients at the first optimizer step."""
    seen = {}

    class Stop(Exception):
        pass

    def stop(*_, **__):
        seen.update(
            {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        )
        raise Stop

    trainer.accelerator.clip_grad_norm_ = stop
    with pytest.raises(Stop):
        trainer.train()
    return seen


@pytest.mark.parametrize(
    ("collator", "padding", "width"),
    [
        (DistillationCollator, {}, 11),
        (DistillationCollator, {"pad_to": 24}, 24),
        (DataCollatorWithPadding, {"pad_to_multiple_of": 8}, 16),
        (DataCollatorWithPadding, {"padding": "max_length"}, 64),
        (DataCollatorWithPadding, {"padding": "max_length", "max_length": 20}, 20),
        (
            DataCollatorWithPadding,
            {"padding": "max_length", "max_length": 20, "pad_to_multiple_of": 8},
            24,
        ),
    ],
)
def test_the_memories_are_as_wide_as_the_collators_batches(
    collator, padding, width, tmp_path, teacher, tokenizer, train
):
    trainer = DistillationTrainer(
        model=student_of(teacher),
        teacher=teacher,
        args=arguments(tmp_path, recipe="fsd", recipe_options=OPTIONS["fsd"], max_steps=6),
        train_dataset=train,
        data_collator=collator(tokenizer, **padding),
        processing_class=tokenizer,
    )
    assert trainer.recipe.options["max_length"] == width
    trainer.train()


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("internal", {"cosine_rows": "tokens"}),
        ("fsd", {"local_weight": 0.0, "clusters": 8}),
        ("universal", {"label_weight": 1.0, "label_share": 0.0}),
    ],
)
def test_accumulated_small_batches_give_the_gradient_of_the_large_batch(
    recipe, options, tmp_path, teacher, tokenizer, train
):
    """Of sentences of any length, with a last batch that is not full: 14 rows by 4."""
    rows = train.select(range(14))
    gradients = []
    for batch, steps in ((14, 1), (4, 4)):
        student = without_dropout(student_of(teacher))
        trainer = trainer_for(
            *(tmp_path, teacher, tokenizer, rows, student),
            recipe=recipe,
            recipe_options=options,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            prepared_dir=str(tmp_path / "prepared"),
        )
        trainer.skip_preparation()
        torch.manual_seed(3)
        for part in trainer.recipe.fitted.values():
            part.stand_in()
        gradients.append(first_gradient(trainer))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_terms_that_couple_samples_are_named_and_not_weighed(tmp_path, teacher, tokenizer, train):
    trainer = trainer_for(tmp_path, teacher, tokenizer, train, recipe="fsd")
    assert [n for n, t in trainer.recipe.terms.items() if t.couples_samples] == ["local"]
    assert "local: couples the samples" in trainer.recipe.table()


def test_the_saved_student_is_plain_transformers(tmp_path, teacher, tokenizer, train):
    trainer = trainer_for(tmp_path, teacher, tokenizer, train)
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert "kdfast" not in (tmp_path / "student" / "config.json").read_text()
    batch = DistillationCollator(tokenizer)([train[i] for i in range(8)])
    batch.pop("labels")
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(saved(**batch).logits, trainer.model(**batch).logits)


def test_learned_parts_of_the_recipe_are_trained_and_saved_apart(
    tmp_path, teacher, tokenizer, train
):
    trainer = trainer_for(tmp_path, teacher, tokenizer, train, recipe="universal")
    before = weights(trainer.recipe)
    trainer.train()
    assert all(not torch.equal(v, before[k]) for k, v in trainer.recipe.state_dict().items())
    folder = tmp_path / "out" / "checkpoint-4"
    saved = load_file(folder / STATE_FILE)
    assert all(torch.equal(v, saved[k]) for k, v in trainer.recipe.state_dict().items())
    assert not set(saved) & set(load_file(folder / "model.safetensors"))


def test_a_recipe_without_learned_parts_saves_its_name_and_options(
    tmp_path, teacher, tokenizer, train
):
    trainer_for(tmp_path, teacher, tokenizer, train, recipe_options={"padding": "counted"}).train()
    with safe_open(tmp_path / "out" / "checkpoint-4" / STATE_FILE, "pt") as state:
        assert not state.keys()
        kept = state.metadata()
    assert kept["recipe"] == "internal"
    assert json.loads(kept["options"]) == {"padding": "counted"}


@pytest.mark.parametrize("recipe", ["internal", "universal"])
def test_a_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(
    recipe, tmp_path, teacher, tokenizer, train
):
    whole = trainer_for(tmp_path / "a", teacher, tokenizer, train, recipe=recipe)
    whole.train()
    shutil.copytree(tmp_path / "a" / "out", tmp_path / "b" / "out")
    shutil.rmtree(tmp_path / "b" / "out" / "checkpoint-4")
    resumed = trainer_for(tmp_path / "b", teacher, tokenizer, train, recipe=recipe)
    resumed.train(resume_from_checkpoint=True)
    for model, other in ((whole.model, resumed.model), (whole.recipe, resumed.recipe)):
        for name, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_a_checkpoint_cut_off_while_writing_is_passed_over(tmp_path, teacher, tokenizer, train):
    trainer_for(tmp_path, teacher, tokenizer, train).train()
    state = tmp_path / "out" / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    assert last_whole_checkpoint(tmp_path / "out").endswith("checkpoint-2")


def test_resuming_another_recipes_checkpoint_is_refused(tmp_path, teacher, tokenizer, train):
    trainer_for(tmp_path, teacher, tokenizer, train, recipe="soft_labels").train()
    other = trainer_for(tmp_path, teacher, tokenizer, train, recipe="universal")
    with pytest.raises(InputError, match=STATE_FILE):
        other.train(resume_from_checkpoint=True)


def test_evaluation_gives_logits_only_and_the_students_own_loss(
    tmp_path, teacher, tokenizer, train
):
    trainer = trainer_for(tmp_path, teacher, tokenizer, train)
    prediction = trainer.predict(train)
    assert prediction.predictions.shape == (48, 2)
    assert prediction.metrics["test_loss"] == pytest.approx(0.693, abs=0.2)


def test_student_attention_dropout_is_zero_by_default_and_kept_on_request(
    tmp_path, teacher, tokenizer, train
):
    student = student_of(teacher)
    trainer_for(tmp_path, teacher, tokenizer, train, student)
    assert student.bert.encoder.layer[0].attention.self.dropout.p == 0.0
    assert student.bert.encoder.layer[0].attention.output.dropout.p == 0.1
    student = student_of(teacher)
    trainer_for(tmp_path, teacher, tokenizer, train, student, attention_dropout=None)
    assert student.bert.encoder.layer[0].attention.self.dropout.p == 0.1


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path, teacher, tokenizer, train):
    gradients = []
    for checkpointing in (False, True):
        student = without_dropout(student_of(teacher))
        trainer = trainer_for(
            *(tmp_path, teacher, tokenizer, train, student), gradient_checkpointing=checkpointing
        )
        gradients.append(first_gradient(trainer))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["internal", pytest.param("universal", marks=pytest.mark.exhaustive)]
)
def test_compiled_models_train_to_the_same_student(recipe, tmp_path, teacher, tokenizer, train):
    ends = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.reset()
        student = without_dropout(student_of(teacher))
        trainer = trainer_for(
            *(tmp_path, teacher, tokenizer, train, student), recipe=recipe, **compiled
        )
        trainer.train()
        ends.append({name: p.detach().clone() for name, p in student.named_parameters()})
    for name, parameter in ends[0].items():
        torch.testing.assert_close(ends[1][name], parameter, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", ["internal", "fsd", "universal"])
def test_bf16_autocast_trains(recipe, tmp_path, teacher, tokenizer, train):
    trainer = trainer_for(tmp_path, teacher, tokenizer, train, bf16=True, recipe=recipe)
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("recipe", ["internal", "fsd", "universal"])
def test_a_bf16_teacher_trains_an_fp32_student(recipe, tmp_path, teacher, tokenizer, train):
    student = student_of(teacher)
    trainer = trainer_for(
        *(tmp_path, teacher.to(torch.bfloat16), tokenizer, train, student), recipe=recipe
    )
    trainer.train()
    assert teacher.dtype == torch.bfloat16
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.fixture
def other_teacher(tmp_path, make_tiny_bert):
    """A teacher with another vocabulary."""
    folder = make_tiny_bert(tmp_path / "other", words=["good", "bad", "film"])
    return (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )


def both(make_sentences, tokenizer, teacher_tokenizer):
    texts, labels = zip(*make_sentences(24), strict=True)
    rows = datasets.Dataset.from_dict(
        {"text": list(texts), "label": [int(label == "pos") for label in labels]}
    )
    return tokenize(rows, tokenizer, 32, teacher_tokenizer)


def test_each_model_reads_the_text_itself_where_vocabularies_differ(
    tmp_path, teacher, tokenizer, other_teacher, make_sentences
):
    other, other_tokenizer = other_teacher
    seen = []
    other.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].max().item()), with_kwargs=True
    )
    trainer = DistillationTrainer(
        model=student_of(teacher),
        teacher=other,
        args=arguments(tmp_path, recipe="universal"),
        train_dataset=both(make_sentences, tokenizer, other_tokenizer),
        data_collator=DistillationCollator(tokenizer, other_tokenizer),
        processing_class=tokenizer,
        teacher_processing_class=other_tokenizer,
    )
    trainer.train()
    assert max(seen) < 8  # the teacher's vocabulary ends there, the student's does not


def test_token_losses_between_different_vocabularies_are_refused(
    tmp_path, teacher, tokenizer, other_teacher, train
):
    with pytest.raises(InputError, match="attention_kl of this recipe compare token by token"):
        DistillationTrainer(
            model=student_of(teacher), teacher=other_teacher[0], args=arguments(tmp_path)
        )


def test_different_vocabularies_without_teacher_columns_are_refused(
    tmp_path, teacher, tokenizer, other_teacher, train
):
    trainer = DistillationTrainer(
        model=student_of(teacher),
        teacher=other_teacher[0],
        args=arguments(tmp_path, recipe="soft_labels"),
        train_dataset=train,
        data_collator=DistillationCollator(tokenizer),
    )
    with pytest.raises(InputError, match="teacher_input_ids"):
        trainer.train()


def test_a_teacher_of_another_family_is_given_the_inputs_it_knows(
    tmp_path, teacher, tokenizer, train
):
    config = RobertaConfig(
        vocab_size=teacher.config.vocab_size, hidden_size=32, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=64, max_position_embeddings=66, pad_token_id=0,
    )  # fmt: skip
    roberta = AutoModelForSequenceClassification.from_config(config)
    trainer_for(tmp_path, roberta, tokenizer, train, student_of(teacher)).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "intrenal"}, "did you mean 'internal'"),
        ({"recipe_options": {"cosine": 1}}, "did you mean 'cosine"),
        ({"recipe_options": "{'a'"}, "JSON"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"attention_dropout": 1.5}, "attention_dropout"),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
            "use_reentrant",
        ),
    ],
)
def test_bad_arguments_are_refused_before_training(
    changes, message, tmp_path, teacher, tokenizer, train
):
    with pytest.raises(InputError, match=message):
        trainer_for(tmp_path, teacher, tokenizer, train, **changes)


@pytest.mark.parametrize("drawn", [0, 3])
def test_learned_parts_start_from_the_seed_whatever_was_drawn_before(
    drawn, tmp_path, teacher, tokenizer, train
):
    torch.rand(drawn)
    recipe = trainer_for(tmp_path, teacher, tokenizer, train, recipe="universal").recipe
    torch.manual_seed(42)  # the Trainer's default seed
    expected = torch.nn.Linear(32, 2).weight
    assert torch.equal(next(recipe.parameters()), expected)


def test_the_users_own_optimizer_trains_the_recipes_parts_too(tmp_path, teacher, tokenizer, train):
    student = student_of(teacher)
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments(tmp_path, recipe="universal"),
        train_dataset=train,
        data_collator=DistillationCollator(tokenizer),
        optimizers=(torch.optim.SGD(student.parameters(), lr=0.1), None),
    )
    before = weights(trainer.recipe)
    trainer.train()
    assert all(not torch.equal(v, before[k]) for k, v in trainer.recipe.state_dict().items())


def test_two_trainers_may_share_a_teacher(tmp_path, teacher, tokenizer, train):
    first = trainer_for(tmp_path / "a", teacher, tokenizer, train)
    second = trainer_for(tmp_path / "b", teacher, tokenizer, train)
    first.close()
    second.train()
    second.close()
    assert teacher.config._attn_implementation == "sdpa"


def test_the_recipe_is_announced_once_training_begins(tmp_path, teacher, tokenizer, train, capsys):
    trainer_for(tmp_path, teacher, tokenizer, train).train()
    out = capsys.readouterr().out
    assert "attention maps by KL" in out
    assert "student layer  1  2" in out and "teacher layer  2  4" in out
    assert "attention dropout set to 0 in 2 layers" in out


def test_labels_in_another_order_are_refused(tmp_path, teacher, tokenizer, train):
    student = student_of(teacher)
    student.config.id2label = {0: "pos", 1: "neg"}
    with pytest.raises(InputError, match="id2label"):
        trainer_for(tmp_path, teacher, tokenizer, train, student)


def test_multi_label_classifiers_are_refused(tmp_path, teacher, tokenizer, train):
    teacher.config.problem_type = "multi_label_classification"
    with pytest.raises(InputError, match="multi-label"):
        trainer_for(tmp_path, teacher, tokenizer, train)


def test_a_teacher_given_by_name_is_refused_with_what_to_do(tmp_path, teacher, tokenizer, train):
    with pytest.raises(InputError, match="from_pretrained"):
        trainer_for(tmp_path, "some/teacher", tokenizer, train, student_of(teacher))


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_a_model_compiled_already_is_refused_with_what_to_do(role, tmp_path, teacher):
    models = {"model": student_of(teacher), "teacher": teacher}
    models[role] = torch.compile(models[role])
    with pytest.raises(InputError, match=f"{role} is compiled already.* torch_compile=True"):
        DistillationTrainer(**models, args=arguments(tmp_path))


def test_a_missing_teacher_is_refused(tmp_path, teacher, tokenizer, train):
    with pytest.raises(InputError, match="needs a teacher"):
        DistillationTrainer(model=teacher, args=arguments(tmp_path), train_dataset=train)


def test_a_model_cannot_teach_itself(tmp_path, teacher):
    with pytest.raises(InputError, match="same object"):
        DistillationTrainer(model=teacher, teacher=teacher, args=arguments(tmp_path))


def test_rows_without_a_label_do_not_count_in_accumulated_batches(
    tmp_path, teacher, tokenizer, train
):
    labels = [-100 if k % 3 == 0 else label for k, label in enumerate(train["labels"])]
    rows = train.remove_columns("labels").add_column("labels", labels).select(range(12))
    gradients = []
    for batch, steps in ((12, 1), (3, 4)):
        student = without_dropout(student_of(teacher))
        trainer = trainer_for(
            *(tmp_path, teacher, tokenizer, rows, student),
            recipe="labels",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        )
        gradients.append(first_gradient(trainer))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", ["alp", "internal"])
def test_a_narrower_student_in_half_precision_trains(recipe, tmp_path, teacher, tokenizer, train):
    student = cut_student(teacher, 2, width=16, label_names=["neg", "pos"]).to(torch.bfloat16)
    options = {} if recipe == "alp" else {"cosine_rows": "tokens", "relation_heads": 4}
    trainer = trainer_for(
        *(tmp_path, teacher, tokenizer, train, student), recipe=recipe, recipe_options=options
    )
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_scheduler_of_ones_own_is_refused_where_it_would_miss_parameters_or_stages(
    tmp_path, teacher, tokenizer, train
):
    def with_scheduler(recipe, **options):
        trainer = trainer_for(
            *(tmp_path, teacher, tokenizer, train), recipe=recipe, recipe_options=options
        )
        optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
        trainer.optimizer = optimizer
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return trainer

    with pytest.raises(InputError, match="parameters of its own"):
        with_scheduler("universal", label_share=0.0).train()
    with pytest.raises(InputError, match="begins anew with stage 'labels'"):
        with_scheduler("annealing").train()
    with_scheduler("internal").train()


def test_a_checkpoint_of_other_options_is_not_resumed(tmp_path, teacher, tokenizer, train):
    options = {"schedule": "stacked"}
    trainer_for(tmp_path, teacher, tokenizer, train, recipe_options=options).train()
    other = trainer_for(
        *(tmp_path, teacher, tokenizer, train), recipe_options={"schedule": "progressive"}
    )
    with pytest.raises(InputError, match="schedule 'stacked', and this one has 'progressive'"):
        other.train(resume_from_checkpoint=True)


def test_a_link_of_a_chain_is_not_trained_from_its_far_end(tmp_path, teacher, tokenizer, train):
    with pytest.raises(InputError, match="one link of that chain"):
        trainer_for(
            *(tmp_path, teacher, tokenizer, train),
            recipe="takd",
            recipe_options={"assistants": [3]},
        )


def test_a_student_that_shares_parameters_with_its_teacher_is_refused(
    tmp_path, teacher, tokenizer, train
):
    student = student_of(teacher)
    student.bert.embeddings = teacher.bert.embeddings
    with pytest.raises(InputError, match="shares .* parameters with teacher"):
        trainer_for(tmp_path, teacher, tokenizer, train, student)


def test_what_labels_are_missing_for_is_said_before_anything_is_fitted(
    tmp_path, teacher, tokenizer, train
):
    rows = train.remove_columns("labels")
    trainer = trainer_for(tmp_path, teacher, tokenizer, rows, recipe="universal")
    with pytest.raises(InputError, match="classification and projection.teacher .*no|has none"):
        trainer.train()


def test_reentrant_checkpointing_set_on_the_model_itself_is_refused(
    tmp_path, teacher, tokenizer, train
):
    student = student_of(teacher)
    student.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(InputError, match="reentrant"):
        trainer_for(tmp_path, teacher, tokenizer, train, student)
