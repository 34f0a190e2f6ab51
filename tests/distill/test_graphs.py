"""Teacher and losses as CUDA graphs; on a CPU with a replay that calls the function again."""

from types import SimpleNamespace

import pytest
import torch

from kdfast import InputError
from kdfast.captured import Captured, Needs
from kdfast.distill import graphs
from kdfast.distill.profile import step_parts
from kdfast.distill.trainer import _check_graphs
from kdfast.recipes import RECIPES

OPTIONS = {"fsd": {"clusters": 8}}


def tensors_of(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, Captured):
        return outputs.tensors()
    if isinstance(outputs, (list, tuple)):
        return [x for part in outputs for x in tensors_of(part)]
    return []


class Again:
    """Stands in for a graph: the same function on the same memory, its outputs overwritten."""

    made = 0
    replays = 0

    def __init__(self, function, tensors):
        Again.made += 1
        self.function, self.tensors = function, tensors
        self.outputs = function(list(tensors))
        self.places = [x.data_ptr() for x in tensors]

    def replay(self):
        Again.replays += 1
        assert self.places == [x.data_ptr() for x in self.tensors]
        with torch.no_grad():
            new = tensors_of(self.function(list(self.tensors)))
            for old, x in zip(tensors_of(self.outputs), new, strict=True):
                old.copy_(x)


def record(function, tensors, pool):
    made = Again(function, tensors)
    for x in tensors_of(made.outputs):  # a graph that is not replayed has run nothing
        x.detach().fill_(0)
    return made, made.outputs


@pytest.fixture
def replays(monkeypatch):
    """Graphs without a GPU."""
    monkeypatch.setattr("kdfast.distill.trainer._check_graphs", lambda args: None)
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(Again, "made", 0)
    monkeypatch.setattr(Again, "replays", 0)
    return Again


def assert_equal_but_for_rounding(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def trained(make_trainer, recipe, **changes):
    """Weights after the training, and the logged losses."""
    # Adam would make steps of equal size of what is rounding.
    changes = {"recipe_options": OPTIONS.get(recipe)} | changes
    trainer = make_trainer(recipe, **(changes | {"optim": "sgd", "learning_rate": 0.1}))
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train()
    learned = [*trainer.model.parameters(), *trainer.recipe.parameters()]
    logs = [
        value
        for entry in trainer.state.log_history
        for name, value in entry.items()
        if name.startswith("loss")
    ]
    return [x.detach().clone() for x in learned], logs


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"custom"}))
def test_a_replayed_step_is_the_step(make_trainer, replays, recipe):
    plain = trained(make_trainer, recipe)
    assert_equal_but_for_rounding(trained(make_trainer, recipe, cuda_graphs=True), plain)
    if recipe != "labels":  # it has no teacher
        assert replays.replays > 0


def test_shapes_are_recorded_once_and_those_too_many_run_as_they_are(
    make_trainer, replays, monkeypatch
):
    plain = trained(make_trainer, "internal")
    assert_equal_but_for_rounding(trained(make_trainer, "internal", cuda_graphs=True), plain)
    # Teacher and losses of each length that came up in 9 steps.
    assert replays.replays == 18 and 2 < replays.made < 18 and replays.made % 2 == 0
    monkeypatch.setattr(graphs, "MOST", 1)
    replays.made = replays.replays = 0
    with pytest.warns(UserWarning, match="1 shapes of the teacher are recorded"):
        some = trained(make_trainer, "internal", cuda_graphs=True)
    assert_equal_but_for_rounding(some, plain)
    assert replays.made == 2 and 2 <= replays.replays < 18


def test_losses_that_change_from_step_to_step_are_not_recorded(make_trainer, replays):
    trainer = make_trainer("annealing", cuda_graphs=True)
    trainer.train()
    stages = {key[0][0] for key in trainer._graphs.of_losses.made}
    assert stages == {len(trainer.recipe.stages) - 1}  # on labels


def test_a_stage_and_a_loaded_state_begin_without_graphs(make_trainer, replays):
    """Their tensors would be the stage's before, or made of another state."""
    trainer = make_trainer("fsd", recipe_options=OPTIONS["fsd"], cuda_graphs=True)
    trainer._prepare_recipe()
    assert not trainer._graphs.of_teacher.made  # nor of the fit
    trainer.train()
    assert trainer._graphs.of_teacher.made and trainer._graphs.of_losses.made
    step_parts(trainer, batches=2)
    assert not trainer._graphs.of_teacher.made and not trainer._graphs.of_losses.made
    staged = make_trainer("internal", recipe_options={"schedule": "stacked"}, cuda_graphs=True)
    staged.train()
    assert {key[0][0] for key in staged._graphs.of_losses.made} == {2}
    staged.close()
    assert not staged._graphs.of_losses.made


def test_a_second_batch_before_the_backward_pass_is_an_error(make_trainer, replays):
    trainer = make_trainer("internal", cuda_graphs=True)
    batch = next(iter(trainer.get_train_dataloader()))
    first = trainer.compute_loss(trainer.model.train(), dict(batch))
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    with pytest.raises(RuntimeError, match="each batch goes backward before the next"):
        first.backward()


def test_graphs_are_recorded_anew_where_what_they_read_has_moved(make_trainer, replays):
    trainer = make_trainer("fsd", recipe_options=OPTIONS["fsd"], cuda_graphs=True)
    trainer._prepare_recipe()
    batch = next(iter(trainer.get_train_dataloader()))

    def made():
        before = replays.made
        trainer.compute_loss(trainer.model.train(), dict(batch)).backward()
        return replays.made - before

    assert (made(), made()) == (2, 0)
    teacher, recipe = trainer.teacher, trainer.recipe
    weight = teacher.classifier.weight
    weight.data = weight.data.clone()
    # Those of the losses too, unless what the teacher's graph gives comes to lie where it was.
    assert made() in (1, 2) and made() == 0
    teacher.classifier.weight = torch.nn.Parameter(weight.data.clone(), requires_grad=False)
    assert made() in (1, 2) and made() == 0
    for moved in (next(recipe.parameters()), next(recipe.buffers())):
        moved.data = moved.data.clone()
        assert (made(), made()) == (1, 0)


def test_inputs_that_are_no_tensors_have_graphs_of_their_own(make_trainer, replays):
    recipe = make_trainer("embedding").recipe
    seen = []

    def run(inputs, needs):
        seen.append(inputs["way"])
        return Captured(logits=inputs["x"] * len(inputs["way"]))

    graphed = graphs.Graphs(recipe, run, None)
    x = torch.ones(2, 3)
    for way in ("a", "bc", "a", "bc", ["not hashable"]):
        logits = graphed.teacher({"x": x, "way": way}, Needs(logits=True)).logits
        assert torch.equal(logits, x * len(way))
    assert replays.made == 2 and seen[-1] == ["not hashable"]


def test_graphs_stand_beside_a_cache_and_accumulated_batches(make_trainer, replays, tmp_path):
    changes = {"gradient_accumulation_steps": 2, "max_steps": 4}
    plain = trained(make_trainer, "internal", **changes)
    both = trained(
        *(make_trainer, "internal"),
        **(changes | {"cuda_graphs": True, "teacher_cache": str(tmp_path / "cache")}),
    )
    assert_equal_but_for_rounding(both, plain)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cpu")}, "the device is cpu"),
        ({"world_size": 2}, "there are 2 processes"),
        ({"torch_compile": True}, "torch_compile is on"),
        ({"fp16": True}, "fp16 scales losses"),
    ],
)
def test_what_graphs_do_not_serve_is_refused(changes, reason):
    served = {"device": torch.device("cuda", 0), "world_size": 1}
    arguments = SimpleNamespace(**(served | {"torch_compile": False, "fp16": False} | changes))
    with pytest.raises(InputError, match=f"cuda_graphs .* {reason}.*: leave it out"):
        _check_graphs(arguments)


def test_what_waits_for_the_device_is_named(make_trainer, replays, monkeypatch):
    def record(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "record", record)
    with pytest.raises(InputError, match="cannot record the teacher.* leave cuda_graphs out"):
        make_trainer("internal", cuda_graphs=True).train()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"dataloader_num_workers": 1},
        {"recipe_options": {"schedule": "progressive"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", ["internal", "fsd", "universal", "minilmv2"])
def test_a_replayed_step_is_the_step_on_a_gpu(make_trainer, recipe, changes):
    if "recipe_options" in changes and recipe != "internal":
        pytest.skip("of one recipe")
    plain = trained(make_trainer, recipe, use_cpu=False, **changes)
    replayed = trained(make_trainer, recipe, use_cpu=False, cuda_graphs=True, **changes)
    bound = 2e-2 if "bf16" in changes else 1e-3
    torch.testing.assert_close(replayed, plain, rtol=bound, atol=bound / 10)


@pytest.mark.gpu
def test_graphs_are_made_again_after_a_profile_on_a_gpu(make_trainer):
    trainer = make_trainer(
        *("fsd",), recipe_options=OPTIONS["fsd"], use_cpu=False, cuda_graphs=True
    )
    trainer.train()
    step_parts(trainer, batches=2)
    torch.cuda.empty_cache()
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_full_and_padded_batches_have_graphs_of_their_own(make_trainer, replays):
    trainer = make_trainer("embedding", cuda_graphs=True)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    mask = batch["attention_mask"]
    full = {**batch, "attention_mask": torch.ones_like(mask), "kdfast_padded_masks": frozenset()}
    for given in (batch, full, batch, full):
        plain = make_trainer("embedding")
        plain.model.load_state_dict(trainer.model.state_dict())
        losses = []
        for one in (trainer, plain):
            for module in one.model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            losses.append(one.compute_loss(one.model.train(), dict(given)))
            losses[-1].backward()
        assert_equal_but_for_rounding(*losses)
    assert replays.made == 4
