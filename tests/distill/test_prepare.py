"""The pass before training: fitted once, kept by what it was made of, otherwise without trace."""

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdfast import DistillationArguments, DistillationTrainer, InputError
from kdfast.distill.data import DistillationCollator, tokenize
from kdfast.distill.models import cut_student


@pytest.fixture
def teacher(tiny_bert):
    return AutoModelForSequenceClassification.from_pretrained(tiny_bert)


@pytest.fixture
def make_trainer(tmp_path, tiny_bert, teacher, make_sentences):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    texts, labels = zip(*make_sentences(40), strict=True)
    rows = datasets.Dataset.from_dict(
        {"text": list(texts), "label": [int(label == "pos") for label in labels]}
    )

    def make(recipe="fsd", rows=rows, **options):
        torch.manual_seed(1)
        options = {"clusters": 8, **options} if recipe == "fsd" else options
        return DistillationTrainer(
            model=cut_student(teacher, 2, label_names=["neg", "pos"]),
            teacher=teacher,
            args=DistillationArguments(
                output_dir=str(tmp_path / "out"),
                max_steps=2,
                per_device_train_batch_size=8,
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="no",
                recipe=recipe,
                recipe_options=options,
                prepared_dir=str(tmp_path / "prepared"),
            ),
            train_dataset=tokenize(rows, tokenizer, 32),
            data_collator=DistillationCollator(tokenizer),
            processing_class=tokenizer,
        )

    return make


def files(tmp_path):
    return sorted((tmp_path / "prepared").iterdir())


def test_a_run_that_reads_its_memory_ends_with_the_bits_of_the_one_that_made_it(
    make_trainer, tmp_path, capsys
):
    first = make_trainer()
    first.train()
    (file,) = files(tmp_path)
    made = file.stat().st_mtime_ns
    assert "fitted to 40 rows" in capsys.readouterr().out
    second = make_trainer()
    second.train()
    assert "fitted before" in capsys.readouterr().out and file.stat().st_mtime_ns == made
    for model, other in ((first.model, second.model), (first.recipe, second.recipe)):
        for name, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_another_teacher_setting_or_data_set_is_fitted_anew(make_trainer, tmp_path, teacher):
    make_trainer().train()
    make_trainer(clusters=4).train()
    assert len(files(tmp_path)) == 2
    with torch.no_grad():
        teacher.classifier.bias += 1
    make_trainer().train()
    assert len(files(tmp_path)) == 3
    rows = datasets.Dataset.from_dict({"text": ["good film", "bad plot"] * 8, "label": [1, 0] * 8})
    make_trainer(rows=rows).train()
    assert len(files(tmp_path)) == 4


def test_a_damaged_file_is_made_again(make_trainer, tmp_path):
    make_trainer().train()
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    make_trainer().train()
    assert file.read_bytes() == whole


def test_the_teacher_memory_is_the_mean_of_the_sentences_nearest_to_each_centroid(
    make_trainer, teacher
):
    trainer = make_trainer(clusters=4)
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


def test_fewer_sentences_than_centroids_are_refused_before_the_first_step(make_trainer):
    trainer = make_trainer(clusters=41)
    with pytest.raises(InputError, match="clusters is 41, .*samples, 40"):
        trainer.train()
    assert trainer.state.global_step == 0
