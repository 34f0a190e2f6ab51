"""`kdfast distill` beyond one classifier: GLUE, embedders, rerankers, words, assistants, LSTMs."""

import json

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertModel

from kdfast import DistillationArguments, DistillationTrainer
from kdfast.captured import ModelShape
from kdfast.cli import main
from kdfast.distill.capture import model_shape
from kdfast.distill.config import DistillConfig, read_config
from kdfast.distill.data import DataConfig, DistillationCollator, load_data, tokenize
from kdfast.distill.fidelity import embed
from kdfast.distill.models import cut_student, layer_indices, load_model
from kdfast.distill.run_directory import IDENTITY_FILE
from kdfast.distill.trainer import STATE_FILE
from kdfast.recipes.layer_map import layer_map


@pytest.fixture
def run(tiny_bert, csv_file, tmp_path, capsys):
    """Runs `kdfast distill` on a few steps; returns its results, its output and its directory."""
    run_dir = tmp_path / "run"
    config = {
        "data": {"teacher_train": 40, "student_train": 40, "dev": 0, "test": 40, "max_length": 32},
        "teacher_base": str(tiny_bert),
        "teacher_dir": str(tmp_path / "teachers"),
        "teacher_training": {"steps": 2, "batch_size": 8},
        "student": {"base": str(tiny_bert), "layers": 1},
        "recipe": "soft_labels",
        "training": {"steps": 2, "batch_size": 8, "log_every": 1},
        "cka_sentences": 8,
        "output_dir": str(run_dir),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def call(*changes):
        path = [] if any("data.path" in c for c in changes) else [f"data.path={csv_file}"]
        status = main(["distill", str(tmp_path / "config.yaml"), *path, *changes])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return json.loads((run_dir / "results.json").read_text()), captured.out, run_dir

    return call


def glue_folder(folder, make_sentences, *, labels, parts):
    """csv files in GLUE's column layout: sentence pairs, a label each."""
    folder.mkdir()
    for k, (part, rows) in enumerate(parts.items()):
        lines = ["sentence1,sentence2,label,idx"]
        for i, (text, _) in enumerate(make_sentences(rows, seed=k)):
            lines.append(f"{text} {i},{part} is a film,{labels[i % len(labels)]},{i}")
        (folder / f"{part}.csv").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_assistants_hand_the_teachers_knowledge_down_and_are_kept(run):
    results, out, run_dir = run("recipe={name: takd, assistants: [3, 2]}", "seeds=[5]")
    assert "takd.assistant-3" in out or "assistants of 3, 2 layers" in out
    layers = {
        name: AutoModel.from_pretrained(
            run_dir / "students" / "takd" / name / "seed-5"
        ).config.num_hidden_layers
        for name in ("assistant-3", "assistant-2")
    }
    assert layers == {"assistant-3": 3, "assistant-2": 2}
    (run_dir / "results.json").unlink()
    for file in (run_dir / "students" / "takd").glob("seed-5*.json"):
        file.unlink()
    before = (run_dir / "students/takd/assistant-2/seed-5/model.safetensors").stat().st_mtime_ns
    again, _, _ = run("recipe={name: takd, assistants: [3, 2]}", "seeds=[5]")
    after = (run_dir / "students/takd/assistant-2/seed-5/model.safetensors").stat().st_mtime_ns
    assert before == after
    assert again["students"][0]["kl_to_teacher"] == results["students"][0]["kl_to_teacher"]


def test_assistants_that_lead_nowhere_are_refused(tiny_bert, csv_file, tmp_path, capsys):
    status = main(
        [
            *("distill", "takd", f"data.path={csv_file}", f"teacher={tiny_bert}"),
            *("recipe.assistants=[2]", f"output_dir={tmp_path / 'r'}", "data.max_length=32"),
        ]
    )
    assert status == 2 and "assistants must be" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bilstm", "gated_cnn"])
def test_another_architecture_learns_from_the_same_teacher(run, kind):
    student = f"{{kind: {kind}, layers: 2, width: 16, embeddings: base}}"
    results, _, run_dir = run(
        f"baselines=[{{name: soft_labels, label: other, student: {student}}}]",
        f"recipe={{name: universal, student: {student}}}",
        "student.freeze_embeddings=true",
    )
    assert kind in results["setting"]["student"]
    saved = load_model(run_dir / "students" / "universal" / "seed-0")
    assert saved.config.num_hidden_layers == 2 and saved.config.hidden_size == 16
    assert torch.tensor(results["students"][0]["cka_after"]).shape == (3, 5)


def test_mnli_is_scored_on_both_its_test_parts(run, tmp_path, make_sentences):
    parts = {"train": 90, "validation_matched": 30, "validation_mismatched": 24}
    folder = glue_folder(tmp_path / "mnli", make_sentences, labels=[0, 1, 2], parts=parts)
    with open(folder / "train.csv") as file:
        assert file.readline().startswith("sentence1")
    for file in folder.glob("*.csv"):
        text = file.read_text().replace("sentence1,sentence2", "premise,hypothesis", 1)
        file.write_text(text)
    results, out, _ = run(f"data.path={folder}", "data.task=mnli", "data.test=all")
    record = results["students"][0]
    assert {"accuracy", "mismatched_accuracy"} <= record.keys()
    assert "mismatched_accuracy" in results["teacher"] and "accuracy % (mismatched)" in out


def test_glue_metrics_are_the_tasks_own(run, tmp_path, make_sentences):
    parts = {"train": 80, "validation": 30}
    folder = glue_folder(tmp_path / "mrpc", make_sentences, labels=[0, 1, 1], parts=parts)
    results, _, _ = run(f"data.path={folder}", "data.task=mrpc", "data.test=all")
    assert results["primary"] == "f1" and {"f1", "accuracy"} <= results["students"][0].keys()


def test_the_papers_glue_configuration_runs_on_a_folder_of_the_layout(
    run, tmp_path, make_sentences, tiny_bert, capsys
):
    folder = glue_folder(
        tmp_path / "stsb",
        make_sentences,
        labels=[0.5, 1.25, 3.0, 4.75],
        parts={"train": 60, "validation": 30},
    )
    status = main(
        [
            *("distill", "glue_bert6", f"data.path={folder}", "data.task=stsb", "quick=true"),
            *(f"teacher_base={tiny_bert}", f"student.base={tiny_bert}", "student.layers=first:2"),
            *("data.teacher_train=40", "data.student_train=40", "data.max_length=32"),
            *("recipe.clusters=4", f"teacher_dir={tmp_path / 't'}", f"output_dir={tmp_path / 'r'}"),
        ]
    )
    assert status == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert results["primary"] == "spearman" and len(results["students"]) == 2


@pytest.mark.parametrize(
    ("config", "teacher_layers", "layers", "change"),
    [
        pytest.param("bert4", 12, 4, "student.base=teacher", marks=pytest.mark.exhaustive),
        ("distilroberta", 8, 6, "student.base={narrow}"),
        ("bilstm", 4, 2, "student.width=16"),
        pytest.param("cnn", 4, 4, "student.width=16", marks=pytest.mark.exhaustive),
    ],
)
def test_the_other_glue_configurations_run_on_a_folder_of_the_layout(
    config, teacher_layers, layers, change, tmp_path, make_sentences, make_tiny_bert, capsys
):
    parts = {"train": 40, "validation": 20}
    folder = glue_folder(tmp_path / "mrpc", make_sentences, labels=[0, 1, 1], parts=parts)
    teacher = make_tiny_bert(tmp_path / "teacher", layers=teacher_layers)
    narrow = make_tiny_bert(tmp_path / "narrow", layers=6, width=16)
    status = main(
        [
            *("distill", f"glue_{config}", f"data.path={folder}", "data.task=mrpc", "quick=true"),
            *("data.teacher_train=24", "data.student_train=24", "data.max_length=32"),
            *(f"teacher_base={teacher}", change.format(narrow=narrow)),
            *("training.batch_size=8", "cka_sentences=8"),
            *(f"teacher_dir={tmp_path / 't'}", f"output_dir={tmp_path / 'r'}"),
        ]
    )
    assert status == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert results["primary"] == "f1"
    universal = next(r for r in results["students"] if r["way"] == "universal")
    assert universal["steps"] == 3 and len(universal["cka_after"]) == layers + 1
    assert len(results["students"]) == len(read_config(DistillConfig, f"glue_{config}").ways())


@pytest.mark.slow
def test_padding_counts_where_all_batches_are_padded_to_max_length(run):
    results, _, run_dir = run(
        "recipe={name: fsd, clusters: 4, padding: counted}",
        *("data.pad=max_length", "data.max_length=24", "student.layers=2"),
    )
    assert results["students"][0]["options"]["padding"] == "counted"
    state = load_file(run_dir / "students" / "fsd" / "seed-0" / STATE_FILE)
    (memory,) = (value for key, value in state.items() if "student_memory" in key)
    assert memory.shape == (4, 24 * 32)


def test_embedders_are_distilled_without_labels_or_heads(run, tiny_bert, tmp_path, csv_file):
    folder = tmp_path / "embedder"
    BertModel.from_pretrained(tiny_bert).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    texts = tmp_path / "texts.csv"
    lines = csv_file.read_text().splitlines()
    texts.write_text("\n".join(line.rsplit(",", 1)[0] for line in lines))
    results, out, run_dir = run(
        f"data.path={texts}",
        "data.kind=embedding",
        f"teacher={folder}",
        "student.base=teacher",
        "recipe=embedding",
        "seeds=[0,1]",
        "baselines=[{name: embedding, label: pooled, attention_weight: 0, cosine_weight: 0}]",
    )
    record = results["students"][0]
    assert {"embedding_cka_to_teacher", "cosine_to_teacher"} <= record.keys()
    assert "accuracy" not in record and "CKA to teacher (embedding)" in out
    assert results["comparison"]["differences"]["embedding"]["cosine_to_teacher"]
    AutoModel.from_pretrained(run_dir / "students" / "embedding" / "seed-0")


def test_embeddings_are_scored_as_their_recipe_pools_them_then_and_later(
    run, tiny_bert, tmp_path, csv_file, capsys
):
    folder = tmp_path / "embedder"
    BertModel.from_pretrained(tiny_bert).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    data = [f"data.path={csv_file}", "data.kind=embedding", f"teacher={folder}"]
    # From random weights, so that first tokens and means are not both next to the teacher's.
    student = "student={base: teacher, layers: 1, init: random}"
    results, _, run_dir = run(*data, student, "recipe={name: embedding, pool: cls}", "baselines=[]")
    folders = run_dir / "students" / "embedding" / "seed-0", folder
    texts = load_data(DataConfig(**yaml.safe_load((run_dir / IDENTITY_FILE).read_text())["data"]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenize(texts.test, tokenizer, 32)

    def cosine(pool):
        states = (
            embed(load_model(each, "embedding"), tokens, DistillationCollator(tokenizer), pool=pool)
            for each in folders
        )
        return float(torch.cosine_similarity(*states).mean())

    found = results["students"][0]["cosine_to_teacher"]
    assert found == pytest.approx(cosine("cls"), abs=1e-5)
    assert abs(found - cosine("mean")) > 0.01
    assert main(["evaluate", str(folders[0]), *data[2:]]) == 0
    assert f"cosine to teacher {found:.4g}" in capsys.readouterr().out


def test_a_reranker_has_one_output_and_is_scored_by_correlation(run, tmp_path, make_sentences):
    file = tmp_path / "pairs.csv"
    rows = [f"{t} {i},the film {i},{i % 2}" for i, (t, _) in enumerate(make_sentences(160))]
    file.write_text("\n".join(["query,document,relevance", *rows]))
    results, _, run_dir = run(
        f"data.path={file}",
        "data.kind=reranking",
        "data.label=relevance",
        "recipe=internal",
    )
    assert {"pearson", "spearman", "mse_to_teacher"} <= results["students"][0].keys()
    # No query has two candidates here.
    assert results["primary"] == "pearson" and "ndcg_at_10" not in results["students"][0]
    folder = run_dir / "students" / "internal" / "seed-0"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.problem_type == "multi_label_classification" and model_shape(model).binary


def test_a_rerankers_queries_are_ranked_and_the_difference_is_tested_over_them(
    run, tmp_path, make_sentences
):
    file = tmp_path / "pairs.csv"
    rows = [
        f"query {i // 4},{text} {i},{int(i % 4 == 0)}"
        for i, (text, _) in enumerate(make_sentences(160))
    ]
    file.write_text("\n".join(["query,document,relevance", *rows]))
    results, out, _ = run(
        *(f"data.path={file}", "data.kind=reranking", "data.label=relevance"),
        *("data.dev=20", "baselines=[labels]", "recipe=soft_labels"),
    )
    assert results["primary"] == "ndcg_at_10" and "nDCG@10" in out and "MRR@10" in out
    assert 0 < results["teacher"]["ndcg_at_10"] <= 1
    # One seed: the queries alone tell the error, ten of them in 40 rows.
    tested = results["comparison"]["differences"]["labels"]
    assert tested["ndcg_at_10"]["degrees_of_freedom"] == pytest.approx(9)
    assert tested["mse_to_teacher"]["degrees_of_freedom"] == pytest.approx(9)
    assert "pearson" not in tested and "test queries alone (one seed)" in out
    records = {record["way"]: record["ndcg_at_10"] for record in results["students"]}
    assert tested["ndcg_at_10"]["difference"] == pytest.approx(
        records["labels"] - records["soft_labels"]
    )


@pytest.mark.parametrize(
    ("tag", "primary", "measured"),
    [("GOOD", "accuracy", "accuracy"), ("B-good", *["entity_f1"] * 2)],
)
def test_words_are_tagged_and_scored_one_by_one_or_as_entities(
    run, tmp_path, make_sentences, tag, primary, measured
):
    file = tmp_path / "words.conll"
    sentences = [
        "\n".join(f"{word} {tag if word in ('good', 'fine') else 'O'}" for word in text.split())
        for text, _ in make_sentences(160)
    ]
    file.write_text("\n\n".join(sentences))
    results, _, _ = run(
        f"data.path={file}", "data.kind=token_classification", "baselines=[labels]", "seeds=[0,1]"
    )
    assert 0 < results["students"][0]["accuracy"] <= 1
    assert results["primary"] == primary and measured in results["teacher"]
    # Whole sentences are drawn, of which there are 40, and not words.
    (tested,) = results["comparison"]["differences"].values()
    assert {measured, "accuracy", "kl_to_teacher"} <= tested.keys()
    assert tested["accuracy"]["degrees_of_freedom"] <= 40


def test_shipped_glue_configurations_name_the_papers_models():
    teachers = {n: read_config(DistillConfig, f"glue_{n}") for n in ("bert4", "distilroberta")}
    assert teachers["bert4"].teacher_base == "google-bert/bert-base-uncased"
    kept = [i + 1 for i in layer_indices(teachers["bert4"].student.layers, 12)]
    shapes = (ModelShape(layers=layers, width=8, heads=2, classes=2) for layers in (4, 12))
    assert kept == [j for _, j in layer_map("uniform", *shapes)]
    assert teachers["distilroberta"].student.base == "distilbert/distilroberta-base"
    for name, kind in (("bilstm", "bilstm"), ("cnn", "gated_cnn")):
        config = read_config(DistillConfig, f"glue_{name}", ["data.task=rte"])
        assert config.student.kind == kind and config.data.task == "rte"


def test_a_rerankers_trainer_evaluates_on_labels(tiny_bert, teacher, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    pairs = {"text": ["good film"] * 4, "text_pair": ["fine plot", "bad plot"] * 2}
    rows = datasets.Dataset.from_dict({**pairs, "label": [1.0, 0.0, 0.5, 0.0]})
    tokens = tokenize(rows, tokenizer, 16)
    student = cut_student(teacher, 2, task="reranking")
    trainer = DistillationTrainer(
        model=student,
        args=DistillationArguments(str(tmp_path), recipe="labels", use_cpu=True, report_to="none"),
        train_dataset=tokens,
        eval_dataset=tokens,
        data_collator=DistillationCollator(tokenizer),
        processing_class=tokenizer,
    )
    with torch.no_grad():
        batch = tokenizer(*pairs.values(), padding=True, return_tensors="pt")
        logits = student.eval()(**batch).logits[:, 0]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.tensor(rows["label"])
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
