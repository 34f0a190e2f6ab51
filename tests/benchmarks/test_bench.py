"""`kdfast bench`: what it measures, what it refuses, and that a wrong output fails the run."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast import cli, reference
from kdfast.benchmarks import attention_kl, harness
from kdfast.errors import BackendError, InputError
from kdfast.ops import dispatch

CPU = torch.device("cpu")
Result = tuple[int, str, str]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Exit status, standard output and standard error of `kdfast bench ...`."""

    def run(*arguments: Any) -> Result:
        status = cli.main(["bench", "--device", "cpu", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def ceilings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of a machine that need not be measured."""
    found = {"bytes": 1e10, "flops": {"float32": 1e11}, "exponentials": None}
    monkeypatch.setattr(harness, "measure_ceilings", lambda *_: found)
    return found


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("measured before the arguments were checked")

    monkeypatch.setattr(harness, "run", run)


def rows() -> list[harness.Row]:
    return [
        row
        for operator in harness.OPERATORS
        for which in harness.operator_module(operator).ROWS.values()
        for row in which
    ]


def small(row: harness.Row, length: int = 33) -> harness.Row:
    return replace(row, shape={key: {"N": length, "d": 64}.get(key, 2) for key in row.shape})


# Running


def test_quick_run_writes_results_and_report(bench: Callable[..., Result], tmp_path: Path) -> None:
    file, folder = tmp_path / "new" / "results.json", tmp_path / "report"
    status, out, err = bench("--quick", "--seconds", "0.05", "--json", file, "--report", folder)
    assert status == 0, err
    results = json.loads(file.read_text())
    assert results["schema"] == 1 and results["complete"] and results["set"] == "quick"
    assert {row["operator"] for row in results["rows"]} == set(harness.OPERATORS)
    assert {row["pass"] for row in results["rows"]} == set(harness.PASSES)
    for row in results["rows"]:
        assert row["wrong"] == [] and row["bound"]["seconds"] > 0
        rounds = {len(variant["seconds"]) for variant in row["variants"].values()}
        assert len(rounds) == 1 and rounds.pop() >= 3
        assert {"kdfast reference", "eager"} <= set(row["variants"])
        outputs = set(row["variants"]["eager"]["error"])
        assert "loss" in outputs and (outputs == {"loss"}) == (row["pass"] == "forward")
    assert all(f"## {operator}" in out for operator in harness.OPERATORS)
    assert (folder / "report.md").exists()


@pytest.mark.gpu
def test_quick_run_on_a_gpu_measures_time_and_memory(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = ["bench", "--quick", "--device", "cuda", "--seconds", "0.05", "--json", str(file)]
    assert cli.main(command) == 0
    results = json.loads(file.read_text())
    assert results["machine"]["gpu"] and results["ceilings"]["exponentials"] > 1e11
    for row in results["rows"]:
        assert row["variants"]["kdfast triton"]["seconds"]
        for name, variant in row["variants"].items():
            measured = variant["seconds"] and variant["memory"]
            assert measured or variant["skipped"], (row["name"], name)


@pytest.mark.usefixtures("ceilings")
def test_results_name_no_folder_of_this_machine(
    bench: Callable[..., Result], tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    bench("attention_map_kl", "--quick", "--only", "scores", "--seconds", "0.01", "--json", file)
    assert str(Path.home()) not in file.read_text() and str(Path.cwd()) not in file.read_text()


@pytest.mark.usefixtures("ceilings")
@pytest.mark.parametrize("wrong", ["off", "nan", "raises"])
def test_wrong_output_fails_the_run(
    wrong: str, bench: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def served(**arguments: Any) -> torch.Tensor:
        if wrong == "raises":
            raise ValueError("kernel is broken")
        factor = 1.001 if wrong == "off" else torch.nan
        return reference.attention_map_kl(**arguments) * factor

    monkeypatch.setitem(
        dispatch.KERNELS, ("attention_map_kl", "reference"), dispatch.Kernel(lambda: served)
    )
    file = tmp_path / "results.json"
    status, out, err = bench(
        "attention_map_kl", "--quick", "--only", "scores", "--seconds", "0.01", "--json", file
    )
    assert status == 1
    row = "attention_map_kl B2 H2 N64 scores float32 forward+backward: kdfast reference"
    assert f"kdfast: wrong: {row}" in err
    assert "**Wrong outputs:**" in out
    (stored,) = json.loads(file.read_text())["rows"]
    assert stored["wrong"]


@pytest.mark.usefixtures("ceilings")
def test_row_that_a_backend_refuses_is_skipped(
    bench: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = dispatch.Kernel(lambda: print, refuses=lambda **_: "float32 is not served")
    monkeypatch.setitem(dispatch.KERNELS, ("attention_map_kl", "cpp"), kernel)
    file = tmp_path / "results.json"
    status, _, _ = bench(
        "attention_map_kl", "--quick", "--only", "scores", "--seconds", "0.01", "--json", file
    )
    (row,) = json.loads(file.read_text())["rows"]
    assert status == 0 and not row["wrong"]
    assert row["variants"]["kdfast cpp"]["skipped"] == "float32 is not served"
    assert row["variants"]["kdfast reference"]["seconds"]


@pytest.mark.usefixtures("ceilings")
def test_baseline_out_of_memory_is_recorded_and_the_run_goes_on(
    bench: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eager(self: Any, **_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention_kl.Problem, "eager", eager)
    file = tmp_path / "results.json"
    status, out, _ = bench(
        "attention_kl", "--quick", "--only", "float32 forward+", "--seconds", "0.01", "--json", file
    )
    assert status == 0 and "out of memory" in out
    (row,) = json.loads(file.read_text())["rows"]
    assert row["variants"]["eager"]["skipped"] == "out of memory"
    assert row["variants"]["flash"]["seconds"]


# What a row is


@pytest.mark.parametrize("row", {small(row).name: small(row) for row in rows()}.values(), ids=str)
def test_every_variant_of_every_row_computes_the_same(row: harness.Row) -> None:
    check_every_variant(row, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "row", {small(row).name: small(row, 64) for row in rows()}.values(), ids=str
)
def test_every_variant_of_every_row_computes_the_same_on_a_gpu(row: harness.Row) -> None:
    check_every_variant(row, torch.device("cuda"))


def check_every_variant(row: harness.Row, device: torch.device) -> None:
    problem = harness.operator_module(row.operator).Problem(row, device)
    exact = harness.exact_outputs(problem, row)
    limit = {"float32": 1e-5}.get(row.dtype, 0.1)
    for name, function in problem.variants().items():
        if not name.startswith("compile"):
            try:
                outputs = harness.once(*harness.runner(problem, row.over, function))
            except BackendError:
                continue
            assert max(harness.errors(exact, outputs).values()) < limit, name


def test_rows_of_a_set_have_different_names() -> None:
    for operator in harness.OPERATORS:
        for which in harness.operator_module(operator).ROWS.values():
            names = [row.name for row in which]
            assert len(names) == len(set(names))


def test_flash_baseline_is_absent_where_it_cannot_express_the_row() -> None:
    js = next(row for row in attention_kl.CPU if row.options.get("direction") == "js")
    assert "flash" not in attention_kl.Problem(small(js), CPU).variants()


def test_forward_makes_no_gradients() -> None:
    row = small(next(row for row in rows() if row.over == "forward"))
    problem = harness.operator_module(row.operator).Problem(row, CPU)
    seen = []

    def function(**inputs: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_grad_enabled() or any(x.requires_grad for x in inputs.values()))
        return inputs[problem.learned[0]].sum()

    harness.once(*harness.runner(problem, "forward", function))
    assert seen == [False]


def test_every_round_begins_with_another_variant() -> None:
    orders = list(harness.interleaved(["a", "b", "c"], 4))
    assert [order[0] for order in orders] == ["a", "b", "c", "a"]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert list(harness.interleaved([], 2)) == [[], []]


@pytest.mark.parametrize("count", [3, 5, 7])
def test_no_variant_follows_the_same_one_in_most_rounds(count: int) -> None:
    names = [str(k) for k in range(count)]
    orders = list(harness.interleaved(names, 25))
    assert orders == list(harness.interleaved(names, 25))  # the same in every run
    for name in names:
        before = [order[order.index(name) - 1] for order in orders if order[0] != name]
        assert set(before) <= {*names} - {name}
        assert all(before.count(other) <= 0.7 * len(before) for other in names)
        assert len(set(before)) >= min(count - 1, 3)


def test_bound_is_set_by_the_scarcest() -> None:
    ceilings: dict[str, Any] = {"bytes": 10.0, "flops": {"float32": 100.0}, "exponentials": 5.0}
    work = harness.Work(bytes=20, flops=300, exponentials=5)
    assert harness.bound(work, "float32", ceilings) == {"seconds": 3.0, "by": "flops"}
    work = harness.Work(bytes=20, flops=100, exponentials=20)
    assert harness.bound(work, "float32", ceilings) == {"seconds": 4.0, "by": "exponentials"}
    ceilings["exponentials"] = None
    assert harness.bound(work, "float32", ceilings) == {"seconds": 2.0, "by": "bytes"}


def test_output_is_wrong_beyond_twice_the_error_of_eager_and_the_floor() -> None:
    def found(ours: float, eager: float) -> list[str]:
        records = {"kdfast cpp": {"error": {"loss": ours}}, "eager": {"error": {"loss": eager}}}
        return harness.wrong_outputs(records, "float32")

    assert not found(2e-3, 1e-3)
    assert found(2.1e-3, 1e-3) and found(2e-6, 0.0) and found(float("nan"), 1.0)


def test_memory_of_a_pass_is_that_of_its_maps() -> None:
    # Maps so large that the allocator takes each from the system and gives it back.
    row = harness.Row("attention_kl", {"B": 1, "H": 4, "N": 1600, "d": 64})
    found = harness.peak_in_a_process(row, "eager")["memory"]
    if found is None:
        pytest.skip("this system does not reset a process's peak memory")
    one_map, gradients = 4 * 1600**2 * 4, 2 * 4 * 1600 * 64 * 4
    assert 3 * one_map < found["beyond_inputs"] < 9 * one_map
    assert found["beyond_inputs"] - found["beyond_inputs_and_gradients"] == gradients


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        (bytearray, (1 << 62,), "out of memory"),
        pytest.param(os._exit, (1,), "killed", marks=pytest.mark.exhaustive),
    ],
)
def test_a_process_without_a_result_says_why(
    function: Callable[..., Any], arguments: tuple[int, ...], reason: str
) -> None:
    assert harness.tried_in_a_process(function, *arguments) == (None, reason)
    assert harness.in_a_process(function, *arguments) is None


# What bad arguments get


def test_existing_results_are_not_overwritten(
    bench: Callable[..., Result], tmp_path: Path, no_measuring: None
) -> None:
    file = tmp_path / "results.json"
    file.write_text("mine")
    status, _, err = bench("--json", file)
    assert status == 2 and str(file) in err and "--force" in err
    assert file.read_text() == "mine"


def test_existing_report_is_not_overwritten(
    bench: Callable[..., Result], tmp_path: Path, no_measuring: None
) -> None:
    (tmp_path / "attention_kl_bound.png").write_text("mine")
    status, _, err = bench("--report", tmp_path)
    assert status == 2 and "attention_kl_bound.png" in err and "--force" in err


@pytest.mark.usefixtures("ceilings")
def test_force_overwrites(bench: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text("old")
    status, _, _ = bench(
        "attention_map_kl", "--quick", "--only", "scores", "--seconds", "0.01", "--json", file,
        "--force",
    )  # fmt: skip
    assert status == 0 and json.loads(file.read_text())["complete"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["atention_kl"], "did you mean 'attention_kl'?"),
        (["--only", "N513"], "no row of the set 'cpu'"),
        (["--only", "N513"], "has 'N513' in its name: attention_kl B"),
        (["attention_map_kl", "--quick", "--only", "N513"], "in its name: attention_map_kl B"),
        (["--threads", "0"], "--threads is 0, should be above 0"),
        (["--seconds", "-1"], "--seconds is -1.0, should be above 0"),
        (["--from", "a.json", "--json", "b.json"], "--from measures nothing"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], expected: str, bench: Callable[..., Result]
) -> None:
    status, _, err = bench(*arguments)
    assert status == 2 and expected in err
    assert err.count("\n") == 1


def test_rows_that_are_listed_are_a_few() -> None:
    with pytest.raises(InputError) as error:
        harness.rows_of(harness.OPERATORS, "cpu", "N513")
    known = len(harness.rows_of(harness.OPERATORS, "cpu", ""))
    assert str(error.value).count("attention_kl B") == harness.LISTED < known
    assert str(error.value).endswith(f", ... and {known - harness.LISTED} more")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err
