"""A random two-family zoo small enough to train in a second, with tokenizers and sentences."""

import random

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

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
