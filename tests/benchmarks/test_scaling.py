"""How losses grow: the fit, the problems, the model of several GPUs."""

import pytest
import torch

from kdfast.benchmarks import harness, scaling
from kdfast.errors import InputError


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


def test_an_unknown_axis_is_refused():
    with pytest.raises(InputError, match="no row of scale has 'depth'.*batch internal"):
        scaling.run(torch.device("cpu"), which="quick", only="depth")


def test_eight_gpus_pay_for_what_they_exchange():
    free = scaling.Cluster(bandwidth=float("inf"), latency=0.0)
    assert scaling.step_on(free, 0.1, 10**8) == 0.1
    eight = scaling.Cluster(gpus=8, bandwidth=1e9, latency=0.0, overlap=0.0)
    # A ring sends 7/8 of the gradients twice.
    assert scaling.step_on(eight, 0.0, 10**9) == pytest.approx(2 * 7 / 8 * 4)
    assert scaling.step_on(eight, 0.0, 0, gathered=10**9) == pytest.approx(2 * 7)
    hidden = scaling.Cluster(gpus=8, bandwidth=1e9, latency=0.0, overlap=1.0)
    assert scaling.step_on(hidden, 0.3, 10**9) == pytest.approx(0.3)
