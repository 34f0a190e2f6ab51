"""`kdfast compare`: tuning on dev, students over seeds, the test between them, going on."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from kdfast.cli import main
from kdfast.distill import compare as comparing
from kdfast.distill import student as training
from kdfast.distill.config import CompareConfig, read_config
from kdfast.distill.significance import holm
from kdfast.distill.significance import test as paired_test
from kdfast.errors import InputError


@pytest.fixture
def settings(tiny_bert, csv_file, tmp_path):
    """A comparison of seconds; returns its configuration's path and its directory."""
    run_dir = tmp_path / "run"
    config = {
        "data": {
            "path": str(csv_file),
            "teacher_train": 0,
            "student_train": 40,
            "dev": 20,
            "test": 40,
            "max_length": 32,
        },
        "teacher": str(tiny_bert),
        "student": {"base": str(tiny_bert), "layers": 1},
        "ways": [
            "soft_labels",
            {
                "name": "internal",
                "tuning": [{"cosine_weight": 0.5}, {"training": {"learning_rate": 1e-3}}],
                "seeds": [1, 2, 3],
            },
            {"name": "internal", "label": "wider", "student": {"layers": 2}},
        ],
        "seeds": [1, 2],
        "training": {"steps": 3, "batch_size": 8, "log_every": 1},
        "tfidf": False,
        "cka_sentences": 8,
        "output_dir": str(run_dir),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, run_dir


def scored(results):
    return {(r["way"], r["seed"]): (r["accuracy"], r["kl_to_teacher"]) for r in results["students"]}


def test_compare_tunes_on_dev_trains_all_seeds_and_tests_the_differences(settings, capsys):
    config, run_dir = settings
    assert main(["compare", str(config)]) == 0
    out = capsys.readouterr().out
    assert "[9/9] internal, seed 3" in out and "min left" in out or "a minute left" in out
    results = json.loads((run_dir / "comparison.json").read_text())
    assert [(r["way"], r["seed"]) for r in results["students"]] == [
        *(("soft_labels", 1), ("soft_labels", 2)),
        *(("internal", 1), ("internal", 2), ("internal", 3), ("wider", 1), ("wider", 2)),
    ]
    # The chosen trial is the best on dev, and the students are trained as it was.
    tuned = results["tuning"]["internal"]
    best = tuned["trials"][tuned["chosen"]]
    assert best["scores"]["accuracy"] == max(t["scores"]["accuracy"] for t in tuned["trials"])
    assert all(
        r["settings"] == best["settings"] for r in results["students"] if r["way"] == "internal"
    )
    assert not list((run_dir / "tuning").rglob("*.safetensors"))
    # Pairs are of the seeds that both have.
    found = results["comparison"]["differences"]
    assert found["internal"]["seeds"] == [1, 2] and found["wider"]["reference"] == "soft_labels"
    for key in ("difference", "standard_error", "interval", "p", "p_holm", "noise"):
        assert key in found["wider"]["accuracy"]
    assert results["command"].startswith("kdfast compare ") and results["environment"]["torch"]
    assert results["configuration"]["seeds"] == [1, 2] and "/" not in results["code"]
    text = (run_dir / "comparison.md").read_text()
    assert "p (Holm)" in text and "taken" in text and "Inside the noise" in text
    for name in ("differences", "accuracy", "fidelity"):
        assert (run_dir / "plots" / f"{name}.png").stat().st_size > 5000
    assert not list(run_dir.rglob("*.partial"))


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_to_the_same_results_and_may_grow(
    settings, capsys, monkeypatch
):
    config, run_dir = settings
    tuned = "{name: internal, tuning: [{cosine_weight: 0.5}, {}]}"
    few = [f"ways=[soft_labels, {tuned}]", "seeds=[1]"]
    whole = comparing.compare(read_config(CompareConfig, str(config), few))
    again = read_config(CompareConfig, str(config), [*few, f"output_dir={run_dir}-2"])
    began = []
    real = training.train

    def interrupted(trainer, what):
        began.append(what)
        if len(began) == 4:
            raise KeyboardInterrupt
        real(trainer, what)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "train", interrupted)
        comparing.compare(again)
    assert len(began) == 4
    capsys.readouterr()
    resumed = comparing.compare(again)
    out = capsys.readouterr().out
    assert "continuing the interrupted run" in out and out.count("done before") == 3
    assert scored(resumed) == scored(whole)
    # One way and one seed more: only the new students are trained.
    grown = read_config(
        CompareConfig,
        str(config),
        ["seeds=[1,2]", "ways=[soft_labels, labels]", f"output_dir={run_dir}-2"],
    )
    results = comparing.compare(grown)
    assert capsys.readouterr().out.count("done before") == 1
    assert len(results["students"]) == 4


def test_a_comparison_drops_its_students_weights_when_told(settings):
    config, run_dir = settings
    changes = ["ways=[soft_labels]", "seeds=[1]", "keep_students=false"]
    comparing.compare(read_config(CompareConfig, str(config), changes))
    assert not list((run_dir / "students").rglob("model.safetensors"))
    assert (run_dir / "students" / "soft_labels" / "seed-1.safetensors").is_file()


def test_a_comparison_of_other_data_is_not_continued(settings):
    config, _ = settings
    small = ["ways=[soft_labels]", "seeds=[1]"]
    comparing.compare(read_config(CompareConfig, str(config), small))
    with pytest.raises(InputError, match="another configuration, teacher or data"):
        comparing.compare(read_config(CompareConfig, str(config), [*small, "data.test=30"]))


def test_what_cannot_work_is_said_before_any_training(settings, capsys):
    config, run_dir = settings
    change = "ways=[soft_labels, {name: internal, tuning: [{layer_map: [[1, 9]]}]}]"
    assert main(["compare", str(config), change]) == 2
    assert "teacher layer 9" in capsys.readouterr().err and not run_dir.exists()


@pytest.mark.parametrize(
    ("ways", "message"),
    [
        ("[soft_labels, soft_labels]", "must differ by name or label"),
        ("[{name: labels, label: a/b}]", "label must be made of letters"),
        ("[soft_labels, {name: fsd, reference: soft_label}]", "did you mean 'soft_labels'"),
        ("[soft_labels, {name: fsd, seeds: [7]}]", "no seed in common"),
        ("[soft_labels, {name: fsd, seeds: [0], tuning: [{temperature: 1.0}]}]", "tuning_seed"),
        ("[soft_labels, {name: fsd, tuning: [{temprature: 1.0}]}]", "did you mean 'temperature'"),
        ("[soft_labels, {name: fsd, tuning: [{seeds: [1]}]}]", "cannot change seeds"),
        ("[soft_labels, {name: fsd, student: {widht: 3}}]", "did you mean 'width'"),
        ("[soft_labels, {name: fsd, training: {step: 3}}]", "did you mean 'steps'"),
        ("[]", "ways"),
    ],
)
def test_ways_that_make_no_comparison_are_refused_in_one_line(ways, message):
    with pytest.raises(InputError, match=message) as error:
        read_config(CompareConfig, None, [f"ways={ways}", "seeds=[1,2]"])
    assert "\n" not in str(error.value)


def test_most_seeds_and_most_trials_cut_each_way():
    changes = ["ways=[{name: soft_labels, tuning: [{}, {temperature: 1.0}]}]", "seeds=[1,2,3]"]
    way = read_config(CompareConfig, None, [*changes, "most_seeds=2", "most_trials=1"]).chosen()[0]
    assert way.seeds == (1, 2) and len(way.trials) == 1


# The test between two ways


def test_the_standard_error_counts_sentences_and_seeds():
    torch.manual_seed(0)
    d = torch.randn(3, 50, dtype=torch.float64) + torch.randn(3, 1, dtype=torch.float64)
    found = paired_test(d)
    sentences, seeds = d.mean(0).var() / 50, d.mean(1).var() / 3
    assert found["standard_error"] == pytest.approx(float((sentences + seeds).sqrt()))
    freedom = (sentences + seeds) ** 2 / (sentences**2 / 49 + seeds**2 / 2)
    assert found["degrees_of_freedom"] == pytest.approx(float(freedom))
    t = found["difference"] / found["standard_error"]
    assert found["p"] == pytest.approx(2 * stats.t.sf(abs(t), float(freedom)))
    low, high = found["interval"]
    assert (low > 0 or high < 0) == (found["p"] < 0.05)


def test_one_seed_and_no_sentences_fall_back_on_the_paired_t_test():
    d = torch.tensor([[0.5, -0.2, 0.9, 0.1]], dtype=torch.float64)
    assert paired_test(d)["p"] == pytest.approx(stats.ttest_1samp(d[0].numpy(), 0).pvalue)
    assert paired_test(d[0])["p"] == pytest.approx(stats.ttest_1samp(d[0].numpy(), 0).pvalue)
    assert paired_test(d[0, :1]) is None


def test_equal_ways_have_p_1():
    found = paired_test(torch.zeros(3, 10))
    assert found["p"] == 1 and found["interval"] == [0, 0]


def test_false_alarms_are_no_more_than_the_level():
    """Crossed effects of sentences and seeds without any difference: at most 5 % are called so."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(400):
        d = 0.6 * rng.normal(size=(1, 80)) + 0.1 * rng.normal(size=(3, 1))
        alarms += paired_test(torch.tensor(d + rng.normal(size=(3, 80))))["p"] < 0.05
    assert alarms / 400 < 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


def test_holm_multiplies_by_the_hypotheses_left_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []
