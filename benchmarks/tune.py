"""Launch tables of the Triton kernels, measured anew: `kdfast bench --tune`.

Each entry of the table of this GPU is walked downhill from what is shipped: tiles, warps and
stages are changed one step at a time, as long as that makes the kernel faster. A candidate takes
turns with the best so far, and must compute what the shipped entry does. Nothing is changed on
disk: what is faster is printed; the JSON says what was tried. `pytest -m "" tests/kernels` says
whether a new entry spills registers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from kdfast.benchmarks import harness
from kdfast.benchmarks.harness import Row
from kdfast.errors import InputError

# (rows of a tile, its columns, warps, stages)
Launch = tuple[int, int, int, int]
Key = tuple[int, ...]  # bytes of an element, width of a head, and for "fused" the keys
STEPS = ((16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (4, 8), (1, 2, 3, 4))
TOKENS = 1 << 14  # of a measured batch, and the length where the entry does not say it
LENGTH = 2048
WORTHWHILE = 1.02
ROUNDS = 15


def entries(tables: dict[str, dict[Key, Launch]]) -> list[tuple[str, Key]]:
    """Those of tables "KERNEL" and "KERNEL VARIANT"; averaged teachers have no benchmark."""
    return [
        (table, key)
        for table, launches in tables.items()
        if not table.endswith(" mean")
        for key in launches
    ]


def row_of(table: str, key: Key) -> Row:
    """A problem whose time is that of the entry's kernel, or depends on it alone."""
    kernel, _, variant = table.partition(" ")
    size, width, *keys = key
    length = keys[0] if keys else LENGTH
    return Row(
        "attention_kl",
        {"B": max(1, TOKENS // length), "H": 12, "N": length, "d": width},
        dtype={2: "bfloat16", 4: "float32"}[size],
        over={"forward": "forward", "fused": "forward+backward"}.get(kernel, "backward"),
        options={"direction": variant} if variant else {},
    )


def neighbours(launch: Launch, table: str) -> Iterator[Launch]:
    """One step away in one parameter. "fused" holds whole rows: its columns are the keys."""
    for i, steps in enumerate(STEPS):
        if i == 1 and table.startswith("fused"):
            continue
        at = steps.index(launch[i])
        for other in (at - 1, at + 1):
            if 0 <= other < len(steps):
                changed = list(launch)
                changed[i] = steps[other]
                yield tuple(changed)  # type: ignore[misc]


def tune_entry(
    launches: dict[Key, Launch],
    table: str,
    key: Key,
    device: torch.device,
    clock: harness.Clock,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What was tried, and the fastest; `launches` is left as it was."""
    shipped = best = launches[key]
    row = row_of(table, key)
    problem = harness.operator_module(row.operator).Problem(row, device)
    steps = harness.runner(problem, row.over, problem.variants()["kdfast triton"])
    tried: dict[Launch, dict[str, Any]] = {shipped: {"speedup": 1.0, "error": None}}
    try:
        right = [x.double() for x in harness.once(*steps)]
        waiting = list(neighbours(best, table))
        while waiting:
            candidate = waiting.pop(0)
            if candidate in tried:
                continue
            say(" ".join(map(str, candidate)))
            try:
                faster = _compared(launches, key, candidate, best, steps, right, row, clock)
            except Exception as error:  # too large for the GPU, or not to be compiled
                tried[candidate] = {"speedup": None, "error": harness.one_line(error)}
                continue
            tried[candidate] = {"speedup": tried[best]["speedup"] * faster, "error": None}
            if faster > WORTHWHILE:
                best = candidate
                waiting = list(neighbours(best, table))
    finally:
        launches[key] = shipped
    return {
        "table": table,
        "key": key,
        "row": row.name,
        "shipped": shipped,
        "best": best,
        "speedup": tried[best]["speedup"],
        "tried": [{"launch": launch, **found} for launch, found in tried.items()],
    }


def _compared(
    launches: dict[Key, Launch],
    key: Key,
    candidate: Launch,
    best: Launch,
    steps: tuple[Callable[[], Any], Callable[[Any], list[Tensor]]],
    right: list[Tensor],
    row: Row,
    clock: harness.Clock,
) -> float:
    """How many times faster the candidate is. Raises: ValueError where it is wrong."""
    launches[key] = candidate
    found = harness.errors({str(i): x for i, x in enumerate(right)}, harness.once(*steps))
    limit = 4 * harness.FLOOR[row.dtype][1]
    if not max(found.values()) <= limit:
        raise ValueError(f"differs by {max(found.values()):.2g} from the shipped entry")
    times: dict[Launch, list[float]] = {best: [], candidate: []}
    for _ in range(ROUNDS):
        for launch in times:
            launches[key] = launch
            times[launch].append(clock(*steps))
    return statistics.median(b / c for b, c in zip(times[best], times[candidate], strict=True))


def run(
    device: torch.device,
    *,
    only: str = "",
    write: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Tune the entries whose name, as in "backward_query js (2, 64)", holds `only`."""
    from kdfast.kernels import attention_kl

    architecture = attention_kl.architecture(device)
    tables = attention_kl.LAUNCH[architecture]
    chosen = [(table, key) for table, key in entries(tables) if only in f"{table} {key}"]
    if not chosen:
        known = ", ".join(f"{table} {key}" for table, key in entries(tables))
        raise InputError(f"no entry of {architecture} has {only!r} in its name: {known}")
    results: dict[str, Any] = {
        "schema": 1,
        "kind": "launch table",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": False,
        "architecture": architecture,
        "machine": harness.machine(device),
        "versions": harness.versions(),
        "entries": [],
    }
    clock = harness.Clock(device)
    with harness.progress(len(chosen)) as (say, advance):
        for table, key in chosen:
            name = f"{table} {key}"

            def say_of_entry(text: str, name: str = name) -> None:
                say(f"{name}: {text}")

            launches = tables[table]
            results["entries"].append(tune_entry(launches, table, key, device, clock, say_of_entry))
            write(results)
            advance()
    results["complete"] = True
    write(results)
    return results


def text(results: dict[str, Any]) -> str:
    """The entries that should change."""
    lines = [f"{results['architecture']}: {len(results['entries'])} entries"]
    for entry in results["entries"]:
        name = f'"{entry["table"]}" {tuple(entry["key"])}'
        same = entry["best"] == entry["shipped"]
        change = "stays" if same else f"-> {tuple(entry['best'])}, {entry['speedup']:.2f} x"
        lines.append(f"  {name}: {tuple(entry['shipped'])} {change}")
    return "\n".join(lines)
