"""Compile the Triton kernels for a GPU that is not there, through their own launch functions.

    python compile.py ARCHITECTURE [MODULE ...] [--dtypes A,B] [--directions A,B] [--exhaustive]

A stub takes the place of Triton's driver, so that every launch compiles what it would compile on
that architecture, with the real arguments, and runs nothing. Prints a line of JSON per compiled
kernel: registers, those that were spilled (bytes of stack on NVIDIA), shared memory, its limit.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget

# Target, and the bytes of shared memory that one program may have.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * 1024),  # stands for all without a launch table
}
# Of student and teacher; the first alone unless exhaustive.
TWO_DTYPES = (
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float16),
    (torch.float16, torch.float32),
)
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    def __init__(self, target):
        self.target = target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


def registers(kernel, target):
    """Registers of a thread, and what was spilled: bytes of stack, or vector registers."""
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        return [
            sum(map(int, re.findall(rf"\.vgpr_{name}:\s*(\d+)", text)))
            for name in ("count", "spill_count")
        ]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [BINARIES / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    return [int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")]


def attention_kl(architecture, dtypes, widths, directions, exhaustive):
    """One call per launch table entry and option that makes other code."""
    from kdfast.kernels import attention_kl as module

    module.architecture = lambda device: architecture
    if TARGETS[architecture][0].backend == "cuda":
        module.precision = lambda x: "tf32x3" if x.dtype == torch.float32 else "ieee"

    def inputs(dtype, width, keys, pairs=1, batch=2, key_heads=2, of_teacher=None):
        dtype_t = of_teacher or dtype
        sides = (
            (4, 64, dtype), (key_heads, keys, dtype), (4, 64, dtype_t), (4, keys, dtype_t)
        )  # fmt: skip
        return [
            [torch.zeros(batch, h, n, width, dtype=of_side) for _ in range(pairs)]
            for h, n, of_side in sides
        ]

    def call(dtype, width, direction, *, keys=512, mask=False, mean=False, sizes=None, **options):
        sides = inputs(dtype, width, keys, **(sizes or {}))
        batch, pairs = sides[0][0].shape[0], len(sides[0])
        causal, window = options.get("causal", False), options.get("window")
        cu_seqlens = options.get("cu_seqlens")
        attention_mask = torch.ones(batch, keys, dtype=torch.bool) if mask else None
        scales = [0.125] * pairs
        arguments = (
            *sides, attention_mask, None, cu_seqlens, scales, scales, causal, window, mean,
            direction,
        )  # fmt: skip
        statistics = module.forward(*arguments)
        module.backward(torch.zeros_like(statistics[0]), *statistics, *arguments, True)

    def fused(dtype, width, direction, keys, mask, **sizes):
        sides = inputs(dtype, width, keys, **sizes)
        if not module.fuses(*sides[:3], direction, False, False):
            return
        batch = sides[0][0].shape[0]
        attention_mask = torch.ones(batch, keys, dtype=torch.bool) if mask else None
        module.fused(
            *sides, attention_mask, None, None, [0.125], [0.125], False, None, False, direction,
            "mean", False,
        )  # fmt: skip

    for dtype in dtypes:
        for width in widths:
            for direction in directions:
                call(dtype, width, direction, mask=True)
                for keys in (128, 256):
                    fused(dtype, width, direction, keys, True)
                # Sizes of 1 become constants of the code.
                alone = {"batch": 1, "key_heads": 4}
                call(dtype, width, direction, mask=True, sizes=alone)
                fused(dtype, width, direction, 128, True, **alone)
                if exhaustive:
                    call(dtype, width, direction)
                    call(dtype, width, direction, causal=True, window=64)
                    call(dtype, width, direction, mask=True, sizes={"pairs": 12})
                    call(dtype, width, direction, mask=True, mean=True)
                    fused(dtype, width, direction, 128, False)
        if exhaustive:
            call(dtype, 256, directions[0], mask=True)
            call(dtype, 80, directions[0], mask=True)
    if exhaustive:
        packed = torch.tensor([0, 64], dtype=torch.int32)
        call(torch.bfloat16, 64, "forward", cu_seqlens=packed, keys=64)
    for dtype, of_teacher in TWO_DTYPES if exhaustive else TWO_DTYPES[:1]:
        for width in widths:
            for direction in directions:
                call(dtype, width, direction, mask=True, sizes={"of_teacher": of_teacher})
                fused(dtype, width, direction, 128, True, of_teacher=of_teacher)


def attention_map_kl(architecture, dtypes, widths, directions, exhaustive):
    from kdfast.kernels import attention_map_kl as module

    module.on_nvidia = lambda: TARGETS[architecture][0].backend == "cuda"
    for dtype in dtypes:
        for keys in (128, 512, 4096, 8192, 32768) if exhaustive else (128, 8192):
            for direction in directions:
                for scores in (True, False):
                    for masked in (True, False) if exhaustive else (True,):
                        map_s = torch.zeros(1, 1, 4, keys, dtype=dtype)
                        mask = torch.ones(1, keys, dtype=torch.bool) if masked else None
                        arguments = (map_s, map_s, mask, scores, direction)
                        statistics = module.forward(*arguments)
                        module.backward(statistics[0], *statistics, *arguments)


def cka(architecture, dtypes, widths, directions, exhaustive):
    """Each side; widths and directions are the attentions'."""
    from kdfast.kernels import cka as module

    module.architecture = lambda device: architecture

    def call(
        side, dtype, n, *, d=(768, 768), layers=2, problems=4, masked=True, of_teacher=None,
        **options,
    ):  # fmt: skip
        features = [torch.zeros(problems, n, d[i % 2], dtype=dtype) for i in range(layers)]
        mask = torch.ones(problems, n, dtype=torch.bool) if masked else None
        half = layers // 2
        features[half:] = [x.to(of_teacher or dtype) for x in features[half:]]
        pairs = [k for i in range(half) for k in (i, half + i)]
        if options.get("matrix"):
            pairs = [k for i in range(half) for j in range(half) for k in (i, half + j)]
        pairs += [k for i in range(layers) for k in (i, i)]
        bandwidths = [0.0] * layers if options.get("rbf") else []
        arguments = (
            features, None, mask, pairs, bandwidths, side, options.get("unbiased", False)
        )  # fmt: skip
        inner, *saved = module.forward(*arguments, True)
        wanted = range(layers if options.get("both") else half)
        module.backward(inner, *saved, *arguments, list(wanted))

    for dtype in dtypes:
        for unbiased in (False, True) if exhaustive else (True,):
            for n in (16, 32, 64, 128) if exhaustive else (64, 128):
                for both in (False, True):
                    call("tiles", dtype, n, unbiased=unbiased, both=both)
                call("gram", dtype, n, unbiased=unbiased, d=(98304, 98304))
            call("gram", dtype, 512, unbiased=unbiased)
            call("tiles", dtype, 512, unbiased=unbiased)
            call("tiles", dtype, 512, unbiased=unbiased, rbf=True)
            call("feature", dtype, 4096, unbiased=unbiased)
            if exhaustive:
                for side in ("tiles", "gram", "feature"):
                    # One problem, widths of no alignment, many layers, no mask.
                    call(side, dtype, 128, unbiased=unbiased, problems=1)
                    call(side, dtype, 128, unbiased=unbiased, d=(77, 13), both=True)
                    call(side, dtype, 128, unbiased=unbiased, layers=12, both=True)
                    call(side, dtype, 128, unbiased=unbiased, masked=False)
                    call(side, dtype, 640, unbiased=unbiased, masked=False)
                call("tiles", dtype, 640, unbiased=unbiased, rbf=True, masked=False)
    for dtype, of_teacher in TWO_DTYPES if exhaustive else TWO_DTYPES[:1]:
        for unbiased in (False, True) if exhaustive else (True,):
            for both in (False, True) if exhaustive else (False,):
                options = {"unbiased": unbiased, "both": both, "of_teacher": of_teacher}
                call("tiles", dtype, 64, **options)
                call("feature", dtype, 4096, layers=4, matrix=True, **options)
                if exhaustive:
                    call("tiles", dtype, 512, **options)
                    call("gram", dtype, 128, **options)
                    call("feature", dtype, 4096, **options)


def layer_projection(architecture, dtypes, widths, directions, exhaustive):
    """Tokens of every kind of program: few features, narrow, held on chip, wide, many layers."""
    from kdfast.kernels import layer_projection as module

    module.architecture = lambda device: architecture

    def sides(dtype, d, many=(6, 12), strided=False, masked=True, of_teacher=None):
        layers = [torch.zeros(2, 3, d, dtype=dtype) for _ in range(sum(many))]
        if strided:  # each layer by strides of its own
            layers[0] = torch.zeros(2, 5, d, dtype=dtype)[:, :3]
        mask = torch.ones(2, 3, dtype=torch.bool) if masked else None
        return layers[: many[0]], [x.to(of_teacher or dtype) for x in layers[many[0] :]], mask

    def project(*arguments, teacher=False, **options):
        layers_s, layers_t, mask = sides(*arguments, **options)
        *projected, weights = module.forward(layers_s, layers_t, mask, 0.5)
        wanted = list(range(len(layers_s) + teacher * len(layers_t)))
        module.backward(
            projected, weights, weights, layers_s, layers_t, mask, 0.5, wanted
        )  # fmt: skip

    def loss(objective, *arguments, losses=False, teacher=False, **options):
        layers_s, layers_t, mask = sides(*arguments, **options)
        options = (layers_s, layers_t, mask, objective, losses, 0.5, 2.0)
        rows = module.loss_forward(*options)
        wanted = list(range(len(layers_s) + teacher * len(layers_t)))
        module.loss_backward(torch.zeros(()).expand(rows.shape), *options, wanted)

    def pairs(objective, dtype, d, many=6, teacher=False, **options):
        layers_s, layers_t, mask = sides(dtype, d, many=(many, many), **options)
        options = (layers_s, layers_t, mask, objective, 2.0)
        rows = module.pairs_forward(*options)
        wanted = list(range(many + teacher * many))
        module.pairs_backward(torch.zeros(()).expand(rows.shape), *options, wanted)

    for dtype, of_teacher in TWO_DTYPES if exhaustive else TWO_DTYPES[:1]:
        for teacher in (False, True) if exhaustive else (False,):
            options = {"teacher": teacher, "of_teacher": of_teacher}
            loss("mse", dtype, 768, **options)
            pairs("mse", dtype, 768, **options)
            if exhaustive:
                project(dtype, 768, **options)
                loss("kl", dtype, 3, many=(6, 11), **options)
                loss("cosine", dtype, 768, losses=True, **options)
    for dtype in dtypes:
        pairs("cosine", dtype, 768)
        pairs("mse", dtype, 4096, teacher=True)
        project(dtype, 768)
        loss("mse", dtype, 768)
        loss("mse", dtype, 768, masked=False)
        loss("mse", dtype, 768, many=(1, 1))
        loss("mse", dtype, 768, teacher=True)
        loss("mse", dtype, 768, losses=True)
        loss("kl", dtype, 768)
        loss("kl", dtype, 3, many=(6, 11))
        loss("kl", dtype, 16, teacher=True)
        loss("kl", dtype, 8192)
        loss("mse", dtype, 128, many=(64, 64))
        if not exhaustive:
            continue
        for teacher in (False, True):
            for objective in ("mse", "cosine", "kl"):
                for d in (3, 100, 384, 768, 1024, 8192):
                    pairs(objective, dtype, d, teacher=teacher)
            pairs("cosine", dtype, 768, many=1, teacher=teacher, masked=False)
            pairs("cosine", dtype, 768, many=64, teacher=teacher, strided=True)
            for d in (3, 32, 100, 384, 768, 1024, 4096):
                project(dtype, d, teacher=teacher)
                loss("mse", dtype, d, teacher=teacher, masked=False)
                for objective in ("mse", "cosine", "kl"):
                    for losses in (False, True):
                        loss(objective, dtype, d, losses=losses, teacher=teacher)
            for many in ((1, 1), (1, 12), (12, 24), (64, 64)):
                if many == (64, 64) and dtype == torch.float32:  # spills on sm_80 and sm_86
                    continue
                project(dtype, 768, many=many, teacher=teacher)
                for objective in ("mse", "kl"):
                    for losses in (False, True):
                        loss(objective, dtype, 768, many=many, losses=losses, teacher=teacher)
            project(dtype, 768, strided=True, teacher=teacher)
            loss("mse", dtype, 768, strided=True, teacher=teacher)


MODULES = {
    "attention_kl": attention_kl,
    "attention_map_kl": attention_map_kl,
    "cka": cka,
    "layer_projection": layer_projection,
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("architecture", choices=TARGETS)
    parser.add_argument("modules", nargs="*", default=list(MODULES))
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--widths", default="64")
    parser.add_argument("--directions", default="forward")
    parser.add_argument("--exhaustive", action="store_true", help="every option of these")
    parsed = parser.parse_args()
    target, limit = TARGETS[parsed.architecture]
    triton.runtime.driver.set_active(Driver(target))
    compiled = {}
    run = triton.runtime.jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in compiled:
            used, spilled = registers(kernel, target)
            chosen = {k: str(v) for k, v in options.items() if k.isupper() or k.startswith("num_")}
            compiled[kernel.hash] = {
                "kernel": self.__name__.lstrip("_"),
                "options": chosen,
                "registers": used,
                "spills": spilled,
                "shared": kernel.metadata.shared,
                "limit": limit,
            }
            print(json.dumps(compiled[kernel.hash]), flush=True)
        return kernel

    triton.runtime.jit.JITFunction.run = compile_only
    for name in parsed.modules:
        MODULES[name](
            parsed.architecture,
            [getattr(torch, dtype) for dtype in parsed.dtypes.split(",")],
            [int(width) for width in parsed.widths.split(",")],
            parsed.directions.split(","),
            parsed.exhaustive,
        )


if __name__ == "__main__":
    sys.exit(main())
