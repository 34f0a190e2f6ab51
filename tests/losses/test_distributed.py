"""Two gloo processes, each with its part of a batch, against one process with all of it."""

import subprocess
import sys
import textwrap

import pytest
import torch

from kdfast.losses import gather_batch

# Both the processes and the test run this: the losses, and a batch of 5 samples of 6 tokens, of
# which rank 0 has the first 3 (at most 4 tokens long) and rank 1 the last 2.
SHARED = """
    import torch
    from kdfast.losses import CKALoss, ClusteredMemoryLoss, RKDLoss, gather_batch

    torch.manual_seed(0)
    lengths = torch.tensor([4, 2, 3, 6, 5])
    mask = (torch.arange(6) < lengths[:, None]).long()
    states = [torch.randn(5, 6, width, dtype=torch.float64) for width in (4, 7)]
    states = [x * mask[..., None] for x in states]
    parts = [(slice(0, 3), 4), (slice(3, 5), 6)]

    losses = {
        f"{rows} {form} {padding}": CKALoss(rows, form=form, padding=padding)
        for rows, form, padding in (
            ("samples", "neg_log", "masked"),
            ("samples", "neg_log", "counted"),
            ("samples", "neg_log_of_mean", "masked"),
            ("all_tokens", "one_minus_root", "masked"),
            ("tokens", "neg_log_of_mean", "masked"),
        )
    }
    relational = RKDLoss()
    losses["rkd"] = lambda s, t, mask: relational(s[:, 0], t[:, 0])

    def gradients(states, mask):
        found = {}
        for name, loss in losses.items():
            s = states[0].clone().requires_grad_()
            value = loss(s, states[1], mask)
            value.backward()
            found[name] = value.detach(), s.grad
        return found

    # One token alone has no alignment, but its rank must not leave the others waiting.
    def lonely(states):
        return CKALoss(form="neg_log_of_mean")(*states).item()

    memory = ClusteredMemoryLoss(3, 6, 4, 7).double()
    memory.set_teacher_memory(torch.randn(3, 6 * 7, dtype=torch.float64))

    def memory_gradients(states, mask):
        s = states[0].clone().requires_grad_()
        value = memory(s, states[1], mask)
        value.backward()
        return value.detach(), s.grad, memory.student_memory.grad
"""

RANK = """
    import sys
    from datetime import timedelta
    import kdfast.losses.distributed
    from torch import distributed

    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
        timeout=timedelta(seconds=120),
    )
    rows, longest = parts[rank]
    found = {"losses": gradients([x[rows, :longest] for x in states], mask[rows, :longest])}
    # The first sample of each rank: batches of equal size, as this loss assumes.
    first = slice(rows.start, rows.start + 1)
    found["memory"] = memory_gradients([x[first, :longest] for x in states], mask[first, :longest])
    found["lonely"] = lonely([x[rows, : 1 if rank else 4] for x in states])
    found["gathered"] = {
        "bfloat16": gather_batch(states[0][rows, :longest].bfloat16()),
        "bool": gather_batch(mask[rows, :longest].bool()),
        "vector": gather_batch(lengths[rows]),
        "no rows": gather_batch(states[0][: 2 * rank, :longest]),
    }
    found["gathered"]["alike"] = gather_batch(states[0][first])
    found["gathered"]["alike bool"] = gather_batch(mask[first].bool())
    told = []
    tell = distributed.all_gather

    def counted(*args, group=None):
        told.append(group is distributed.group.WORLD)
        tell(*args, group=group)

    distributed.all_gather = counted
    layers = [[x[rows, :longest]] * 3 for x in states]
    CKALoss("samples", form="neg_log")(*layers, mask[rows, :longest])
    # As beside nccl, which is not of this machine.
    distributed.get_backend_config = lambda group: "cuda:nccl"
    kdfast.losses.distributed._HOSTS.clear()
    for _ in range(2):
        found["gathered"]["beside"] = gather_batch(states[0][rows, :longest])
    found["told"] = told
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "rank.py"
    script.write_text(textwrap.dedent(SHARED) + textwrap.dedent(RANK))
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), folder], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-6000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one():
    names: dict = {}
    exec(textwrap.dedent(SHARED), names)
    return names


def test_coupled_losses_and_gradients_equal_those_of_the_joined_batch(ranks, one):
    for name, (value, gradient) in one["gradients"](one["states"], one["mask"]).items():
        for rank, (rows, longest) in zip(ranks, one["parts"], strict=True):
            found, own = rank["losses"][name]
            torch.testing.assert_close(found, value, msg=lambda m, n=name: f"{n}: {m}")
            # What an average of parameter gradients over two ranks makes of it.
            torch.testing.assert_close(own / 2, gradient[rows, :longest])


def test_memory_losses_and_gradients_average_to_those_of_the_joined_batch(ranks, one):
    rows = [0, 3]
    states = [x[rows] for x in one["states"]]
    value, gradient, of_memory = one["memory_gradients"](states, one["mask"][rows])
    found = [rank["memory"] for rank in ranks]
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, value)
    torch.testing.assert_close((found[0][2] + found[1][2]) / 2, of_memory)
    for k, (_, longest) in enumerate(one["parts"]):
        torch.testing.assert_close(found[k][1] / 2, gradient[k : k + 1, :longest])


def test_a_rank_with_too_few_tokens_takes_part_in_the_mean(ranks, one):
    first = [x[:3, :4] for x in one["states"]]
    mean = (3 * torch.tensor(-one["lonely"](first)).exp() + 2) / 5
    for rank in ranks:
        assert rank["lonely"] == pytest.approx(-mean.log().item(), rel=1e-5)


def test_gathered_rows_are_those_of_all_ranks_extended_to_the_longest(ranks, one):
    states, mask = one["states"][0], one["mask"]
    for rank in ranks:
        gathered = rank["gathered"]
        torch.testing.assert_close(gathered["bfloat16"], states.bfloat16(), rtol=0, atol=0)
        torch.testing.assert_close(gathered["bool"], mask.bool())
        torch.testing.assert_close(gathered["vector"], one["lengths"])
        torch.testing.assert_close(gathered["no rows"], states[:2])
        torch.testing.assert_close(gathered["alike"], states[[0, 3]])
        torch.testing.assert_close(gathered["alike bool"], mask[[0, 3]].bool())
        torch.testing.assert_close(gathered["beside"], states)


def test_sizes_are_told_once_for_all_layers_and_from_host_to_host(ranks):
    for rank in ranks:
        assert rank["told"] == [True, False, False]


def test_a_single_process_gathers_nothing():
    x = torch.randn(3, 2)
    assert gather_batch(x) is x
