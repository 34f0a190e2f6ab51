"""`kdfast bench --tune`: it finds what is faster, and leaves the table as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast import cli
from kdfast.benchmarks import harness, tune
from kdfast.ops import library

pytest.importorskip("triton")
from kdfast.kernels import attention_kl  # noqa: E402

ENTRY = ("forward", (4, 64))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A small table for tiny problems, which the interpreter computes on the CPU."""
    if not library.interpreting():
        pytest.skip("Triton compiles for a GPU here")
    monkeypatch.setitem(library.DEVICE, "triton", "cpu")
    monkeypatch.setattr(tune, "STEPS", ((16, 32, 64), (32, 64), (4,), (1,)))
    monkeypatch.setattr(tune, "TOKENS", 40)
    monkeypatch.setattr(tune, "LENGTH", 40)
    monkeypatch.setattr(tune, "ROUNDS", 1)
    small = {**attention_kl.LAUNCH["interpreter"], "forward": {(4, 64): (32, 64, 4, 1)}}
    monkeypatch.setitem(attention_kl.LAUNCH, "interpreter", small)
    return small


class Clock:
    """Says what each launch takes."""

    def __init__(self, tables: dict[str, Any], cost: Callable[[tune.Launch], float]) -> None:
        self.tables, self.cost = tables, cost

    def __call__(self, *_: Any) -> float:
        return self.cost(self.tables[ENTRY[0]][ENTRY[1]])


def tuned(tables: dict[str, Any], cost: Callable[[tune.Launch], float]) -> dict[str, Any]:
    launches: Any = tables[ENTRY[0]]
    clock: Any = Clock(tables, cost)
    return tune.tune_entry(launches, *ENTRY, torch.device("cpu"), clock, lambda _: None)


@pytest.mark.triton
def test_walks_downhill_and_leaves_the_table_alone(tables: dict[str, Any]) -> None:
    found = tuned(tables, lambda launch: launch[0] * launch[1])
    assert found["best"] == (16, 32, 4, 1) and found["speedup"] == 4
    assert tables["forward"] == {(4, 64): (32, 64, 4, 1)}


@pytest.mark.triton
def test_what_is_not_worth_a_change_stays(tables: dict[str, Any]) -> None:
    found = tuned(tables, lambda launch: 1 + launch[0] / 1e4)
    assert found["best"] == found["shipped"] == (32, 64, 4, 1) and len(found["tried"]) == 4


@pytest.mark.triton
def test_candidate_that_fails_or_is_wrong_is_passed_over(
    tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def errors(exact: dict[str, Any], _: Any) -> dict[str, float]:
        if tables["forward"][4, 64][0] == 64:
            raise RuntimeError("out of resource: shared memory")
        return dict.fromkeys(exact, 1.0)

    monkeypatch.setattr(harness, "errors", errors)
    found = tuned(tables, lambda launch: launch[0] * launch[1])
    assert found["best"] == found["shipped"]
    said = sorted(x["error"] for x in found["tried"] if x["error"])
    assert said[0] == "RuntimeError: out of resource: shared memory"
    assert all("differs by 1 from the shipped entry" in text for text in said[1:])


@pytest.mark.triton
def test_run_writes_and_shows_every_entry(tables: dict[str, Any], tmp_path: Path) -> None:
    states = []
    results = tune.run(torch.device("cpu"), only="forward (4, 64)", write=states.append)
    harness.write_json(tmp_path / "tuned.json", results)
    stored = json.loads((tmp_path / "tuned.json").read_text())
    assert stored["complete"] and stored["architecture"] == "interpreter" and len(states) == 2
    (entry,) = stored["entries"]
    assert entry["table"] == "forward" and entry["key"] == [4, 64] and entry["tried"]
    assert '"forward" (4, 64): (32, 64, 4, 1)' in tune.text(results)


def test_every_entry_of_every_table_has_a_problem() -> None:
    for tables in attention_kl.LAUNCH.values():
        for table, key in tune.entries(tables):
            row = tune.row_of(table, key)
            assert row.over in harness.PASSES and row.shape["B"] * row.shape["N"] == tune.TOKENS
            assert list(tune.neighbours(tables[table][key], table))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "launch tables are those of GPUs"),
        (["--report", "x"], "no operator, --from or --report"),
        (["attention_kl"], "no operator, --from or --report"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "--tune", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_unknown_entry_is_refused_with_those_there_are(tables: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"no entry of interpreter has 'sideways'.*forward \(4, 64\)"
    ):
        tune.run(torch.device("cpu"), only="sideways")
