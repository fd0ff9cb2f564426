"""Recipes: defaults, overrides, and what a mistake says."""

import dataclasses
import tomllib
import typing
from dataclasses import asdict

import pytest

import config
from config import UserError
from tests.tools.environment import ROOT, shared
from training import planner

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
    r, path = config.load(
        [file, "stage.two.epochs=3", "model.llm_config.hidden_size=16", "train.output=a=b"], "x"
    )
    assert str(path) == file and list(r.stage) == ["one", "two"]
    assert r.stage["one"].learning_rate == 1.0 and isinstance(r.stage["one"].learning_rate, float)
    assert r.stage["one"].tune.llm == "full" and r.stage["two"].tune.llm == "frozen"
    assert r.stage["two"].epochs == 3.0
    assert r.model.llm_config == {"hidden_size": 16} and r.train.output == "a=b"
    assert (
        config.load(["stage.one.steps=2"], file)[0].stage["one"].steps == 2
    )  # no recipe named: the default


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
    with pytest.raises(
        UserError, match=r"stage\.one\.tune\.llmm: unknown key; fix: did you mean \"llm\""
    ):
        config.load([str(tmp_path / "key.toml")], file)
    (tmp_path / "none.toml").write_text("[model]\n")
    with pytest.raises(UserError, match="no stage"):
        config.load([str(tmp_path / "none.toml")], file)


# -------------------------------------------------------------------------------------------- bases


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return [str(folder / f"{name}.toml") for name in files]


def test_a_recipe_is_laid_over_its_base(tmp_path):
    (tmp_path / "deep").mkdir()
    ground = (
        "[train]\nworkers = 7\nseed = 1\n"
        "[stage.one]\ntune = { llm = 'full' }\nsteps = 3\n"
        "[stage.two]\n"
    )
    middle = "base = '../ground.toml'\n[stage.one]\ntune = { vision = 'partial:2' }\n"
    top = "base = 'middle.toml'\n[train]\nseed = 2\n[stage.three]\n[published]\nGQA = 5\n"
    write(tmp_path, ground=ground)
    _, file = write(tmp_path / "deep", middle=middle, top=top)
    r, path = config.load([file, "stage.one.steps=4"], "x")
    assert str(path) == file
    assert (r.train.workers, r.train.seed) == (7, 2)
    assert list(r.stage) == ["one", "two", "three"]
    one = r.stage["one"]
    assert (one.tune.llm, one.tune.vision, one.tune.connector, one.steps) == (
        "full",
        "partial:2",
        "full",
        4,
    )
    assert r.published == {"GQA": 5}


def test_a_base_that_cannot_be_read_is_named(tmp_path):
    a, b, c, gone, odd = write(
        tmp_path,
        a="base = 'b.toml'",
        b="base = 'c.toml'",
        c="base = 'a.toml'",
        gone="base = 'bb.toml'",
        odd="base = 3",
    )
    with pytest.raises(UserError, match=rf"^{c}:base: {a} is itself based on this recipe; fix: "):
        config.load([a], "x")
    with pytest.raises(
        UserError, match=rf'^{gone}:base: no such recipe bb.toml; fix: did you mean "b.toml"'
    ):
        config.load([gone], "x")
    with pytest.raises(UserError, match=rf"^{odd}:base: 3 is not a str"):
        config.load([odd], "x")
    (self,) = write(tmp_path, self="base = 'self.toml'\n[stage.one]\n")
    with pytest.raises(UserError, match=rf"^{self}:base: .* is itself based on this recipe"):
        config.load([self], "x")
    (mistaken,) = write(tmp_path, mistaken="base = 'wrong.toml'\n")
    write(tmp_path, wrong="[stage.one]\nstep = 1\n")
    with pytest.raises(
        UserError, match=r"stage\.one\.step: unknown key; fix: did you mean \"steps\""
    ):
        config.load([mistaken], "x")


def test_what_is_saved_is_resolved_and_whole(file, tmp_path):
    over, plain = write(
        tmp_path, over="base = 'r.toml'\n[published]\nGQA = 5.5\n", plain="base = 'r.toml'\n"
    )
    scored = config.load([over], "x")[0]
    unscored = config.load([plain], "x")[0]
    text = config.dumps(scored)
    assert "base" not in text and "hidden_size = 8" in text
    (again,) = write(tmp_path, again=text)
    assert config.load([again], "x")[0] == scored
    assert unscored == config.load([file], "x")[0]
    assert scored.published == {"GQA": 5.5}

    # So a score that is corrected later stops no resuming.
    deciding, others = config.differences(text, unscored)
    assert deciding == [] and others == [("published.GQA", 5.5, None)]


# ------------------------------------------------------------------------------------ two recipes


def every_field(cls=config.Recipe, path=""):
    """Return (dotted name, field) for each field of a recipe that has stages one and two."""
    found = []
    types = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        full = f"{path}{f.name}"
        if dataclasses.is_dataclass(types[f.name]):
            found += every_field(types[f.name], f"{full}.")
        elif typing.get_origin(types[f.name]) is dict:
            _, named = typing.get_args(types[f.name])
            name = {"stage": "one", "mixture": "a"}[f.name]
            found += every_field(named, f"{full}.{name}.")
        else:
            found.append((full, f))
    return found


TWO = "[stage.one.mixture.a]\n[stage.one.mixture.b]\n[stage.two]\n"

# What a stopped run may go on with another value of.
MAY_CHANGE = {
    *("published", "model.allow_pickle"),
    *("train.output", "train.device", "train.workers", "train.on_bad_row", "train.compile"),
    *("train.gradient_checkpointing", "train.log_every", "train.save_every", "train.keep"),
    *("train.keep_best", "train.answers", "train.log", "train.parallel", "train.resume"),
    *("stage.one.validation", "stage.one.validation_every", "stage.one.micro_batch_tokens"),
}


def test_what_may_change_at_a_resume_is_a_list_that_nobody_makes_longer_by_accident():
    assert {name for name, f in every_field() if not f.metadata["decides"]} == MAY_CHANGE


@pytest.mark.parametrize(
    "name, field", every_field(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_two_recipes_differ_where_a_field_differs(tmp_path, name, field):
    (file,) = write(tmp_path, file=TWO)
    saved = config.load([file], "x")[0]
    old = field.default
    choices = [c for c in field.metadata["choices"] if c != old]
    if field.default is dataclasses.MISSING:
        name, old, new, text = f"{name}.a_key", None, 7, "7"
    elif choices:
        new = text = choices[0]
    elif isinstance(old, bool):
        new, text = not old, str(not old).lower()
    elif isinstance(old, str):
        new = text = "another"
    else:
        new = field.metadata["high"]
        text = str(new)
    recipe = config.load([file, f"{name}={text}"], "x")[0]

    deciding, others = config.differences(config.dumps(saved), recipe)
    expected = ([], [(name, old, new)])
    if field.metadata["decides"]:
        expected = ([(name, old, new)], [])
    assert (deciding, others) == expected
    assert config.differences(config.dumps(recipe), recipe) == ([], [])


def test_a_recipe_that_another_version_saved(tmp_path):
    (file,) = write(tmp_path, file=TWO)
    recipe = config.load([file], "x")[0]

    # What it does not say has the default.
    assert config.differences(TWO, recipe) == ([], [])
    assert config.differences("[train]\nseed = 1\n" + TWO, recipe)[0] == [("train.seed", 1, 0)]

    # What it alone has may have decided something.
    assert config.differences("[train]\ngone = 1\n" + TWO, recipe)[0] == [("train.gone", 1, None)]

    # Stages and sources decide by their order, too.
    turned = "[stage.two]\n[stage.one.mixture.a]\n[stage.one.mixture.b]\n"
    assert config.differences(turned, recipe)[0] == [("stage", ["two", "one"], ["one", "two"])]
    turned = "[stage.one.mixture.b]\n[stage.one.mixture.a]\n[stage.two]\n"
    (found,) = config.differences(turned, recipe)[0]
    assert str(found) == "stage.one.mixture: ['b', 'a'] -> ['a', 'b']"


@pytest.mark.parametrize("text", ["[model", "a = " + "[" * 100_000, "a = " + "9" * 5000, "\0"])
def test_a_saved_recipe_that_is_no_toml_is_a_value_error(text):
    with pytest.raises(ValueError):
        config.differences(text, config.Recipe())


@pytest.mark.parametrize("text", ["stage = 3", "model = 3", "stage = { one = 3 }", "[[train]]"])
def test_a_saved_recipe_of_another_shape_differs(text):
    recipe = config.Recipe(stage={"one": config.Stage()})
    assert config.differences(text, recipe)[0]


# ------------------------------------------------------------------------------------------ recipes

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
GROUND = {"base", "share", "video"}  # what the others are laid over
TEMPLATE = {
    "phi2": "phi",
    "stablelm": "phi",
    "tinyllama": "llama",
    "openelm": "llama",
    "gemma": "gemma",
    "qwen2": "qwen2_base",
    "qwen2.5-0.5b": "qwen2_base",
    "qwen2.5-3b": "qwen2_base",
}


def flat(table: dict, path: str = "") -> dict:
    out = {}
    for key, value in table.items():
        out |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return out


def facts(section: int) -> list[list[str]]:
    """The rows of the first table of a section of FACTS.md."""
    text = shared("design/FACTS.md").read_text().split(f"\n## {section}. ")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if not line.startswith("|--")
    ]


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_states_what_it_is_and_only_what_differs(file):
    text = file.read_text()
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 120
    stated = tomllib.loads(text)
    resolved = flat(asdict(config.load([str(file)], file)[0]))
    under = flat(asdict(config.Recipe()))
    if "base" in stated:
        under |= flat(asdict(config.load([str(file.with_name(stated.pop("base")))], file)[0]))
    for name in stated.get("stage", {}):
        under = {f"stage.{name}.{k}": v for k, v in flat(asdict(config.Stage())).items()} | under
    differs = {k: v for k, v in resolved.items() if k not in under or under[k] != v}
    needless = set(flat(stated)) - set(differs)
    assert {k: v for k, v in flat(stated).items() if k not in needless} == differs
    assert not needless or file.stem in GROUND | {
        "demo"
    }  # these say the important things even where they are defaults


WHOLE = [f for f in RECIPES if f.stem not in GROUND | {"demo", "moving", "custom-lora"}]


@pytest.mark.parametrize("file", WHOLE, ids=lambda p: p.stem)
def test_a_recipe_is_whole(file):
    r, _ = config.load([str(file)], file)
    llm = next(
        name for name in sorted(TEMPLATE, key=len, reverse=True) if file.stem.startswith(f"{name}-")
    )
    assert r.train.output == f"out/{file.stem}"
    assert r.model.llm.count("/") == r.model.vision.count("/") == 1
    assert list(r.stage.values())[-1].template == TEMPLATE[llm]
    assert {s.template for s in list(r.stage.values())[:-1]} == {"pretrain"}
    assert all(s.data.endswith(".json") for s in r.stage.values())
    assert ("clip-vit-large-patch14-336" in r.model.vision) == r.model.allow_pickle
    assert set(r.published) <= set(planner.BENCHMARKS) or set(r.published) == set(planner.VIDEO)


@pytest.mark.parametrize(
    "row, recipe, stage",
    [
        ("base pretrain", "phi2-siglip-base", "pretrain"),
        ("base finetune", "phi2-siglip-base", "finetune"),
        ("share 1", "phi2-siglip-share-factory", "pretrain"),
        ("share 2 (Factory)", "phi2-siglip-share-factory", "caption"),
        ("share 2 (paper / Bench)", "phi2-siglip-share-paper", "caption"),
        ("share 3", "phi2-siglip-share-factory", "finetune"),
        ("share 3", "phi2-siglip-share-paper", "finetune"),
        ("lora finetune", "phi2-siglip-lora", "finetune"),
        ("qlora finetune", "phi2-siglip-qlora", "finetune"),
        ("custom lora", "custom-lora", "mine"),
    ],
)
def test_stages_are_as_the_original_has_them(row, recipe, stage):
    found = {r[0]: r[1:] for r in facts(1)}[row]
    what, rate, batch, tokens, template, data = found
    s = config.load([str(ROOT / "recipes" / f"{recipe}.toml")], "x")[0].stage[stage]
    assert (s.learning_rate, s.global_batch, s.max_tokens) == (float(rate), int(batch), int(tokens))
    tuned = {"connector": "full", "llm": "full" if "LLM" in what else "frozen"}
    if "lora" in row:
        tuned["llm"] = "qlora-nf4" if row.startswith("q") else "lora"
        assert (s.lora.r, s.lora.alpha, s.lora.dropout, s.lora.targets) == (128, 256, 0.05, "")
    tuned["vision"] = "partial:12" if "tower from layer 12" in what else "frozen"
    assert asdict(s.tune) == tuned
    assert s.template == template or template == "per LLM"
    assert not data.endswith(".json") or s.data == f"data/{data}"
    assert (s.weight_decay, s.warmup_ratio, s.max_grad_norm, s.epochs, s.beta2) == (
        0,
        0.03,
        1.0,
        1,
        0.999,
    )


def test_published_scores_are_those_of_the_facts():
    llms = {
        "OpenELM-450M": "openelm",
        "Qwen2-0.5B": "qwen2",
        "Qwen2.5-0.5B": "qwen2.5-0.5b",
        "Qwen2.5-3B": "qwen2.5-3b",
        "TinyLlama": "tinyllama",
        "StableLM-2": "stablelm",
        "Gemma-2b-it": "gemma",
        "Phi-2": "phi2",
    }
    kinds = {"base": "base", "share": "share-factory", "base, LoRA": "lora"}
    head, *table = facts(6)
    assert head[2:] == list(planner.BENCHMARKS) and len(table) == 14
    scored = {f.stem for f in RECIPES if config.load([str(f)], f)[0].published}
    for towers, kind, *scores in table:
        vision, llm = towers.split(" + ")
        name = f"{llms[llm]}-{vision.lower()}-{kinds[kind]}"
        r, _ = config.load([str(ROOT / "recipes" / f"{name}.toml")], "x")
        assert r.published == dict(zip(head[2:], map(float, scores), strict=True)), name
        scored.remove(name)
    names = ("qwen2.5-3b-siglip-video", "qwen2.5-3b-siglip-video-1fps", "", "phi2-siglip-video")
    for name, row in zip(names, facts(9)[1:], strict=True):
        if name:
            published = config.load([str(ROOT / "recipes" / f"{name}.toml")], "x")[0].published
            assert list(published.values()) == list(map(float, row[1:])) and list(
                published
            ) == list(planner.VIDEO)
            scored.remove(name)
    assert not scored
