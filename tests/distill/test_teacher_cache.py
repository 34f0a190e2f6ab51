"""The teacher's part kept on disk: the same losses without a teacher, never a wrong byte."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

from kdfast import DistillationArguments, DistillationTrainer, InputError
from kdfast.captured import Needs
from kdfast.cli import main
from kdfast.distill import teacher_cache
from kdfast.distill.data import DistillationCollator, tokenize
from kdfast.distill.models import cut_student
from kdfast.distill.teacher_cache import ROW


@pytest.fixture
def cached(make_trainer, tmp_path):
    """make_trainer with a cache, of two steps."""

    def make(recipe="internal", **changes):
        values = {"max_steps": 2, "save_strategy": "no", "teacher_cache": str(tmp_path / "cache")}
        return make_trainer(recipe, **{**values, **changes})

    return make


@pytest.fixture
def forwards(teacher):
    """How often the teacher ran, as .count."""
    seen = SimpleNamespace(count=0)

    def count(*_):
        seen.count += 1

    # Before the forward, as one that is not run to its end counts too.
    teacher.register_forward_pre_hook(count)
    return seen


def folder(tmp_path):
    (found,) = (tmp_path / "cache").iterdir()
    return found


def items(tmp_path):
    return sorted(path.stem for path in folder(tmp_path).glob("*.json"))


def written(tmp_path):
    return {p.name: p.stat().st_mtime_ns for p in folder(tmp_path).glob("*.*")}


def first_batch(trainer):
    """Loss and gradients of the student and of the recipe on the first batch."""
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(5)
    batch = next(iter(trainer.get_train_dataloader()))
    # As the training loop does: the number of labelled tokens, here of one micro-batch alone.
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    named = {**dict(trainer.model.named_parameters()), **dict(trainer.recipe.named_parameters())}
    return batch, loss, {n: p.grad.clone() for n, p in named.items() if p.grad is not None}


@pytest.mark.parametrize(
    ("recipe", "options", "kept"),
    [
        (
            "internal",
            {"cosine_rows": "tokens"},
            "hidden-2 hidden-4 key-2 key-4 logits query-2 query-4",
        ),
        ("fsd", {"clusters": 4}, "hidden-3 logits"),
        ("universal", {}, "hidden-1 hidden-2 hidden-3 logits"),
        ("minilm", {}, "key-4 logits query-4 value-4"),
        ("minilmv2", {}, "key-4 logits query-4 value-4"),
        ("alp", {}, "hidden-1 hidden-2 hidden-3 hidden-4 logits"),
        (
            "custom",
            {
                "losses": [
                    {"loss": name} for name in ("hidden_mse", "attention_scores", "rkd_angle")
                ]
            },
            "",
        ),
    ],
)
def test_losses_and_gradients_are_those_of_the_running_teacher(
    recipe, options, kept, cached, forwards, tmp_path
):
    results = []
    for cache in (None, str(tmp_path / "cache")):
        trainer = cached(recipe, recipe_options=options, teacher_cache=cache)
        trainer.skip_preparation()
        torch.manual_seed(3)
        for part in trainer.recipe.fitted.values():
            part.stand_in()
        if cache is not None:
            trainer._fill_cache()
            if kept:
                assert items(tmp_path) == kept.split()
            forwards.count = 0
        results.append(first_batch(trainer))
    (batch, loss, gradients), (cached_batch, cached_loss, cached_gradients) = results
    assert forwards.count == 0 and ROW in cached_batch and ROW not in batch
    assert torch.equal(batch["input_ids"], cached_batch["input_ids"])
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 2
    torch.testing.assert_close(cached_loss, loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == cached_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached_gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_the_teacher_runs_over_the_data_once_and_in_later_runs_never(
    cached, forwards, tmp_path, capsys
):
    """The pass takes one batch, after two of a row or two, to measure and to compare."""
    first = cached(max_steps=12)
    first.train()
    assert forwards.count == 3
    out = capsys.readouterr().out
    size = sum(p.stat().st_size for p in folder(tmp_path).glob("*.bin"))
    announced = f"of 48 rows, 8 tokens on average: {size / 1e3:.0f} kB in {folder(tmp_path)}"
    assert announced in out and out.index(announced) < out.index("recipe internal")
    before = written(tmp_path)
    second = cached(max_steps=12)
    second.train()
    assert forwards.count == 3 and written(tmp_path) == before
    assert "made before, read from" in capsys.readouterr().out
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_parts_that_are_fitted_first_read_it_too(cached, forwards, tmp_path):
    """Four passes of k-means and two of pseudo classifiers without the teacher, to the same end,
    under the name that a run without the cache gives it."""
    losses = [{"loss": "global", "clusters": 8}, {"loss": "pseudo_projection"}]
    fitted = []
    for name, cache in (("a", None), ("b", str(tmp_path / "cache"))):
        home = tmp_path / name
        trainer = cached(
            "custom",
            recipe_options={"losses": losses},
            teacher_cache=cache,
            prepared_dir=str(home),
        )
        forwards.count = 0
        trainer.train()
        fitted.append({path.name: load_file(path) for path in home.iterdir()})
    assert forwards.count == 3 and fitted[0].keys() == fitted[1].keys() and len(fitted[0]) == 2
    for name, values in fitted[0].items():
        for key, value in values.items():
            torch.testing.assert_close(fitted[1][name][key], value, rtol=1e-2, atol=1e-3)


def test_only_valid_tokens_are_kept_in_the_dtype_of_the_teacher(
    cached, forwards, teacher, tmp_path
):
    trainer = cached("soft_labels", recipe_options={})
    trainer.train()
    assert items(tmp_path) == ["logits"]
    assert (folder(tmp_path) / "logits.bin").stat().st_size == 48 * 2 * 4
    teacher.bfloat16()
    trainer = cached("hidden")
    trainer.train()
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    assert (trainer._cache.folder / "hidden-4.bin").stat().st_size == tokens * 32 * 2
    assert trainer._cache._items["hidden-4"][1].dtype == torch.bfloat16


def test_under_autocast_it_holds_what_the_capture_gives(cached, forwards, tmp_path):
    results = []
    for cache in (None, str(tmp_path / "cache")):
        trainer = cached(recipe_options={"cosine_rows": "tokens"}, bf16=True, teacher_cache=cache)
        trainer.train()
        results.append([entry for entry in trainer.state.log_history if "loss" in entry][-1])
        if cache is not None:
            assert trainer._cache._items["query-2"][1].dtype == torch.bfloat16
    for name in ("loss_attention_kl", "loss_cosine", "loss_soft_labels"):
        assert results[1][name] == pytest.approx(results[0][name], rel=2e-2)


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "sequential"])
def test_rows_may_be_drawn_in_any_way(strategy, cached, forwards, tmp_path):
    if "train_sampling_strategy" not in DistillationArguments.__dataclass_fields__:
        pytest.skip("transformers names it otherwise")
    losses = []
    for cache in (None, str(tmp_path / "cache")):
        trainer = cached(
            teacher_cache=cache,
            train_sampling_strategy=strategy,
            gradient_accumulation_steps=2,
            dataloader_drop_last=True,
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and trainer.train_dataset.num_rows == 48


def test_another_recipe_adds_only_what_is_missing(cached, forwards, tmp_path, capsys):
    cached()._fill_cache()
    before = written(tmp_path)
    capsys.readouterr()
    cached("soft_labels")._fill_cache()
    assert not capsys.readouterr().out and written(tmp_path) == before
    cached("alp")._fill_cache()
    said = capsys.readouterr().out
    after = written(tmp_path)
    assert {k: after[k] for k in before} == before
    assert {n.split(".")[0] for n in set(after) - set(before)} == {"hidden-1", "hidden-3"}
    assert "hidden states of layers 1, 3 of 48 rows" in said


def truncate(path):
    path.write_bytes(path.read_bytes()[:-4])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_another_folder(path):
    values = json.loads(path.read_text())
    values.pop("digest")
    values["key"] = "0" * 16
    path.write_text(json.dumps({**values, "digest": teacher_cache._hash(values)}))


def changed_scale(path):
    values = json.loads(path.read_text())
    values["attention"]["scale"] *= 2
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("hidden-2.bin", truncate, "bytes, not"),
        ("hidden-2.bin", flip, "hidden-2.bin was altered"),
        ("hidden-2.bin", lambda path: path.unlink(), "hidden-2.bin is missing"),
        ("hidden-2.json", truncate, "hidden-2.json cannot be read"),
        ("hidden-2.json", lambda path: path.write_text("[1]"), "hidden-2.json cannot be read"),
        ("hidden-2.json", of_another_folder, "hidden-2.json belongs to something else"),
        ("query-2.json", changed_scale, "query-2.json cannot be read (it was altered)"),
        # Cut off between the two: nothing to say, as it was never whole.
        ("hidden-2.json", lambda path: path.unlink(), "hidden states of layer 2 of 48 rows"),
    ],
)
def test_damaged_and_foreign_files_are_named_and_made_again(
    file, damage, said, cached, tmp_path, capsys
):
    cached()._fill_cache()
    path = folder(tmp_path) / file
    item = path.stem
    contents = {p.name: p.read_bytes() for p in folder(tmp_path).glob("*.*")}
    before = written(tmp_path)
    damage(path)
    capsys.readouterr()
    cached()._fill_cache()
    assert said in capsys.readouterr().out
    after = written(tmp_path)
    assert {p.name: p.read_bytes() for p in folder(tmp_path).glob("*.*")} == contents
    assert {name for name in after if after[name] != before[name]} == {
        f"{item}.bin",
        f"{item}.json",
    }


def test_all_is_looked_at_once_by_processes_that_start_together(
    cached, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(teacher_cache, "CHUNK", 256)
    monkeypatch.setattr(teacher_cache, "BAR_BYTES", 0)
    monkeypatch.setattr(teacher_cache, "LOOKED_AT", 2)
    cached("hidden")._fill_cache()
    path = folder(tmp_path) / "hidden-4.bin"

    def notices(local_rank):
        trainer = cached("hidden", disable_tqdm=False)
        with monkeypatch.context() as patch:
            patch.setenv("LOCAL_RANK", local_rank)
            trainer._fill_cache()
        return "hidden-4.bin was altered" in capsys.readouterr().out

    flip(path)  # in the middle
    assert not notices("1")
    monkeypatch.setattr(teacher_cache.os, "getppid", lambda: 0)  # of another start
    assert notices("1")
    flip(path)
    assert notices("0") and not notices("0")


def test_a_pass_that_is_cut_off_leaves_nothing(cached, teacher, tmp_path):
    calls = 0

    def stop(*_):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    handle = teacher.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        cached()._fill_cache()
    handle.remove()
    assert [path.name for path in folder(tmp_path).iterdir()] == ["lock"]
    left = folder(tmp_path) / "hidden-2.bin.partial"  # of a process that was killed
    left.write_bytes(b"half")
    cached()._fill_cache()
    assert not left.exists() and "hidden-2" in items(tmp_path)


def test_another_teacher_configuration_or_data_set_gets_a_folder_of_its_own(
    cached, teacher, tmp_path
):
    def folders():
        return len(list((tmp_path / "cache").iterdir()))

    cached("soft_labels")._fill_cache()
    with torch.no_grad():
        teacher.classifier.bias += 1
    cached("soft_labels")._fill_cache()
    assert folders() == 2
    teacher.config.layer_norm_eps *= 2
    cached("soft_labels")._fill_cache()
    assert folders() == 3
    rows = datasets.Dataset.from_dict({"text": ["good film", "bad plot"] * 8, "label": [1, 0] * 8})
    cached("soft_labels", rows=rows)._fill_cache()
    assert folders() == 4
    # Labels are not read by the teacher.
    cached("soft_labels", rows=rows.map(lambda row: {"label": 1 - row["label"]}))._fill_cache()
    assert folders() == 4
    cached("soft_labels", rows=rows, bf16=True)._fill_cache()
    assert folders() == 5


def trainer_of(
    tmp_path, teacher, rows, collator, tokenizer, student=None, teacher_tokenizer=None, **changes
):
    torch.manual_seed(1)
    values = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "teacher_cache": str(tmp_path / "cache"),
        **changes,
    }
    return DistillationTrainer(
        model=student or cut_student(teacher, 2, label_names=["neg", "pos"]),
        teacher=teacher,
        args=DistillationArguments(output_dir=str(tmp_path / "out"), **values),
        train_dataset=rows,
        data_collator=collator,
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer,
    )


@pytest.fixture
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture
def train(tokenizer, make_sentences):
    texts, labels = zip(*make_sentences(20), strict=True)
    numbers = [int(label == "pos") for label in labels]
    return tokenize(datasets.Dataset.from_dict({"text": texts, "label": numbers}), tokenizer, 32)


def test_another_tokenizer_gets_a_folder_of_its_own(tmp_path, teacher, tokenizer, train):
    """Other ids of the same sentences."""
    collator = DistillationCollator(tokenizer)
    trainer_of(tmp_path, teacher, train, collator, tokenizer)._fill_cache()
    other = train.map(lambda row: {"input_ids": [5 + (i + 1) % 12 for i in row["input_ids"]]})
    trainer_of(tmp_path, teacher, other, collator, tokenizer)._fill_cache()
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["datasets", "list", "shuffled", "padded"])
def test_any_collator_and_indexed_data_set_work(
    kind, side, tmp_path, teacher, tokenizer, train, forwards
):
    tokenizer.padding_side = side
    right = side == "right"
    if not right:  # where BERT's head reads the first position, and its positions are absolute
        teacher.bert.embeddings.position_embeddings.weight.data.zero_()
    rows = {
        "datasets": lambda: train,
        "list": lambda: [
            {k: train[i][k] for k in ("input_ids", "attention_mask", "labels")} for i in range(20)
        ],
        "shuffled": lambda: train.shuffle(seed=3).select(range(1, 20)),
        "padded": lambda: train.map(
            lambda row: {
                "input_ids": [0, *row["input_ids"], *[0] * (20 - len(row["input_ids"]))],
                "attention_mask": [0, *row["attention_mask"], *[0] * (20 - len(row["input_ids"]))],
                "token_type_ids": [0] * 21,
            }
        ),
    }[kind]()
    collator = DataCollatorWithPadding(tokenizer)
    options = {"cosine_rows": "tokens", "soft_label_weight": float(right)}
    trainer = trainer_of(
        *(tmp_path, teacher, rows, collator, tokenizer), max_steps=6, recipe_options=options
    )
    trainer.train()
    before = forwards.count
    batch = next(iter(trainer.get_train_dataloader()))
    _, own = trainer._split(batch, training=True)
    needs = Needs(logits=right, hidden_states=[2, 4], attention=[2, 4])
    read = trainer._teacher_of(own, needs, batch[ROW])
    assert forwards.count == before
    ran = trainer._run_teacher(own, needs)
    mask = own["attention_mask"].bool()
    for layer in (2, 4):
        pairs = [(read.hidden_states[layer], ran.hidden_states[layer])]
        for part in ("query", "key"):
            of = [getattr(side.attention[layer], part).transpose(1, 2) for side in (read, ran)]
            pairs.append(tuple(of))
        for kept, live in pairs:
            assert kept.shape == live.shape and kept.dtype == live.dtype
            torch.testing.assert_close(kept[mask], live[mask], rtol=1e-4, atol=1e-5)
            assert not kept[~mask].any() and kept[mask].any(-1).all()
        kept, live = read.attention[layer], ran.attention[layer]
        assert (kept.scale, kept.causal, kept.window) == (live.scale, live.causal, live.window)
        assert kept.value is None
    if right:
        torch.testing.assert_close(read.logits, ran.logits, rtol=1e-4, atol=1e-5)
    first = int(mask[mask.sum(1).argmin()].int().argmax())
    assert (first > 0) == (kind == "padded" or not right)


def test_what_the_collator_makes_beside_token_ids_gets_a_folder_of_its_own(
    tmp_path, teacher, tokenizer, train
):
    plain = DistillationCollator(tokenizer)

    def typed(rows):
        batch = plain(rows)
        return {**batch, "token_type_ids": batch["attention_mask"]}

    def folders(collator):
        trainer_of(tmp_path, teacher, train, collator, tokenizer)._fill_cache()
        return len(list((tmp_path / "cache").iterdir()))

    assert folders(plain) == 1 and folders(typed) == 2
    assert folders(DistillationCollator(tokenizer, pad_to=20)) == 2  # padding is not kept


def test_another_release_of_transformers_gets_a_folder_of_its_own(cached, tmp_path, monkeypatch):
    for release, folders in (("5.1.0", 1), ("5.1.2", 1), ("5.2.0", 2)):
        monkeypatch.setattr(teacher_cache.transformers, "__version__", release)
        cached("soft_labels")._fill_cache()
        assert len(list((tmp_path / "cache").iterdir())) == folders


def test_a_teacher_that_gives_no_numbers_is_refused(cached, teacher):
    teacher.classifier.bias.data.fill_(float("nan"))
    with pytest.raises(InputError, match="values that are not finite"):
        cached("soft_labels").train()


@pytest.mark.parametrize("options", [{}, {"attention_weight": 0.0}, {"cosine_weight": 0.0}])
def test_a_teacher_that_sees_padding_is_refused(options, tmp_path, teacher, tokenizer, train):
    tokenizer.padding_side = "left"
    collator = DataCollatorWithPadding(tokenizer)
    options = {"soft_label_weight": 0.0, **options}
    trainer = trainer_of(tmp_path, teacher, train, collator, tokenizer, recipe_options=options)
    with pytest.raises(InputError, match="padded further .*padding_side"):
        trainer.train()


def test_a_collator_that_changes_tokens_is_refused(tmp_path, teacher, tokenizer, train):
    plain = DistillationCollator(tokenizer)

    def masking(rows):
        batch = plain(rows)
        batch["input_ids"][:, 1] = 4
        return batch

    with pytest.raises(InputError, match="data_collator.* gives row .* other tokens"):
        trainer_of(tmp_path, teacher, train, masking, tokenizer).train()


def test_data_that_cannot_be_indexed_are_refused(tmp_path, teacher, tokenizer, train):
    streamed = train.to_iterable_dataset()
    collator = DistillationCollator(tokenizer)
    with pytest.raises(InputError, match="a length and numbered rows, was IterableDataset"):
        trainer_of(tmp_path, teacher, streamed, collator, tokenizer).train()


def test_losses_that_read_padding_are_refused(cached, tmp_path):
    for recipe, options in {
        "internal": {"padding": "counted"},
        "fsd": {"padding": "counted", "clusters": 4},
        "tinybert": {"padding": "counted", "attention_weight": 0.0},
        "custom": {"losses": [{"loss": "intra", "padding": "counted"}]},
    }.items():
        with pytest.raises(InputError, match=f"padding=counted of recipe '{recipe}'"):
            cached(recipe, recipe_options=options)
    cached("internal", recipe_options={"padding": "counted"}, teacher_cache=None)
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_refused_with_both_sizes(cached, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"needs \d+ kB in .*, and 10 kB are free"):
        cached()._fill_cache()
    assert not items(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(cached, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match="teacher_cache must be a folder that can be written"):
        cached().train()


def test_a_recipe_without_teacher_keeps_nothing(cached, tmp_path):
    cached("labels").train()
    assert not (tmp_path / "cache").exists()


def test_a_resumed_run_ends_with_the_bits_of_the_whole_one(cached, forwards, tmp_path):
    """Also where the files were lost in between."""
    options = {"schedule": "stacked", "cosine_rows": "tokens"}
    kwargs = {"recipe_options": options, "max_steps": 6, "save_strategy": "steps"}
    whole = cached(folder="whole", **kwargs)
    whole.train()
    for lost in (False, True):
        resumed = cached(folder=f"lost-{lost}", **kwargs)
        if lost:
            shutil.rmtree(tmp_path / "cache")
        ran = forwards.count
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
        assert (forwards.count > ran) == lost
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_teacher_with_its_own_tokens_is_kept_by_those(
    tmp_path, teacher, tokenizer, make_tiny_bert, make_sentences
):
    home = make_tiny_bert(tmp_path / "other", words=["good", "bad", "film"])
    other = AutoModelForSequenceClassification.from_pretrained(home)
    other_tokenizer = AutoTokenizer.from_pretrained(home)
    texts, labels = zip(*make_sentences(20), strict=True)
    rows = datasets.Dataset.from_dict({"text": texts, "label": [int(x == "pos") for x in labels]})
    rows = tokenize(rows, tokenizer, 32, other_tokenizer)
    collator = DistillationCollator(tokenizer, other_tokenizer)
    losses = []
    for cache in (None, str(tmp_path / "cache")):
        torch.manual_seed(2)
        trainer = trainer_of(
            *(tmp_path, other, rows, collator, tokenizer),
            recipe="universal",
            recipe_options={"pool": "mean"},
            teacher_cache=cache,
            student=cut_student(teacher, 2, label_names=["neg", "pos"]),
            teacher_tokenizer=other_tokenizer,
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_logits_of_tokens_are_kept_token_by_token(tmp_path, tiny_bert, tokenizer, train):
    teacher = AutoModelForTokenClassification.from_pretrained(tiny_bert)
    rows = train.remove_columns("labels")
    losses = []
    for cache in (None, str(tmp_path / "cache")):
        torch.manual_seed(2)
        student = AutoModelForTokenClassification.from_pretrained(tiny_bert, num_hidden_layers=2)
        trainer = trainer_of(
            *(tmp_path, teacher, rows, DistillationCollator(tokenizer), tokenizer),
            student=student,
            recipe="soft_labels",
            teacher_cache=cache,
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    (file,) = folder(tmp_path).glob("*.bin")
    assert file.stat().st_size == sum(map(len, rows["input_ids"])) * 2 * 4


@pytest.mark.slow
def test_all_students_of_a_run_share_it(tiny_bert, csv_file, tmp_path, capsys):
    """And a further run of the command line."""
    config = {
        "data": {"path": str(csv_file), "teacher_train": 0, "student_train": 40, "dev": 0},
        "teacher": str(tiny_bert),
        "student": {"base": str(tiny_bert), "layers": 1},
        "teacher_cache": str(tmp_path / "cache"),
        "baselines": ["soft_labels"],
        "recipe": "internal",
        "training": {"steps": 2, "batch_size": 8},
        "cka_sentences": 8,
        "tfidf": False,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["distill", str(tmp_path / "config.yaml")]
    assert main([*command, f"output_dir={tmp_path / 'one'}"]) == 0
    out = capsys.readouterr().out
    assert "teacher cache: logits of 40 rows" in out
    assert "teacher cache: hidden states, queries and keys of layer 4 of 40 rows" in out
    before = written(tmp_path)
    assert main([*command, f"output_dir={tmp_path / 'two'}"]) == 0
    assert "made before" in capsys.readouterr().out and written(tmp_path) == before
    assert main([*command, f"output_dir={tmp_path / 'three'}", "recipe.padding=counted"]) == 2
    assert "set padding=masked" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="needs Linux")
def test_what_was_read_does_not_stay_in_memory(cached, tmp_path):
    trainer = cached("internal")
    trainer.train()
    mapped = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if ".bin" in line:
            mapped[name := line.split()[-1]] = None
        elif line.startswith("Rss:") and mapped and mapped[name] is None:
            mapped[name] = int(line.split()[1])
    of_cache = {Path(k).stem: v for k, v in mapped.items() if str(folder(tmp_path)) in k}
    assert of_cache == dict.fromkeys(items(tmp_path), 0)


@pytest.mark.slow
def test_of_two_processes_one_makes_it_and_the_other_waits(trained_in_processes, tmp_path):
    options = {"recipe": "internal", "recipe_options": {"cosine_rows": "tokens"}}
    trained_in_processes(1, **options, per_device_train_batch_size=8)
    printed = trained_in_processes(
        2,
        **options,
        per_device_train_batch_size=4,
        teacher_cache=str(tmp_path / "cache"),
        dataloader_num_workers=1,
    )
    ran = sorted(line for line in printed.splitlines() if line.startswith("teacher ran"))
    assert ran == ["teacher ran 0", "teacher ran 3"]
    trained_in_processes.agree("model")
