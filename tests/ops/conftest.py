import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The shapes here are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
