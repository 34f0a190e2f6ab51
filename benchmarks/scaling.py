"""How the losses grow: time and memory against batch, length, layer pairs, teacher layers, classes.

Along each axis one size changes and all others stay. What is timed is the loss of a recipe, forward
and backward, on random internals of the shapes that a capture would leave: no model runs. As in
training, a full batch has no mask, and the teacher's tensors go as the losses are taken. An
exponent is the slope of a straight line through all points, logarithm against logarithm, with its
standard error; at the small end it is that of the overhead.

The results are as in `harness`, but for `suite` ("scale") and the rows:

    rows  [{name, axis, method, points: [{size, skipped: why nothing was run | null,
                                          variants: {name: {seconds: [one a round],
                                                            memory: peak bytes | null,
                                                            memory_skipped: as in `harness`}}}],
            exponents: {name: {seconds: [slope, standard error], memory: the same | null}},
            others: as in `harness`, of the point where it was most}]
"""

from __future__ import annotations

import gc
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kdfast.benchmarks import harness
from kdfast.benchmarks.step import losses_of
from kdfast.errors import InputError

VARIANTS = ("kdfast", "eager")
TITLE = "How losses grow"
FILES = ("scale.md", "scale_seconds.png", "scale_memory.png")


@dataclass(frozen=True)
class Size:
    """The shapes of a problem; the teacher has the student's width and heads of 32 or 64."""

    batch: int = 16
    length: int = 128
    pairs: int = 3
    teacher_layers: int = 6
    classes: int = 3
    width: int = 384
    heads: int = 12


METHODS: dict[str, dict[str, Any]] = {
    "internal": {"cosine_rows": "tokens"},
    "fsd": {},
    "universal": {"label_share": 0.0},
}
# axis: (field of Size, its values by set, the methods that it changes, what else is different)
AXES: dict[str, tuple[str, dict[str, Sequence[int]], Sequence[str], dict[str, int]]] = {
    "batch": (
        "batch",
        {"cpu": (4, 8, 16, 32, 64), "cuda": (16, 32, 64, 128, 256), "quick": (2, 4)},
        ("internal", "fsd", "universal"),
        {},
    ),
    "length": (
        "length",
        {"cpu": (64, 128, 256, 512, 1024), "cuda": (128, 256, 512, 1024, 2048), "quick": (8, 16)},
        ("internal", "fsd"),
        {"batch": 4},
    ),
    "layer pairs": (
        "pairs",
        {"cpu": (1, 2, 3, 6), "cuda": (1, 2, 3, 6), "quick": (1, 2)},
        ("internal", "fsd"),
        {},
    ),
    "teacher layers": (
        "teacher_layers",
        {"cpu": (3, 6, 12, 24), "cuda": (3, 6, 12, 24), "quick": (3, 6)},
        ("universal",),
        {"batch": 64, "classes": 16},
    ),
    "classes": (
        "classes",
        {"cpu": (2, 8, 32, 128, 512), "cuda": (2, 8, 32, 128, 512), "quick": (2, 8)},
        ("universal",),
        {"batch": 64},
    ),
}
BEFORE = """\
Measured by an older revision, which gave the losses a mask of ones and took all layers at once,
where training gives a full batch none and, on a CPU, goes layer by layer."""
ON_PAPER = """\
On paper, with B samples of N tokens, P layer pairs, T teacher and S student layers, width D, C
classes: `internal` takes 4·P·B·N²·D products for attention KL and 2·P·B·H·N² exponentials in H
heads, and memory of a few tiles; P·B·N·D for the cosine. `fsd` takes B·N²·D or B·N·D² for the
tokens of each sample, whichever is less, B²·N·D for the samples of a batch, and 100·N·D for
each sample and each memory of 100 centroids. `universal` takes B·T·S·C, and B·T·D·C for its
classifiers. So batch and layer pairs cost their first power but in what couples samples; length
its second in attention, its first elsewhere."""


def problem(method: str, size: Size, device: torch.device) -> Callable[[], None]:
    """A call is one forward and backward of the method's losses."""
    from kdfast.captured import Captured, LayerAttention, ModelShape
    from kdfast.recipes import build_recipe

    shapes = [
        ModelShape(layers, size.width, size.heads, size.classes)
        for layers in (size.pairs, size.teacher_layers)
    ]
    options: dict[str, Any] = {**METHODS[method], "soft_label_weight": 0.0}
    if method == "fsd":
        options |= {"max_length": size.length, "layer_map": "uniform"}
    recipe = build_recipe(method, *shapes, **options).to(device)
    for part in recipe.fitted.values():
        part.stand_in()
    generator = torch.Generator(device).manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def captured(shape: Any, needs: Any) -> Captured:
        def projected() -> torch.Tensor:  # [B, N, H, d] in memory
            heads = size.heads, size.width // size.heads
            return tensor(size.batch, size.length, *heads).transpose(1, 2)

        return Captured(
            logits=tensor(size.batch, size.classes),
            hidden_states={
                i: tensor(size.batch, size.length, size.width) for i in needs.hidden_states
            },
            attention={
                i: LayerAttention(
                    projected(), projected(), projected(), scale=(size.width // size.heads) ** -0.5
                )
                for i in needs.attention
            },
        )

    own, theirs = (
        captured(shape, needs) for shape, needs in zip(shapes, recipe.needs(), strict=True)
    )
    learned: list[Any] = [own.logits, *own.hidden_states.values()]
    learned += [x for layer in own.attention.values() for x in (layer.query, layer.key)]
    for x in learned:
        x.requires_grad_()
    labels = torch.randint(size.classes, (size.batch,), device=device)

    def run() -> None:
        # Of their own: the teacher's is emptied.
        student, teacher = (side.map(lambda x: x) for side in (own, theirs))
        recipe.total(recipe(student, teacher, labels, release=True)).backward()
        recipe.zero_grad()
        for x in learned:
            x.grad = None

    return run


def needed(size: Size) -> tuple[int, int]:
    """Bytes of the captured tensors and memories, and of eager's maps and their gradients."""
    maps = size.batch * size.heads * size.length**2 * 6 * size.pairs
    states = size.batch * size.length * size.width * 12 * (size.pairs + size.teacher_layers)
    memories = 100 * size.length * size.width * 6 * size.pairs
    return 4 * (states + memories), 4 * maps


def exponent(points: Sequence[tuple[float, float]]) -> list[float] | None:
    """Slope of log y against log x and its standard error; None without two points above 0."""
    points = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    if len(points) < 2:
        return None
    xs, ys = zip(*points, strict=True)
    x0, y0 = statistics.mean(xs), statistics.mean(ys)
    spread = sum((x - x0) ** 2 for x in xs)
    slope = sum((x - x0) * (y - y0) for x, y in points) / spread
    left = sum((y - y0 - slope * (x - x0)) ** 2 for x, y in points)
    error = math.sqrt(left / max(1, len(points) - 2) / spread)
    return [slope, error]


def measure(
    axis: str,
    method: str,
    which: str,
    device: torch.device,
    clock: harness.Clock,
    *,
    seconds: float,
    rounds: tuple[int, int],
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """A row of the results. `seconds` is what the rounds of all its points may take, `rounds` their
    least and most number."""
    field, values, _, others = AXES[axis]
    base = replace(Size(), **others)
    if which == "quick":
        base = replace(base, batch=4, length=8, width=32, heads=2)
    points: list[dict[str, Any]] = []
    shares: list[float] = []
    for value in values[which]:
        say(f"{value}")
        size = replace(base, **{field: value})
        lean, dense = needed(size)
        if reason := harness.too_large(lean, device):
            points.append({"size": value, "skipped": reason, "variants": {}})
            continue
        reason = harness.too_large(lean + dense, device)  # of eager alone
        variants: dict[str, dict[str, Any]] = {
            name: {"seconds": [], "memory": None, "memory_skipped": None}
            for name in VARIANTS
            if name == "kdfast" or reason is None
        }
        runs = {}
        for name in variants:
            with losses_of(name):
                torch.manual_seed(0)
                runs[name] = problem(method, size, device)
                runs[name]()
        other_work = harness.OtherWork() if device.type == "cpu" else None
        for number, order in enumerate(harness.interleaved(list(runs), rounds[1])):
            for name in order:
                with losses_of(name):
                    took = clock(lambda: None, lambda _, run=runs[name]: run())
                    variants[name]["seconds"].append(took)
            spent = sum(sum(v["seconds"]) for v in variants.values())
            share = seconds / len(values[which])
            if number + 1 >= rounds[0] and spent * (number + 2) / (number + 1) > share:
                break
        if other_work and (busy := other_work.share()) is not None:
            shares.append(busy)
        del runs
        gc.collect()
        if which != "quick":
            for name in variants:
                variants[name] |= _peak(method, size, name, device)
        if reason is not None:
            reason = f"eager {reason}"
        points.append({"size": value, "skipped": reason, "variants": variants})
    exponents: dict[str, Any] = {}
    for name in VARIANTS:
        ran = [p for p in points if name in p["variants"]]
        times = [(p["size"], statistics.median(p["variants"][name]["seconds"])) for p in ran]
        memory = [(p["size"], p["variants"][name]["memory"] or 0) for p in ran]
        exponents[name] = {"seconds": exponent(times), "memory": exponent(memory)}
    return {
        "name": f"{axis} {method}",
        "axis": axis,
        "method": method,
        "points": points,
        "exponents": exponents,
        "others": max(shares, default=None),
    }


def _peak(method: str, size: Size, variant: str, device: torch.device) -> dict[str, Any]:
    """memory: bytes beyond the captured tensors at the peak of a run, in a process of its own."""
    found, reason = harness.tried_in_a_process(
        _peak_of_this_process, method, size, variant, device.type, torch.get_num_threads()
    )
    return {"memory": found, "memory_skipped": reason}


def _peak_of_this_process(
    method: str, size: Size, variant: str, kind: str, threads: int
) -> int | None:
    torch.set_num_threads(threads)
    device = torch.device(kind)
    with losses_of(variant):
        problem(method, replace(size, batch=2, length=8), device)()
        run = problem(method, size, device)
        gc.collect()
        if kind == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            return int(torch.cuda.max_memory_allocated() - before)
        peak = harness.peak_of_process(run)
        return peak and max(0, peak[1] - peak[0])


def run(
    device: torch.device,
    *,
    which: str | None = None,
    only: str = "",
    seconds: float | None = None,
    write: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Measure all axes; `write` sees each state. seconds: for the rounds of each axis."""
    which = which or device.type
    quick = which == "quick"
    if seconds is None:
        seconds = 0.5 if quick else 20.0 if device.type == "cpu" else 2.0
    wanted = [
        (axis, method)
        for axis, (_, _, methods, _) in AXES.items()
        for method in methods
        if only in f"{axis} {method}"
    ]
    if not wanted:
        known = [
            f"{axis} {method}" for axis, (_, _, methods, _) in AXES.items() for method in methods
        ]
        raise InputError(f"no row of scale has {only!r} in its name: {', '.join(known)}")
    results = harness.begun(which, device, suite="scale")
    clock = harness.Clock(device)
    with harness.progress(len(wanted)) as (say, advance):
        for axis, method in wanted:

            def say_of_row(text: str, label: str = f"scale {axis} {method}") -> None:
                say(f"{label}: {text}")

            results["rows"].append(
                measure(
                    axis,
                    method,
                    which,
                    device,
                    clock,
                    seconds=seconds,
                    rounds=(3, 5) if quick else (5, 25),
                    say=say_of_row,
                )  # fmt: skip
            )
            write(results)
            advance()
    results["complete"] = True
    write(results)
    return results


# On paper: several GPUs


@dataclass(frozen=True)
class Cluster:
    """GPUs that each train on their own batch, under DistributedDataParallel. All is assumed.

    bandwidth: bytes per second that a GPU sends while it receives as many (NVLink 4: 450e9), of
    which collectives reach `reached`. latency: seconds of a collective. overlap: the share of the
    gradients' exchange that hides behind the backward pass. products: operations per second that
    large matrix products reach (bfloat16 of an H100 or H200: 40 % of 989e12).
    """

    gpus: int = 8
    bandwidth: float = 450e9
    reached: float = 0.7
    latency: float = 2e-5
    overlap: float = 0.0
    products: float = 4e14


@dataclass(frozen=True)
class Job:
    """What each GPU trains: the student's parameters, its own batch, the layer pairs of a local
    structure (rows="samples" of CKALoss), 0 without one. size: bytes of a gradient and of a state;
    bucket: bytes of gradients that go in one collective."""

    parameters: int
    batch: int
    length: int
    width: int
    pairs: int = 0
    size: int = 2
    bucket: int = 25 << 20

    @property
    def states(self) -> int:
        """Bytes of a layer's states of one GPU's batch."""
        return self.batch * self.length * self.width * self.size

    def operations(self, gpus: int) -> float:
        """Of the local structure of the batch of so many GPUs: two symmetric Gram matrices, of
        which half is computed, and their product with the student's states in backward."""
        return 4.0 * self.pairs * (gpus * self.batch) ** 2 * self.length * self.width

    def memory(self, gpus: int) -> int:
        """Bytes of the gathered states of all pairs, both sides, and of the student's gradient."""
        return 3 * self.pairs * gpus * self.states


def longer(cluster: Cluster, job: Job) -> dict[str, float]:
    """Seconds by which a step on all GPUs exceeds one GPU's step on its own batch.

    gradients: DistributedDataParallel's, round a ring, what of it does not hide. states: of student
    and teacher, gathered before the loss, after the sizes of all, which hosts tell each other;
    backward sends nothing, since each GPU has the gradient of the whole batch. products: every GPU
    computes the coupled loss of the whole batch. The last two hide behind nothing.
    """
    if cluster.gpus == 1:
        return {"gradients": 0.0, "states": 0.0, "products": 0.0}
    speed, others = cluster.bandwidth * cluster.reached, cluster.gpus - 1
    gradients = job.parameters * job.size
    exchange = 2 * others / cluster.gpus * gradients / speed
    exchange += math.ceil(gradients / job.bucket) * cluster.latency
    gather = 2 * (others * job.states / speed + cluster.latency)
    more = job.operations(cluster.gpus) - job.operations(1)
    return {
        "gradients": (1 - cluster.overlap) * exchange,
        "states": cluster.latency + job.pairs * gather,
        "products": more / cluster.products,
    }


# Tables and plots


def markdown(results: dict[str, Any]) -> str:
    from kdfast.benchmarks.report import _table

    body = []
    for row in results["rows"]:
        for name in VARIANTS:
            ran = [point for point in row["points"] if name in point["variants"]]
            sizes = [str(point["size"]) for point in ran]
            times = [statistics.median(p["variants"][name]["seconds"]) for p in ran]
            body.append(
                [
                    row["axis"],
                    row["method"],
                    name,
                    ", ".join(sizes),
                    ", ".join(f"{1e3 * t:.3g}" for t in times),
                    *(_exponent(row["exponents"][name][x]) for x in ("seconds", "memory")),
                ]
            )
    header = ["axis", "losses", "", "sizes", "ms", "time grows by", "memory by"]
    skipped = [
        f"{row['name']} {point['size']}: {point['skipped']}"
        for row in results["rows"]
        for point in row["points"]
        if point["skipped"]
    ]
    skipped += [
        f"{row['name']} {point['size']}: memory of {name}: {variant['memory_skipped']}"
        for row in results["rows"]
        for point in row["points"]
        for name, variant in point["variants"].items()
        if variant.get("memory_skipped")
    ]
    if any("others" not in row for row in results["rows"]):
        skipped.append(BEFORE)
    return "\n\n".join([_table(header, body), *skipped, ON_PAPER])


def _exponent(found: list[float] | None) -> str:
    return "" if found is None else f"{found[0]:.2f} ± {found[1]:.2f}"


def plot(folder: Path, results: dict[str, Any]) -> list[Path]:
    """scale_seconds.png and scale_memory.png: a panel an axis, logarithms on both sides."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, and none may be there
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for what, unit, scale in (("seconds", "ms", 1e3), ("memory", "MB", 1e-6)):
        shown = [r for r in results["rows"] if r["exponents"]["kdfast"][what]]
        axes = list(dict.fromkeys(row["axis"] for row in shown))
        if not axes:
            continue
        figure, panels = plt.subplots(
            1, len(axes), figsize=(3.4 * len(axes), 3.4), squeeze=False, layout="constrained"
        )
        for panel, axis in zip(panels[0], axes, strict=True):
            rows = [row for row in shown if row["axis"] == axis]
            for k, row in enumerate(rows):
                for name, style in zip(VARIANTS, ("o-", "s--"), strict=True):
                    ran = [point for point in row["points"] if name in point["variants"]]
                    xs = [point["size"] for point in ran]
                    ys = [_value(point["variants"][name], what) for point in ran]
                    slope = _exponent(row["exponents"][name][what]).split(" ±")[0]
                    label = f"{row['method']}, {name}: {slope}"
                    panel.loglog(xs, [scale * y for y in ys], style, color=f"C{k}", ms=4,
                                 label=label)  # fmt: skip
            sizes = [point["size"] for point in rows[0]["points"]]
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.minorticks_off()
            panel.set_xlabel(axis)
            panel.set_ylabel(f"{'peak memory' if what == 'memory' else 'time'}, {unit}")
            panel.legend(fontsize=7)
        made.append(folder / f"scale_{what}.png")
        partial = made[-1].with_name(made[-1].name + ".partial")
        figure.savefig(partial, dpi=130, format="png")
        os.replace(partial, made[-1])
        plt.close(figure)
    return made


def _value(variant: dict[str, Any], what: str) -> float:
    return statistics.median(variant["seconds"]) if what == "seconds" else variant["memory"] or 0.0
