"""Two revisions side by side: this working tree ("new") and another revision of its git ("old").

Each is exported into a temporary folder, its compiled library built there (kept under build/against
for the next call), and runs in a process of its own. Both run the rows of the new one's benchmarks,
in turn, round after round, never both at once; what counts are ratios of times of the same round. A
third process computes in float64 what is right, so that the two that are timed do the same work and
nothing else.

The rows are those of operators, or of the suite `step`: whole training steps, of soft labels and of
kdfast. Of a step, loss and gradient of this tree's eager losses are right.

A row is slower when a 99 % interval of the median ratio new / old lies above 1 + tolerance, faster
when it lies below 1 / (1 + tolerance). The interval is that of the sign test: it takes the ratios
for nothing but independent.

The results, as JSON, are those of `harness`, but for

    kind        "against"
    backend     "auto" | name
    tolerance   0.03 for 3 %
    revisions   {new, old: {name, commit, tree: of git, changed: whether the working tree differs
                 from the commit}}
    rows        [{operator ("step" for a step), name, shape, dtype, pass, options,
                  variants: {new, old: "kdfast BACKEND", or of a step its variant | null},
                  seconds: {new, old: [one a round]},
                  error: {new, old: {loss and each gradient: |x - x64|max / |x64|max; of a step
                          loss and gradient: |x - eager| / |eager|} | null},
                  ratio: {median, quartiles: [low, high], interval: [low, high]} | null,
                  verdict: "same" | "slower" | "faster" | null,
                  skipped: why it was not compared | null,
                  others: share of the CPUs that other work took during the rounds | null,
                  wrong: {new, old: [what is wrong]}}]
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import kdfast
from kdfast.benchmarks import harness, report, step
from kdfast.benchmarks.harness import Row
from kdfast.errors import BackendError, InputError, nearest
from kdfast.ops import dispatch, library

SIDES = ("new", "old")
TOLERANCE = 0.03
ROUNDS = (12, 40)  # of 12, the interval leaves out one on either side
CONFIDENCE = 0.99
# What is shorter is repeated in each round, and its median taken.
LEAST_SECONDS = 0.02
REPEATS = 9
SOURCES = ("kdfast", "kernels", "benchmarks", "csrc")


# Rows


Ask = Callable[..., dict[str, Any]]  # of a role what is to be done, with its arguments


@dataclass(frozen=True)
class Call:
    """A row of an operator, served by a backend; float64 says what is right."""

    row: Row
    backend: str
    right = "float64"

    @property
    def operator(self) -> str:
        return self.row.operator

    @property
    def name(self) -> str:
        return self.row.name

    def described(self) -> dict[str, Any]:
        return harness.described(self.row)

    def memory(self) -> tuple[int, int]:
        return harness.memory_of(self.row)

    def unfit(self, device: torch.device) -> str | None:
        return None

    def judge(self, ask: Ask, exact: Path, eager: bool) -> dict[str, Any]:
        """Have what is right written; how far eager is from it, where that is to run."""
        return ask("judge", "judge", row=asdict(self.row), exact=str(exact), eager=eager)

    def prepare(self, ask: Ask, side: str, exact: Path) -> dict[str, Any]:
        return ask(side, "prepare", row=asdict(self.row), backend=self.backend, exact=str(exact))

    def wrong(self, reply: dict[str, Any], judged: dict[str, Any]) -> list[str]:
        found = {"eager": {"error": judged["eager"]}, reply["variant"]: reply}
        return harness.wrong_outputs(found, self.row.dtype)


@dataclass(frozen=True)
class Step:
    """A variant of a row of the suite `step`; eager losses say what is right."""

    row: step.Row
    variant: str
    right = "eager"

    @property
    def operator(self) -> str:
        return "step"

    @property
    def name(self) -> str:
        return self.row.name

    def described(self) -> dict[str, Any]:
        shape = {"B": self.row.batch, "N": self.row.tokens}
        return {"operator": "step", "name": self.name, "shape": shape, "dtype": self.row.dtype,
                "pass": "step", "options": {}}  # fmt: skip

    def memory(self) -> tuple[int, int]:
        """As `harness.memory_of`: of this variant alone."""
        others = tuple(name for name in step.VARIANTS if name != self.variant)
        return step.needed(replace(self.row, without=others))

    def unfit(self, device: torch.device) -> str | None:
        return step.unfit(self.row, device)

    def judge(self, ask: Ask, exact: Path, eager: bool) -> dict[str, Any]:
        """Have what is right written, where eager is to run; soft labels are nobody's kernel."""
        if not eager or self.variant != "kdfast":
            return {}
        return ask("judge", "judge_step", row=asdict(self.row), exact=str(exact))

    def prepare(self, ask: Ask, side: str, exact: Path) -> dict[str, Any]:
        right = str(exact) if exact.exists() else None
        return ask(side, "prepare_step", row=asdict(self.row), variant=self.variant, exact=right)

    def wrong(self, reply: dict[str, Any], judged: dict[str, Any]) -> list[str]:
        return step.wrong(reply["error"], self.row.dtype) if reply["error"] else []


def steps_of(which: str, only: str) -> list[Step]:
    """Soft labels, which the rows of several methods share, and kdfast's losses."""
    found: dict[Any, Step] = {}
    for row in step.rows_of(which, only):
        shared = (row.pair, row.batch, row.tokens, row.dtype)
        found.setdefault(shared, Step(replace(row, method="soft labels"), "soft labels"))
        found[row] = Step(row, "kdfast")
    return list(found.values())


# Revisions


@dataclass(frozen=True)
class Revision:
    name: str  # as the user gave it
    commit: str
    tree: str
    changed: bool = False  # the working tree, where it differs from the commit

    def __str__(self) -> str:
        return f"{self.name} ({self.commit[:9]}{', changed' if self.changed else ''})"


def checkout() -> Path:
    """The git checkout that this kdfast lies in.

    Raises: InputError where there is none.
    """
    package = Path(kdfast.__file__).resolve().parent
    if shutil.which("git") is None:
        raise InputError("--against needs git, which is not on the path")
    try:
        root = Path(_git(package, "rev-parse", "--show-toplevel"))
    except InputError as error:
        raise InputError(
            f"--against compares revisions of a git checkout of kdfast; {package} is in none: "
            f"{error}"
        ) from error
    if not all((root / name).exists() for name in ("setup.py", "kdfast/__init__.py")):
        raise InputError(
            f"--against compares revisions of a git checkout of kdfast; {package} is in {root}, "
            "which is another project"
        )
    return root


def revision(root: Path, name: str) -> Revision:
    """Raises: InputError for a name that git does not know."""
    try:
        commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options",
                      name + "^{commit}")  # fmt: skip
    except InputError as error:
        known = _git(root, "for-each-ref", "--format=%(refname:short)").splitlines()
        raise InputError(
            f"--against {name}: should be a revision that git knows here, such as HEAD~1, a branch "
            f"or a tag{nearest(name, known)}"
        ) from error
    return Revision(name, commit, _git(root, "rev-parse", commit + "^{tree}"))


def working_tree(root: Path, scratch: Path) -> Revision:
    """What is tracked, as it is now, and new sources; written beside git's own objects."""
    head = revision(root, "HEAD")
    git = _git_of(root, scratch)
    git("read-tree", "HEAD")
    git("add", "--update", ".")
    git("add", "--", *(name for name in SOURCES if (root / name).is_dir()))
    tree = git("write-tree")
    return Revision("this tree", head.commit, tree, changed=tree != head.tree)


def export(root: Path, tree: str, scratch: Path, folder: Path) -> None:
    """The files of a tree, with `kernels` where it is when kdfast is installed."""
    git = _git_of(root, scratch)
    git("read-tree", tree)
    git("checkout-index", "--all", f"--prefix={folder}/")
    if (folder / "kernels").is_dir():
        _link(folder / "kdfast" / "kernels", folder / "kernels")


def _link(name: Path, target: Path) -> None:
    if name.is_symlink() or name.is_file():
        name.unlink()
    elif name.is_dir():
        shutil.rmtree(name)
    name.symlink_to(target, target_is_directory=True)


def _git_of(root: Path, scratch: Path) -> Callable[..., str]:
    """git with an index, and a place for objects, of our own: nothing is left in the repository."""
    objects = (root / _git(root, "rev-parse", "--git-path", "objects")).resolve()
    (scratch / "objects").mkdir(parents=True, exist_ok=True)
    environment = {
        "GIT_INDEX_FILE": str(scratch / "index"),
        "GIT_OBJECT_DIRECTORY": str(scratch / "objects"),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(objects),
    }
    return lambda *arguments: _git(root, *arguments, **environment)


def _git(root: Path, *arguments: str, **environment: str) -> str:
    # A git hook, from which this may be called, says where its own repository and index are.
    of_hooks = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
    inherited = {name: value for name, value in os.environ.items() if name not in of_hooks}
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        env=inherited | environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise InputError(f"git {arguments[0]}: {done.stderr.strip() or 'failed'}")
    return done.stdout.strip()


# Libraries


def needed_libraries(backend: str, device: torch.device) -> list[str]:
    """The backends, of those that are compiled, which may serve."""
    tried = dispatch.AUTO.get(device.type, ()) if backend == "auto" else (backend,)
    return [name for name in tried if name in library.COMPILED]


def build(
    root: Path, tree: Path, of: Revision, backend: str, say: Callable[[str], None] = lambda _: None
) -> None:
    """Put a backend's compiled library into an exported tree, by the tree's own setup.py; the same
    sources are compiled once.

    Raises: InputError where it does not compile, after the compiler's last lines.
    """
    name, kind = library.COMPILED[backend], library.COMPILED[backend].removeprefix("_")
    if not (tree / "csrc" / kind).is_dir():
        return  # older than the library
    environment = {"KDFAST_BUILD": kind}
    if kind == "cuda" and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        major, minor = torch.cuda.get_device_capability()
        environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}{'a' if major == 9 else ''}"
    known = ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")
    setting = {x: (os.environ | environment).get(x) for x in known}
    key = hashlib.sha256(
        json.dumps([kind, torch.__version__, platform.machine(), setting]).encode()
    )
    for file in [tree / "setup.py", *sorted((tree / "csrc").rglob("*"))]:
        if file.is_file():
            key.update(str(file.relative_to(tree)).encode() + b"\0" + file.read_bytes())
    kept = root / "build" / "against" / key.hexdigest()[:16]
    if not kept.is_dir():
        say(f"compiling kdfast/{name} of {of}, which takes minutes")
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=tree, env=os.environ | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        made = sorted((tree / "kdfast").glob(f"{name}.*so"))
        if done.returncode or not made:
            # Without ninja's account of what succeeded, and the compiler's hundred flags.
            said = [x for x in done.stdout.splitlines() if not re.match(r"\[\d+/\d+\]", x)]
            print("\n".join(line[:200] for line in said[-20:]), file=sys.stderr)
            raise InputError(
                f"{of}: its kdfast/{name} was not built, the reason is above; --backend takes one "
                "that needs no compiler, such as reference"
            )
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{kept.name}.partial-", dir=kept.parent))
        shutil.copy2(made[0], partial)
        with contextlib.suppress(OSError):  # another call was faster
            partial.rename(kept)
        shutil.rmtree(partial, ignore_errors=True)
    for file in kept.iterdir():
        if not (tree / "kdfast" / file.name).exists():
            shutil.copy2(file, tree / "kdfast")


# The processes


class Died(RuntimeError):
    """A process ended before it answered; the text is the last line that it wrote."""


class Worker:
    """A process that imports kdfast from an exported tree; `kdfast.benchmarks` is a link there."""

    def __init__(self, tree: Path, device: torch.device, log: Path) -> None:
        self.tree, self.device, self.log = tree, device, log
        self.process: subprocess.Popen[str] | None = None
        self.ready = False

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """The answer of the process, of a new one where it died.

        Raises: Died.
        """
        if self.process is None or self.process.poll() is not None:
            self.start()
        if not self.ready:
            self._ask(
                "start",
                tree=str(self.tree.resolve()),
                benchmarks=str((self.tree / "kdfast" / "benchmarks").resolve()),
                device=str(self.device),
                threads=torch.get_num_threads(),
            )
            self.ready = True
        return self._ask(what, **arguments)

    def start(self) -> None:
        """Begin to import; several do so at once."""
        path = [str(self.tree), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from kdfast.benchmarks import against; against.serve()"],
                cwd=self.tree, env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self.ready = False

    def _ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin and self.process.stdout
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            self.end(patience=10)
            said = self.log.read_text(errors="replace").strip().splitlines()
            code = self.process.returncode
            ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            last = said[-1] if said else "it said nothing"
            raise Died(f"its process ended ({ended}): {harness.without_paths(last)}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def end(self, patience: float = 1) -> None:
        """Let it go, or after so many seconds kill it."""
        if self.process is not None:
            assert self.process.stdin and self.process.stdout
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            try:
                self.process.wait(timeout=patience)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()


def serve() -> None:
    """Answer requests, one line of JSON each, on what was the standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; who asked ends us
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    served = _Served()
    for line in sys.stdin:
        request = json.loads(line)
        reply = getattr(served, request.pop("do"))(**request)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class _Served:
    """What a process does for the one that asks; the answers are JSON."""

    def start(self, tree: str, benchmarks: str, device: str, threads: int) -> dict[str, Any]:
        import kdfast.benchmarks

        parts = [(kdfast, f"{tree}/kdfast"), (kdfast.benchmarks, benchmarks)]
        if Path(tree, "kernels").is_dir():
            import kdfast.kernels

            parts.append((kdfast.kernels, f"{tree}/kernels"))
        for module, folder in parts:
            found = Path(str(module.__file__)).resolve()
            if not found.is_relative_to(folder):
                raise RuntimeError(f"{module.__name__} is imported from {found}, not {folder}")
        torch.set_num_threads(threads)
        # Only ours and eager run here, and importing the compiler takes longer than they do.
        torch.compile = lambda function, **_: function  # type: ignore[assignment]
        self.device = torch.device(device)
        self.clock = harness.Clock(self.device)
        self.timed: Callable[[], float] | None = None
        self.close: Callable[[], None] | None = None
        return {}

    def judge(self, row: dict[str, Any], exact: str, eager: bool) -> dict[str, Any]:
        """Write what is right into a file; the error of eager, where it can run."""
        what, problem = self._problem(row)
        right = harness.exact_outputs(problem, what)
        torch.save({name: x.cpu() for name, x in right.items()}, exact)
        error = None
        if eager and "eager" not in what.without:
            with contextlib.suppress(Exception):  # out of memory: what is wrong is judged without
                found = harness.once(
                    *harness.runner(problem, what.over, problem.variants()["eager"])
                )
                error = harness.errors(right, found)
                del found
        del problem, right
        self.release()
        return {"eager": error}

    def judge_step(self, row: dict[str, Any], exact: str) -> dict[str, Any]:
        """Write what eager losses give into a file."""
        return self._or_why_not(lambda: self._judge_step(row, exact))

    def _judge_step(self, row: dict[str, Any], exact: str) -> dict[str, Any]:
        stepper = self._stepper(row, "eager")
        with step.losses_of("eager"):
            found = stepper.outcome()
        torch.save([found.loss, found.gradient], exact)
        stepper.close()
        del stepper, found
        self.release()
        return {}

    def prepare(self, row: dict[str, Any], backend: str, exact: str) -> dict[str, Any]:
        """The variant that serves, its error, and the seconds of a run; or why none does."""
        return self._or_why_not(lambda: self._prepare(row, backend, exact))

    def prepare_step(self, row: dict[str, Any], variant: str, exact: str | None) -> dict[str, Any]:
        """As `prepare`; without an error where nothing says what is right."""
        return self._or_why_not(lambda: self._prepare_step(row, variant, exact))

    def _or_why_not(self, prepare: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return prepare()
        except Exception as error:
            found = harness.one_line(error)
        self.release()
        return {"skipped": found}

    def _prepare_step(self, row: dict[str, Any], variant: str, exact: str | None) -> dict[str, Any]:
        stepper = self._stepper(row, variant)
        self.close = stepper.close
        error = None
        if exact is not None:
            error = stepper.outcome().error(step.Outcome(*torch.load(exact)))
        self.timed = lambda: step.timed(stepper.step, self.device)
        for _ in range(2):  # the first also allocates what the optimizer keeps
            seconds = self.timed()
        return {"variant": variant, "error": error, "seconds": seconds}

    def _stepper(self, row: dict[str, Any], variant: str) -> step.Stepper:
        what = step.Row(**row | {"without": tuple(row["without"])})
        pair = step.make_pair(what.pair, what.tokens)
        pair.teacher.to(self.device)
        torch.manual_seed(0)
        return step.Stepper(pair, what, variant, step.make_batch(pair, what), self.device)

    def _prepare(self, row: dict[str, Any], backend: str, exact: str) -> dict[str, Any]:
        what, problem = self._problem(row)
        variants = problem.variants()
        tried = (backend,)
        if backend == "auto":
            tried = dispatch.AUTO.get(self.device.type, dispatch.AUTO_ELSEWHERE)  # type: ignore[assignment]
        reasons = {x.backend: x.reason for x in dispatch.explain(what.operator)}
        for name in tried:
            variant = f"kdfast {name}"
            if variant in what.without:
                reasons[name] = "takes too long here"
            elif variant in variants:
                steps = harness.runner(problem, what.over, variants[variant])
                try:
                    found = harness.once(*steps)
                except BackendError as refused:
                    reasons[name] = refused.reasons[name]
                    continue
                right = {k: x.to(self.device) for k, x in torch.load(exact).items()}
                error = harness.errors(right, found)
                del found, right
                self.timed = functools.partial(self.clock, *steps)
                gc.collect()
                self.timed()
                return {"variant": variant, "error": error, "seconds": self.timed()}
        del problem, variants
        self.release()
        text = "; ".join(f"kdfast {x}: {reasons.get(x) or 'cannot serve this row'}" for x in tried)
        return {"skipped": text}

    def run(self, repeats: int) -> dict[str, Any]:
        assert self.timed is not None
        gc.disable()
        try:
            return {"seconds": statistics.median(self.timed() for _ in range(repeats))}
        finally:
            gc.enable()

    def release(self) -> dict[str, Any]:
        if self.close is not None:
            self.close()
        self.timed = self.close = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        return {}

    def _problem(self, row: dict[str, Any]) -> tuple[Row, harness.Problem]:
        what = Row(**row | {"without": tuple(row["without"])})
        torch.manual_seed(0)
        return what, harness.operator_module(what.operator).Problem(what, self.device)


# The run


@contextlib.contextmanager
def _workers(
    root: Path,
    name: str,
    backend: str,
    device: torch.device,
    say: Callable[[str], None],
) -> Iterator[tuple[dict[str, Revision], dict[str, Worker], Path]]:
    """Both revisions, and processes that run them ("judge" is of the new one); a scratch folder."""
    other = revision(root, name)
    with tempfile.TemporaryDirectory(prefix="kdfast-against-") as created:
        scratch = Path(created)
        revisions = {"new": working_tree(root, scratch / "git"), "old": other}
        for side, of in revisions.items():
            say(f"exporting {of}")
            export(root, of.tree, scratch / "git", scratch / side)
            for compiled in needed_libraries(backend, device):
                build(root, scratch / side, of, compiled, say)
        for side in SIDES:
            _link(scratch / side / "kdfast" / "benchmarks", scratch / "new" / "benchmarks")
        trees = {"new": "new", "old": "old", "judge": "new"}
        workers = {
            role: Worker(scratch / side, device, scratch / f"{role}.log")
            for role, side in trees.items()
        }
        try:
            for worker in workers.values():
                worker.start()
            yield revisions, workers, scratch
        finally:
            for worker in workers.values():
                worker.end()


def run(
    name: str,
    operators: Sequence[str],
    device: torch.device,
    *,
    backend: str = "auto",
    which: str | None = None,
    only: str = "",
    seconds: float | None = None,
    tolerance: float = TOLERANCE,
    write: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Compare this tree with the revision `name` of its git, row by row; `write` sees each state.

    `operators`: theirs are the rows, or of ("step",) whole training steps, with backend="auto".
    `seconds` is what the rounds of a row may take, `tolerance` what may be lost (0.03: 3 %).
    Raises: InputError for an unknown revision, backend or row, where there is no checkout, and
    where a revision does not compile or cannot run these benchmarks.
    """
    check_backend(backend, device)
    which = which or device.type
    rows: Sequence[Call | Step] = (
        steps_of(which, only)
        if list(operators) == ["step"]
        else [Call(row, backend) for row in harness.rows_of(operators, which, only)]
    )
    if seconds is None:
        seconds = 2.0 if which == "quick" else 15.0 if device.type == "cpu" else 3.0
    root = checkout()

    def say_it(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with (
        _workers(root, name, backend, device, say_it) as (revisions, workers, scratch),
        harness.progress(len(rows)) as (say, advance),
    ):
        for role, worker in workers.items():  # before anything is measured
            try:
                worker.ask("release")
            except Died as error:
                of = revisions.get(role, revisions["new"])
                raise InputError(f"{of} cannot run the benchmarks of this tree: {error}") from error
        results = harness.begun(
            which,
            device,
            kind="against",
            backend=backend,
            tolerance=tolerance,
            revisions={side: asdict(of) for side, of in revisions.items()},
        )
        for row in rows:
            say(f"{row.operator} {row.name}")
            results["rows"].append(
                _compare(row, workers, device, seconds, tolerance, scratch / "exact.pt")
            )
            write(results)
            advance()
    results["complete"] = True
    write(results)
    return results


def check_backend(backend: str, device: torch.device) -> None:
    known = ("auto", *dispatch.BACKENDS)
    if backend not in known:
        raise InputError(
            f"--backend {backend}: unknown{nearest(backend, known)}; known are {', '.join(known)}"
        )
    at = library.DEVICE.get(backend, device.type)
    if at != device.type and not (backend == "triton" and library.interpreting()):
        raise InputError(f"--backend {backend} serves {at}, and --device is {device.type}")


def _compare(
    row: Call | Step,
    workers: dict[str, Worker],
    device: torch.device,
    seconds: float,
    tolerance: float,
    exact: Path,
) -> dict[str, Any]:
    record: dict[str, Any] = {
        **row.described(),
        "variants": dict.fromkeys(SIDES),
        "seconds": {side: [] for side in SIDES},
        "error": dict.fromkeys(SIDES),
        "ratio": None,
        "verdict": None,
        "skipped": None,
        "others": None,
        "wrong": {side: [] for side in SIDES},
    }
    problem, dense = row.memory()  # two processes hold the first
    if reason := row.unfit(device) or harness.too_large(2 * problem, device):
        return record | {"skipped": reason}

    def ask(role: str, what: str, **arguments: Any) -> dict[str, Any]:
        try:
            return workers[role].ask(what, **arguments)
        except Died as error:
            return {"skipped": str(error)}

    eager = harness.too_large(problem + dense, device) is None
    judged = row.judge(ask, exact, eager)
    if reason := judged.get("skipped"):
        return record | {"skipped": f"{row.right}: {reason}"}
    ready = {side: row.prepare(ask, side, exact) for side in SIDES}
    exact.unlink(missing_ok=True)
    for side, reply in ready.items():
        if "variant" in reply:
            record["variants"][side], record["error"][side] = reply["variant"], reply["error"]
            record["wrong"][side] = row.wrong(reply, judged)
    reasons = {side: reply["skipped"] for side, reply in ready.items() if "skipped" in reply}
    ours = [worker.process.pid for worker in workers.values() if worker.process is not None]
    others = harness.OtherWork(ours) if device.type == "cpu" else None
    began, number = time.perf_counter(), 0
    while not reasons and number < ROUNDS[1]:
        longest = max(reply["seconds"] for reply in ready.values())
        repeats = min(REPEATS, math.ceil(LEAST_SECONDS / longest))
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            reply = ask(side, "run", repeats=repeats)
            if "skipped" in reply:
                reasons[side] = reply["skipped"]
                break
            record["seconds"][side].append(reply["seconds"])
        number += 1
        spent = time.perf_counter() - began
        if number >= ROUNDS[0] and spent * (number + 1) / number > seconds:
            break
    record["others"] = others and others.share()
    for side in SIDES:
        ask(side, "release")
    if reasons:
        if "old" not in reasons:  # what served once serves no more
            record["wrong"]["new"].append(reasons["new"])
        text = "; ".join(f"{side}: {reason}" for side, reason in reasons.items())
        return record | {"skipped": text, "seconds": {side: [] for side in SIDES}, "others": None}
    return record | compared(record["seconds"], tolerance)


# Verdicts


def compared(seconds: dict[str, list[float]], tolerance: float) -> dict[str, Any]:
    """The ratio new / old of the rounds, and what it says."""
    ratios = [new / old for new, old in zip(seconds["new"], seconds["old"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    interval = sign_interval(ratios)
    verdict = "same"
    if interval[0] > 1 + tolerance:
        verdict = "slower"
    elif interval[1] < 1 / (1 + tolerance):
        verdict = "faster"
    ratio = {"median": middle, "quartiles": [low, high], "interval": list(interval)}
    return {"ratio": ratio, "verdict": verdict}


def sign_interval(values: Sequence[float]) -> tuple[float, float]:
    """Between which of the ordered values the median lies, with CONFIDENCE; those of fewer than 8
    hold it with less. It is outside of all but the k lowest and highest when at most k of n fair
    coins show heads, or tails."""
    ordered, n = sorted(values), len(values)
    tail = itertools.accumulate(2 * math.comb(n, k) / 2**n for k in range(n // 2))
    k = max(sum(1 for outside in tail if outside <= 1 - CONFIDENCE) - 1, 0)
    return ordered[k], ordered[n - 1 - k]


def status(results: dict[str, Any]) -> int:
    """1 where the new one is slower in a row, wrong, or fails; 2 where nothing was compared."""
    rows = results["rows"]
    if any(row["verdict"] == "slower" or row["wrong"]["new"] for row in rows):
        return 1
    return 0 if any(row["verdict"] for row in rows) else 2


def text(results: dict[str, Any]) -> str:
    revisions = {side: Revision(**of) for side, of in results["revisions"].items()}
    rows = results["rows"]
    lines = [f"{revisions['new']} against {revisions['old']}", "", *report.setting(results), ""]
    body = []
    for row in rows:
        if row["ratio"] is None:
            continue
        names = dict.fromkeys(row["variants"][side].removeprefix("kdfast ") for side in SIDES)
        low, high = row["ratio"]["quartiles"]
        body.append(
            [
                f"{row['operator']} {row['name']}",
                " / ".join(names),
                *(report.milliseconds(statistics.median(row["seconds"][side])) for side in SIDES),
                f"{row['ratio']['median']:.3f} ({low:.3f}-{high:.3f})",
                row["verdict"],
            ]
        )
    header = ["row", "kdfast", "new, ms", "old, ms", "new / old", "verdict"]
    lines += [report._table(header, body)] if body else ["Nothing was compared."]
    skipped = [row for row in rows if row["skipped"]]
    if skipped:
        lines += ["", "Not compared:", ""]
        lines += [f"- {row['operator']} {row['name']}: {row['skipped']}" for row in skipped]
    wrong = [
        f"- {row['operator']} {row['name']}, {side}: {what}"
        for row in rows
        for side in SIDES
        for what in row["wrong"][side]
    ]
    if wrong:
        lines += ["", "**Wrong outputs:**", "", *wrong]
    if not results["complete"]:
        lines += ["", "The run was not finished: rows are missing."]
    tolerance = f"{100 * results['tolerance']:g} %"
    lines += [
        "",
        "Ratios are medians over rounds of time of this tree / time of the other revision in the "
        f"same round, with the middle half's ends. Slower, faster: by more than {tolerance}, with "
        f"{100 * CONFIDENCE:g} % confidence. Caches are cold, but of whole steps.",
    ]
    return "\n".join(lines)
