"""`kdfast doctor`: what it says, and that its check finds a wrong backend."""

import json
from typing import Any

import pytest
import torch

from kdfast import cli, doctor, reference
from kdfast.ops import dispatch


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for kernel in dispatch.KERNELS.values():  # what is not loaded here may be loaded by later tests
        monkeypatch.setattr(kernel, "_outcome", None)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(["doctor", *arguments])
    return status, capsys.readouterr().out


def replace_backend(
    monkeypatch: pytest.MonkeyPatch, operator: str, backend: str, function: Any
) -> None:
    """Serve `backend` of `operator` by a function, and check nothing else."""
    monkeypatch.setitem(
        dispatch.KERNELS, (operator, backend), dispatch.Kernel(load=lambda: function)
    )
    monkeypatch.setattr(doctor, "operators", lambda: [operator])
    monkeypatch.setattr(doctor, "DTYPES", (torch.float32,))


def test_report_names_versions_and_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys)
    assert status == 0
    for word in ("kdfast", "python", "triton", "transformers", "nvcc", "cpu", "gpu", "kdfast/_cpu"):
        assert any(line.startswith(f"{word} ") for line in out.splitlines()), word
    assert torch.__version__ in out
    assert all(operator in out for operator, _ in dispatch.KERNELS)


def test_each_backend_that_cannot_serve_has_a_reason() -> None:
    for entry in doctor.report()["operators"].values():
        assert set(entry["backends"]) == set(dispatch.BACKENDS)
        for state in entry["backends"].values():
            assert state["available"] == (state["reason"] is None)


def test_auto_is_the_first_available_of_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ImportError("cpp is not built")

    entry = ("attention_map_kl", "cpp")
    monkeypatch.setitem(dispatch.KERNELS, entry, dispatch.Kernel(load=missing))
    found = doctor.report()["operators"]["attention_map_kl"]
    assert found["auto"]["cpu"] == "reference"
    assert found["backends"]["cpp"]["reason"] == "cpp is not built"
    monkeypatch.setitem(dispatch.KERNELS, entry, dispatch.Kernel(load=lambda: print))
    assert doctor.report()["operators"]["attention_map_kl"]["auto"]["cpu"] == "cpp"


def test_available_backend_says_why_auto_leaves_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for backend in ("cpp", "cuda"):
        replace_backend(monkeypatch, "attention_map_kl", backend, print)
    lines = [line.split(maxsplit=1) for line in run(capsys)[1].splitlines()[-4:]]
    answers = dict(line for line in lines if len(line) == 2)
    assert answers["reference"] == "yes, where cpp cannot serve a call"
    assert answers["cpp"] == "yes"
    assert answers["cuda"].startswith("yes, asked for by name")


def test_missing_programs_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda *_: None)
    monkeypatch.setattr(doctor.library, "compiled_library", lambda backend: None)
    _, out = run(capsys)
    assert "not built; no C++ compiler (g++, clang++ or CXX)" in out
    assert "not built; no nvcc" in out


def test_json_holds_the_report_and_the_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "operators", lambda: ["attention_map_kl"])
    status, out = run(capsys, "--json", "--check")
    found = json.loads(out)
    assert status == 0 and found["cpu"]["threads"] > 0
    assert {check["dtype"] for check in found["checks"]} >= {"float64", "float32", "bfloat16"}


def test_check_of_the_reference_passes_for_every_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", ("reference",))
    monkeypatch.setattr(doctor, "DTYPES", (torch.float64, torch.float32))
    checks = list(doctor.check())
    assert {check.operator for check in checks} == {operator for operator, _ in dispatch.KERNELS}
    assert all(check.passed and not check.skipped for check in checks), "\n".join(map(str, checks))


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_check_fails_on_a_wrong_backend(
    wrong: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def served(**arguments: Any) -> Any:
        return reference.attention_kl(**arguments) * wrong

    replace_backend(monkeypatch, "attention_kl", "cpp", served)
    status, out = run(capsys, "--check")
    lines = [line.split() for line in out.splitlines()[-2:]]
    assert status == 1
    assert lines[0][:5] == ["PASS", "attention_kl", "reference", "cpu", "float32"]
    assert lines[1][:5] == ["FAIL", "attention_kl", "cpp", "cpu", "float32"]
    assert "should be <=" in out


def test_check_fails_on_a_wrong_gradient(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def served(**arguments: Any) -> Any:
        rows = reference.attention_map_kl(**arguments)
        return rows * 1.01 - rows.detach() * 0.01

    replace_backend(monkeypatch, "attention_map_kl", "cpp", served)
    status, out = run(capsys, "--check")
    assert status == 1 and out.splitlines()[-1].startswith("FAIL")


def test_check_shows_what_a_backend_raised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def served(**arguments: Any) -> Any:
        raise RuntimeError("kernel is broken")

    replace_backend(monkeypatch, "attention_map_kl", "cpp", served)
    status, out = run(capsys, "--check")
    assert status == 1 and "RuntimeError: kernel is broken" in out


def test_dtype_that_a_backend_refuses_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_backend(monkeypatch, "attention_map_kl", "cpp", None)
    kernel = dispatch.Kernel(
        load=lambda: reference.attention_map_kl, refuses=lambda **_: "float32 is not served"
    )
    monkeypatch.setitem(dispatch.KERNELS, ("attention_map_kl", "cpp"), kernel)
    status, out = run(capsys, "--check")
    assert status == 0
    assert out.splitlines()[-1].startswith("SKIP") and "float32 is not served" in out


def test_cases_that_a_backend_refuses_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_backend(monkeypatch, "attention_map_kl", "cpp", None)
    kernel = dispatch.Kernel(
        load=lambda: reference.attention_map_kl,
        refuses=lambda **given: "no js" if given["direction"] == "js" else None,
    )
    monkeypatch.setitem(dispatch.KERNELS, ("attention_map_kl", "cpp"), kernel)
    status, out = run(capsys, "--check")
    assert status == 0 and out.splitlines()[-1].startswith("PASS")
    assert out.endswith("not served: 'scores, js', 'probabilities, js'\n")
