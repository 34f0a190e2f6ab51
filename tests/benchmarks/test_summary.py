"""The results in benchmarks/README.md are those of the committed JSON."""

import json
import shutil
from pathlib import Path

import pytest

from kdfast.benchmarks import summary
from kdfast.errors import InputError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def machine(root):
    """The first folder of a machine that ran everything."""
    folders = sorted(x for x in (root / "results").iterdir() if x.is_dir())
    return next(x for x in folders if all((x / name).is_file() for name in summary.PARTS))


def test_the_readme_holds_what_the_committed_json_says():
    assert summary.main([str(BENCHMARKS), "--check"]) == 0, "run `make report`"


def test_another_result_changes_the_text_and_nothing_beside_it(copied):
    root = copied
    file = machine(root) / "results.json"
    results = json.loads(file.read_text())
    results["rows"] = results["rows"][:1]
    file.write_text(json.dumps(results))
    before = (root / "README.md").read_text()
    assert summary.main([str(root), "--check"]) == 1
    assert (root / "README.md").read_text() == before
    assert summary.main([str(root)]) == 0
    after = (root / "README.md").read_text()
    assert after.partition(summary.BEGIN)[0] == before.partition(summary.BEGIN)[0]
    assert len(after) < len(before) and results["rows"][0]["name"] in after
    assert summary.main([str(root), "--check"]) == 0


@pytest.fixture
def copied(tmp_path):
    """The committed results and their README, to be changed."""
    shutil.copytree(BENCHMARKS / "results", tmp_path / "benchmarks" / "results")
    shutil.copy(BENCHMARKS / "README.md", tmp_path / "benchmarks")
    return tmp_path / "benchmarks"


@pytest.mark.parametrize("name", ["report.md", "step.md", "scale.md"])
def test_a_table_beside_its_json_that_says_something_else_is_named(copied, name, capsys):
    file = machine(copied) / name
    file.write_text(file.read_text().replace("kdfast", "faster"))
    assert summary.main([str(copied), "--check"]) == 1
    assert capsys.readouterr().err.startswith(f"{file} is not what the JSON says")
    file.unlink()
    assert summary.main([str(copied), "--check"]) == 1


def test_skipped_rows_keep_their_estimate_and_wrong_ones_are_named(copied):
    file = machine(copied) / "results.json"
    results = json.loads(file.read_text())
    first, second = results["rows"][:2]
    first |= {"skipped": "needs about 9.0 GB", "variants": {}, "bound": None}
    second["wrong"] = ["kdfast cpp: error of loss is 1"]
    text = summary.operators(results)
    assert f"- {first['name']}: needs about 9.0 GB" in text
    assert (
        f"{second['name']}: kdfast cpp: error of loss is 1" in text.partition("`attention_kl`")[0]
    )


def test_a_command_that_the_file_does_not_name_is_not_made_up(copied):
    file = machine(copied) / "step.json"
    results = json.loads(file.read_text())
    results.pop("command", None)
    file.write_text(json.dumps(results))
    assert "#### Whole steps\n\nOlder results: they do not" in summary.text(copied / "results")
    file.write_text(json.dumps(results | {"command": "kdfast bench step --only x"}))
    assert "#### Whole steps: `kdfast bench step --only x`" in summary.text(copied / "results")


def test_results_of_two_machines_do_not_stand_under_one_heading(tmp_path):
    root = tmp_path / "benchmarks"
    shutil.copytree(BENCHMARKS / "results", root / "results")
    file = machine(root) / "step.json"
    results = json.loads(file.read_text())
    results["machine"]["cpu"] = "another"
    file.write_text(json.dumps(results))
    with pytest.raises(InputError, match="its cpu is 'another'.*a folder of their own"):
        summary.text(root / "results")


def test_what_the_first_file_does_not_say_is_compared_among_the_others(tmp_path):
    root = tmp_path / "benchmarks"
    shutil.copytree(BENCHMARKS / "results", root / "results")
    for name, cores in (("results.json", None), ("step.json", 2), ("scale.json", 64)):
        file = machine(root) / name
        results = json.loads(file.read_text())
        results["machine"].pop("cores", None)
        if cores is not None:
            results["machine"]["cores"] = cores
        file.write_text(json.dumps(results))
    with pytest.raises(InputError, match="scale.json: its cores is 64, that of step.json .* 2"):
        summary.text(root / "results")


def rows_of_steps(*lengths, tokens=None):
    return [
        {
            "name": "", "pair": "tiny", "method": "internal", "dtype": "float32", "skipped": None,
            "shape": {"B": 2, "N": length}, "tokens": tokens or 2 * length,
            "variants": {
                "kdfast": {"seconds": [1e-3 * length, 2e-3 * length, 9.0]},
                "eager": {"seconds": [1e-4 * length**2]},
                "compile": {"seconds": [1.0] if length == 8 else []},
            },
        }
        for length in lengths
    ]  # fmt: skip


def test_growth_of_whole_steps_is_fitted_from_three_lengths():
    lines = summary._growth(rows_of_steps(32, 8, 16)).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    name = "tiny internal B2 float32"
    assert cells == [
        [name, "kdfast", "8, 16, 32", "16, 32, 64", "1.00 ± 0.00"],
        [name, "eager", "8, 16, 32", "6.4, 25.6, 102", "2.00 ± 0.00"],
    ]


def test_two_lengths_or_padded_batches_show_no_growth():
    assert summary._growth(rows_of_steps(8, 16)) == ""
    assert summary._growth(rows_of_steps(8, 16, 32, tokens=5)) == ""


def test_a_readme_without_its_marks_is_left_alone(tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    assert summary.main([str(tmp_path)]) == 2 and "should hold" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"
