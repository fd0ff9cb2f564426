"""Recipes: defaults, overrides, and what a mistake says."""

import tomllib
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


def test_what_is_saved_is_resolved_and_says_nothing_that_a_run_does_not_depend_on(file, tmp_path):
    over, plain = write(
        tmp_path, over="base = 'r.toml'\n[published]\nGQA = 5.5\n", plain="base = 'r.toml'\n"
    )
    text = config.dumps(config.load([over], "x")[0])
    assert text == config.dumps(
        config.load([plain], "x")[0]
    )  # so a score that is corrected later stops no resuming
    assert "base" not in text and "published" not in text and "hidden_size = 8" in text
    (again,) = write(tmp_path, again=text)
    assert (
        config.load([again], "x")[0] == config.load([over], "x")[0] == config.load([file], "x")[0]
    )
    assert config.load([over], "x")[0].published == {"GQA": 5.5}


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
