"""A random two-family zoo small enough to train in a second, with tokenizers and sentences."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

from kdfast import DistillationArguments, DistillationTrainer
from kdfast.distill.data import DistillationCollator, tokenize
from kdfast.distill.models import cut_student

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "plot", "the", "a", "is", "was"]


def save_tiny_bert(folder, *, layers=4, width=32, heads=4, labels=("neg", "pos"), words=WORDS):
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64)
    torch.manual_seed(len(words) + width)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentences(rows, seed=0):
    """(text, label) of `rows` sentences whose words tell the label."""
    choose = random.Random(seed)
    made = []
    for _ in range(rows):
        label = choose.choice(["neg", "pos"])
        telling = WORDS[3:6] if label == "neg" else WORDS[:3]
        words = [choose.choice(WORDS[6:]) for _ in range(choose.randint(2, 8))]
        words.insert(choose.randrange(len(words)), choose.choice(telling))
        made.append((" ".join(words), label))
    return made


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """Folder of a 4-layer BERT, width 32, 4 heads, labels neg and pos, with its tokenizer."""
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture
def csv_file(tmp_path):
    path = tmp_path / "sentences.csv"
    rows = sentences(160)
    path.write_text("text,label\n" + "\n".join(f"{text},{label}" for text, label in rows))
    return path


@pytest.fixture
def make_tiny_bert():
    return save_tiny_bert


@pytest.fixture
def make_sentences():
    return sentences


@pytest.fixture
def teacher(tiny_bert):
    return AutoModelForSequenceClassification.from_pretrained(tiny_bert)


class Processes:
    """Trains the same small student in one process or several, and compares what they saved."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder

    def __call__(self, processes, **changes):
        """What was printed. changes: of DistillationArguments."""
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        launch += [f"--master_port={29500 + os.getpid() % 1000}"]
        command = [
            *(sys.executable, *(launch if processes > 1 else [])),
            *(Path(__file__).with_name("train_in_processes.py"), self.model),
            *(self.folder / f"{processes}-processes", json.dumps(changes)),
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-6000:]
        return result.stdout

    def agree(self, *names):
        for name in names:
            one, two = (
                load_file(self.folder / f"{processes}-processes" / f"{name}.safetensors")
                for processes in (1, 2)
            )
            for key, value in one.items():
                torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)


@pytest.fixture
def trained_in_processes(tiny_bert, tmp_path):
    return Processes(tiny_bert, tmp_path)


@pytest.fixture
def make_trainer(tmp_path, tiny_bert, teacher):
    """Trainers of the same 2-layer student on the same 48 sentences, by their arguments."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    texts, labels = zip(*sentences(48), strict=True)
    numbers = [int(label == "pos") for label in labels]
    all_rows = datasets.Dataset.from_dict({"text": list(texts), "label": numbers})

    def make(recipe="internal", folder="out", rows=all_rows, **changes):
        torch.manual_seed(1)
        values = {
            "max_steps": 9,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "recipe": recipe,
            **changes,
        }
        return DistillationTrainer(
            model=cut_student(teacher, 2, label_names=["neg", "pos"]),
            teacher=teacher,
            args=DistillationArguments(output_dir=str(tmp_path / folder), **values),
            train_dataset=tokenize(rows, tokenizer, 32),
            data_collator=DistillationCollator(tokenizer),
            processing_class=tokenizer,
        )

    return make
