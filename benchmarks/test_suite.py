"""The suite's rows for pytest-benchmark, a benchmark each variant: what it stores, compares between
commits and fails on (--benchmark-autosave, --benchmark-compare, --benchmark-compare-fail).

    pytest benchmarks/test_suite.py -k quick
    pytest benchmarks/test_suite.py -k "cpu and attention_kl and N512 and eager"

Variants run one after the other here; ratios between them come from `kdfast bench`, which takes
turns.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from kdfast.benchmarks import harness, report
from kdfast.benchmarks.harness import Row
from kdfast.errors import BackendError

pytest.importorskip("pytest_benchmark")

SETS = ("quick", "cpu", *(["cuda"] if torch.cuda.is_available() else []))


def device_of(which: str) -> torch.device:
    return torch.device("cuda" if which == "cuda" else "cpu")


def cases() -> list[Any]:
    found = []
    for which in SETS:
        for operator in harness.OPERATORS:
            ours = [f"kdfast {x}" for x in harness.backends(operator, device_of(which))]
            for row in harness.operator_module(operator).ROWS[which]:
                for variant in (*ours, *report.BASELINES):
                    if variant not in row.without:
                        name = f"{which} {operator} {row.name} {variant}".replace(" ", "-")
                        found.append(pytest.param(which, row, variant, id=name))
    return found


@functools.lru_cache(maxsize=1)
def problem_of(operator: str, which: str, name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """One row's variants follow each other, and share the problem and its float64 results."""
    module = harness.operator_module(operator)
    row = next(row for row in module.ROWS[which] if row.name == name)
    problem = module.Problem(row, device_of(which))
    return problem, harness.exact_outputs(problem, row)


@pytest.mark.parametrize(("which", "row", "variant"), cases())
def test_row(benchmark: Any, which: str, row: Row, variant: str) -> None:
    torch.compiler.reset()
    problem, exact = problem_of(row.operator, which, row.name)
    function = problem.variants().get(variant)
    if function is None:
        pytest.skip(f"{variant} cannot express this row")
    prepare, timed = harness.runner(problem, row.over, function)
    try:
        errors = harness.errors(exact, harness.once(prepare, timed))
    except BackendError as error:
        pytest.skip(error.reasons[variant.removeprefix("kdfast ")])
    device = device_of(which)
    clock = harness.Clock(device)

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        prepared = prepare()
        clock.flushed.zero_()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (prepared,), {}

    def run(prepared: Any) -> None:
        timed(prepared)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{row.operator} {row.name}"
    benchmark.extra_info |= {f"error of {name}": error for name, error in errors.items()}
    benchmark.pedantic(run, setup=setup, rounds=5 if device.type == "cpu" else 30)
    eager = harness.runner(problem, row.over, problem.variants()["eager"])
    records = {
        "eager": {"error": harness.errors(exact, harness.once(*eager))},
        variant: {"error": errors},
    }
    wrong = harness.wrong_outputs(records, row.dtype)
    assert not wrong, "\n".join(wrong)
