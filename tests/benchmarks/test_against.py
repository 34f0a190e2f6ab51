"""`kdfast bench --against`: two revisions of a copy of this repository, on the reference, which
needs no compiler; and rows that memory would not hold."""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast import cli
from kdfast.benchmarks import against, harness, report, step
from kdfast.errors import InputError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
Result = tuple[int, str, str]


def git(root: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(
        ["git", "-C", str(root), *settings, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(root: Path, message: str) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", message)


def append(file: Path, code: str) -> None:
    file.write_text(file.read_text() + "\n" + code)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources with one commit, tagged v1.0.0."""
    root = tmp_path / "repository"
    built = shutil.ignore_patterns("__pycache__", "*.so", "results", "distill", "*.yaml")
    for name in ("kdfast", "kernels", "benchmarks"):
        shutil.copytree(ROOT / name, root / name, ignore=built)
    (root / "setup.py").write_text("")
    (root / ".gitignore").write_text("__pycache__/\nbuild/\n*.so\n")
    git(tmp_path, "init", "--quiet", str(root))
    commit(root, "first")
    git(root, "tag", "v1.0.0")
    monkeypatch.setattr(against, "checkout", lambda: root)
    return root


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Exit status, standard output and standard error of `kdfast bench ...`."""

    def run(*arguments: Any) -> Result:
        status = cli.main(["bench", "--device", "cpu", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


# Two revisions


SLOW = """
_dense = attention_map_kl
def attention_map_kl(map_s, map_t, **options):
    if options["inputs"] == "scores" and map_s.dtype != torch.float64:
        import time
        time.sleep(0.15)
    return _dense(map_s, map_t, **options)
"""
NOT_YET = """
def cka(*_, **__):
    raise RuntimeError("not here yet")
"""
RUN = ("--quick", "--backend", "reference", "--tolerance", 20, "--seconds", 0.5)


@pytest.mark.slow
def test_slower_same_and_missing_rows_are_told_apart(
    bench: Callable[..., Result], repository: Path, scratch: Path, tmp_path: Path
) -> None:
    cka = repository / "kdfast" / "ops" / "cka.py"
    now = cka.read_text()
    append(cka, NOT_YET)
    commit(repository, "without cka")
    cka.write_text(now)
    append(repository / "kdfast" / "reference" / "attention_map_kl.py", SLOW)
    before = git(repository, "status", "--porcelain"), git(repository, "count-objects")
    file = tmp_path / "results.json"
    status, out, err = bench("attention_map_kl", "cka", "--against", "HEAD", *RUN, "--json", file)
    assert status == 1, err
    same, slower, missing, there = json.loads(file.read_text())["rows"]
    assert (same["options"], same["verdict"]) == ({"inputs": "probabilities"}, "same")
    assert (slower["options"], slower["verdict"]) == ({"inputs": "scores"}, "slower"), slower
    assert slower["variants"] == {"new": "kdfast reference", "old": "kdfast reference"}
    assert len(slower["seconds"]["new"]) == len(slower["seconds"]["old"]) >= 12
    assert min(slower["seconds"]["new"]) > 0.15 > min(slower["seconds"]["old"])
    assert slower["error"]["new"] == slower["error"]["old"]
    assert missing["skipped"] == "old: RuntimeError: not here yet" and not missing["verdict"]
    assert there["verdict"] and not any(x["wrong"]["new"] for x in (same, slower, missing, there))
    assert "this tree" in out and "changed) against HEAD" in out and " slower |" in out
    assert "- cka B4 N24 d32 float32 forward+backward: old: RuntimeError" in out
    assert list(scratch.iterdir()) == []
    assert before == (git(repository, "status", "--porcelain"), git(repository, "count-objects"))
    # The same table again, from the file.
    assert bench("--from", file)[:2] == (1, out)


@pytest.mark.exhaustive
def test_tree_is_the_same_as_itself(
    bench: Callable[..., Result], repository: Path, scratch: Path
) -> None:
    status, out, err = bench("attention_map_kl", "--against", "v1.0.0", *RUN)
    assert status == 0, err
    assert out.count(" same |") == 2 and "changed" not in out
    assert list(scratch.iterdir()) == []


def test_whole_steps_are_compared(
    bench: Callable[..., Result], repository: Path, scratch: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Both sides in this process, whose old one is the slower."""

    class Here(against._Served):
        process = None
        timed: Any
        close: Any

        def __init__(self, tree: Path, device: torch.device, log: Path) -> None:
            self.tree, self.device = tree, device
            self.timed = self.close = None

        def start(self) -> None:  # type: ignore[override]
            pass

        end = start

        def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
            reply: dict[str, Any] = getattr(self, what)(**json.loads(json.dumps(arguments)))
            if what == "run" and self.tree.name == "old":
                reply["seconds"] *= 1000
            return reply

    monkeypatch.setattr(against, "Worker", Here)
    monkeypatch.setattr(against, "needed_libraries", lambda *_: [])
    file = tmp_path / "results.json"
    status, out, err = bench(
        "step", "--against", "HEAD", "--quick", "--only", "internal", "--json", file
    )
    assert status == 0, err
    soft, internal = json.loads(file.read_text())["rows"]
    assert soft["name"] == "tiny soft labels B4 N16 float32" and soft["operator"] == "step"
    assert soft["variants"]["new"] == "soft labels" and soft["error"]["new"] is None
    assert internal["variants"] == {"new": "kdfast", "old": "kdfast"}
    assert internal["error"]["new"] == internal["error"]["old"]
    assert internal["error"]["new"]["loss"] < 1e-4 > internal["error"]["new"]["gradient"] / 10
    for row in (soft, internal):
        assert row["verdict"] == "faster" and len(row["seconds"]["old"]) >= 12
        assert not row["wrong"]["new"]
    assert re.search(r"step tiny internal B4 N16 float32 +\| +kdfast +\|", out)
    assert bench("--from", file)[:2] == (0, out)


def test_a_wrong_step_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = against._Served()
    served.device, served.timed, served.close = CPU, None, None
    row = against.steps_of("quick", "internal")[1]
    exact = tmp_path / "exact.pt"
    request: Any = {"row": asdict(row.row), "exact": str(exact)}
    assert served.judge_step(**request) == {}
    error = served.prepare_step(**request, variant="kdfast")["error"]
    assert step.wrong(error, "float32") == []
    served.release()
    loss, gradient = torch.load(exact)
    torch.save([loss + 1, -gradient], exact)
    error = served.prepare_step(**request, variant="kdfast")["error"]
    assert error["gradient"] == pytest.approx(2, rel=1e-3)
    assert [text.split()[1] for text in step.wrong(error, "float32")] == ["loss", "gradient"]
    served.release()
    monkeypatch.setattr(served, "_stepper", lambda *_: 1 / 0)
    found = served.prepare_step(**request, variant="kdfast")
    assert (
        found == {"skipped": "ZeroDivisionError: division by zero"} == served.judge_step(**request)
    )


def test_revision_that_cannot_run_the_benchmarks_is_named(
    bench: Callable[..., Result], repository: Path, scratch: Path
) -> None:
    package = repository / "kdfast" / "__init__.py"
    now = package.read_text()
    package.write_text("raise ImportError('broken then')\n")
    commit(repository, "broken")
    package.write_text(now)
    status, _, err = bench("cka", "--against", "HEAD", "--quick", "--backend", "reference")
    assert status == 2 and "cannot run the benchmarks of this tree" in err
    assert "ImportError: broken then" in err
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, OSError("disk is full")])
def test_temporary_folders_are_gone_whatever_happens(
    trouble: Any, bench: Callable[..., Result], repository: Path, scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def ask(*_: Any, **__: Any) -> None:
        assert list(scratch.iterdir())
        raise trouble

    monkeypatch.setattr(against.Worker, "start", lambda self: None)
    monkeypatch.setattr(against.Worker, "ask", ask)
    status, _, err = bench("cka", "--against", "v1.0.0", *RUN)
    assert status == 2 and ("interrupted" in err or "disk is full" in err)
    assert list(scratch.iterdir()) == []


# Libraries


BUILDS = """
import os, pathlib
print("compiled", os.environ["KDFAST_BUILD"])
pathlib.Path("kdfast/_cpu.abi3.so").write_text("library")
print("calls", file=open(os.environ["CALLS"], "a"))
"""


def exported(repository: Path, scratch: Path) -> tuple[against.Revision, Path]:
    of = against.revision(repository, "HEAD")
    folder = Path(tempfile.mkdtemp(dir=scratch))
    against.export(repository, of.tree, folder / "git", folder / "tree")
    return of, folder / "tree"


def test_library_is_compiled_once_for_the_same_sources(
    repository: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALLS", str(scratch / "calls"))
    (repository / "setup.py").write_text(BUILDS)
    (repository / "csrc" / "cpu").mkdir(parents=True)
    source = repository / "csrc" / "cpu" / "a.cpp"
    for content, calls in (("1", 1), ("1", 1), ("2", 2)):
        source.write_text(content)
        git(repository, "add", "--all")
        git(repository, "commit", "--quiet", "--allow-empty", "--message", content)
        of, tree = exported(repository, scratch)
        against.build(repository, tree, of, "cpp")
        assert (tree / "kdfast" / "_cpu.abi3.so").read_text() == "library"
        assert (scratch / "calls").read_text().count("calls") == calls


def test_failed_compilation_names_the_revision_and_shows_why(
    repository: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "setup.py").write_text("print('a.cpp:1: error: no such thing')")
    (repository / "csrc" / "cpu").mkdir(parents=True)
    (repository / "csrc" / "cpu" / "a.cpp").write_text("thing")
    commit(repository, "second")
    of, tree = exported(repository, scratch)
    with pytest.raises(InputError, match=rf"HEAD \({of.commit[:9]}\): its kdfast/_cpu was not"):
        against.build(repository, tree, of, "cpp")
    assert "a.cpp:1: error: no such thing" in capsys.readouterr().err


def test_new_sources_belong_to_this_tree_and_other_files_do_not(
    repository: Path, scratch: Path
) -> None:
    (repository / "kdfast" / "added.py").write_text("")
    (repository / "notes.txt").write_text("")
    (repository / "setup.py").write_text("changed = True\n")
    of = against.working_tree(repository, scratch / "git")
    against.export(repository, of.tree, scratch / "git", scratch / "tree")
    assert of.changed and (scratch / "tree" / "kdfast" / "added.py").exists()
    assert (scratch / "tree" / "setup.py").read_text() == "changed = True\n"
    assert not (scratch / "tree" / "notes.txt").exists()
    assert (scratch / "tree" / "kdfast" / "kernels" / "attention_kl.py").exists()


# Bad input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--against", "v1.0.1"], "--against v1.0.1: should be a revision that git knows here"),
        (["--against", "v1.0.1"], "did you mean 'v1.0.0'?"),
        (["--against=--output=x"], "--against --output=x: should be a revision"),
        (
            ["--against", "v1.0.0", "--backend", "cp"],
            "known are auto, reference, cpp, triton, cuda",
        ),
        (["--against", "v1.0.0", "--backend", "cuda"], "serves cuda, and --device is cpu"),
        (["--against", "v1.0.0", "--tolerance", "-1"], "--tolerance is -1.0, should be 0 or more"),
        (["--against", "v1.0.0", "--tune"], "--against takes no --tune"),
        (["--against", "v1.0.0", "--only", "N513"], "no row of the set 'cpu'"),
        (["--backend", "cpp"], "--backend is of --against REV"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], expected: str, bench: Callable[..., Result], repository: Path,
    scratch: Path,
) -> None:  # fmt: skip
    status, _, err = bench(*arguments)
    assert status == 2 and expected in err
    assert err.count("\n") == 1
    assert list(scratch.iterdir()) == []


def test_revision_needs_a_checkout(
    bench: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kdfast

    monkeypatch.setattr(kdfast, "__file__", str(tmp_path / "kdfast" / "__init__.py"))
    (tmp_path / "kdfast").mkdir()
    status, _, err = bench("--against", "HEAD~1")
    assert status == 2 and "compares revisions of a git checkout of kdfast" in err
    git(tmp_path, "init", "--quiet")
    status, _, err = bench("--against", "HEAD~1")
    assert status == 2 and "which is another project" in err
    assert err.count("\n") == 1


def test_unknown_device_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "cdua"]) == 2
    assert "known are cpu, cuda" in capsys.readouterr().err


# Verdicts


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "same"), (1.02, "same"), (1.05, "slower"), (0.95, "faster")]
)
def test_verdict_needs_more_than_the_tolerance(factor: float, verdict: str) -> None:
    old = [1.0 + 0.1 * (k % 3) for k in range(20)]
    new = [factor * x * (1.004 if k % 2 else 0.996) for k, x in enumerate(old)]
    assert against.compared({"new": new, "old": old}, 0.03)["verdict"] == verdict


def test_noise_is_no_verdict() -> None:
    old, new = [1.0] * 10, [1.5] * 9 + [0.9]
    assert against.compared({"new": new, "old": old}, 0.03)["verdict"] == "same"


def test_interval_of_the_median_holds_it_in_99_of_100_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (10, 25, 40):
        samples = torch.randn(4000, n, generator=generator).exp().tolist()
        intervals = [against.sign_interval(x) for x in samples]
        held = sum(low <= 1 <= high for low, high in intervals) / len(intervals)
        assert held > 0.985


def results_with(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"rows": [{"verdict": None, "wrong": {"new": [], "old": []}} | row for row in rows]}


def test_status_is_that_of_the_new_revision() -> None:
    same = {"verdict": "same"}
    assert against.status(results_with(same, {})) == 0
    assert against.status(results_with(same, {"verdict": "faster"})) == 0
    assert against.status(results_with(same, {"verdict": "slower"})) == 1
    assert against.status(results_with(same, {"wrong": {"new": [], "old": ["is off"]}})) == 0
    assert against.status(results_with(same, {"wrong": {"new": ["is off"], "old": []}})) == 1
    assert against.status(results_with({})) == 2


# Memory


def test_row_that_memory_cannot_hold_is_skipped_with_its_estimate(
    bench: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ceilings = {"bytes": 1e10, "flops": {"float32": 1e11}, "exponentials": None}
    monkeypatch.setattr(harness, "measure_ceilings", lambda *_: ceilings)
    monkeypatch.setattr(harness, "free_memory", lambda device: 1)
    file = tmp_path / "results.json"
    status, out, _ = bench("--quick", "--json", file, "--report", tmp_path / "report")
    rows = json.loads(file.read_text())["rows"]
    assert status == 0 and {row["operator"] for row in rows} == set(harness.OPERATORS)
    for row in rows:
        assert row["skipped"].startswith("skipped: needs about ")
        assert row["skipped"].endswith(" GB, 0.0 GB are free") and row["variants"] == {}
        assert f"- {row['name']}: {row['skipped']}" in out


def test_variant_that_memory_cannot_hold_is_skipped_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = harness.operator_module("attention_kl").ROWS["quick"][0]
    needed, dense = harness.memory_of(row)
    assert needed > dense  # in a small row; one byte is free once the problem is there
    asked: list[int] = []

    def free(_: torch.device) -> int:
        asked.append(0)
        return needed if len(asked) == 1 else 1

    monkeypatch.setattr(harness, "free_memory", free)
    ceilings: dict[str, Any] = {"bytes": 1.0, "flops": {"float32": 1.0}, "exponentials": None}
    found = harness.measure(row, CPU, harness.Clock(CPU), ceilings, seconds=0.01, rounds=(1, 1))
    assert found["variants"]["eager"]["skipped"].startswith("skipped: needs about")
    assert found["variants"]["flash"]["seconds"] and not found["wrong"]


def test_estimate_holds_the_inputs_and_the_maps_of_eager() -> None:
    for operator in harness.OPERATORS:
        module = harness.operator_module(operator)
        for row in module.ROWS["quick"]:
            inputs = module.Problem(row, CPU).inputs.values()
            needed, dense = harness.memory_of(row)
            assert needed > sum(x.numel() * x.element_size() for x in inputs) and dense > 0
        for row in module.ROWS["cuda"]:
            assert harness.memory_of(row) > (1 << 20, 1 << 20)
    long = harness.Row("attention_kl", {"B": 1, "H": 12, "N": 32768, "d": 64}, "bfloat16")
    assert harness.memory_of(long)[1] > 4 * 12 * 32768**2 * 2


def test_free_memory_is_that_of_this_machine() -> None:
    free = harness.free_memory(CPU)
    assert free is None or free > 1 << 20


# Results of several runs


@pytest.fixture
def stored() -> dict[str, Any]:
    return report.read_json(Path(__file__).parent / "results.json")


def written(folder: Path, name: str, results: dict[str, Any]) -> Path:
    file = folder / name
    file.write_text(json.dumps(results))
    return file


def test_results_of_one_machine_are_shown_together(
    stored: dict[str, Any], tmp_path: Path, bench: Callable[..., Result]
) -> None:
    first = written(tmp_path, "a.json", stored | {"rows": stored["rows"][:2]})
    second = written(tmp_path, "b.json", stored | {"rows": stored["rows"][2:]})
    assert report.read_runs([first, second])["rows"] == stored["rows"]
    assert bench("--from", first, "--from", second)[0] == 0
    with pytest.raises(InputError, match="two files have the row"):
        report.read_runs([first, first])


def test_results_of_two_machines_are_never_mixed(
    stored: dict[str, Any], tmp_path: Path, bench: Callable[..., Result]
) -> None:
    other = stored | {"machine": stored["machine"] | {"gpu": "another GPU"}}
    first, second = written(tmp_path, "a.json", stored), written(tmp_path, "b.json", other)
    status, _, err = bench("--from", first, "--from", second)
    assert status == 2 and err.count("\n") == 1
    assert f"{first} is of " in err and f"{second} is of " in err
    assert "another GPU" in err and str(stored["machine"]["gpu"]) in err
