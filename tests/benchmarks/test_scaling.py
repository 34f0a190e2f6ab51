"""How losses grow: the fit, the problems, the model of several GPUs."""

import pytest
import torch

from kdfast.benchmarks import harness, scaling
from kdfast.benchmarks.step import losses_of
from kdfast.errors import InputError
from kdfast.recipes.recipe import Recipe


def test_an_exponent_is_the_slope_between_logarithms():
    slope, error = scaling.exponent([(x, 3.0 * x**1.5) for x in (2, 4, 8, 64)])
    assert slope == pytest.approx(1.5) and error == pytest.approx(0, abs=1e-9)
    assert scaling.exponent([(1, 0.0), (2, 1.0)]) is None  # nothing was measured at 1
    noisy = scaling.exponent([(1, 1.0), (2, 2.2), (4, 3.9), (8, 8.1)])
    assert noisy[0] == pytest.approx(1, abs=0.1) and 0 < noisy[1] < 0.1


def test_all_axes_are_measured_and_drawn(tmp_path):
    results = scaling.run(torch.device("cpu"), which="quick", only="layer pairs")
    assert [(row["axis"], row["method"]) for row in results["rows"]] == [
        ("layer pairs", "internal"),
        ("layer pairs", "fsd"),
    ]
    for row in results["rows"]:
        assert [point["size"] for point in row["points"]] == [1, 2]
        assert row["others"] is None or row["others"] >= 0
        assert row["axis"] in scaling.markdown(results)
    (file,) = scaling.plot(tmp_path, results)
    assert file.stat().st_size > 1000


def test_eager_is_left_out_where_memory_would_not_hold_its_maps(monkeypatch, tmp_path):
    size = scaling.Size(batch=4, length=16, width=32, heads=2)  # the second of the quick lengths
    lean, dense = scaling.needed(size)
    monkeypatch.setattr(harness, "free_memory", lambda device: lean + dense - 1)
    results = scaling.run(torch.device("cpu"), which="quick", only="length internal")
    first, second = results["rows"][0]["points"]
    assert set(first["variants"]) == {"kdfast", "eager"} and set(second["variants"]) == {"kdfast"}
    assert f"length internal 16: {second['skipped']}" in scaling.markdown(results)
    scaling.plot(tmp_path, results)


@pytest.mark.parametrize("axis", scaling.AXES)
def test_a_problem_of_every_axis_has_a_loss_and_gradients(axis):
    field, values, methods, _ = scaling.AXES[axis]
    for method in methods:
        size = scaling.Size(batch=4, length=8, width=32, heads=2)
        size = scaling.replace(size, **{field: values["quick"][1]})
        scaling.problem(method, size, torch.device("cpu"))()


@pytest.mark.parametrize("variant", scaling.VARIANTS)
def test_losses_run_as_training_runs_them_and_each_run_finds_the_whole_teacher(
    variant, monkeypatch
):
    seen = []
    own = Recipe.forward

    def forward(self, student, teacher, *rest, **options):
        assert student.attention_mask is None and options == {"release": True}
        before = len(teacher.tensors())
        losses = own(self, student, teacher, *rest, **options)
        seen.append((before, len(teacher.hidden_states) + len(teacher.attention)))
        return losses

    monkeypatch.setattr(Recipe, "forward", forward)
    size = scaling.Size(batch=4, length=8, width=32, heads=2)
    for method in scaling.METHODS:
        seen.clear()
        with losses_of(variant):
            run = scaling.problem(method, size, torch.device("cpu"))
            run()
            run()
        (first, left), second = seen
        assert first > 0 and left == 0 and second == (first, left)


def test_a_run_before_training_s_own_order_is_said_to_be_one():
    results = scaling.run(torch.device("cpu"), which="quick", only="layer pairs internal")
    assert scaling.BEFORE not in scaling.markdown(results)
    del results["rows"][0]["others"]
    assert scaling.BEFORE in scaling.markdown(results)


def test_memory_that_could_not_be_measured_has_its_reason():
    results = scaling.run(torch.device("cpu"), which="quick", only="layer pairs internal")
    results["rows"][0]["points"][1]["variants"]["eager"]["memory_skipped"] = "out of memory"
    text = scaling.markdown(results)
    assert "layer pairs internal 2: memory of eager: out of memory" in text


def test_an_unknown_axis_is_refused():
    with pytest.raises(InputError, match="no row of scale has 'depth'.*batch internal"):
        scaling.run(torch.device("cpu"), which="quick", only="depth")


JOB = scaling.Job(parameters=10**9, batch=4, length=8, width=16, pairs=2, size=2, bucket=10**10)


def on_paper(**cluster):
    return scaling.longer(scaling.Cluster(**{"reached": 1.0, "latency": 0.0, **cluster}), JOB)


def test_one_gpu_exchanges_nothing():
    assert set(on_paper(gpus=1, latency=1.0).values()) == {0.0}


def test_gradients_go_round_a_ring_and_may_hide():
    # 7/8 of them are sent twice.
    assert on_paper(bandwidth=1e9)["gradients"] == pytest.approx(2 * 7 / 8 * 2)
    assert on_paper(bandwidth=1e9, reached=0.5)["gradients"] == pytest.approx(4 * 7 / 8 * 2)
    assert on_paper(bandwidth=1e9, overlap=1.0)["gradients"] == 0
    assert on_paper(bandwidth=1e30, latency=1.0)["gradients"] == pytest.approx(1)  # one bucket


def test_states_of_both_sides_come_from_all_other_gpus_once():
    # Nothing is sent in backward, and nothing hides it.
    states = 4 * 8 * 16 * 2
    assert on_paper(bandwidth=1e3, overlap=1.0)["states"] == pytest.approx(2 * 2 * 7 * states / 1e3)
    # The sizes of both go before them, at once.
    assert on_paper(bandwidth=1e30, latency=1.0)["states"] == pytest.approx(1 + 2 * 2)


def test_every_gpu_computes_the_coupled_loss_of_the_whole_batch():
    assert JOB.operations(1) == 2 * 4 * 4**2 * 8 * 16
    assert JOB.operations(8) == 64 * JOB.operations(1)
    assert on_paper(products=1.0)["products"] == 63 * JOB.operations(1)
    assert JOB.memory(8) == 8 * JOB.memory(1)


def test_the_operations_of_the_local_structure_are_those_of_its_benchmark():
    # Samples are rows, their token states side by side the features.
    row = harness.Row("cka", {"B": 1, "N": 4, "d": 8 * 16})
    problem = harness.operator_module("cka").Problem(row, torch.device("cpu"))
    alone = scaling.replace(JOB, pairs=1)
    assert problem.side == "gram" and problem.work.flops == alone.operations(1)
