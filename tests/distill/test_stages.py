"""Stages: when they turn, what they train, how they survive an interruption."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from kdfast import InputError
from kdfast.captured import ModelShape
from kdfast.distill.stages import StageClock, stage_steps
from kdfast.recipes import build_recipe
from kdfast.recipes.schedule import Stage, Threshold, Weight

STUDENT = ModelShape(layers=2, width=8, heads=2, classes=3)
TEACHER = ModelShape(layers=4, width=8, heads=2, classes=3)


@pytest.mark.parametrize(
    ("value", "progress", "expected"),
    [
        (2.0, 0.7, 2.0),
        ([[0, 0], [0.5, 1]], 0.25, 0.5),
        ([[0, 0], [0.5, 1]], 0.9, 1.0),
        ([[0.2, 3], [0.4, 1], [1, 0]], 0.1, 3.0),
        ([[0.2, 3], [0.4, 1], [1, 0]], 0.7, 0.5),
    ],
)
def test_weights_are_linear_between_their_points(value, progress, expected):
    assert Weight(value)(progress) == pytest.approx(expected)


@pytest.mark.parametrize("value", ["high", [[0.5, 1], [0.5, 2]], [[0, -1]], [[0, 1, 2]], [], True])
def test_bad_weights_are_refused(value):
    with pytest.raises(InputError, match="weight"):
        Weight(value)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([{}, {}, {}], [3, 4, 3]),
        ([{"steps": 2}, {}, {}], [2, 4, 4]),
        ([{"epochs": 1.0}, {"epochs": 0.5}, {}], [4, 2, 4]),
        ([{}, {"share": 0.3}], [7, 3]),
        ([{"steps": 2}, {"steps": 2}], [2, 8]),
    ],
)
def test_stages_share_the_steps_that_others_leave(lengths, expected):
    stages = [Stage(str(k), ("labels",), **length) for k, length in enumerate(lengths)]
    assert stage_steps(stages, 10, per_epoch=4) == expected


def test_stages_that_leave_the_last_one_nothing_are_refused():
    with pytest.raises(
        InputError, match="a run of 10 steps is too short .*first 9, second 3, last -2"
    ):
        stage_steps(
            [
                Stage("first", ("a",), steps=9),
                Stage("second", ("a",), steps=3),
                Stage("last", ("a",)),
            ],
            10,
            0,
        )


def clock(threshold=None, steps=(4, 4, 4)):
    options = {} if threshold is None else {"cosine_threshold": threshold, "check_every": 2}
    recipe = build_recipe("internal", STUDENT, TEACHER, schedule="stacked", **options)
    return StageClock(recipe, list(steps))


def turns(clock, losses):
    """The stage before each step."""
    stages = []
    for step, loss in enumerate(losses):
        stages.append(clock.stage)
        if "cosine" in clock.recipe.stages[clock.stage].terms:
            clock.observe({"cosine": torch.tensor(loss)})
        clock.after(step + 1, lambda mean: mean)
    return stages


def test_a_stage_ends_after_its_steps_and_the_last_one_never():
    assert turns(clock(), [1.0] * 14) == [0] * 4 + [1] * 4 + [2] * 6


def test_a_stage_ends_when_the_mean_of_its_loss_between_two_looks_is_below_the_threshold():
    # Looks after 2 and 4 steps: means 0.55, 0.3.
    assert turns(clock(0.5), [1.0, 0.1, 0.5, 0.1] + [1.0] * 4) == [0] * 4 + [1] * 4
    assert turns(clock(0.5), [0.6, 0.3] + [0.4] * 2 + [1.0]) == [0, 0, 1, 1, 2]


def test_a_clock_saved_between_two_looks_turns_as_the_one_that_went_on():
    whole, half = clock(0.5), clock(0.5)
    turns(half, [0.6])
    again = clock(0.5)
    again.load(half.state())
    again.observe({"cosine": torch.tensor(0.3)})
    assert again.after(2, lambda mean: mean)
    assert turns(whole, [0.6, 0.3, 1.0])[2] == again.stage == 1


def test_progress_is_that_of_the_run_and_of_the_stage():
    one = clock()
    one.after(4, lambda mean: mean)
    moment = one.moment(6)
    assert (moment.stage, moment.progress, moment.stage_progress) == (1, 0.5, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check_every": 0, "cosine_threshold": 0.1}, "check_every"),
        ({"cosine_threshold": -1.0}, "threshold"),
        ({"layer_steps": 0}, "longer than 0"),
        ({"layer_steps": 2, "layer_epochs": 1.0}, "one of steps, epochs and share"),
    ],
)
def test_bad_stages_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        build_recipe("internal", STUDENT, TEACHER, schedule="stacked", **options)


def test_a_threshold_on_a_loss_that_the_stage_does_not_train_is_refused():
    with pytest.raises(InputError, match="does not train"):
        build_recipe(
            "internal", STUDENT, TEACHER,
            schedule="stacked", cosine_weight=0.0, cosine_threshold=0.1,
        )  # fmt: skip
    assert Threshold("cosine", 0.1).every == 20


# With models


def state(trainer):
    """Everything that training moves."""
    own = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    return {**own, **{f"recipe.{k}": v for k, v in trainer.recipe.state_dict().items()}}


def test_each_stage_trains_its_own_losses_and_parameters(make_trainer, teacher, capsys):
    trainer = make_trainer(recipe_options={"schedule": "progressive"})
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    losses = [
        {k for k in entry if k.startswith("loss_")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    assert losses == [{"loss_attention_kl", "loss_cosine"}] * 6 + [{"loss_soft_labels"}] * 3
    said = capsys.readouterr().out
    assert "layer 1  ≤ 3" in said and "of student layer 2" in said and "outputs" in said
    # Only the last stage, of three steps, reaches the head: the optimizer has seen it so often.
    optimizer = trainer.optimizer.state
    for name, parameter in trainer.model.named_parameters():
        assert not torch.equal(parameter, before[name])
        upper = 3 if "classifier" in name or "pooler" in name else 6 if "layer.1" in name else 9
        assert int(optimizer[parameter]["step"]) == upper, name


def test_nothing_is_captured_and_no_teacher_runs_in_a_stage_of_labels_alone(make_trainer):
    trainer = make_trainer(
        recipe="universal", recipe_options={"label_share": 0.5}, max_steps=4, save_strategy="no"
    )
    calls = []
    trainer.teacher.register_forward_hook(lambda *_: calls.append(trainer.state.global_step))
    trainer.train()
    assert set(calls) == {0, 1}


def test_the_learning_rate_and_the_optimizers_moments_begin_anew_where_a_stage_says_so(
    make_trainer,
):
    trainer = make_trainer(
        recipe="universal",
        recipe_options={"label_share": 0.5},
        max_steps=8,
        warmup_steps=4,
        save_strategy="no",
    )
    trainer.train()
    assert {int(own["step"]) for own in trainer.optimizer.state.values()} == {4}
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    half = [0.0, 0.5e-3, 1e-3, 0.5e-3]
    assert rates == pytest.approx(half + half, abs=1e-9)


def test_a_schedule_with_a_lowest_rate_restarts_to_that_rate(make_trainer):
    trainer = make_trainer(
        recipe="universal",
        recipe_options={"label_share": 0.5},
        max_steps=8,
        learning_rate=2e-5,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-5},
        save_strategy="no",
    )
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert rates[:4] == pytest.approx(rates[4:]) and min(rates) > 1e-5


def test_too_few_steps_for_the_stages_are_said_before_anything_is_fitted(make_trainer):
    trainer = make_trainer(
        recipe="custom",
        recipe_options={
            "losses": [{"loss": "global", "clusters": 8}],
            "stages": [{"steps": 9}, {"name": "end"}],
        },
    )
    with pytest.raises(InputError, match="too short"):
        trainer.train()
    assert trainer._prepared is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("internal", {"schedule": "stacked", "cosine_threshold": 1.0, "check_every": 2}),
        ("universal", {"label_share": 0.4}),
        ("fsd", {"clusters": 8, "global_weight": [[0, 0], [0.5, 1]]}),
    ],
)
def test_resumed_at_any_step_a_run_ends_with_the_same_bits(make_trainer, tmp_path, recipe, options):
    whole = make_trainer(recipe=recipe, recipe_options=options, max_steps=7)
    whole.train()
    expected = state(whole)
    for step in range(1, 7):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "out" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        resumed = make_trainer(recipe, f"from-{step}", recipe_options=options, max_steps=7)
        resumed.train(resume_from_checkpoint=True)
        assert resumed._clock.state() == whole._clock.state()
        for name, value in state(resumed).items():
            assert torch.equal(value, expected[name]), (step, name)


KILLED = """
    import os, signal, sys
    import datasets, torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from kdfast import DistillationArguments, DistillationTrainer
    from kdfast.distill.data import DistillationCollator, tokenize
    from kdfast.distill.models import cut_student
    from kdfast.distill.trainer import last_whole_checkpoint

    model, output, die_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
    teacher = AutoModelForSequenceClassification.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = ["good film", "bad plot", "the film is fine", "awful film was awful"] * 8
    rows = datasets.Dataset.from_dict({"text": texts, "label": [1, 0, 1, 0] * 8})
    torch.manual_seed(1)
    student = cut_student(teacher, 2, label_names=["neg", "pos"])

    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=DistillationArguments(
            output_dir=output, max_steps=9, use_cpu=True, report_to="none", learning_rate=1e-3,
            per_device_train_batch_size=4, save_steps=1, logging_steps=1, disable_tqdm=True,
            recipe="custom",
            recipe_options={
                "losses": [
                    {"recipe": "internal", "schedule": "stacked", "cosine_threshold": 1e-9,
                     "check_every": 2},
                    {"loss": "global", "weight": 0.1, "clusters": 8},
                    {"loss": "pseudo_projection", "weight": 0.5},
                ]
            },
        ),
        train_dataset=tokenize(rows, tokenizer, 32),
        data_collator=DistillationCollator(tokenizer),
        processing_class=tokenizer,
        callbacks=[Die()],
    )
    trainer.train(resume_from_checkpoint=bool(last_whole_checkpoint(output)))
    trainer.save_model(output + "/end")
"""


@pytest.mark.slow
def test_killed_in_every_stage_a_run_ends_with_the_bits_of_the_uninterrupted_one(
    tiny_bert, tmp_path
):
    """Stages, threshold sums, memory, pseudo classifiers, optimizer, schedule and random state."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(KILLED))

    def run(folder, die_at):
        command = [sys.executable, script, tiny_bert, tmp_path / folder, str(die_at)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        return result.returncode, result.stderr[-4000:]

    assert run("whole", 0)[0] == 0
    for step in (2, 5, 8):  # one in each stage of three steps
        assert run("killed", step)[0] == -signal.SIGKILL
    code, errors = run("killed", 0)
    assert code == 0, errors
    for name in ("model.safetensors", "kdfast_state.safetensors"):
        one, two = (load_file(tmp_path / f / "end" / name) for f in ("whole", "killed"))
        assert one and all(torch.equal(value, two[key]) for key, value in one.items())
    assert os.path.isfile(tmp_path / "killed" / "end" / "kdfast_state.safetensors")
