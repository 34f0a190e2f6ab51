"""The command line end to end on a model and sentences made here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdfast.cli import main
from kdfast.distill.data import DataConfig, DistillationCollator, load_data


@pytest.fixture
def settings(tiny_bert, csv_file, tmp_path):
    """A configuration file for a run of seconds; returns its path and the run directory."""
    run_dir = tmp_path / "run"
    config = {
        "data": {
            "path": str(csv_file),
            "teacher_train": 40,
            "student_train": 48,
            "dev": 10,
            "test": 40,
            "max_length": 32,
        },
        "teacher_base": str(tiny_bert),
        "teacher_dir": str(tmp_path / "teachers"),
        "teacher_training": {"steps": 4, "batch_size": 8},
        "student": {"base": str(tiny_bert), "layers": 2, "freeze_embeddings": True},
        "baselines": ["labels", "soft_labels"],
        "recipe": "internal",
        "seeds": [1, 2],
        "training": {"steps": 4, "batch_size": 8, "log_every": 2},
        "cka_sentences": 16,
        "output_dir": str(run_dir),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, run_dir


@pytest.fixture
def run(capsys):
    """Runs the command line; returns exit status, standard output and standard error."""

    def call(*arguments):
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err.strip().splitlines()

    return call


def refused(result):
    """The one line of a refused call."""
    status, _, errors = result
    assert status == 2
    message = [line for line in errors if line.startswith("kdfast: ")]
    assert len(message) == 1 and "Traceback" not in "".join(errors)
    return message[0]


def test_distill_writes_table_plots_json_and_students(settings, run):
    config, run_dir = settings
    status, out, _ = run("distill", config)
    assert status == 0
    assert "| soft labels" in out and "recipe internal" in out and "attention dropout" in out
    results = json.loads((run_dir / "results.json").read_text())
    assert [(r["way"], r["seed"]) for r in results["students"]] == [
        (way, seed) for way in ("labels", "soft_labels", "internal") for seed in (1, 2)
    ]
    for record in results["students"]:
        for key in ("accuracy", "agreement", "kl_to_teacher", "cka_to_teacher"):
            assert isinstance(record[key], float)
        assert record["milliseconds_per_step"] > 0
        assert (record["parts"] is not None) is (record["seed"] == 1)
    assert results["comparison"]["reference"] == "soft_labels"
    for name in ("scores", "losses", "cka"):
        assert (run_dir / "plots" / f"{name}.png").stat().st_size > 5000
    text = (run_dir / "results.md").read_text()
    assert "plots/cka.png" in text and "Parts of a step" in text
    assert not list(run_dir.rglob("*.partial"))


def test_the_saved_student_reproduces_the_printed_accuracy_in_plain_transformers(settings, run):
    config, run_dir = settings
    run("distill", config, "seeds=[1]")
    folder = run_dir / "students" / "internal" / "seed-1"
    record = json.loads((run_dir / "results.json").read_text())["students"][-1]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert not any("teacher" in key or "kdfast" in key for key in weights.keys())  # noqa: SIM118
    status, out, _ = run(
        *("evaluate", folder, f"data.path={yaml.safe_load(config.read_text())['data']['path']}"),
        *("data.teacher_train=40", "data.student_train=48", "data.dev=10", "data.test=40"),
        "data.max_length=32",
    )
    assert status == 0 and f"accuracy {record['accuracy']:.4g}" in out
    # And by nothing but transformers: the test sentences with their labels.
    data = yaml.safe_load(config.read_text())["data"]
    test = load_data(DataConfig(**data)).test
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**tokenizer(list(test["text"]), padding=True, return_tensors="pt")).logits
    accuracy = (logits.argmax(-1) == torch.tensor(test["label"])).float().mean()
    assert float(accuracy) == pytest.approx(record["accuracy"])


def test_universal_saves_its_state_beside_the_student_and_plots_its_weights(settings, run):
    config, run_dir = settings
    run("distill", config, "recipe=universal", "baselines=[]", "seeds=[1]")
    folder = run_dir / "students" / "universal" / "seed-1"
    assert any("classifiers" in key for key in load_file(folder / "kdfast_state.safetensors"))
    assert (run_dir / "plots" / "projection_weights.png").is_file()
    AutoModelForSequenceClassification.from_pretrained(folder)


def test_the_teacher_is_kept_for_the_next_run(settings, run):
    config, run_dir = settings
    run("distill", config, "baselines=[]", "seeds=[1]")
    status, out, _ = run("distill", config, "baselines=[]", "seeds=[2]", f"output_dir={run_dir}-2")
    assert status == 0 and "fine-tuned before" in out


def test_the_same_run_twice_gives_the_same_figures(settings, run):
    config, run_dir = settings
    for name in ("a", "b"):
        run("distill", config, "baselines=[]", "seeds=[1]", f"output_dir={run_dir}-{name}")
    first, second = (
        json.loads((run_dir.with_name(f"run-{n}") / "results.json").read_text())["students"][0]
        for n in ("a", "b")
    )
    timing = {"milliseconds_per_step", "seconds", "parts"}
    assert {k: v for k, v in first.items() if k not in timing} == {
        k: v for k, v in second.items() if k not in timing
    }


def test_batches_of_like_lengths_are_padded_less(settings, run, monkeypatch):
    config, run_dir = settings
    padded = []

    class Counting(DistillationCollator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            if len(rows) == 2:  # those of the training
                padded.append(int((batch["attention_mask"] == 0).sum()))
            return batch

    monkeypatch.setattr("kdfast.distill.student.DistillationCollator", Counting)
    sums = []
    for grouped in ("true", "false"):
        shutil.rmtree(run_dir, ignore_errors=True)
        padded.clear()
        changes = ("baselines=[]", "recipe=labels", "seeds=[1]", "training.steps=24")
        changes += (f"training.group_by_length={grouped}", "training.batch_size=2")
        assert run("distill", config, *changes)[0] == 0
        sums.append(sum(padded))
    assert sums[0] < 0.7 * sums[1], sums


def test_own_teacher_and_a_student_cut_from_it(settings, run, tiny_bert):
    config, _ = settings
    status, out, _ = run(
        *("distill", config, f"teacher={tiny_bert}", "student.base=teacher", "seeds=[1]"),
        "data.teacher_train=0",
    )
    assert status == 0 and "internal" in out


def test_regression_is_scored_by_correlation(settings, run, tmp_path, csv_file):
    lines = csv_file.read_text().splitlines()
    scored = [f"{line.rsplit(',', 1)[0]},{i % 7 + i / 100:.2f}" for i, line in enumerate(lines[1:])]
    (tmp_path / "scores.csv").write_text("\n".join(["text,score", *scored]))
    config, run_dir = settings
    status, out, _ = run("distill", config, f"data.path={tmp_path / 'scores.csv'}", "seeds=[1]")
    assert status == 0 and "Pearson" in out
    assert "mse_to_teacher" in json.loads((run_dir / "results.json").read_text())["students"][0]


def test_results_are_never_overwritten_unasked(settings, run):
    config, run_dir = settings
    run("distill", config, "baselines=[]", "seeds=[1]")
    before = (run_dir / "results.json").read_bytes()
    message = refused(run("distill", config, "baselines=[]", "seeds=[1]"))
    assert "already has results" in message and "overwrite=true" in message
    assert (run_dir / "results.json").read_bytes() == before
    assert run("distill", config, "baselines=[]", "seeds=[2]", "overwrite=true")[0] == 0
    assert json.loads((run_dir / "results.json").read_text())["students"][0]["seed"] == 2


def test_bad_input_of_an_overwriting_run_loses_nothing(settings, run):
    config, run_dir = settings
    run("distill", config, "baselines=[]", "seeds=[1]")
    message = refused(run("distill", config, "overwrite=true", "recipe.layer_map=[[1,9]]"))
    assert "teacher layer 9; the teacher has layers 1 to 4" in message
    assert (run_dir / "results.json").is_file()


def test_a_folder_of_something_else_is_never_touched(settings, run):
    config, run_dir = settings
    run_dir.mkdir()
    (run_dir / "thesis.txt").write_text("years of work")
    (run_dir / "config.yaml").write_text("of: another program")
    for change in ("overwrite=true", "overwrite=false"):
        message = refused(run("distill", config, change))
        assert "was not written by kdfast" in message
    assert (run_dir / "thesis.txt").read_text() == "years of work"
    assert (run_dir / "config.yaml").read_text() == "of: another program"


def test_overwriting_a_run_leaves_other_files_beside_it(settings, run):
    config, run_dir = settings
    run("distill", config, "baselines=[]", "seeds=[1]")
    (run_dir / "notes.txt").write_text("mine")
    assert run("distill", config, "baselines=[]", "seeds=[2]", "overwrite=true")[0] == 0
    assert (run_dir / "notes.txt").read_text() == "mine"
    assert not (run_dir / "students" / "internal" / "seed-1").exists()


def test_predictions_of_another_teacher_are_never_used(settings, run, tiny_bert, tmp_path):
    config, run_dir = settings
    run("distill", config, "baselines=[]", "seeds=[1]")
    for name in ("results.json", "students", "work"):
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = refused(run("distill", config, "baselines=[]", "seeds=[1]", f"teacher={tiny_bert}"))
    assert "another configuration, teacher or data" in message


def test_data_that_changed_since_an_interruption_is_noticed(settings, run, csv_file):
    config, run_dir = settings
    run("distill", config, "baselines=[]", "seeds=[1]")
    (run_dir / "results.json").unlink()
    csv_file.write_text(csv_file.read_text().replace("great", "grand"))
    assert "data" in refused(run("distill", config, "baselines=[]", "seeds=[1]"))


def test_a_run_cut_off_after_its_last_step_is_scored_without_training_on(settings, run):
    config, run_dir = settings
    changes = ("baselines=[]", "seeds=[1]", "training.arguments.lr_scheduler_type=constant")
    run("distill", config, *changes)
    whole = load_file(run_dir / "students" / "internal" / "seed-1" / "model.safetensors")
    # As if it had been killed while predicting: the last checkpoint is there, the student is not.
    process = start(config, *changes, f"output_dir={run_dir}-3", "training.save_every=4")
    checkpoint = run_dir.with_name("run-3") / "work" / "internal" / "seed-1" / "checkpoint-4"
    wait_for((checkpoint / "trainer_state.json").is_file, process)
    process.kill()
    process.wait()
    status, _, _ = run(
        "distill", config, *changes, f"output_dir={run_dir}-3", "training.save_every=4"
    )
    assert status == 0
    resumed = load_file(run_dir.with_name("run-3") / "students/internal/seed-1/model.safetensors")
    assert all(torch.equal(value, whole[key]) for key, value in resumed.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.path=nowhere.csv", "nowhere.csv"),
        ("data.text=sentence", "sentence"),
        ("teacher=/no/such/model", "/no/such/model"),
        ("student.layers=9", "layers"),
        ("student.layers=[0,9]", "layers 0 to 3"),
        ("recipe.layer_map=[[1,9]]", "teacher layer 9"),
        ("recipe=nothing", "recipe 'nothing' is unknown"),
        ("training.arguments.lr_scheduler_type=nothing", "nothing"),
        ("data.max_length=5000", "max_length"),
        ("seeds=[-1]", "seeds"),
        ("recipe.relation_heads=5", "relation_heads must divide"),
        ("recipe.match_heads=foo", "match_heads must be one of mean"),
        ("recipe.cosine_weight=.nan", "cosine_weight of recipe 'internal' must be a finite number"),
        ("recipe={name: [1]}", "recipe needs a name"),
        ("training.arguments.eval_strategy=epoch", "eval_strategy"),
        ("training.arguments.max_grad_norm=abc", "abc"),
        ("training.arguments.label_smoothing_factor=0.1", "label_smoothing_factor"),
        ("teacher_training.arguments.optim=nothing", "nothing"),
        ("data=3", "data: input should be a dictionary, was 3"),
        ("student.layers=two", "student: layers must be a number, a list of them, first:K"),
        ("recipe={name: internal, schedule: stacked, layer_steps: 9}", "too short for the stages"),
        ("recipe={name: fsd, clusters: 100}", "fitted to at least 100 training rows"),
        ("recipe={name: fsd, label: a b}", "label must be made of letters"),
        ("quick=1", "quick must be true or false"),
    ],
)
def test_bad_input_gets_one_line_and_status_2_before_any_training(settings, run, change, message):
    config, run_dir = settings
    assert message in refused(run("distill", config, change))
    assert not run_dir.exists()


def test_a_teacher_with_other_labels_is_refused(settings, run, tmp_path, make_tiny_bert):
    config, _ = settings
    other = make_tiny_bert(tmp_path / "other", labels=("sports", "politics"))
    assert "politics" in refused(run("distill", config, f"teacher={other}"))


def test_head_counts_that_differ_are_refused_with_the_way_out(
    settings, run, tmp_path, make_tiny_bert
):
    config, _ = settings
    other = make_tiny_bert(tmp_path / "other", heads=2)
    message = refused(run("distill", config, f"student.base={other}"))
    assert "relation_heads" in message
    assert run("distill", config, f"student.base={other}", "recipe.relation_heads=4")[0] == 0


def test_different_vocabularies_with_a_token_loss_are_refused_and_otherwise_both_tokenise(
    settings, run, tmp_path, make_tiny_bert
):
    config, _ = settings
    other = make_tiny_bert(tmp_path / "other", words=["good", "bad", "film"])
    message = refused(run("distill", config, f"student.base={other}"))
    assert "different vocabularies" in message and "attention_kl" in message
    changes = (f"student.base={other}", "recipe.attention_weight=0", "seeds=[1]")
    assert run("distill", config, *changes)[0] == 0


@pytest.mark.parametrize("key", ["output_dir", "teacher_dir"])
def test_a_place_that_cannot_be_written_is_named(settings, run, key, csv_file):
    config, _ = settings
    assert str(csv_file) in refused(run("distill", config, f"{key}={csv_file}/below"))


def test_labels_matched_by_number_are_stated(settings, run, tmp_path, make_tiny_bert):
    config, _ = settings
    teacher = make_tiny_bert(tmp_path / "other", labels=("LABEL_0", "LABEL_1"))
    _, out, _ = run("distill", config, f"teacher={teacher}", "baselines=[]", "seeds=[1]")
    assert "matched to the teacher's by number" in out


def test_evaluate_compares_classes_by_name_whatever_their_order(
    settings, run, tiny_bert, csv_file, tmp_path
):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight.flip(0))
        model.classifier.bias.copy_(model.classifier.bias.flip(0))
    model.config.id2label = {0: "pos", 1: "neg"}
    model.config.label2id = {"pos": 0, "neg": 1}
    model.save_pretrained(tmp_path / "flipped")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "flipped")
    status, out, _ = run(
        *("evaluate", tiny_bert, f"teacher={tmp_path / 'flipped'}", f"data.path={csv_file}"),
        *("data.teacher_train=0", "data.student_train=0", "data.dev=0", "data.test=100"),
        "data.max_length=32",
    )
    assert status == 0 and "agreement 1," in out


def test_an_interrupted_finetuning_of_other_settings_is_not_resumed(
    settings, run, tiny_bert, csv_file, tmp_path
):
    data = ("data.teacher_train=60", "data.dev=0", "data.test=0", "data.max_length=32")
    common = ("finetune", "finetune", f"data.path={csv_file}", f"model={tiny_bert}", *data)
    target = f"output_dir={tmp_path / 'teacher'}"
    work = tmp_path / "teacher.work"
    assert run(*common, target, "training.epochs=1", "training.save_every=1")[0] == 0
    assert not work.exists()
    work.mkdir()
    (work / "kdfast_run.yaml").write_text("of another fine-tuning")
    (work / "checkpoint-1").mkdir()
    status, out, _ = run(*common, target, "training.epochs=1", "overwrite=true")
    assert status == 0 and "resuming" not in out


def test_debug_shows_the_traceback(settings):
    config, _ = settings
    with pytest.raises(Exception, match="unknown"):
        main(["distill", "--debug", str(config), "recipe=nothing"])


def test_finetune_saves_a_teacher_that_evaluate_scores(
    settings, run, tiny_bert, csv_file, tmp_path
):
    data = ("data.teacher_train=60", "data.dev=20", "data.test=40", "data.max_length=32")
    folder = tmp_path / "own-teacher"
    status, out, _ = run(
        *("finetune", "finetune", f"data.path={csv_file}", f"model={tiny_bert}", *data),
        *("training.epochs=1", f"output_dir={folder}"),
    )
    assert status == 0 and "test: accuracy" in out
    printed = out.split("test: ")[1].split(",")[0]
    # Parts and lengths are those that the model was trained with, unless the call says otherwise.
    status, out, _ = run("evaluate", folder, f"teacher={tiny_bert}")
    assert status == 0 and printed in out and "agreement" in out and "trained on" not in out
    status, out, _ = run("evaluate", folder, f"data.path={csv_file}", "data.seed=5")
    assert status == 0 and "the model was trained on" in out
    status, out, _ = run("analyze", folder, tiny_bert, f"output_dir={tmp_path / 'analysis'}")
    assert status == 0 and "of 40 sentences" in out
    message = refused(run("finetune", "finetune", f"output_dir={folder}"))
    assert "not empty" in message


def test_a_students_data_travel_with_it_and_rows_that_its_teacher_saw_are_named(
    settings, run, tmp_path, csv_file, tiny_bert
):
    config, run_dir = settings
    few = ("baselines=[]", "recipe=soft_labels", "seeds=[1]")
    teacher = tmp_path / "own-teacher"
    quick = (f"model={tiny_bert}", "training.steps=2", "data.max_length=32")
    sizes = ("data.teacher_train=120", "data.student_train=0", "data.dev=10", "data.test=20")
    data = (f"data.path={csv_file}", *sizes)
    assert run("finetune", "finetune", *data, *quick, f"output_dir={teacher}")[0] == 0
    status, out, _ = run("distill", config, *few, f"teacher={teacher}")
    assert status == 0 and "lie idle, as the teacher is given" in out
    assert "of the 40 test rows" in out and "of the 48 student_train rows" in out
    student = run_dir / "students/soft_labels/seed-1"
    accuracy = f"{json.loads(student.with_suffix('.json').read_text())['accuracy']:.4g}"
    status, out, _ = run("evaluate", student)
    assert status == 0 and f"test, 40 rows: accuracy {accuracy}" in out
    # Another source: only the length is taken over.
    other = tmp_path / "other.csv"
    other.write_text(csv_file.read_text())
    status, out, _ = run("evaluate", student, f"data.path={other}", "data.test=30", "data.seed=5")
    assert status == 0 and "cut at 32 tokens" in out and "the model was trained on" in out
    csv_file.unlink()
    message = refused(run("evaluate", student))
    assert "was trained on" in message and "give data.path" in message


def start(config, *changes):
    return subprocess.Popen(
        [sys.executable, "-m", "kdfast", "distill", str(config), *changes],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As many threads as this process, so that sums come out bit for bit the same.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        # What a shell starts in the background is deaf to it, and so would this be.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


LONG = ("baselines=[]", "seeds=[1]", "training.steps=60", "training.save_every=10")


def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_student(settings, run):
    config, run_dir = settings
    assert run("distill", config, *LONG, f"output_dir={run_dir}-whole")[0] == 0
    process = start(config, *LONG)
    checkpoint = run_dir / "work" / "internal" / "seed-1" / "checkpoint-20" / "trainer_state.json"
    wait_for(checkpoint.is_file, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run_dir / "results.json").exists()
    status, out, _ = run("distill", config, *LONG)
    assert status == 0 and "continuing the interrupted run" in out and "resuming from" in out
    students = [
        load_file(folder / "students" / "internal" / "seed-1" / "model.safetensors")
        for folder in (run_dir, run_dir.with_name("run-whole"))
    ]
    assert all(torch.equal(value, students[1][key]) for key, value in students[0].items())


def test_an_interrupted_run_says_how_to_go_on_and_leaves_with_status_2(settings):
    config, run_dir = settings
    # So many steps that none of it is over before the signal, however busy the machine.
    process = start(config, *LONG[:2], "training.steps=5000", "training.save_every=10")
    work = run_dir / "work" / "internal" / "seed-1"
    wait_for(lambda: list(work.glob("checkpoint-*/trainer_state.json")), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "interrupted" in errors and "Traceback" not in errors


def test_an_unfinished_run_of_another_configuration_is_not_continued(settings, run):
    config, run_dir = settings
    process = start(config, *LONG)
    wait_for((run_dir / "teacher_predictions.safetensors").is_file, process)
    process.kill()
    process.wait()
    message = refused(run("distill", config, *LONG, "training.learning_rate=0.5"))
    assert "another configuration" in message
