"""Configurations: shipped, overridden, and every way of getting one wrong."""

import pytest

from kdfast.distill.config import (
    CompareConfig,
    DistillConfig,
    EvaluateConfig,
    FinetuneConfig,
    dump_config,
    read_config,
    shipped,
)
from kdfast.errors import InputError
from kdfast.recipes import RECIPES, check_recipe


@pytest.mark.parametrize("name", [n for n in shipped() if n not in ("finetune", "comparison")])
@pytest.mark.parametrize("quick", ["true", "false"])
def test_every_shipped_configuration_is_valid(name, quick):
    assert read_config(DistillConfig, name, [f"quick={quick}"]).ways()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_configuration_of_its_name(recipe):
    assert read_config(DistillConfig, recipe).ways()[-1].recipe == recipe


def test_the_shipped_comparison_is_that_of_the_papers():
    config = read_config(CompareConfig, "comparison")
    ways = {way.label: way for way in config.chosen()}
    assert len(ways) == 15 and all(len(way.trials) == 3 for way in ways.values())
    five = {label for label, way in ways.items() if len(way.seeds) == 5}
    assert five == {"soft_labels", "internal", "fsd", "universal"}
    assert ways["bilstm_universal"].reference == "bilstm_soft_labels"
    assert ways["bilstm_universal"].student.kind == "bilstm"
    quickstart = read_config(DistillConfig, "quickstart")
    for section in ("data", "student", "training", "teacher_training"):
        assert getattr(config, section) == getattr(quickstart, section)
    quick = read_config(CompareConfig, "comparison", ["quick=true"]).chosen()
    assert {(len(way.trials), len(way.seeds)) for way in quick} == {(2, 2)}


def test_the_shipped_finetune_configuration_is_valid():
    quickstart = read_config(DistillConfig, "quickstart")
    assert read_config(FinetuneConfig, "finetune").data == quickstart.data


def test_the_quickstart_is_what_the_readme_says():
    config = read_config(DistillConfig, "quickstart")
    assert [way.label for way in config.ways()] == ["labels", "soft_labels", "internal"]
    assert len(config.seeds) == 3 and config.data.test >= 4000
    assert 150 <= config.training.steps <= 200 and config.data.student_train == 1000


def test_a_configuration_of_another_command_is_named():
    with pytest.raises(
        InputError, match="'ways' is of a .* for kdfast compare.* for kdfast distill"
    ):
        read_config(DistillConfig, "comparison")
    with pytest.raises(
        InputError, match="is of a configuration for kdfast distill or compare.* finetune"
    ):
        read_config(FinetuneConfig, "internal")


def test_an_unknown_key_of_a_section_is_not_taken_for_another_commands():
    with pytest.raises(InputError, match="unknown key 'model'.*known here are base") as error:
        read_config(DistillConfig, "internal", ["recipe.student={model: bert}"])
    assert "StudentConfig" not in str(error.value)


def test_glue_runs_of_several_tasks_have_their_own_directories():
    config = read_config(DistillConfig, "glue_bert6", ["data.task=rte"])
    assert config.output_dir == "runs/glue-bert6-rte"
    with pytest.raises(InputError, match="data.task is not set"):
        read_config(DistillConfig, "quickstart", ["output_dir=runs/{task}"])


def test_a_misspelt_key_of_a_way_or_loss_is_suggested():
    with pytest.raises(InputError, match="'lable'.*did you mean 'label'"):
        read_config(DistillConfig, "internal", ["recipe.lable=x"])
    with pytest.raises(InputError, match="'wieght'.*did you mean 'weight'"):
        check_recipe("fsd", {"wieght": 3}, beside=("loss", "weight"))


def test_overrides_change_single_keys():
    config = read_config(DistillConfig, "quickstart", ["training.steps=7", "data.path=my.csv"])
    assert (config.training.steps, config.data.path) == (7, "my.csv")
    assert config.training.learning_rate == 2e-4


def test_scientific_notation_without_a_point_is_a_number():
    config = read_config(DistillConfig, "quickstart", ["training.learning_rate=3e-4"])
    assert config.training.learning_rate == 3e-4


def test_naming_a_recipe_replaces_the_section_and_its_options_can_follow():
    config = read_config(
        DistillConfig,
        "quickstart",
        ["recipe=fsd", "recipe.estimator=unbiased", "recipe.form=one_minus"],
    )
    assert config.recipe == {"name": "fsd", "estimator": "unbiased", "form": "one_minus"}


def test_the_users_own_overrides_win_over_quick():
    config = read_config(DistillConfig, "quickstart", ["data.test=77", "quick=true"])
    assert config.data.test == 77 and config.seeds == [1]


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    config = read_config(DistillConfig, "quickstart", ["seeds=[4,5]"])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert read_config(DistillConfig, str(tmp_path / "c.yaml")) == config


def test_steps_and_epochs_together_are_refused_and_neither_means_three_epochs():
    with pytest.raises(InputError, match="steps or epochs"):
        read_config(DistillConfig, "quickstart", ["training.epochs=2", "training.steps=9"])
    assert read_config(DistillConfig, None).training.epochs == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainign.steps=3"], r"unknown key 'trainign' \(did you mean 'training'\?\)"),
        (["training.step=3"], r"did you mean 'training.steps'"),
        (["data.pth=x"], r"did you mean 'data.path'"),
        (["training.steps=many"], r"training.steps: .*was 'many'"),
        (["training.steps=0"], r"training.steps: .*greater than or equal to 1, was 0"),
        (["training.learning_rate=-1"], r"training.learning_rate"),
        (["seeds=[]"], r"seeds"),
        (["seeds=[1,1]"], r"seeds must differ"),
        (["recipe=intrenal"], r"did you mean 'internal'"),
        (["recipe.cosine_wight=3"], r"did you mean 'cosine_weight'"),
        (["recipe.name=internal", "baselines=[internal]"], r"differ by name"),
        (["training.arguments.optimm=x"], r"arguments.optimm.*did you mean 'optim"),
        (["training.arguments.seed=3"], r"arguments.seed"),
        (["nonsense"], r"should be key=value"),
        (["student.attention_dropout=1.5"], r"student.attention_dropout"),
        (["quick_overrides=3", "quick=true"], r"quick_overrides"),
    ],
)
def test_bad_keys_and_values_are_named_in_one_line(overrides, message):
    with pytest.raises(InputError, match=message) as error:
        read_config(DistillConfig, "quickstart", overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must be a mapping"),
        ("data: [unclosed\n", "not valid YAML"),
        ("output_dir: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration_are_refused(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_config(DistillConfig, str(tmp_path / "c.yaml"))


def test_an_unknown_configuration_lists_the_shipped_ones():
    with pytest.raises(InputError, match="did you mean 'quickstart'.*universal"):
        read_config(DistillConfig, "quickstrat")


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match="no configuration file .*nowhere.yaml"):
        read_config(DistillConfig, "nowhere.yaml")


def test_evaluation_keys_are_checked_too():
    with pytest.raises(InputError, match="did you mean 'teacher'"):
        read_config(EvaluateConfig, None, ["techer=x"])


# One configuration on top of another


def written(folder, name, text):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_configuration_extends_a_shipped_one_and_a_file_beside_it(tmp_path):
    written(tmp_path, "below.yaml", "extends: quickstart\ndata: {test: 77}\nseeds: [9]\n")
    above = written(
        tmp_path, "above.yaml", "extends: below.yaml\nrecipe: fsd\ntraining: {epochs: 2}\n"
    )
    config = read_config(DistillConfig, above)
    assert (config.data.test, config.data.student_train, config.seeds) == (77, 1000, [9])
    # A recipe that is named replaces the one below; epochs take the place of steps.
    assert config.recipe == {"name": "fsd"} and len(config.baselines) == 2
    assert (config.training.epochs, config.training.steps) == (2, None)
    assert config.training.learning_rate == 2e-4


def test_a_recipe_section_without_a_name_changes_the_one_below(tmp_path):
    path = written(tmp_path, "a.yaml", "extends: quickstart\nrecipe: {cosine_weight: 2.0}\n")
    recipe = read_config(DistillConfig, path).recipe
    assert recipe["name"] == "internal" and recipe["cosine_weight"] == 2
    assert recipe["cosine_rows"] == "tokens"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: a.yaml", "extend one another: .*a.yaml -> .*a.yaml"),
        ("extends: b.yaml", "no configuration file .*b.yaml"),
        ("extends: quikstart", "did you mean 'quickstart'"),
        ("extends: [quickstart]", "extends in .* must be"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_config(DistillConfig, written(tmp_path, "a.yaml", text))


def test_a_way_has_its_own_label_student_and_training():
    config = read_config(
        DistillConfig,
        "quickstart",
        ["recipe={name: soft_labels, label: lstm, student: {kind: bilstm}, training: {epochs: 5}}"],
    )
    way = config.ways()[-1]
    assert (way.label, way.recipe, way.options) == ("lstm", "soft_labels", {})
    # Another architecture starts from its own sizes, and keeps what is common.
    assert (way.student.kind, way.student.layers) == ("bilstm", None)
    assert way.student.base == "demo:minilm" and way.student.freeze_embeddings
    assert (way.training.epochs, way.training.steps) == (5, None)
    assert config.ways()[0].student.layers == [0, 3]


def test_one_budget_of_the_command_line_takes_the_place_of_the_other():
    config = read_config(
        DistillConfig, "internal", ["training.steps=3", "teacher_training.steps=2"]
    )
    assert (config.training.steps, config.training.epochs) == (3, None)
    assert (config.teacher_training.steps, config.teacher_training.epochs) == (2, None)
    with pytest.raises(InputError, match="not both"):
        read_config(DistillConfig, "internal", ["training.steps=3", "training.epochs=1"])
