import dataclasses
from pathlib import Path

import pytest

from lfm_jax.config import ModelConfig
from lfm_jax.pretrain.config import TrainConfig
from lfm_jax.recipe import dump_recipe, load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("run_dir: runs/x\nsteps: 300\ndata: {sources: [a, b], seq_len: 64, batch_size: 2}\n"
                    "optimizer: {peak_lr: 1e-3}\nmodel: {preset: lfm2-700m, dtype: float32}\n")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_recipes_are_valid(path):
    assert load_recipe(TrainConfig, path).steps >= 1


def test_preset_and_the_fields_beside_it(path):
    assert load_recipe(TrainConfig, path).model == ModelConfig.preset("lfm2-700m").replace(dtype="float32")


def test_a_preset_named_on_the_command_line_replaces_that_of_the_file(path):
    for name in ("lfm2-1.2b", "lfm3-1.7b"):
        model = load_recipe(TrainConfig, path, ["--model.preset", name, "--model.conv-taps", "4"]).model
        assert model == ModelConfig.preset(name).replace(dtype="float32", conv_taps=4)


def test_overrides_win_and_values_have_their_types(path):
    config = load_recipe(TrainConfig, path, ["--optimizer.peak-lr", "2e-3", "--data.sources", "c", "--steps", "500"])
    assert config.optimizer.peak_lr == 2e-3
    assert config.data.sources == ("c",)
    assert config.steps == 500


def test_dump_reads_back_equal(path, tmp_path):
    config = load_recipe(TrainConfig, path)
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(config))
    assert load_recipe(TrainConfig, again) == config


def test_every_default_survives_a_dump(tmp_path, path):
    config = dataclasses.replace(load_recipe(TrainConfig, path), model=ModelConfig(eos_ids=()).replace(eos_ids=(7, 2)))
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(config))
    assert load_recipe(TrainConfig, again) == config


@pytest.mark.parametrize(
    ("line", "nearest"), [("stpes: 3", "--steps"), ("optimizer: {peek_lr: 1}", "--optimizer.peak-lr")]
)
def test_an_unknown_key_is_an_error_with_the_nearest_name(path, capsys, line, nearest):
    path.write_text("run_dir: r\nsteps: 300\ndata: {sources: [a], seq_len: 64, batch_size: 2}\n" + line + "\n")
    with pytest.raises(SystemExit) as error:
        load_recipe(TrainConfig, path)
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert nearest in printed.out + printed.err


@pytest.mark.parametrize(("content", "message"), [("- a\n", "expected keys"), ("a: [", "not valid YAML")])
def test_a_file_that_is_not_a_mapping(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_recipe(TrainConfig, path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_recipe(TrainConfig, tmp_path / "none.yaml")
