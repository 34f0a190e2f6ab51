"""The clustered memory: k-means against clusters known beforehand, L_G against its formula."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdfast.losses import (
    ClusteredMemoryLoss,
    distances,
    fit_centroids,
    flat_states,
    memory_bytes,
)

B, N, W, DS, DT, C = 4, 3, 5, 2, 6, 3
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])


# k-means


def clustered(samples_each=40, clusters=5, width=8, seed=0):
    random = np.random.default_rng(seed)
    centres = random.normal(size=(clusters, width)) * 20
    x = centres.repeat(samples_each, 0) + random.normal(size=(samples_each * clusters, width))
    labels = np.arange(clusters).repeat(samples_each)
    order = random.permutation(len(x))
    return x[order].astype(np.float32), labels[order]


def in_batches(x, size):
    return lambda: (x[i : i + size] for i in range(0, len(x), size))


@pytest.mark.parametrize("batch", [3, 16, 1000])
def test_centroids_are_the_means_of_well_separated_clusters(batch):
    x, labels = clustered()
    means = np.stack([x[labels == c].mean(0) for c in range(5)])
    found = fit_centroids(in_batches(x, batch), 5).numpy()
    nearest = np.linalg.norm(found[:, None] - means, axis=2).argmin(1)
    assert sorted(nearest) == list(range(5))
    np.testing.assert_allclose(found, means[nearest], rtol=1e-5)


def test_every_centroid_is_the_mean_of_samples_and_together_they_keep_the_overall_mean():
    x = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    found = fit_centroids(in_batches(x, 16), 7).numpy()
    assert found.shape == (7, 6) and found.dtype == np.float32
    spread = np.square(x[:, None] - found).sum(2).min(1).mean()
    assert spread < 0.75 * np.square(x - x.mean(0)).sum(1).mean()


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    x = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    first, again, other = (fit_centroids(in_batches(x, 16), 7, seed=s) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_as_many_clusters_as_samples_are_the_samples():
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    found = fit_centroids(in_batches(torch.from_numpy(x), 2), 6).numpy()
    np.testing.assert_array_equal(np.sort(found, 0), np.sort(x, 0))


def test_fewer_distinct_samples_than_clusters_leave_finite_centroids():
    x = np.eye(4, dtype=np.float32)[[0, 1] * 10]
    found = fit_centroids(in_batches(x, 5), 4)
    assert found.isfinite().all()


def test_fewer_samples_than_clusters_are_an_error():
    with pytest.raises(ValueError, match="clusters is 7, should be at most .* 6"):
        fit_centroids(in_batches(np.zeros((6, 4)), 4), 7)


def test_batches_that_run_out_are_an_error():
    once = iter([np.random.default_rng(0).normal(size=(9, 4))])
    with pytest.raises(ValueError, match="pass 2"):
        fit_centroids(lambda: once, 3)


def test_batches_of_differing_widths_are_an_error():
    with pytest.raises(ValueError, match=r"\[3, 5\], should be \[B, 4\]"):
        fit_centroids(lambda: [np.zeros((9, 4)), np.zeros((3, 5))], 2)


def test_values_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="NaN"):
        fit_centroids(lambda: [np.full((9, 4), np.nan)], 2)


def test_flat_states_zero_padding_and_extend_to_the_longest():
    hidden = torch.randn(4, N, DT, dtype=torch.bfloat16)
    flat = flat_states(hidden, MASK, max_length=W)
    assert flat.dtype == torch.float32
    expected = torch.zeros(4, W, DT)
    expected[:, :N] = hidden.float() * MASK[..., None]
    torch.testing.assert_close(flat, expected.flatten(1))
    counted = flat_states(hidden, MASK, padding="counted")
    torch.testing.assert_close(counted, hidden.float().flatten(1))


# L_G


def explicit(hidden, memory, mask, eps):
    """Distances and cosines with features extended to W tokens and one difference a pair."""
    width = hidden.shape[2]
    h = torch.zeros(len(hidden), W, width, dtype=hidden.dtype)
    h[:, : hidden.shape[1]] = hidden * mask[..., None]
    h = h.flatten(1)
    distances = ((h[:, None] - memory).square().sum(2) + eps).sqrt()
    return distances, F.cosine_similarity(h[:, None], memory, dim=2)


def dense_cka(x, y):
    k, l = x @ x.T, y @ y.T  # noqa: E741
    c = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    k, l = c @ k @ c, c @ l @ c  # noqa: E741
    return (k * l).sum() / (k.norm() * l.norm())


def made(dtype=torch.float64, width_s=DS, **options):
    loss = ClusteredMemoryLoss(C, W, width_s, DT, **options).to(dtype)
    loss.set_teacher_memory(torch.randn(C, W * DT, dtype=dtype))
    return loss


def states(dtype=torch.float64, tokens=N):
    return torch.randn(B, tokens, DS, dtype=dtype), torch.randn(B, tokens, DT, dtype=dtype)


@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.5])
def test_the_loss_follows_the_paper_on_batches_shorter_than_the_memory(eps):
    loss, (s, t) = made(balance=0.3, memory_alignment=2.0, eps=eps), states()
    distance_s, cosine_s = explicit(s, loss.student_memory, MASK, eps)
    distance_t, cosine_t = explicit(t, loss.teacher_memory, MASK, eps)
    parts = {
        "euclidean": (distance_s - distance_t).square().mean(),
        "cosine": (cosine_s - cosine_t).square().mean(),
        "memory": -dense_cka(loss.student_memory, loss.teacher_memory).abs().log(),
    }
    torch.testing.assert_close(loss.parts(s, t, MASK), parts)
    total = 0.3 * parts["euclidean"] + 0.7 * parts["cosine"] + 2 * parts["memory"]
    torch.testing.assert_close(loss(s, t, MASK), total)
    gradients = torch.autograd.grad(total, loss.student_memory)
    loss(s, t, MASK).backward()
    torch.testing.assert_close(loss.student_memory.grad, gradients[0])


def test_padding_can_be_counted_as_in_the_paper():
    loss, (s, t) = made(padding="counted"), states()
    torch.testing.assert_close(loss(s, t, MASK), loss(s, t))
    masked = made()
    masked.load_state_dict(loss.state_dict())
    assert masked(s, t, MASK) != loss(s, t, MASK)


def test_masked_padding_may_hold_anything():
    loss, (s, t) = made(), states()
    elsewhere = [torch.where(MASK[..., None] == 1, x, 1e3) for x in (s, t)]
    torch.testing.assert_close(loss(*elsewhere, MASK), loss(s, t, MASK))


def test_the_loss_does_not_depend_on_how_far_a_batch_is_padded():
    loss, (s, t) = made(), states()
    padded = [F.pad(x, (0, 0, 0, W - N), value=3.0) for x in (s, t)]
    torch.testing.assert_close(loss(*padded, F.pad(MASK, (0, W - N))), loss(s, t, MASK))


def test_micro_batches_average_to_the_joined_batch():
    loss, (s, t) = made(), states()
    loss(s, t, MASK).backward()
    joined, loss.student_memory.grad = loss.student_memory.grad, None
    for half in (slice(2), slice(2, 4)):
        (loss(s[half], t[half], MASK[half]) / 2).backward()
    torch.testing.assert_close(loss.student_memory.grad, joined)


def test_fp32_distances_of_states_far_from_zero_keep_their_digits():
    exact, (s, t) = made(), states()
    t = t + 300
    with torch.no_grad():
        exact.teacher_memory[:, : N * DT] += 300
    rounded = copy.deepcopy(exact).float()
    found = rounded.parts(s.float(), t.float())["euclidean"]
    torch.testing.assert_close(found.double(), exact.parts(s, t)["euclidean"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_a_sample_on_its_centroid_has_a_finite_gradient(eps):
    loss, (s, t) = made(torch.float32, eps=eps), states(torch.float32)
    with torch.no_grad():
        loss.student_memory[0] = flat_states(s, max_length=W)[0]
    s.requires_grad_()
    loss(s, t).backward()
    assert s.grad.isfinite().all() and loss.student_memory.grad.isfinite().all()


def test_samples_without_a_token_and_empty_states_have_finite_gradients():
    loss, (s, t) = made(), states()
    s.requires_grad_()
    loss(s, t, torch.zeros(B, N)).backward()
    assert loss.student_memory.grad.isfinite().all() and s.grad.abs().sum() == 0


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_terms_of_weight_zero_are_left_out(balance):
    loss, (s, t) = made(balance=balance, memory_alignment=0.0), states()
    assert list(loss.parts(s, t)) == ["euclidean" if balance else "cosine"]


def test_half_precision_under_autocast_gives_the_fp32_loss():
    loss, (s, t) = made(torch.float32), states(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(s, t, MASK)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(s.float(), t.float(), MASK))


def test_a_memory_that_is_not_set_is_an_error_and_a_loaded_one_is_set():
    loss, (s, t) = ClusteredMemoryLoss(C, W, DS, DT).double(), states()
    with pytest.raises(ValueError, match="set_teacher_memory"):
        loss(s, t)
    other = torch.nn.ModuleDict({"loss": made()})
    torch.nn.ModuleDict({"loss": loss}).load_state_dict(other.state_dict())
    torch.testing.assert_close(loss(s, t), other["loss"](s, t))


def test_a_new_memory_replaces_the_kept_alignment():
    loss, (s, t) = made(balance=0.0), states()
    loss(s, t)
    for change in (
        lambda: loss.set_teacher_memory(torch.randn(C, W * DT)),
        lambda: loss.load_state_dict(made().state_dict()),
        lambda: loss.float().double(),
    ):
        change()
        expected = -dense_cka(loss.student_memory, loss.teacher_memory).abs().log()
        torch.testing.assert_close(loss.parts(s, t)["memory"], expected)


def test_the_student_memory_can_start_as_the_teachers_and_is_then_aligned():
    loss = made(width_s=DT, init="teacher")
    assert torch.equal(loss.student_memory, loss.teacher_memory)
    assert loss.parts(states()[1], states()[1])["memory"].abs() < 1e-12


def test_a_student_memory_from_a_checkpoint_survives_setting_the_teachers_again():
    trained = made(width_s=DT, init="teacher")
    with torch.no_grad():
        trained.student_memory += 1
    loss = ClusteredMemoryLoss(C, W, DT, DT, init="teacher").double()
    loss.load_state_dict(trained.state_dict())
    loss.set_teacher_memory(trained.teacher_memory)
    assert torch.equal(loss.student_memory, trained.student_memory)


def test_the_loss_survives_pickling():
    loss, (s, t) = made(), states()
    loss(s, t)
    torch.testing.assert_close(pickle.loads(pickle.dumps(loss))(s, t), loss(s, t))


def test_only_the_student_memory_is_trained_and_both_are_saved():
    loss = made()
    assert [name for name, _ in loss.named_parameters()] == ["student_memory"]
    assert set(loss.state_dict()) == {"student_memory", "teacher_memory"}


def test_memory_bytes_are_those_of_training_with_adam():
    loss = made(torch.float32)
    optimizer = torch.optim.Adam(loss.parameters())
    loss(*states(torch.float32)).backward()
    optimizer.step()
    moments = [x for x in optimizer.state[loss.student_memory].values() if x.dim()]
    tensors = [loss.teacher_memory, loss.student_memory, loss.student_memory.grad, *moments]
    assert memory_bytes(C, W, DS, DT) == sum(4 * x.numel() for x in tensors)


@pytest.mark.parametrize("options", [{}, {"eps": 0.0, "balance": 0.2}])
def test_gradients_match_finite_differences(options):
    loss, (s, t) = made(**options), states()
    memory = loss.student_memory.detach().clone().requires_grad_()

    def call(s, memory):
        return torch.func.functional_call(loss, {"student_memory": memory}, (s, t, MASK))

    assert torch.autograd.gradcheck(call, (s.requires_grad_(), memory))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: ClusteredMemoryLoss(1, W, DS, DT), "clusters"),
        (lambda: ClusteredMemoryLoss(C, 0, DS, DT), "max_length"),
        (lambda: ClusteredMemoryLoss(C, W, DS, DT, balance=1.5), "balance"),
        (lambda: ClusteredMemoryLoss(C, W, DS, DT, memory_alignment=-1), "memory_alignment"),
        (lambda: ClusteredMemoryLoss(C, W, DS, DT, padding="none"), "padding"),
        (lambda: ClusteredMemoryLoss(C, W, DS, DT, init="zeros"), "init"),
        (lambda: ClusteredMemoryLoss(C, W, DS, DT, init="teacher"), "equal widths"),
        (lambda: ClusteredMemoryLoss(C, W, DS, DT, eps=-1.0), "eps"),
        (lambda: made().set_teacher_memory(torch.zeros(C, DT)), r"\[3, 30\]"),
        (lambda: made().set_teacher_memory(torch.full((C, W * DT), torch.inf)), "finite"),
        (lambda: made()(*states(tokens=W + 1)), "max_length"),
        (lambda: made()(states()[1], states()[1]), "width 2"),
        (lambda: made()(states()[0], states(tokens=2)[1]), "batch and tokens"),
        (lambda: flat_states(states()[0], max_length=2), "max_length"),
        (lambda: fit_centroids(list, 0), "clusters"),
        (lambda: fit_centroids(list, 1, epochs=0), "epochs"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize("features", [200, 320])
def test_distances_made_by_blocks_of_features_are_those_of_whole_rows(features, monkeypatch):
    monkeypatch.setitem(distances.BLOCK_BYTES, "cpu", 1)  # blocks of 64 features
    x = torch.randn(5, features, dtype=torch.float64) + 30
    memory = torch.randn(3, 320, dtype=torch.float64) + 30
    whole = F.pad(x, (0, 320 - features))
    made = distances.SamplesAndMemory.of(x, memory)
    torch.testing.assert_close(made.distances(0), torch.cdist(whole, memory))
    cosine = F.cosine_similarity(whole[:, None], memory, dim=-1)
    torch.testing.assert_close(made.cosines(), cosine)

    def both(x, memory):
        found = distances.SamplesAndMemory.of(x, memory)
        return found.distances(1e-8), found.cosines()

    x, memory = x.requires_grad_(), memory.requires_grad_()
    assert torch.autograd.gradcheck(both, (x, memory), fast_mode=True)
    assert torch.autograd.gradcheck(lambda m: both(x.detach(), m), (memory,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda y: both(y, memory.detach()), (x,), fast_mode=True)


def test_a_sample_or_memory_of_zeros_has_a_cosine_of_zero():
    x, memory = torch.randn(4, 6) + 1e3, torch.randn(3, 8)
    x[1], memory[2] = 0, 0
    cosines = distances.SamplesAndMemory.of(x, memory.requires_grad_()).cosines()
    assert cosines[1].eq(0).all() and cosines[:, 2].eq(0).all()
    cosines.sum().backward()
    assert memory.grad is not None and memory.grad.isfinite().all()


@pytest.mark.parametrize("size", [1, 1e-4])
def test_cosines_of_features_far_from_zero_lose_no_digits(size):
    x, memory = torch.randn(4, 500) + 1000, torch.randn(3, 500) * size
    exact = F.cosine_similarity(x.double()[:, None], memory.double(), dim=-1)
    found = distances.SamplesAndMemory.of(x, memory).cosines()
    torch.testing.assert_close(found, exact.float(), rtol=0, atol=1e-6)


def test_the_memory_is_read_in_the_samples_dtype():
    x, memory = torch.randn(4, 70, dtype=torch.float64), torch.randn(3, 90)
    found, exact = (distances.SamplesAndMemory.of(x, m) for m in (memory, memory.double()))
    torch.testing.assert_close(found.distances(0), exact.distances(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.cosines(), exact.cosines(), rtol=1e-12, atol=1e-15)


def test_distances_are_compiled_whole():
    def loss(x, memory):
        found = distances.SamplesAndMemory.of(x, memory)
        return (found.distances(1e-8) + found.cosines()).sum()

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        x, memory = (torch.ones(2, 6).cumsum(i) for i in (0, 1))
        x, memory = x[:, :5].requires_grad_(), memory.requires_grad_()
        function(x, memory).backward()
        gradients.append((x.grad, memory.grad))
    torch.testing.assert_close(*gradients)
