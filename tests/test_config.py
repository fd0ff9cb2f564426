"""Recipes: defaults, overrides, and what a mistake says."""

import dataclasses
import math
import os
import pty
import subprocess
import sys
import textwrap
import tomllib
import typing
from dataclasses import asdict

import pytest

import command_line
import config
from config import UserError
from tests.tools import fuzz
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
    *("published", "model.allow_pickle", "train.accept_changes"),
    *("train.output", "train.device", "train.workers", "train.on_bad_row", "train.compile"),
    *("train.gradient_checkpointing", "train.log_every", "train.save_every", "train.keep"),
    *("train.keep_best", "train.answers", "train.log", "train.parallel", "train.resume"),
    *("stage.one.data", "stage.one.images"),  # what is in them is compared by itself
    *("stage.one.mixture.a.data", "stage.one.mixture.a.images"),
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
    "llama3.2-1b": "chat",
    "openelm": "llama",
    "gemma": "gemma",
    "gemma3-1b": "chat",
    "qwen2": "qwen2_base",
    "qwen2.5-0.5b": "qwen2_base",
    "qwen2.5-3b": "qwen2_base",
    "qwen3-0.6b": "chat",
    "smollm2-360m": "chat",
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


FINETUNED = {"smolvlm-256m-finetune", "onevision-0.5b-finetune"}  # a published model's own
APART = {"demo", "moving", "custom-lora", "own"} | FINETUNED
WHOLE = [f for f in RECIPES if f.stem not in GROUND | APART]


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


# ------------------------------------------------------------------------------------ wrong values


NUMBERS = [(name, f) for name, f in every_field() if type(f.default) in (int, float)]


def test_every_number_has_a_range_that_its_default_is_in():
    for name, f in NUMBERS:
        assert f.metadata["low"] <= f.default <= f.metadata["high"], name
    helped = config.help_table()
    assert 'peak of the warm-up + cosine schedule (0 to 100, or "auto")\n' in helped
    assert (
        " *log_every               int    10            steps between progress lines (1 to"
        in helped
    )


@pytest.mark.parametrize("name, field", NUMBERS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_number_out_of_its_range_is_refused(tmp_path, name, field):
    (file,) = write(tmp_path, file=TWO)
    low, high = field.metadata["low"], field.metadata["high"]
    wrong = [-1e11, 1e11, "nan", "inf", "-inf", 2**64, -(2**64), 10**400, "9" * 5000]
    wrong += [low - 1, high + 1]
    if name == "train.seed":
        wrong.remove(1e11)
    for value in wrong:
        with pytest.raises(UserError, match="; fix: write ") as raised:
            config.load([file, f"{name}={value}"], "x")
        assert name in str(raised.value) and len(str(raised.value)) < 2000

    # The limits themselves are allowed.
    for value in (low, high):
        config.load([file, f"{name}={value}", "stage.one.steps=1", f"{name}={value}"], "x")


AUTO = {
    "stage.one.global_batch",
    "stage.one.epochs",
    "stage.one.warmup_ratio",
    "stage.one.learning_rate",
    "stage.one.lora.r",
    "stage.one.lora.alpha",
}


def test_some_numbers_may_be_left_to_the_rows(tmp_path):
    (file,) = write(tmp_path, file=TWO)
    for name, _ in NUMBERS:
        if name in AUTO:
            recipe, _ = config.load([file, f"{name}=auto"], "x")
            (tmp_path / "again.toml").write_text(config.dumps(recipe))
            assert config.load([str(tmp_path / "again.toml")], "x")[0] == recipe
        else:
            with pytest.raises(UserError, match=f"{name}: 'auto' is not a .*; fix: "):
                config.load([file, f"{name}=auto"], "x")


@pytest.mark.parametrize(
    "override, message",
    [
        ("stage.one.epochs=0", "stage.one: neither epochs nor steps: it would train nothing; fix"),
        ("train.output=", "train.output: empty; fix: name a folder"),
        ("train.device=mps", "'mps' is not a choice; fix: one of: auto, cpu, cuda"),
        ("published.GQA=nan", "published.GQA: nan is out of range"),
        ("published.GQA=-1", "published.GQA: -1.0 is out of range"),
        ("published.GQA='a'", "published.GQA: 'a' is not a float"),
        ("model.vision_config=", "'' is not a dict; fix: write {} or {key = value}"),
        ("model.vision_config=1", "1 is not a dict; fix: write {} or {key = value}"),
        ("stage.one=", "'' is not a Stage; fix: write {key = value}"),
        ("stage=", "'' is not a dict; fix: write {} or {key = value}"),
        ("model.llm_config={a = 2000-01-01}", "model.llm_config.a: 2000-01-01 is a date; fix: "),
        ("model.llm_config={a = [07:32:00]}", "model.llm_config.a: 07:32:00 is a time; fix: "),
        ("model.llm_config={a = 18446744073709551616}", "an integer of more than 64 bits; fix"),
        ("model.llm_config.hidden_size.x=1", "model.llm_config.hidden_size is not a table there"),
        ("model.llm_config" + ".a" * 5000 + "=1", "nested too deeply; fix: "),
        ("model.llm_config=" + "[" * 50 + "]" * 50, "is not a dict; fix: "),
        ("train.seed=1\nx = 2", "has a control character"),
        ("train.output=a\udcff", r"'train.output=a\\udcff' is not UTF-8; fix: "),
        ("train.output=a\0", "has a control character; fix: "),
        ("train.seed" + "9" * 100_000, "not an override; fix: "),
    ],
)
def test_a_wrong_value_is_one_line(file, override, message):
    with pytest.raises(UserError) as raised:
        config.load([file, override], "x")
    said = str(raised.value)
    assert message.replace(r"\\", "\\") in said and said.isprintable() and len(said) < 4000


@pytest.mark.parametrize(
    "content, message",
    [
        (b"# \xe4\n", "not UTF-8 text; fix: save it as UTF-8"),
        (TEXT.encode("utf-16"), "not UTF-8 text; fix: save it as UTF-8"),
        (b"a = " + b"[" * 50_000, "not TOML: nested too deeply; fix: "),
        (b"[a" + b".a" * 3000 + b"]\n", "not TOML: nested too deeply; fix: "),
        (b"a = " + b"9" * 5000, "not TOML: "),
        (b"a = 1\0", "not TOML: "),
        (b"[stage.'']\n", "stage: a table without a name; fix: "),
        (b"[stage.one.mixture.' ']\n", "stage.one.mixture: a table without a name; fix: "),
        (b'[stage."a\\nb"]\n', r"stage: 'a\nb' has a control character; fix: "),
        (b'[stage.one]\ndata = "a\\u0000"\n', r"stage.one.data: 'a\x00' has a control character"),
        (b"base = 2000-01-01\n", "base: datetime.date(2000, 1, 1) is not a str; fix: "),
        (b"stage = 3\n", "stage: expected named tables; fix: "),
        (b"#" * 200_000, "more than 100,000 bytes; fix: "),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, content, message):
    file = tmp_path / "r.toml"
    file.write_bytes(content)
    with pytest.raises(UserError) as raised:
        config.load([str(file)], file)
    said = str(raised.value)
    assert said.startswith(str(file)) and message in said and said.isprintable()


@pytest.mark.parametrize("override", ["stage.one.steps=1", "stage.one=1", "model.llm=a"])
@pytest.mark.parametrize("text", ["stage = 3\nmodel = 3\n", "stage = [1]\nmodel = 'a'\n"])
def test_an_override_of_what_is_no_table(tmp_path, text, override):
    (file,) = write(tmp_path, file=text)
    with pytest.raises(UserError, match="; fix: "):
        config.load([file, override], "x")


def test_what_is_no_file_is_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop", "", "x" * 300, "r.toml/below", "\x1b[2J"):
        with pytest.raises(UserError, match="; fix: "):
            config.load([str(tmp_path / name)], tmp_path / "r.toml")
    with pytest.raises(UserError, match="pipe: not a file; fix: "):
        config.load([str(tmp_path / "pipe")], tmp_path / "r.toml")
    with pytest.raises(UserError, match="loop: cannot be read: Too many levels of symbolic links"):
        config.load([str(tmp_path / "loop")], tmp_path / "r.toml")

    for i in range(100):
        (tmp_path / f"{i}.toml").write_text(f"base = '{i + 1}.toml'\n[stage.one]\n")
    with pytest.raises(UserError, match="more than 30 recipes, each the base of the one before; f"):
        config.load([str(tmp_path / "0.toml")], tmp_path / "r.toml")


def test_a_byte_order_mark_and_windows_lines_are_read(file, tmp_path):
    other = tmp_path / "windows.toml"
    other.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert config.load([str(other)], "x")[0] == config.load([file], "x")[0]


NAMES = ["a.b", "a b", 'a"b', "a'b", "a\\b", "ä", "😀", "]", "#", "=", "\u202e", "-", "stage", "0"]


def test_what_is_written_is_read_back_whatever_its_names_and_values(tmp_path):
    values = {"float": 0.1, "more": 1e22, "less": 1e-7, "inf": [math.inf, -math.inf], "": {"": []}}
    values |= {"text": "".join(map(chr, range(0xA0, 0x180))) + "\"\\/'😀\u2028\ufeff", "no": False}
    values |= {name: {name: [1, 2.0]} for name in NAMES}
    sources = {name: config.Source(data=name) for name in NAMES}
    stages = {name: config.Stage(data=name, mixture=sources) for name in NAMES}
    model = config.Model(llm=values["text"], llm_config=values)
    published = {name: 1.5 for name in NAMES}
    recipe = config.Recipe(model=model, stage=stages, published=published)
    (tmp_path / "r.toml").write_bytes(config.dumps(recipe).encode())
    assert config.load([str(tmp_path / "r.toml")], "x")[0] == recipe
    assert config.differences(config.dumps(recipe), recipe) == ([], [])

    # What `load` refuses is written as TOML all the same.
    control = {"a": "".join(map(chr, range(0xA0))), "nan": math.nan}
    text = config.dumps(config.Recipe(model=config.Model(llm_config=control)))
    again = tomllib.loads(text)["model"]["llm_config"]
    assert again["a"] == control["a"] and math.isnan(again["nan"])


def test_wrong_recipes():
    fuzz.check("recipes", "--count", 8, "--seed", 10_000)


@pytest.mark.full
def test_many_wrong_recipes():
    fuzz.check("recipes", "--count", 1000)


# ------------------------------------------------------------------------------- the command line


def script(body: str, *argv, text=True, **how) -> subprocess.CompletedProcess:
    """Run a script whose main(argv) is `body`."""
    lines = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    code = f"import os, sys, command_line, config\ndef main(argv):\n{lines}\n"
    code += "command_line.cli(main, 'what it does')\n"
    how = {"capture_output": True, "cwd": ROOT, "text": text, "timeout": 60} | how
    return subprocess.run([sys.executable, "-c", code, *argv], **how)


def is_one_line(done: subprocess.CompletedProcess, code: int = 1) -> str:
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    "raises, line",
    [
        ("open('/nowhere/at\\nall')", r"error: /nowhere/at\nall: No such file or directory; fix: "),
        ("open('/')", "error: /: Is a directory; fix: "),
        ("open('/etc/passwd/x')", "error: /etc/passwd/x: Not a directory; fix: "),
        ("os.mkdir('/etc/passwd')", "error: /etc/passwd: File exists; fix: "),
        ("open('x' * 300)", "File name too long; fix: "),
        ("raise PermissionError(13, os.strerror(13), 'a')", "error: a: Permission denied; fix: "),
        ("raise PermissionError(1, os.strerror(1), 'kept')", "error: kept: Operation not permitte"),
        ("raise OSError(30, os.strerror(30), 'disc')", "error: disc: Read-only file system; fix: "),
        ("raise OSError(28, os.strerror(28))", "No space left on device; fix: make room"),
        ("raise OSError(122, os.strerror(122), 'home')", "error: home: Disk quota exceeded; fix: "),
        ("raise OSError(5, os.strerror(5), 'disk')", "error: disk: Input/output error; fix: "),
        ("raise OSError(24, os.strerror(24))", "Too many open files; fix: raise the limit"),
        ("os.symlink('a', 'b')\nos.symlink('b', 'a')\nopen('a')", "error: a: Too many "),
        ("bytearray(10 ** 15)", "error: memory: "),
        ("raise MemoryError", "error: memory: too little for this; fix: take a smaller "),
        (
            "raise RuntimeError('[enforce] DefaultCPUAllocator: can\\'t allocate memory: 7 bytes')",
            "error: memory: [enforce] DefaultCPUAllocator: can't allocate memory: 7 bytes; fix: ",
        ),
        ("raise ValueError('\\x1b[2J\\na; fix: b')", r"error: \x1b[2J\na; fix: b"),
        ("raise ValueError('a' * 10**6 + '; fix: b')", "error: aaa"),
    ],
)
def test_what_the_user_can_mend_is_one_line(tmp_path, monkeypatch, raises, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception) as raised:
        exec(raises)
    said = command_line.one_line(raised.value, "take a smaller model")
    assert line in said and "; fix: " in said and len(said) < 3000 and said.isprintable()


def test_a_full_disk_is_one_line_of_a_script():
    done = script("raise OSError(28, os.strerror(28), 'out')")
    assert is_one_line(done).startswith("error: out: No space left on device; fix: make room")


@pytest.mark.parametrize(
    "raises", ["1 / 0", "raise ValueError('ours')", "raise OSError('ours')", "{}['key']"]
)
def test_a_mistake_of_ours_keeps_its_traceback(raises):
    done = script(f"print('before')\n{raises}")
    assert done.returncode == 1 and done.stdout == "before\n"
    assert done.stderr.startswith("Traceback (most recent call last):")


def test_what_was_printed_stays_above_the_error():
    body = "print('before')\nraise config.UserError('here', 'wrong', 'mend it')"
    done = script(body, capture_output=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.stdout == "before\nerror: here: wrong; fix: mend it\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("body", ["print('a' * 10**6)", "print('a', flush=True)", "print('a')"])
def test_a_reader_that_goes_away_ends_a_script_quietly(body, unbuffered):
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    read, write_end = os.pipe()
    os.close(read)
    done = script(body, capture_output=False, stdout=write_end, stderr=subprocess.PIPE, env=env)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_is_no_reader_gone_away():
    done = script("read, write = os.pipe()\nos.close(read)\nos.write(write, b'a')")
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


def test_help_for_a_reader_that_goes_away():
    read, write_end = os.pipe()
    os.close(read)
    done = script(
        "command_line.parser('what it does').parse_args(argv)",
        "--help",
        stdout=write_end,
        stderr=subprocess.PIPE,
        capture_output=False,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_to_a_full_disk_is_one_line():
    env = {**os.environ, "PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        streams = {"capture_output": False, "stdout": full, "stderr": subprocess.PIPE}
        done = script("print('a')", env=env, **streams)
    line = is_one_line(done)
    assert line.startswith("error: standard output: No space left on device; fix: ")


def test_ctrl_c_is_one_line_and_130():
    # A process that a shell started in the background ignores the signal.
    body = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    done = script(body + "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)")
    assert is_one_line(done, 130) == "stopped by Ctrl-C"


def test_words_that_are_no_text_are_refused():
    done = script("print(argv)", os.fsdecode(b"--prompt=\xff"))
    assert is_one_line(done).startswith(r"error: command line: '--prompt=\udcff' is not UTF-8; fix")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed(encoding):
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = script("print('é█😀\\ud83d')", env=env, text=False)
    assert (done.returncode, done.stderr) == (0, b"")
    expected = "é█😀\ud83d".encode(encoding, "backslashreplace")
    assert done.stdout == expected + b"\n"


def test_input_that_is_no_text_is_read():
    done = script("print(ascii(input()))", input=b"a\xff\n", text=False)
    assert done.stdout == b"'a\\ufffd'\n"


def test_a_script_without_standard_streams():
    body = "print('a', sys.stdout.isatty())\nopen(argv[0], 'w').write('done')"
    code = "import os, sys, command_line, config\ndef main(argv):\n"
    code += f"  {body.splitlines()[1]}\n  print(1)\n"
    code += "  sys.stdout.isatty()\ncommand_line.cli(main, '')"
    command = f'exec {sys.executable} -c "$0" /dev/null >&- 2>&-'
    assert subprocess.run(["sh", "-c", command, code], cwd=ROOT).returncode == 0


STEERS = "a\x1b[31mb\x1b]0;title\x07\rc\x9b2J\n\td"


def test_a_terminal_obeys_no_text_and_a_file_gets_the_true_one(tmp_path):
    body = f"print({STEERS!r}, flush=True)\nprint('\\rprogress', end='')\n"
    body += "print('\\x1b[32mours\\x1b[0m', file=command_line.colours())"
    done = script(body, text=False)
    assert done.stdout.decode() == STEERS + "\n\rprogress\x1b[32mours\x1b[0m\n"

    # Python's own pseudo-terminal.
    ours, its = pty.openpty()
    done = script(body, capture_output=False, stdin=its, stdout=its, stderr=its)
    os.close(its)
    shown = os.read(ours, 10_000).decode().replace("\r\n", "\n")
    os.close(ours)
    assert done.returncode == 0
    assert shown == (
        r"a\x1b[31mb\x1b]0;title\x07\rc\x9b2J" + "\n\td\n\rprogress\x1b[32mours\x1b[0m\n"
    )


def test_argparse_repeats_nothing_as_it_is():
    body = "command_line.parser('what it does').parse_args(argv)"
    line = is_one_line(script(body, "--a\x1b[2J\nerror: all is well"))
    assert r"--a\x1b[2J\nerror: all is well; fix: see python" in line
    assert len(is_one_line(script(body, "--" + "a" * 100_000))) < 1000


@pytest.mark.parametrize(
    "word", ["0", "11", "1.5", "nan", "inf", "x", "", "-1", "9" * 5000, "\x1b"]
)
def test_an_option_out_of_its_range_is_one_line(word):
    parser = command_line.parser("what it does")
    parser.add_argument("--rows", type=command_line.within(int, 1, 10))
    with pytest.raises(SystemExit, match="--rows: .* is not a whole number from 1 to 10; fix: "):
        parser.parse_args([f"--rows={word}"])
    assert parser.parse_args(["--rows=10"]).rows == 10


def launch(tmp_path, body: str, ranks: int) -> subprocess.CompletedProcess:
    """Run a script under torchrun; return what it says, both streams in one."""
    file = tmp_path / "script.py"
    lines = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    file.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport command_line, config\n"
        f"def main(argv):\n{lines}\ncommand_line.cli(main, 'what it does')\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [sys.executable, *torchrun, file],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_under_torchrun_the_last_line_is_ours(tmp_path):
    body = """
        if os.environ["RANK"] == "1":
            raise config.UserError("rows.json:7", "wrong", "mend it")
        import time
        time.sleep(60)
    """
    done = launch(tmp_path, body, 2)
    assert done.returncode == 1
    lines = done.stdout.strip().splitlines()
    line = "error: rows.json:7: wrong; fix: mend it"
    assert lines[-1] == line and f"  traceback : {line}" in lines
    assert lines.count(line) == 2  # at once, and at last


@pytest.mark.full
def test_of_several_ranks_that_fail_one_has_the_last_line(tmp_path):
    done = launch(tmp_path, "raise config.UserError('here', 'wrong', 'mend it')", 2)
    lines = done.stdout.strip().splitlines()
    assert lines[-1] == "error: here: wrong; fix: mend it" and lines[-2].startswith("=====")
