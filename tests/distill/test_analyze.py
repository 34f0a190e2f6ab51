"""`kdfast analyze`: CKA of all layers of two models, and the weights of a layer projection."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from kdfast.captured import ModelShape
from kdfast.cli import main
from kdfast.distill.capture import model_shape
from kdfast.recipes import build_recipe


@pytest.fixture
def run(csv_file, tmp_path, capsys):
    """Analyzes two models on the sentences made here; returns status, results and the output."""

    def call(*arguments):
        target = tmp_path / "analysis"
        few = ("data.teacher_train=0", "data.student_train=0", "data.dev=0", "data.test=40")
        status = main(
            [
                *("analyze", *map(str, arguments), "--data", str(csv_file)),
                *("--output", str(target), "data.max_length=32", *few),
            ]
        )
        file = target / "analysis.json"
        captured = capsys.readouterr()
        results = json.loads(file.read_text()) if file.is_file() else None
        return status, results, captured.out + captured.err, target

    return call


def test_a_model_is_like_itself_and_both_files_are_written(run, tiny_bert):
    status, results, out, target = run(tiny_bert, tiny_bert)
    assert status == 0 and "CKA over all tokens of 40 sentences" in out
    matrix = torch.tensor(results["cka"])
    assert matrix.shape == (5, 5)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix, matrix.T, atol=1e-5, rtol=0)
    assert results["projection_weights"] is None
    assert (target / "cka.png").stat().st_size > 5000
    assert "already has an analysis" in run(tiny_bert, tiny_bert)[2]


def test_models_of_different_tokenisers_meet_in_their_first_token_and_it_is_said(
    run, tiny_bert, tmp_path, make_tiny_bert
):
    other = make_tiny_bert(tmp_path / "other", layers=2, words=["good", "bad", "film"])
    status, results, out, _ = run(other, tiny_bert)
    assert status == 0 and "[CLS]" in results["rows"] and "tokenisers differ" in out
    assert torch.tensor(results["cka"]).shape == (3, 5)


def test_alp_weights_follow_from_the_states_alone(run, tiny_bert, tmp_path, make_tiny_bert):
    student = make_tiny_bert(tmp_path / "student", layers=2)
    status, results, _, target = run(student, tiny_bert, "--recipe", "alp")
    weights = torch.tensor(results["projection_weights"])
    assert status == 0 and weights.shape == (2, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert (target / "projection_weights.png").is_file()


@pytest.mark.parametrize("options", [{"scale": "width"}, {"rows": "tokens", "temperature": 3.0}])
def test_an_alp_students_weights_are_those_of_the_options_it_was_trained_with(
    options, run, tiny_bert, tmp_path, make_trainer
):
    trainer = make_trainer("alp", recipe_options=options, max_steps=1, save_strategy="no")
    trainer.train()
    student = tmp_path / "student"
    trainer.save_model(str(student))
    _, found, _, _ = run(student, tiny_bert)
    assert found["recipe"] == {"name": "alp", **options}
    asked = json.dumps({"name": "alp", **options})
    _, again, _, _ = run(student, tiny_bert, "--recipe", asked, "overwrite=true")
    _, others, _, _ = run(
        student, tiny_bert, "--recipe", "{name: alp, scale: 0.1}", "overwrite=true"
    )
    assert found["projection_weights"] == again["projection_weights"]
    assert found["projection_weights"] != others["projection_weights"]


def test_weights_are_left_out_beside_a_model_that_was_not_the_teacher(
    run, tmp_path, make_trainer, make_tiny_bert
):
    trainer = make_trainer(
        "alp", recipe_options={"rows": "tokens"}, max_steps=1, save_strategy="no"
    )
    student = tmp_path / "student"
    trainer.save_model(str(student))
    for changes, why in (
        ({"width": 16}, "does not fit these two models"),
        ({"words": ["good", "bad", "film"]}, "the tokenisers differ"),
    ):
        other = make_tiny_bert(tmp_path / "other", **changes)
        status, results, out, _ = run(student, other, "overwrite=true")
        assert status == 0 and "no layer-projection weights: " in out and why in out
        assert results["projection_weights"] is None


def test_universal_weights_are_those_of_the_state_beside_the_student(
    run, tiny_bert, tmp_path, make_tiny_bert
):
    student = make_tiny_bert(tmp_path / "student", layers=3)
    assert "has no kdfast_state" in run(student, tiny_bert, "--recipe", "universal")[2]
    shapes = [
        model_shape(AutoModelForSequenceClassification.from_pretrained(folder))
        for folder in (student, tiny_bert)
    ]
    torch.manual_seed(0)
    recipe = build_recipe("universal", *shapes, temperature=3.0)
    assert isinstance(shapes[0], ModelShape)
    options = json.dumps(recipe.options)
    file = student / "kdfast_state.safetensors"
    save_file(recipe.state_dict(), file, metadata={"recipe": "universal", "options": options})
    status, results, _, _ = run(student, tiny_bert)
    assert status == 0 and results["recipe"] == {"name": "universal", "temperature": 3.0}
    weights = torch.tensor(results["projection_weights"])
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    state = load_file(file)
    save_file(
        {k: torch.zeros(len(v), *([9] * (v.dim() - 1))) for k, v in state.items()},
        file,
        metadata={"recipe": "universal", "options": options},
    )
    assert "does not fit" in run(student, tiny_bert, "overwrite=true")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere/at/all",), "nowhere/at/all"),
        (("--recipe", "fsd"), "no layer projection"),
        (("--recipe", "alpp"), "did you mean 'alp'"),
        (("sentneces=9",), "did you mean 'sentences'"),
    ],
)
def test_bad_input_gets_one_line(run, tiny_bert, arguments, message):
    models = (
        (tiny_bert, arguments[0]) if "/" in arguments[0] else (tiny_bert, tiny_bert, *arguments)
    )
    status, results, out, _ = run(*models)
    assert status == 2 and message in out and results is None
