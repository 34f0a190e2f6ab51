import gc
import os
from collections import Counter
from collections.abc import Iterator

# Before anything imports transformers: tests read local files only, and plots have no display.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Test processes side by side, and what they start, have a core each.
threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
os.environ["OMP_NUM_THREADS"] = str(threads)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(threads)
if not torch.cuda.is_available():  # read when triton is imported: kernels run on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

# Interpreted, a Triton kernel takes seconds where others take milliseconds: of each test's cases
# one in so many is part of `make test`. A prime, so that few options are left out of all of them.
ONE_IN = 11


@pytest.fixture(autouse=True, scope="module")
def old_objects_are_no_garbage() -> Iterator[None]:
    """Accelerate collects garbage before every training: half a second over thousands of tests."""
    gc.freeze()
    yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[str] = Counter()
    for item in items:
        if _is_interpreted(item):
            function = item.nodeid.partition("[")[0]
            if seen[function] % ONE_IN:
                item.add_marker(pytest.mark.triton)
            seen[function] += 1
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _is_interpreted(item: pytest.Item) -> bool:
    if item.get_closest_marker("gpu") or item.path.name == "test_compile.py":
        return False
    return item.path.parent.name == "kernels" or "triton-interpreted" in item.nodeid
