"""A profiled step is the trainer's own step, taken apart."""

import pytest
import torch

from kdfast.distill.profile import PARTS, profile, step_parts


@pytest.mark.parametrize("recipe", ["internal", "fsd", "universal", "minilmv2"])
def test_its_gradients_are_those_of_the_step(make_trainer, recipe):
    options = {"clusters": 8} if recipe == "fsd" else {}
    trainer = make_trainer(recipe, max_steps=4, recipe_options=options)
    trainer.train()
    trainer._clock.stage = 0  # where there is a teacher
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.args.max_grad_norm = 1e9
    batch = next(iter(trainer.get_train_dataloader()))
    learned = dict(trainer.model.named_parameters()) | dict(trainer.recipe.named_parameters())

    def gradients():
        return {name: p.grad.clone() for name, p in learned.items() if p.grad is not None}

    trainer.model.zero_grad(), trainer.recipe.zero_grad()
    trainer.model.train()
    inputs = trainer._prepare_inputs(dict(batch))
    trainer.compute_loss(trainer.model, inputs).backward()
    expected, found = gradients(), {}
    trainer.model.zero_grad(), trainer.recipe.zero_grad()
    trainer.optimizer.step = lambda: found.update(gradients())
    seconds = profile(trainer, [batch, batch])
    assert {part: len(each) for part, each in seconds.items()} == dict.fromkeys(PARTS, 2)
    assert all(second > 0 for each in seconds.values() for second in each)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_it_leaves_student_recipe_and_random_state_as_they_were(make_trainer):
    trainer = make_trainer("universal", max_steps=10)
    trainer.train()
    models = {"student": trainer.model, "recipe": trainer.recipe}
    before = {
        (name, key): value.clone()
        for name, model in models.items()
        for key, value in model.state_dict().items()
    }
    state = torch.get_rng_state()
    parts = step_parts(trainer, batches=2)
    assert torch.equal(torch.get_rng_state(), state)
    for name, model in models.items():
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[name, key]), key
    # Its last stage, 3 of 10 steps, has no teacher: the first one's share is what counts.
    first, last = (
        sum(map(sum, profile(trainer, [next(iter(trainer.get_train_dataloader()))], k).values()))
        for k in (0, 1)
    )
    assert parts["teacher"] > 0 and min(first, last) > 0 and tuple(parts) == PARTS
