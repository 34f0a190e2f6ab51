import inspect
import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from kdfast import ops, reference
from kdfast.ops import attention_kl, cka, dispatch, explain, library, procrustes_distance

OPERATORS = [
    "attention_kl",
    "attention_map_kl",
    "cka",
    "cka_matrix",
    "gram_distance",
    "hsic",
    "hsic_matrix",
    "layer_projection",
    "layer_projection_loss",
    "procrustes_distance",
]
operators = pytest.mark.parametrize("operator", OPERATORS)


def inputs_of(operator):
    x = torch.rand(2, 2, 5, 4, requires_grad=True)
    if operator == "attention_kl":
        return x, x.detach(), x.detach(), x.detach()
    if operator in ("attention_map_kl", "cka", "gram_distance", "hsic", "procrustes_distance"):
        return x, x.detach()
    return [x], [x.detach()]


@operators
def test_reference_has_the_public_signature_less_backend(operator):
    public = inspect.signature(getattr(ops, operator)).parameters
    dense = inspect.signature(getattr(reference, operator)).parameters
    for name, parameter in public.items():
        if name != "backend":
            assert (dense[name].default, dense[name].kind) == (parameter.default, parameter.kind)
    # What tests force either side of CKA with, and what CKATeacher keeps.
    assert set(dense) - set(public) <= {"side", "terms_t"}


@operators
def test_auto_is_the_first_backend_that_is_available(operator):
    inputs = inputs_of(operator)
    function = getattr(ops, operator)
    available = {backend for backend, available, _ in explain(operator) if available}
    first = next(backend for backend in dispatch.AUTO["cpu"] if backend in available)
    picked, asked = function(*inputs), function(*inputs, backend=first)
    torch.testing.assert_close(picked, asked, rtol=0, atol=0)


def test_compiled_library_was_built_and_serves_the_cpu():
    """Where there is a compiler, which is where the tests run."""
    assert explain("attention_kl")[dispatch.BACKENDS.index("cpp")] == ("cpp", True, "")


@operators
@pytest.mark.parametrize("backend", ["cpp", "triton", "cuda"])
def test_backend_asked_for_by_name_raises_with_shapes_and_every_reason(operator, backend):
    inputs = inputs_of(operator)
    inputs = [x.to("meta") if isinstance(x, torch.Tensor) else [x[0].to("meta")] for x in inputs]
    with pytest.raises(RuntimeError) as raised:
        getattr(ops, operator)(*inputs, backend=backend)
    message = str(raised.value)
    assert message.startswith(f"{operator}: backend={backend!r} cannot serve this call")
    assert "float32[2, 2, 5, 4] meta" in message
    assert "reference: can serve this call" in message
    for name in ("cpp", "triton", "cuda"):
        (reason,) = re.findall(f"^  {name}: (.+)$", message, re.MULTILINE)
        assert reason != "can serve this call"


@operators
def test_unknown_backend_suggests_the_nearest(operator):
    with pytest.raises(ValueError, match=r"'refrence' is unknown; did you mean 'reference'\?.*cpp"):
        getattr(ops, operator)(*inputs_of(operator), backend="refrence")


def test_second_derivative_of_one_input_raises_when_the_upstream_gradient_is_constant():
    x = torch.rand(6, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(cka(x, torch.rand(6, 4)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cka has first derivatives only"):
        (grad.square().sum() + x.sum()).backward()


def test_creating_the_graph_of_a_gradient_does_not_change_it():
    x, y = torch.rand(6, 3, requires_grad=True), torch.rand(6, 4)
    (plain,) = torch.autograd.grad(cka(x, y), x)
    (graphed,) = torch.autograd.grad(cka(x, y), x, create_graph=True)
    assert torch.equal(plain, graphed.detach())


def test_explain_gives_every_backend_and_the_reason_it_cannot_run():
    found = explain("procrustes_distance")
    by_name = {backend: (available, reason) for backend, available, reason in found}
    assert by_name["reference"] == (True, "")
    assert by_name["cpp"] == (False, "no kernel for procrustes_distance in this version")
    assert list(by_name) == list(dispatch.BACKENDS)


def test_explain_of_an_unknown_operator_lists_the_known_ones():
    with pytest.raises(ValueError, match="'ckaa' is unknown.*attention_kl.*layer_projection"):
        explain("ckaa")


@pytest.mark.parametrize(
    ("capability", "hip", "served"),
    [((7, 5), None, False), ((8, 0), None, True), ((12, 0), None, True), ((7, 5), "7.0", True)],
)
def test_triton_serves_nvidia_gpus_from_compute_capability_8_on(
    monkeypatch, capability, hip, served
):
    monkeypatch.setattr(library, "interpreting", lambda: False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16)
    reason = library.refuses("triton", x)
    assert reason is None if served else "compute capability 7.5" in reason


def test_a_backward_pass_says_whether_its_graph_is_kept(monkeypatch):
    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            said.append(dispatch.keeps_graph())
            return grad

    said = []
    y = Asking.apply(torch.ones((), requires_grad=True))
    y.backward(retain_graph=True)
    y.backward()
    assert said == [True, False]
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    assert dispatch.keeps_graph()  # where PyTorch does not say, nothing is given away


def kernel(result, reason=None):
    return dispatch.Kernel(
        load=lambda: lambda **arguments: result, refuses=lambda **arguments: reason
    )


def test_auto_picks_the_first_kernel_that_can_serve(monkeypatch):
    monkeypatch.setitem(dispatch.KERNELS, ("cka", "cpp"), kernel("cpp result"))
    assert cka(torch.rand(4, 2), torch.rand(4, 2)) == "cpp result"
    monkeypatch.setitem(dispatch.KERNELS, ("cka", "cpp"), kernel("cpp result", "d is odd"))
    assert isinstance(cka(torch.rand(4, 2), torch.rand(4, 2)), torch.Tensor)


def test_reason_of_a_verifier_is_in_the_error(monkeypatch):
    monkeypatch.setitem(dispatch.KERNELS, ("cka", "cpp"), kernel(None, "d = 2 is below 8"))
    with pytest.raises(RuntimeError, match="cpp: d = 2 is below 8"):
        cka(torch.rand(4, 2), torch.rand(4, 2), backend="cpp")


def test_kernel_that_cannot_be_imported_is_a_reason_and_not_a_crash(monkeypatch):
    def load():
        raise ImportError("triton is not installed: pip install triton")

    monkeypatch.setitem(dispatch.KERNELS, ("cka", "triton"), dispatch.Kernel(load))
    assert explain("cka")[2] == ("triton", False, "triton is not installed: pip install triton")
    with pytest.raises(RuntimeError, match="triton: triton is not installed: pip install"):
        cka(torch.rand(4, 2), torch.rand(4, 2), backend="triton")
    assert isinstance(cka(torch.rand(4, 2), torch.rand(4, 2)), torch.Tensor)


def test_library_that_does_not_load_is_a_reason_and_is_tried_once(monkeypatch):
    tries = []

    def load():
        tries.append(1)
        raise OSError("libkdfast_cpu.so: undefined symbol")

    monkeypatch.setitem(dispatch.KERNELS, ("cka", "cpp"), dispatch.Kernel(load))
    for _ in range(2):
        assert isinstance(cka(torch.rand(4, 2), torch.rand(4, 2)), torch.Tensor)
    assert explain("cka")[1] == ("cpp", False, "libkdfast_cpu.so: undefined symbol")
    assert len(tries) == 1


def test_kdfast_log_says_what_auto_picked(monkeypatch, caplog):
    x = torch.rand(1, 1, 3, 2)
    monkeypatch.delenv("KDFAST_LOG", raising=False)
    with caplog.at_level(logging.INFO, logger="kdfast"):
        attention_kl(x, x, x, x)
        assert not caplog.records
        monkeypatch.setenv("KDFAST_LOG", "1")
        procrustes_distance(x, x)
    text = "procrustes_distance: auto picked reference for x_s=float32[1, 1, 3, 2]"
    assert text in caplog.text


def test_kdfast_log_is_seen_without_setting_up_logging():
    code = "import torch; from kdfast.ops import cka; cka(torch.rand(4, 2), torch.rand(4, 2))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KDFAST_LOG": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cka: auto picked " in run.stderr


def test_importing_the_operators_needs_torch_only():
    code = (
        "import sys, torch; before = set(sys.modules); import kdfast.ops; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"triton", "transformers", "numpy", "sklearn"} & set(run.stdout.split())


@pytest.mark.parametrize("device", ["meta"])
@operators
def test_devices_without_kernels_of_their_own_use_the_reference(operator, device):
    def move(x):
        return [move(y) for y in x] if isinstance(x, (list, tuple)) else x.detach().to(device)

    result = getattr(ops, operator)(*move(inputs_of(operator)))
    tensor = result[1] if isinstance(result, tuple) else result
    assert tensor.device.type == device
