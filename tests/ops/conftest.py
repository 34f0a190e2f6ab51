import sys

import pytest
import torch

from kdfast.ops import dispatch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The shapes here are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_start():
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # a test's compiled graphs would count for the next
        torch.compiler.reset()


@pytest.fixture(params=["reference", "cpp"])
def backend_on_cpu(request, monkeypatch):
    """What `auto` picks on the CPU; the same tests hold for both."""
    if request.param == "reference":
        monkeypatch.setitem(dispatch.AUTO, "cpu", ("reference",))
    elif reason := dispatch.explain("attention_kl")[1].reason:
        pytest.skip(reason)
