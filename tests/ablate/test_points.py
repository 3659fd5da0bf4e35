import dataclasses
from pathlib import Path

import pytest
import yaml
from studies import tiny_study

from lfm_jax.ablate.pattern import to_letters
from lfm_jax.ablate.points import BASE, all_settings, make_trial, match, points
from lfm_jax.ablate.schedule import AblateConfig
from lfm_jax.ablate.study import Grid
from lfm_jax.ablate.tasks.text import Text
from lfm_jax.config import ModelConfig
from lfm_jax.recipe import load_recipe

FILES = (Path(__file__).parents[2] / "configs" / "ablations").glob("*.yaml")
CONFIGS = sorted(path for path in FILES if path.stem != "hybridise")  # It has a script of its own.


def grids(*plain):
    return tuple(Grid.of(axes) for axes in plain)


TEXT = Text(vocab_size=512, seq_len=64, batch_size=4, steps=100)


def trials(study, name="text", task=TEXT):
    found = points(study)
    return [make_trial(study, point, found[0], name, task) for point in found]


def test_a_grid_is_every_combination_without_the_base_again():
    study = tiny_study(vary=grids({"attention": [0, 1, 2, 4], "operator": ["conv", "rglru"]}))
    found = points(study)
    assert [point.name for point in found] == [
        BASE, "attention=0 operator=conv", "attention=0 operator=rglru", "attention=1 operator=rglru",
        "attention=2 operator=conv", "attention=2 operator=rglru", "attention=4 operator=conv",
    ]
    assert [to_letters(point.model.layer_types) for point in found] == [
        "ccac", "cccc", "rrrr", "rrar", "caca", "rara", "aaaa",
    ]
    assert all_settings(study, found[0]) == {"attention": 1, "operator": "conv"}
    assert all_settings(study, found[5]) == {"attention": 2, "operator": "rglru"}


def test_another_number_of_attention_layers_stands_where_the_bases_do():
    for pattern, letters, place in (("conv:3,attention:1,place:back", "ccaa", "back"), ("accc", "caca", "even"),
                                    ("conv:3,attention:1", "caca", "even")):
        study = tiny_study(pattern=pattern, vary=grids({"attention": [2]}, {"place": "front", "attention": 1}))
        two = points(study)[1]
        assert to_letters(two.model.layer_types) == letters
        assert all_settings(study, two)["place"] == place
    published = tiny_study(pattern="conv:10,attention:6,place:lfm2", vary=grids({"attention": [2], "operator": "conv"},
                                                                                {"place": "even"}), match="none")
    base, two, _ = points(published)
    assert to_letters(two.model.layer_types) == "ccccacccccccaccc"
    assert [all_settings(published, point)["place"] for point in (base, two)] == ["lfm2", "even"]


def test_every_axis_changes_what_it_says():
    study = tiny_study(match="none", vary=grids(
        {"place": ["front", "back"]}, {"pattern": "ssaa"}, {"taps": [1, 7]}, {"gates": ["none", "input"]},
        {"kv_heads": 4}, {"hidden_size": 64}, {"feed_forward": "moe", "experts": 6, "active": 2},
        {"operator": ["liquid", "lti", "sliding_attention"]},
    ))
    models = {point.name: point.model for point in points(study)}
    base = models[BASE]
    assert to_letters(models["place=front"].layer_types) == "accc"
    assert to_letters(models["pattern=ssaa"].layer_types) == "ssaa"
    assert models["taps=7"] == base.replace(conv_taps=7)
    assert models["gates=input"] == base.replace(conv_gates="input")
    assert models["kv_heads=4"] == base.replace(num_kv_heads=4)
    mixture = models["feed_forward=moe experts=6 active=2"]
    assert mixture == base.replace(ffn_types=("moe",), num_experts=6, active_experts=2)
    assert models["operator=lti"].recurrence == "lti"
    assert to_letters(models["operator=sliding_attention"].layer_types) == "ssas"
    wide = models["hidden_size=64"]
    assert (wide.num_heads, wide.num_kv_heads, wide.ffn_size) == (8, 4, 128)
    assert wide.init_std == pytest.approx(base.init_std / 2**0.5)


@pytest.mark.parametrize("by", ["params", "flops"])
def test_points_are_matched_within_one_percent(by):
    study = tiny_study(match=by, match_step=2, vary=grids(
        {"attention": [0, 2, 4], "operator": ["conv", "rglru"]}, {"gates": ["none", "output"]}, {"taps": 7},
        {"ffn_ratio": [1.0, 3.0]},
    ))
    made = trials(study)
    assert {one.point.settings.get("ffn_ratio") for one in made} == {None, 1.0, 3.0}
    base = made[0].model
    assert made[0].match_off == 0
    assert made[0].changed == {}
    for one in made:
        count = one.model.num_params() if by == "params" else one.model.flops_per_token(64)
        wanted = base.num_params() if by == "params" else base.flops_per_token(64)
        assert one.match_off == pytest.approx(count / wanted - 1)
        assert abs(one.match_off) <= 0.01
        ratio = one.point.settings.get("ffn_ratio")
        if ratio is None:
            assert one.model.hidden_size == base.hidden_size
        else:
            assert one.model.ffn_size / one.model.hidden_size == pytest.approx(ratio, rel=0.2)
    assert any(one.changed for one in made)


def test_a_point_out_of_reach_says_how_far_it_is():
    model = ModelConfig(
        layer_types=("conv",) * 4, hidden_size=32, ffn_size=64, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=64
    )
    with pytest.raises(ValueError, match=r"within 1% of the base by params.*match_step \(now 32\)"):
        match(model.replace(conv_gates="none"), model, "params", 64, 32)


def test_a_budget_of_flops_gives_the_steps():
    study = tiny_study(match="none", vary=grids({"hidden_size": [32, 64], "train_flops": [1.0e10, 2.0e10]}))
    made = {one.point.name: one for one in trials(study)[1:]}
    assert len(made) == 4
    for name, one in made.items():
        wanted = one.point.settings["train_flops"]
        assert one.train_flops == pytest.approx(wanted, rel=0.02), name
        assert one.train_flops == 3 * one.model.flops_per_token(64) * one.tokens
    small, large = made["hidden_size=32 train_flops=2e+10"], made["hidden_size=64 train_flops=2e+10"]
    assert small.tokens > 2 * large.tokens


@pytest.mark.parametrize(("plain", "says"), [
    ({"layers": 3}, "layers cannot be varied; the axes are"), ({"attention": -1}, "attention is -1"),
    ({"operator": ["mamba"]}, "operator is 'mamba'"), ({"gates": "all"}, "gates is 'all'"),
    ({"train_flops": "1e12"}, "1.0e\\+12"), ({"pattern": "cx"}, "'x'"), ({"taps": []}, "taps has no values"),
    ({"pattern": "ca", "attention": 1}, "in a grid of its own"), ("attention", "must be a mapping"),
])
def test_a_bad_grid_says_what_is_wrong(plain, says):
    with pytest.raises(ValueError, match=says):
        Grid.of(plain)


def test_points_that_make_no_model_are_all_named():
    study = tiny_study(vary=grids({"attention": [9]}, {"kv_heads": [3]}, {"hidden_size": [40]}, {"experts": [8]}))
    with pytest.raises(ValueError, match=r"(?s)attention=9: .*kv_heads=3: .*hidden_size=40: .*experts=8: .*no mixture"):
        points(study)


def test_a_base_with_mixtures_in_some_layers_has_experts_to_vary():
    study = tiny_study(match="none", vary=grids({"experts": [8]}))
    base = study.model.replace(layer_types=("conv", "full_attention"), ffn_types=("moe", "swiglu"))
    eight = points(dataclasses.replace(study, pattern="ca", model=base))[1]
    assert (eight.model.num_experts, eight.model.ffn_types) == (8, ("moe", "swiglu"))


@pytest.mark.parametrize("sizes", [(), ("20m",), ("20m", "100m")], ids=lambda sizes: "+".join(sizes) or "cpu")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_study_loads_and_matches(path, sizes):
    if path.stem == "intelligence_density" and sizes:
        sizes = ("20m", "density-20m")
    study = load_recipe(AblateConfig, [path, *(path.parent / "sizes" / f"{size}.yaml" for size in sizes)]).study
    assert study.name == path.stem
    assert study.seeds >= 5
    if sizes:
        assert study.model.hidden_size >= 256
    for name in study.tasks:
        for one in trials(study, name, study.task(name)):
            assert abs(one.match_off) <= 0.01
    assert yaml.safe_load(path.read_text())["out"].startswith("runs/")


def test_a_bad_grid_of_a_file_is_told_as_it_is(tmp_path):
    content = yaml.safe_load(CONFIGS[0].read_text()) | {"vary": [{"layers": [3]}]}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="layers cannot be varied; the axes are"):
        load_recipe(AblateConfig, path)


def test_a_schedule_longer_than_a_run_is_refused_before_anything_runs():
    study = tiny_study(match="none", vary=grids({"train_flops": [1.0e8]}))
    long = dataclasses.replace(study, optimizer=dataclasses.replace(study.optimizer, decay_steps=50))
    with pytest.raises(ValueError, match="decay_steps 50 exceed the run's"):
        trials(long)


def test_unmatched_ratios_are_as_asked():
    study = tiny_study(match="none", vary=grids({"ffn_ratio": [1.0, 3.0]}))
    assert [one.model.ffn_size for one in trials(study)] == [64, 32, 96]


def test_a_pattern_is_not_labelled_with_the_operator_of_the_base():
    study = tiny_study(match="none", vary=grids({"pattern": "rrar"}, {"operator": "liquid", "place": "back"}))
    found = points(study)
    assert all_settings(study, found[1]) == {"pattern": "rrar", "operator": "rglru", "place": "-"}
    assert all_settings(study, found[0]) == {"pattern": "ccac", "operator": "conv", "place": "even"}


def test_the_study_of_the_docs_is_one(tmp_path):
    page = (CONFIGS[0].parents[2] / "docs" / "ablations" / "README.md").read_text()
    (tmp_path / "study.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    study = load_recipe(AblateConfig, tmp_path / "study.yaml").study
    assert len(points(study)) == 6
    for name in study.tasks:
        assert all(abs(one.match_off) <= 0.01 for one in trials(study, name, study.task(name)))
