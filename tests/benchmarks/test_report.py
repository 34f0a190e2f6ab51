"""The report of a small set of results, whose figures are known."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from kdfast import cli
from kdfast.benchmarks import report
from kdfast.benchmarks.harness import ratios
from kdfast.errors import InputError

FILE = Path(__file__).parent / "results.json"


@pytest.fixture
def results() -> dict[str, Any]:
    return report.read_json(FILE)


def line_of(text: str, *words: str) -> list[str]:
    (line,) = [x for x in text.splitlines() if all(word in x for word in words)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratio_is_the_median_over_rounds_with_its_spread(results: dict[str, Any]) -> None:
    # Round by round 4, 4 and 5, though the median times are 2 and 10.
    assert ratios(results["rows"][0], "kdfast triton", "eager") == (4, 4, 4.5)
    assert ratios(results["rows"][1], "kdfast triton", "eager") is None


def test_table_of_times_has_each_baseline_and_the_bound(results: dict[str, Any]) -> None:
    cells = line_of(report.markdown(results), "N512 d64", "exponentials")
    assert cells == [
        "B2 H3 N512 d64 bfloat16 forward+backward", "triton", "2", "4.00 (4.00-4.50)",
        "2.00 (2.00-2.00)", "1.50 (1.50-1.50)", "50 %", "exponentials",
    ]  # fmt: skip


def test_reference_is_in_the_table_of_times_only_where_there_is_no_kernel(
    results: dict[str, Any],
) -> None:
    text = report.markdown(results)
    assert line_of(text, "probabilities", "bytes")[1] == "reference"
    assert not [x for x in text.splitlines() if "| reference" in x and "exponentials" in x]


def test_baseline_out_of_memory_is_named(results: dict[str, Any]) -> None:
    cells = line_of(report.markdown(results), "N16384", "exponentials")
    assert cells[3:6] == ["out of memory", "", ""]


def test_memory_is_in_the_report_beside_errors(results: dict[str, Any]) -> None:
    text = report.markdown(results)
    assert "30 / 28" in text and "3 / 1" in text
    assert "2.0e-03 3.0e-03" in text


def test_memory_that_a_process_could_not_say_has_its_reason(results: dict[str, Any]) -> None:
    results["rows"][0]["variants"]["flash"]["memory_skipped"] = "killed"
    assert "killed" in line_of(report.markdown(results), "N512", "30 / 28")


@pytest.mark.parametrize("suite", ["step", "scale"])
def test_a_file_of_another_suite_is_named_with_what_it_holds(
    results: dict[str, Any], suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    operators, steps, against = (tmp_path / f"{name}.json" for name in ("operators", "of", "ab"))
    operators.write_text(json.dumps(results))
    steps.write_text(json.dumps(results | {"suite": suite}))
    against.write_text(json.dumps(results | {"kind": "against"}))
    other = {"step": "scale", "scale": "step"}[suite]
    for arguments, said in (
        ([suite, "--from", operators], f"suite {suite}, but results of operators: kdfast bench "),
        ([suite, "--from", against], f"suite {suite}, but a comparison of revisions: "),
        ([other, "--from", steps], f"suite {other}, but those of the suite {suite}: kdfast bench "),
        (["--from", steps], f"holds results of the suite {suite}: kdfast bench {suite} --from "),
    ):
        assert cli.main(["bench", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert said in error and f"--from {arguments[-1]} holds" in error


def test_wrong_and_unfinished_results_are_announced(results: dict[str, Any]) -> None:
    assert "Wrong" not in report.markdown(results)
    results["rows"][2]["wrong"] = ["kdfast reference: error of loss is 1"]
    results["complete"] = False
    text = report.markdown(results)
    assert "- attention_map_kl B2 H3 N512 probabilities bfloat16 forward: kdfast reference" in text
    assert "not finished" in text


def test_busy_machine_is_announced(results: dict[str, Any]) -> None:
    assert "busy" not in report.markdown(results)
    results["rows"][0]["others"] = 0.32
    assert "busy with 32 % other work" in report.markdown(results)


def test_report_is_written_from_json_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "--from", str(FILE), "--report", str(tmp_path / "out")]) == 0
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {
        "report.md", "attention_kl_ratios.png", "attention_kl_bound.png",
        "attention_kl_memory.png", "attention_map_kl_ratios.png", "attention_map_kl_bound.png",
    }  # fmt: skip
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(f"({name})" in text for name in written - {"report.md"})
    assert "4.00 (4.00-4.50)" in capsys.readouterr().out


def test_one_operator_of_the_results_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "attention_map_kl", "--from", str(FILE)]) == 0
    text = capsys.readouterr().out
    assert "## attention_map_kl" in text and "## attention_kl" not in text


def test_report_without_matplotlib_has_tables_only(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report.write_report(tmp_path, results)
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]
    assert "png" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("content", ["not JSON", "[]", json.dumps({"schema": 2, "rows": []})])
def test_file_that_holds_no_results_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(InputError, match="other.json: should be the JSON of `kdfast bench --json`"):
        report.read_json(file)


@pytest.mark.parametrize("key", ["machine", "versions"])
def test_results_that_do_not_say_where_they_are_from_are_refused(
    results: dict[str, Any], key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "part.json"
    del results[key]
    file.write_text(json.dumps(results))
    assert cli.main(["bench", "--from", str(file)]) == 2
    assert f"part.json: has no {key}, should have time, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("codes", "refused"),
    [
        (("0.1 (aaa)", "0.1 (bbb)"), "a.json is of 0.1 (aaa); {}b.json is of 0.1 (bbb): "),
        (("0.1 (aaa)", None), "a.json is of 0.1 (aaa); {}b.json is of unknown code: "),
        (("0.1 (aaa)", "0.1 (aaa)"), None),
        ((None, None), None),
    ],
)
def test_results_of_two_revisions_are_never_mixed(
    results: dict[str, Any], codes: tuple[str | None, ...], refused: str | None, tmp_path: Path
) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, code, rows in zip(
        files, codes, (results["rows"][:1], results["rows"][1:]), strict=True
    ):
        said = {} if code is None else {"code": code}
        file.write_text(json.dumps(results | said | {"rows": rows}))
    if refused is None:
        assert report.read_runs(files)["rows"] == results["rows"]
        return
    with pytest.raises(InputError) as error:
        report.read_runs(files)
    assert refused.format(f"{tmp_path}/") in str(error.value)
    assert "of one code only are shown together" in str(error.value)


def test_missing_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--from", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
