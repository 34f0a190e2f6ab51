"""Every kernel compiles for every architecture, without spilling registers, into its memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile.py")
ROOT = SCRIPT.parents[2]
ARCHITECTURES = [
    "sm_90",
    *(pytest.param(x, marks=pytest.mark.triton) for x in ("sm_80", "sm_100", "gfx942")),
    pytest.param("sm_86", marks=pytest.mark.exhaustive),
]


@pytest.fixture(scope="module")
def compilations(request):
    """One process per architecture, two at a time; compiled once for all tests here."""
    chosen = [item.callspec.params for item in request.session.items if item.path == request.path]
    architectures, options = [params["architecture"] for params in chosen], []
    if "sm_86" in architectures:
        options = [
            "--exhaustive", "--dtypes=bfloat16,float16,float32", "--widths=64,128",
            "--directions=forward,reverse,js",
        ]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    waiting, running, outputs = list(architectures), {}, {}

    def finish(architecture):
        out, errors = running.pop(architecture).communicate()
        outputs[architecture] = (out, errors)

    while waiting or running:
        while waiting and len(running) < 2:
            architecture = waiting.pop(0)
            running[architecture] = subprocess.Popen(
                [sys.executable, SCRIPT, architecture, *options],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                env=environment,
            )  # fmt: skip
        finish(next(iter(running)))
    return outputs


@pytest.mark.slow
@pytest.mark.timeout(7200)  # all compile for the first of these
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(compilations, architecture):
    out, errors = compilations[architecture]
    kernels = [json.loads(line) for line in out.splitlines()]
    assert not errors, errors
    names = {kernel["kernel"] for kernel in kernels}
    expected = {"visibility", "forward", "backward_query", "backward_key", "rows"}
    expected |= {"pairs_forward", "pairs_backward", "whole_gram", "gram", "apply", "inner"}
    expected |= {"feature_products", "feature_apply"}
    expected |= {"project", "project_backward", "loss", "loss_of_few_features", "loss_of_pairs"}
    assert expected <= names
    spilling = [kernel for kernel in kernels if kernel["spills"]]
    assert not spilling, spilling
    large = [kernel for kernel in kernels if kernel["shared"] > kernel["limit"]]
    assert not large, large
