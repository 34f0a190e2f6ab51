"""The pass before training: fitted once, kept by what it was made of, otherwise without trace."""

import datasets
import pytest
import torch

from kdfast import InputError


@pytest.fixture
def memory_trainer(make_trainer, tmp_path):
    """A trainer whose recipe has a memory of so many centroids."""

    def make(clusters=8, **changes):
        return make_trainer(
            "fsd",
            recipe_options={"clusters": clusters},
            max_steps=2,
            save_strategy="no",
            prepared_dir=str(tmp_path / "prepared"),
            **changes,
        )

    return make


def files(tmp_path):
    return sorted((tmp_path / "prepared").iterdir())


def test_a_run_that_reads_its_memory_ends_with_the_bits_of_the_one_that_made_it(
    memory_trainer, tmp_path, capsys
):
    first = memory_trainer()
    first.train()
    (file,) = files(tmp_path)
    made = file.stat().st_mtime_ns
    assert "over 48 rows" in capsys.readouterr().out
    second = memory_trainer()
    second.train()
    assert "fitted before" in capsys.readouterr().out and file.stat().st_mtime_ns == made
    for model, other in ((first.model, second.model), (first.recipe, second.recipe)):
        for name, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_all_parts_of_a_recipe_share_the_passes(make_trainer):
    """Two memories and the pseudo classifiers: as many teacher forwards as for one memory, and the
    bits of each fitted alone."""
    losses = [
        {"loss": "global", "clusters": 8, "layer_map": [[1, 2], [2, 4]]},
        {"loss": "pseudo_projection"},
    ]
    together = make_trainer("custom", recipe_options={"losses": losses}, max_steps=1)
    forwards = 0

    def count(*_):
        nonlocal forwards
        forwards += 1

    handle = together.teacher.register_forward_hook(count)
    said = together._prepare_recipe()
    handle.remove()
    assert forwards == 4 * 2  # k-means' four passes over 48 rows, 32 a batch
    assert sum("in 4 passes" in line for line in said) == 2
    for entry, key in zip(losses, ("global", "pseudo_projection"), strict=True):
        alone = make_trainer("custom", recipe_options={"losses": [entry]}, max_steps=1)
        alone._prepare_recipe()
        for name, part in alone.recipe.fitted.items():
            assert name.startswith(key)
            for field, value in part.fitted_state().items():
                assert torch.equal(value, together.recipe.fitted[name].fitted_state()[field])


def test_a_part_that_has_enough_says_how_many_rows_it_read(make_trainer):
    (said,) = make_trainer("universal", recipe_options={"pseudo_rows": 20})._prepare_recipe()
    assert said.endswith("fitted in 1 pass over 32 rows")  # a batch, of 48


@pytest.mark.parametrize("loss", ["global", "pseudo_projection"])
def test_an_interrupted_fit_is_forgotten(make_trainer, loss, monkeypatch):
    losses = [{"loss": loss} | ({"clusters": 8} if loss == "global" else {})]
    trainers = [make_trainer("custom", recipe_options={"losses": losses}) for _ in range(2)]
    run_teacher, calls = trainers[0]._run_teacher, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_teacher(*args)

    monkeypatch.setattr(trainers[0], "_run_teacher", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainers[0]._prepare_recipe()
    for trainer in trainers:
        trainer._prepare_recipe()
    (one,), (other,) = (trainer.recipe.fitted.values() for trainer in trainers)
    for name, value in one.fitted_state().items():
        assert torch.equal(value, other.fitted_state()[name])


def test_another_teacher_setting_or_data_set_is_fitted_anew(memory_trainer, tmp_path, teacher):
    memory_trainer().train()
    memory_trainer(clusters=4).train()
    assert len(files(tmp_path)) == 2
    with torch.no_grad():
        teacher.classifier.bias += 1
    memory_trainer().train()
    assert len(files(tmp_path)) == 3
    rows = datasets.Dataset.from_dict({"text": ["good film", "bad plot"] * 8, "label": [1, 0] * 8})
    memory_trainer(rows=rows).train()
    assert len(files(tmp_path)) == 4


def test_a_damaged_file_is_made_again(memory_trainer, tmp_path):
    memory_trainer().train()
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    memory_trainer().train()
    assert file.read_bytes() == whole


def test_the_teacher_memory_is_the_mean_of_the_sentences_nearest_to_each_centroid(
    memory_trainer, teacher
):
    trainer = memory_trainer(clusters=4)
    trainer.train()
    (part,) = trainer.recipe.fitted.values()
    memory = part.loss.teacher_memory
    features = []
    for row in trainer.train_dataset:
        ids = torch.tensor([row["input_ids"]])
        hidden = teacher(ids, output_hidden_states=True).hidden_states[3]
        flat = hidden.detach().flatten()
        features.append(torch.nn.functional.pad(flat, (0, memory.shape[1] - len(flat))))
    features = torch.stack(features)
    distances = torch.cdist(features, memory)
    # The last pass moved the centroids once more, so nearly all sentences are still theirs.
    nearest = distances.argmin(1)
    inertia = distances.min(1).values.square().mean()
    assert inertia < 0.8 * (features - features.mean(0)).square().sum(1).mean()
    assert len(set(nearest.tolist())) == 4


def test_fewer_sentences_than_centroids_are_refused_before_the_first_step(memory_trainer):
    trainer = memory_trainer(clusters=49)
    with pytest.raises(InputError, match="clusters is 49, .*samples, 48"):
        trainer.train()
    assert trainer.state.global_step == 0
