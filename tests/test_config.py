"""Recipes: defaults, overrides, and what a mistake says."""

import pytest

import config
from config import UserError

TEXT = """
[model]
connector = "linear"
llm_config = { hidden_size = 8 }
[stage.one]
learning_rate = 1
tune = { llm = "full" }
[stage.two]
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "r.toml").write_text(TEXT)
    return str(tmp_path / "r.toml")


def test_file_defaults_and_overrides(file):
    r, path = config.load([file, "stage.two.epochs=3", "model.llm_config.hidden_size=16", "train.output=a=b"], "x")
    assert str(path) == file and list(r.stage) == ["one", "two"]
    assert r.stage["one"].learning_rate == 1.0 and isinstance(r.stage["one"].learning_rate, float)
    assert r.stage["one"].tune.llm == "full" and r.stage["two"].tune.llm == "frozen"
    assert r.stage["two"].epochs == 3.0
    assert r.model.llm_config == {"hidden_size": 16} and r.train.output == "a=b"
    assert config.load(["stage.one.steps=2"], file)[0].stage["one"].steps == 2  # no recipe named: the default


@pytest.mark.parametrize(
    "override, message",
    [
        ("stage.one.learnig_rate=1", 'did you mean "learning_rate"'),
        ("stage.three.steps=1", "unknown stage"),
        ("trian.seed=1", 'did you mean "train"'),
        ("train.seed=one", "not a int"),
        ("train.gradient_checkpointing=1", "not a bool"),
        ("train.precision=fp8", "not a choice"),
        ("nonsense", "not an override"),
    ],
)
def test_a_wrong_override_names_the_right_one(file, override, message):
    with pytest.raises(UserError, match=message):
        config.load([file, override], "x")


def test_a_wrong_file(file, tmp_path):
    with pytest.raises(UserError, match="no such recipe; fix: did you mean"):
        config.load([str(tmp_path / "rr.toml")], file)
    (tmp_path / "bad.toml").write_text("[model\n")
    with pytest.raises(UserError, match="not TOML"):
        config.load([str(tmp_path / "bad.toml")], file)
    (tmp_path / "key.toml").write_text("[stage.one.tune]\nllmm = 'full'\n")
    with pytest.raises(UserError, match=r"stage\.one\.tune\.llmm: unknown key; fix: did you mean \"llm\""):
        config.load([str(tmp_path / "key.toml")], file)
    (tmp_path / "none.toml").write_text("[model]\n")
    with pytest.raises(UserError, match="no stage"):
        config.load([str(tmp_path / "none.toml")], file)
