"""How rows are measured, whatever the operator.

A row is one pass (forward, backward, or both) over one problem. All variants of a row run in one
process, in turn, round after round, so that whatever slows the machine down slows all of them; what
counts are ratios of times of the same round. Caches are flushed before every run. The output of
every variant is compared with float64; a kdfast output that errs more than twice as much as eager
PyTorch in the same dtype, plus a floor, is wrong, and the run fails.

An operator's file provides `ROWS` (by set: "cpu", "cuda", "quick"), `Problem`, and `memory`, an
estimate by which a row that would not fit is skipped beforehand.

The results, as JSON (`kdfast.benchmarks.report` needs nothing else):

    schema      1
    time        when the run began, UTC, ISO 8601
    complete    false while the run goes on
    set         "cpu" | "cuda" | "quick"
    device      "cpu" | "cuda"
    command     what was run, without the files it wrote; code: of which version or revision
    machine     {cpu: its name, kind: family/model/stepping/cache | null, cores, threads,
                 allocator: "default", or the libraries that are preloaded,
                 gpu: name | null, capability: "9.0" | null, gpu_memory: bytes | null}
    versions    {kdfast, python, torch, cuda, triton}; null where it is not there
    ceilings    {bytes: per second of a large copy, read and written,
                 flops: {dtype: per second of a large matrix product},
                 exponentials: per second, 16 a clock and multiprocessor | null on a CPU}
    rows        [{operator, name, shape: {B, H, N, ...}, dtype, pass, options,
                  skipped: why nothing was run, such as too little memory | null,
                  work: {bytes, flops, exponentials}: the least that the pass must do | null,
                  bound: {seconds, by: "bytes" | "flops" | "exponentials"} | null,
                  variants: {name: {seconds: [one a round],
                                    error: {loss and each gradient: |x - x64|max / |x64|max},
                                    memory: {beyond_inputs, beyond_inputs_and_gradients} | null,
                                    memory_skipped: why its process did not say its memory | null,
                                    skipped: why it was not run | null}},
                  others: share of the CPUs that other work took during the rounds | null,
                  wrong: [what is wrong with which variant]}]

Seconds of the k-th round of all variants of a row belong together. Memory is the peak in bytes
during one run: of the allocator on CUDA, of the process on a CPU, in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kdfast.errors import BackendError, InputError
from kdfast.ops import dispatch, library

OPERATORS = ("attention_kl", "attention_map_kl", "cka", "layer_projection")
# Beside the operators, by the name that `kdfast bench` knows: a module with `run`, `markdown`,
# `plot` and FILES, what a report of it writes.
SUITES = {"step": "step", "scale": "scaling"}
PASSES = ("forward", "forward+backward", "backward")

# An error below this is the rounding of the result itself: by dtype, of the loss and of a gradient.
FLOOR = {
    "float64": (1e-13, 1e-12),
    "float32": (1e-6, 2e-6),
    "float16": (1e-4, 5e-4),
    "bfloat16": (1e-4, 4e-3),
}


@dataclass(frozen=True)
class Row:
    """One line of the results."""

    operator: str
    shape: dict[str, int]
    dtype: str = "float32"
    over: str = "forward+backward"
    options: dict[str, Any] = field(default_factory=dict)
    memory: bool = False  # measure it on a CPU too, where each variant takes a process of its own
    without: tuple[str, ...] = ()  # variants that cannot run, or take too long

    @property
    def name(self) -> str:
        words = [f"{key}{value}" for key, value in self.shape.items()]
        words += [str(v) if isinstance(v, str) else k for k, v in self.options.items()]
        return " ".join([*words, self.dtype, self.over])


@dataclass(frozen=True)
class Work:
    """The least that any implementation of a pass must do."""

    bytes: float
    flops: float
    exponentials: float


class Problem(Protocol):
    """A row's tensors on a device, what is computed from them, and what is right."""

    inputs: dict[str, Tensor]
    learned: tuple[str, ...]  # names of the inputs that get a gradient
    upstream: Tensor | None  # of a result that is no scalar
    work: Work

    def __init__(self, row: Row, device: torch.device) -> None: ...

    def variants(self) -> dict[str, Callable[..., Tensor]]:
        """By name; each takes the inputs. Those called "kdfast BACKEND" are ours; "eager" is the
        one whose error in the same dtype is the measure."""

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """The result and the learned inputs' gradients in float64."""


def operator_module(operator: str) -> Any:
    return importlib.import_module(f"kdfast.benchmarks.{operator}")


def backends(operator: str, device: torch.device) -> list[str]:
    """Those that can run on a device here, but for the interpreter of Triton."""
    return [
        name
        for name, available, _ in dispatch.explain(operator)
        if available and library.DEVICE.get(name, device.type) == device.type
    ]


# Running


def runner(
    problem: Problem, over: str, function: Callable[..., Tensor]
) -> tuple[Callable[[], Any], Callable[[Any], list[Tensor]]]:
    """What comes before the clock starts, and what is timed; its results are compared."""
    leaves = [problem.inputs[name].requires_grad_() for name in problem.learned]
    constants = {name: x.detach() for name, x in problem.inputs.items()}

    def forward(_: Any) -> list[Tensor]:
        with torch.no_grad():
            return [function(**constants)]

    def backward(result: Tensor) -> list[Tensor]:
        return [result, *torch.autograd.grad(result, leaves, problem.upstream)]

    if over == "forward":
        return lambda: None, forward
    if over == "backward":
        return lambda: function(**problem.inputs), backward
    return lambda: None, lambda _: backward(function(**problem.inputs))


class Clock:
    """Times one run with cold caches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        else:
            size = 2 * last_level_cache()
        self.flushed = torch.empty(size // 4, dtype=torch.int32, device=device)

    def __call__(self, prepare: Callable[[], Any], timed: Callable[[Any], Any]) -> float:
        prepared = prepare()
        self.flushed.zero_()
        if self.device.type == "cpu":
            start = time.perf_counter()
            result = timed(prepared)
            seconds = time.perf_counter() - start
            del result, prepared
            return seconds
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device waits while the host runs ahead, as it does in the midst of a training step:
        # what is timed is the work on the device.
        torch.cuda._sleep(2_000_000)
        begin.record()
        result = timed(prepared)
        end.record()
        end.synchronize()
        del result, prepared
        return begin.elapsed_time(end) / 1e3


class OtherWork:
    """What the CPUs do from now on for processes that are not ours; what a hypervisor withholds
    counts too. Ours is this one, and those whose numbers are given."""

    def __init__(self, ours: Sequence[int] = ()) -> None:
        self.ours = ours
        self.before = self._seconds()

    def share(self) -> float | None:
        """Of the time of all CPUs; None where the system does not say."""
        if self.before is None or (after := self._seconds()) is None:
            return None
        busy, own, wall = (b - a for a, b in zip(self.before, after, strict=True))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))

    def _seconds(self) -> tuple[float, float, float] | None:
        try:
            # A process's name, which may hold spaces, stands in brackets; user and system follow.
            stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2] for pid in self.ours]
            ticks = sum(float(x) for stat in stats for x in stat.split()[11:13])
            said = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
            user, nice, system, _, _, irq, softirq, steal = (float(x) for x in said)
        except (OSError, ValueError, IndexError):
            return None
        hertz = os.sysconf("SC_CLK_TCK")
        busy = (user + nice + system + irq + softirq + steal) / hertz
        return busy, sum(os.times()[:4]) + ticks / hertz, time.perf_counter()


def last_level_cache() -> int:
    """Bytes; 64 MiB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KM]?)", file.read_text().strip()).groups()  # type: ignore[union-attr]
        sizes.append(int(number) << {"": 0, "K": 10, "M": 20}[unit])
    return max(sizes, default=64 << 20)


def exact_outputs(problem: Problem, row: Row) -> dict[str, Tensor]:
    """In float64, by name, in the order in which a run returns them."""
    result, gradients = problem.exact()
    if row.over == "forward":
        return {"loss": result}
    return {"loss": result} | dict(zip(problem.learned, gradients, strict=True))


def errors(exact: dict[str, Tensor], found: Sequence[Tensor]) -> dict[str, float]:
    """|x - x64|max / |x64|max of each output."""
    tiny = torch.finfo(torch.float64).tiny
    return {
        name: float((x.double() - x64).abs().max() / x64.abs().max().clamp(min=tiny))
        for (name, x64), x in zip(exact.items(), found, strict=True)
    }


def measure(
    row: Row,
    device: torch.device,
    clock: Clock,
    ceilings: dict[str, Any],
    *,
    seconds: float,
    rounds: tuple[int, int],
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """A row of the results. `seconds` is what the rounds may take, `rounds` their least and most
    number."""
    torch.manual_seed(0)
    torch.compiler.reset()
    needed, dense = memory_of(row)
    if reason := too_large(needed, device):
        empty: dict[str, Any] = {
            "work": None,
            "bound": None,
            "variants": {},
            "others": None,
            "wrong": [],
        }
        return {**described(row), "skipped": reason, **empty}
    problem: Problem = operator_module(row.operator).Problem(row, device)
    say("float64")
    exact = exact_outputs(problem, row)

    variants: dict[str, dict[str, Any]] = {}
    runners = {}
    wrong = []
    for name, function in problem.variants().items():
        if name in row.without:
            continue
        say(name)
        record: dict[str, Any] = {
            "seconds": [], "error": None, "memory": None, "memory_skipped": None, "skipped": None,
        }  # fmt: skip
        variants[name] = record
        # A GPU that is full raises; a CPU's process is killed.
        if device.type == "cpu" and name not in LEAN:
            record["skipped"] = too_large(dense, device)
            if record["skipped"]:
                continue
        steps = runner(problem, row.over, function)
        try:
            record["error"] = errors(exact, once(*steps))
            if device.type == "cuda":
                record["memory"] = peak_on_cuda(problem, row, steps)
        except BackendError as error:
            record["skipped"] = error.reasons[name.removeprefix("kdfast ")]
        except Exception as error:
            reason = "out of memory" if out_of_memory(error) else one_line(error)
            record["skipped"] = reason
            if name.startswith("kdfast"):
                wrong.append(f"{name}: {reason}")
            del error  # its traceback holds the tensors
        else:
            runners[name] = steps
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    wrong += wrong_outputs(variants, row.dtype)
    del exact

    if device.type == "cpu" and row.memory:
        for name in runners:
            if name == "kdfast reference":
                continue
            say(f"{name}: memory")
            variants[name] |= peak_in_a_process(row, name)

    gc.disable()
    others = OtherWork() if device.type == "cpu" else None
    try:
        for number, order in enumerate(interleaved(list(runners), rounds[1])):
            say(f"round {number + 1}")
            for name in order:
                variants[name]["seconds"].append(clock(*runners[name]))
            spent = sum(sum(v["seconds"]) for v in variants.values())
            if number + 1 >= rounds[0] and spent * (number + 2) / (number + 1) > seconds:
                break
    finally:
        gc.enable()
    work = problem.work
    return {
        **described(row),
        "skipped": None,
        "work": vars(work),
        "bound": bound(work, row.dtype, ceilings),
        "variants": variants,
        "others": others and others.share(),
        "wrong": wrong,
    }


def described(row: Row) -> dict[str, Any]:
    """What a row of the results begins with."""
    return {
        "operator": row.operator,
        "name": row.name,
        "shape": row.shape,
        "dtype": row.dtype,
        "pass": row.over,
        "options": row.options,
    }


def once(prepare: Callable[[], Any], timed: Callable[[Any], list[Tensor]]) -> list[Tensor]:
    return [x.detach() for x in timed(prepare())]


def interleaved(names: list[str], rounds: int) -> Iterator[list[str]]:
    """Every round begins with another variant, and the others follow in a random order, the same in
    every run, so that none always follows the same one."""
    chance = random.Random(0)
    for k in range(rounds):
        first = names[k % max(len(names), 1) :][:1]
        others = [name for name in names if name not in first]
        yield first + chance.sample(others, len(others))


def wrong_outputs(variants: dict[str, dict[str, Any]], dtype: str) -> list[str]:
    """What errs more than twice as much as eager, plus the floor; where eager cannot run, more than
    four times the floor."""
    eager = (variants.get("eager") or {}).get("error") or {}
    found = []
    for name, record in variants.items():
        if not name.startswith("kdfast") or record["error"] is None:
            continue
        for output, error in record["error"].items():
            floor = FLOOR[dtype][output != "loss"]
            limit = 2 * eager[output] + floor if output in eager else 4 * floor
            if not error <= limit:  # NaN is wrong too
                found.append(f"{name}: error of {output} is {error:.2g}, should be <= {limit:.2g}")
    return found


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or (
        "can't allocate memory" in str(error)
    )


def one_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {without_paths(text)}"[:200]


def without_paths(text: str) -> str:
    """Results are published."""
    return re.sub(r"(?:/[^/ :]+){2,}/?", "...", text)


# Memory


# What stores no more than its inputs and outputs, about.
LEAN = ("kdfast cpp", "kdfast triton", "kdfast cuda", "flash")


def memory_of(row: Row) -> tuple[int, int]:
    """About how many bytes a row takes: its inputs and what is right in float64, without which it
    cannot be measured, and what a variant that stores everything, as eager does, takes beyond the
    inputs."""
    needed, dense = operator_module(row.operator).memory(row)
    return int(needed), int(dense)


def itemsize(row: Row) -> int:
    dtype: torch.dtype = getattr(torch, row.dtype)
    return dtype.itemsize


def too_large(needed: int, device: torch.device) -> str | None:
    """Why so many bytes cannot be had, or None where they can, or nobody knows."""
    free = free_memory(device)
    if free is None or needed <= free:
        return None
    return f"skipped: needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had now; None where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    from kdfast import system  # not there in older revisions, which --against runs

    return system.free_memory()


def peak_on_cuda(problem: Problem, row: Row, steps: tuple[Any, Any]) -> dict[str, int]:
    """Of a second run: the first also holds what compilation and tuning allocate."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    once(*steps)
    torch.cuda.synchronize()
    return _memory(problem, row, torch.cuda.max_memory_allocated() - before)


def _memory(problem: Problem, row: Row, peak: int) -> dict[str, int]:
    learned = [problem.inputs[name] for name in problem.learned if row.over != "forward"]
    gradients = sum(x.numel() * x.element_size() for x in learned)
    return {
        "beyond_inputs": max(peak, 0),
        "beyond_inputs_and_gradients": max(peak - gradients, 0),
    }


def peak_in_a_process(row: Row, variant: str) -> dict[str, Any]:
    """memory: by the process's own peak, which a fresh one alone can tell from what came before;
    memory_skipped: why there is none."""
    found, reason = tried_in_a_process(_peak_of_this_process, row, variant, torch.get_num_threads())
    return {"memory": found, "memory_skipped": reason}


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Its result in a fresh process; None where that was killed or ran out of memory."""
    return tried_in_a_process(function, *arguments)[0]


def tried_in_a_process(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """Its result in a fresh process; or None, and that it was killed or ran out of memory."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_map_blocks) as process:
        try:
            return process.submit(function, *arguments).result(), None
        except BrokenProcessPool:  # for want of memory, as a rule, but nobody says so
            return None, "killed"
        except Exception as error:
            if not out_of_memory(error):
                raise
            return None, "out of memory"


def _map_blocks() -> None:
    """Memory of a MiB and more comes from the system and goes back to it at once: the peak is then
    what is held, without the holes between blocks of an allocator that keeps them."""
    threshold = -3  # M_MMAP_THRESHOLD of glibc
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(threshold, 1 << 20)


def _peak_of_this_process(row: Row, variant: str, threads: int) -> dict[str, int] | None:
    torch.set_num_threads(threads)
    module, device = operator_module(row.operator), torch.device("cpu")

    def steps(problem: Problem) -> tuple[Any, Any]:
        return runner(problem, row.over, problem.variants()[variant])

    # A tiny run loads the code. What a variant keeps from call to call at the real size stays
    # outside of it, and so counts.
    if not variant.startswith("compile"):
        once(*steps(module.Problem(replace(row, shape=module.TINY), device)))
    problem = module.Problem(row, device)
    run = steps(problem)
    if variant.startswith("compile"):
        once(*run)  # the compiler's own memory is not the operator's
    peak = peak_of_process(lambda: once(*run))
    return peak and _memory(problem, row, peak[1] - peak[0])


def peak_of_process(run: Callable[[], Any]) -> tuple[int, int] | None:
    """Bytes of this process before a run and at its peak; None where the system does not say."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator holds would hide a need
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before, reset = status("VmRSS"), status("VmHWM")
    except (OSError, AttributeError, KeyError):
        return None
    if reset > before + (8 << 20):  # the system did not reset it
        return None
    run()
    return before, status("VmHWM")


def status(name: str) -> int:
    """Bytes, from the lines `VmRSS:     1234 kB`."""
    lines = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) << 10


# Ceilings


def measure_ceilings(device: torch.device, dtypes: Sequence[str]) -> dict[str, Any]:
    """What this machine can do at best, measured in the same run as the rows."""
    cuda = device.type == "cuda"

    def best(run: Callable[[], Any]) -> float:
        run()
        times = []
        for _ in range(10 if cuda else 5):
            if cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            else:
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
        return min(times)

    size = (4 << 30) if cuda else max(256 << 20, 4 * last_level_cache())
    # Random bits: a device may move or multiply zeros faster.
    source = torch.randint(2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copied = best(lambda: target.copy_(source))

    def product(dtype: str, side: int) -> float:
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * side**3 / best(lambda: torch.mm(a, b, out=out))

    if cuda:
        flops = {dtype: product(dtype, 8192) for dtype in sorted({*dtypes, "float32"})}
    else:
        # Where a CPU has no instructions for half precision, float32 is what it can do.
        flops = {"float32": product("float32", 2048)}
        for dtype in sorted({*dtypes} - {"float32"}):
            own = product(dtype, 2048 if dtype == "float64" else 512)
            flops[dtype] = own if dtype == "float64" else max(own, flops["float32"])
    return {
        "bytes": 2 * size / copied,
        "flops": flops,
        "exponentials": _exponentials(device) if cuda else None,
    }


def _exponentials(device: torch.device) -> float | None:
    """16 a clock on each multiprocessor (NVIDIA, 8.0 to 10.0), at the highest clock; or None."""
    if torch.version.hip:
        return None
    properties = torch.cuda.get_device_properties(device)
    kilohertz = getattr(properties, "clock_rate", None)
    if kilohertz is None:
        query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
            kilohertz = 1e3 * float(said.stdout.splitlines()[0])
        except (OSError, ValueError, IndexError, subprocess.SubprocessError):
            return None
    return 16 * properties.multi_processor_count * 1e3 * kilohertz


def bound(work: Work, dtype: str, ceilings: dict[str, Any]) -> dict[str, Any]:
    """The least time a pass can take, and what sets it."""
    times = {
        "bytes": work.bytes / ceilings["bytes"],
        "flops": work.flops / ceilings["flops"][dtype],
    }
    if ceilings["exponentials"] is not None:
        times["exponentials"] = work.exponentials / ceilings["exponentials"]
    by = max(times, key=lambda name: times[name])
    return {"seconds": times[by], "by": by}


# The run

LISTED = 8  # rows in an error


def rows_of(operators: Sequence[str], which: str, only: str) -> list[Row]:
    """Those of a set whose name has `only` in it; InputError where there are none."""
    known = [row for operator in operators for row in operator_module(operator).ROWS[which]]
    rows = [row for row in known if only in f"{row.operator} {row.name}"]
    if not rows:
        names = [f"{row.operator} {row.name}" for row in known]
        more = f", ... and {len(names) - LISTED} more" if len(names) > LISTED else ""
        raise InputError(
            f"no row of the set {which!r} of {', '.join(operators)} has {only!r} in its name: "
            f"{', '.join(names[:LISTED])}{more}"
        )
    return rows


def begun(which: str, device: torch.device, **more: Any) -> dict[str, Any]:
    """The results of any suite before its first row; more: what is its own."""
    return {
        "schema": 1,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": False,
        "set": which,
        "device": device.type,
        "machine": machine(device),
        "versions": versions(),
        **more,
        "rows": [],
    }


def run(
    operators: Sequence[str],
    device: torch.device,
    *,
    which: str | None = None,
    only: str = "",
    seconds: float | None = None,
    write: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Measure the rows of a set (by default that of the device); `write` sees each state."""
    which = which or device.type
    rows = rows_of(operators, which, only)
    results = begun(which, device, ceilings=None)
    quick = which == "quick"
    if seconds is None:
        seconds = 0.5 if quick else 15.0 if device.type == "cpu" else 1.5
    rounds = (3, 5) if quick else (5, 25) if device.type == "cpu" else (10, 50)
    clock = Clock(device)
    with progress(len(rows) + 1) as (say, advance):
        say("ceilings")
        results["ceilings"] = measure_ceilings(device, [row.dtype for row in rows])
        advance()
        for row in rows:
            label = f"{row.operator} {row.name}"

            def say_of_row(text: str, label: str = label) -> None:
                say(f"{label}: {text}")

            results["rows"].append(
                measure(
                    row,
                    device,
                    clock,
                    results["ceilings"],
                    seconds=seconds,
                    rounds=rounds,
                    say=say_of_row,
                )  # fmt: skip
            )
            write(results)
            advance()
    results["complete"] = True
    write(results)
    return results


def wrong_rows(results: dict[str, Any]) -> list[str]:
    return [
        f"{row['operator']} {row['name']}: {text}"
        for row in results["rows"]
        for text in row["wrong"]
    ]


def rounded(results: dict[str, Any]) -> dict[str, Any]:
    """To five digits, as they are written: the sixth is noise."""
    found: dict[str, Any] = json.loads(
        json.dumps(results), parse_float=lambda text: float(f"{float(text):.5g}")
    )
    return found


def write_json(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def machine(device: torch.device) -> dict[str, Any]:
    cpu, kind = platform.processor() or platform.machine(), None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        said = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        cpu = said["model name"]
        # A virtual machine may call different processors by one name.
        parts = ("cpu family", "model", "stepping", "cache size")
        kind = "/".join(said.get(part, "") for part in parts)
    except (OSError, KeyError):
        pass
    allocator = os.environ.get("LD_PRELOAD") or "default"
    found = {
        "cpu": cpu,
        "kind": kind,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "allocator": Path(allocator).name,
    }
    if device.type != "cuda":
        return found | {"gpu": None, "capability": None, "gpu_memory": None}
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "gpu_memory": properties.total_memory,
    }


def versions() -> dict[str, str | None]:
    def installed(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "kdfast": installed("kdfast"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
    }


class progress:
    """A bar on a terminal that has tqdm, else a line for each row."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.text = total, 0, ""
        self.began = time.perf_counter()
        self.bar: Any = None
        if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            self.bar = tqdm(total=total, file=sys.stderr, dynamic_ncols=True, leave=False)

    def __enter__(self) -> tuple[Callable[[str], None], Callable[[], None]]:
        return self.say, self.advance

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def say(self, text: str) -> None:
        self.text = text
        if self.bar is not None:
            self.bar.set_description_str(text)

    def advance(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        else:
            what, seconds = self.text.split(":")[0], time.perf_counter() - self.began
            print(f"{self.done}/{self.total} {what}, {seconds:.0f} s", file=sys.stderr, flush=True)


def ratios(row: dict[str, Any], variant: str, baseline: str) -> tuple[float, float, float] | None:
    """How many times faster than the baseline: median over rounds, and the middle half's ends."""
    times = [row["variants"].get(name, {}).get("seconds") for name in (variant, baseline)]
    if not all(times):
        return None
    each = [b / v for v, b in zip(*times, strict=True)]
    if len(each) == 1:
        return each[0], each[0], each[0]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return middle, low, high
