"""Recipes: what an experiment is, how a TOML file becomes one, and how two of them differ.

    torchrun train.py recipes/qwen2-siglip-base.toml stage.finetune.learning_rate=1e-5

A recipe names a model, how the run behaves, and its stages in order. Every field is written once,
here, with its default and the reason it exists; `train.py --help` prints that table. An unknown key
is an error that names the nearest known one. The resolved recipe (every field, defaults included)
is saved beside the checkpoints. `base = "FILE.toml"` lays a recipe over another one, table by
table, so that it states only what differs.

To add a field, write it in its dataclass: `learning_rate: float = opt(1e-3, "why it exists")`. The
TOML, the command line, --help and the saved recipe follow from that line.

The file, from top to bottom:

    printable, UserError, opt         a mistake of the user; a field with its reason
    Model, Train, Stage ... Recipe    what a recipe says, one frozen dataclass per table
    LLaVAConfig                       what a model is, whatever file it came from
    load                              TOML file -> its bases -> overrides -> checked dataclasses
    dumps, differences, help_table    back to TOML; what a resume compares; what --help prints
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
import typing
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import NamedTuple


def printable(text, most: int = 400) -> str:
    """Return data from outside as it may stand in a message: one line, safe for a terminal, short.

    Line breaks, control and formatting characters and halves of surrogate pairs become escapes as
    in Python's source, so that data can neither forge a second message nor steer a terminal. Of a
    text longer than `most` characters the middle is left out.
    """
    text = str(text)
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-(most // 2) :]}"
    safe = []
    for character in text:
        if character.isprintable():
            safe.append(character)
        else:
            safe.append(character.encode("unicode_escape").decode("ascii"))
    return "".join(safe)


def is_unicode(text: str) -> bool:
    """Say whether a text can be written: JSON may hold one half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class UserError(ValueError):
    """A mistake that the user can mend, printed as one line:

    error: <file>:<row or key>: <what>; fix: <action>
    """

    def __init__(self, where, what: str, fix: str):
        # All three may quote what a file holds.
        where = printable(where, 1000)
        super().__init__(f"{where}: {printable(what)}; fix: {printable(fix, 2000)}")


def opt(
    default,
    why: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    decides: bool = True,
    auto: bool = False,
):
    """Return a field of a recipe.

    default: a value, {} for a table of anything, or a dataclass of this file for a table of its
    fields.
    why: the reason the field exists, as --help prints it.
    choices: the only values it takes; empty = any value of its type.
    low, high: the least and the greatest value of a number. Every number of a recipe has both.
    decides: whether it decides what is trained. A field that changes only speed, memory, safety or
    what is reported does not (sums may round differently), so a stopped run may go on with another
    value of it.
    auto: whether a number may also be AUTO. training/small_sets.py puts a number in its place when
    the rows are known, before anything computes with it.
    """
    metadata = {"why": why, "choices": choices, "low": low, "high": high, "decides": decides}
    metadata["auto"] = auto

    # Tables are made anew for each recipe: dataclasses forbid to share a default that can change.
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)

    return field(default=default, metadata=metadata)


# ------------------------------------------------------------------------------- what a recipe says

AUTO = "auto"  # in place of a number: as many as the rows ask for


@dataclass(frozen=True)
class Model:
    """The table [model]: the parts of a model, and how pictures and videos enter it."""

    # A finished model, or the parts of a new one.
    checkpoint: str = opt(
        "", "a finished model to go on from, in any layout: all of it, in place of the fields below"
    )
    llm: str = opt(
        "", "language model: a Hugging Face folder or id; its config.json decides the family"
    )
    vision: str = opt("", "vision encoder: a Hugging Face folder or id")
    vision2: str = opt(
        "",
        "a DINOv2 beside a CLIP in `vision`: their mixture of features, for the connector mof_mlp",
    )
    connector: str = opt("mlp2x_gelu", "identity, linear, mlpNx_gelu, ..., see connectors.py")
    connector_options: dict = opt({}, "sizes of a connector, see connectors.py")
    tokenizer: str = opt("", "folder with tokenizer.json or tokenizer.model; empty = the llm's")
    llm_config: dict = opt(
        {}, "build the llm from these config.json fields with random weights, load nothing"
    )
    vision_config: dict = opt({}, "the same for the vision encoder")
    allow_pickle: bool = opt(
        False,
        "also read pytorch_model.bin (tensors only) where a folder has no safetensors",
        decides=False,
    )

    # What the connector gets from the encoder.
    feature_layer: int = opt(
        -2,
        "which hidden state of the encoder is used; 0 = embeddings, -1 = last block",
        low=-1000,
        high=1000,
    )
    feature_select: str = opt(
        "patch", "patch drops token 0, as LLaVA does; cls_patch keeps all", ("patch", "cls_patch")
    )
    feature_norm: bool = opt(
        False, "the encoder's final norm on the features of its last layer, as in SmolVLM"
    )

    # What the encoder gets from a picture or a video.
    image_mode: str = opt(
        "square",
        "square resizes; pad makes a square first; tiles, anyres, anyres_max: high resolution; "
        "split: that of SmolVLM, whose control tokens the llm gets; split_nanovlm: of a nanoVLM; "
        "native: that of the picture, for a NaFlex, see inputs/image_modes.py",
        ("square", "pad", "tiles", "anyres", "anyres_max", "split", "split_nanovlm", "native"),
    )
    image_grids: str = opt(
        "1x2 2x1 2x2 3x1 1x3",
        "tiles, anyres, anyres_max: the grids to choose from, rows x columns",
    )
    image_views: int = opt(
        9,
        "anyres_max: the tiles' tokens are at most about those of so many views",
        low=1,
        high=1000,
    )
    resample: str = opt(
        "",
        "how pictures are resized, if not as the encoder's image processor does; llama.cpp "
        "resizes to a square bicubic alone",
        choices=("", "bilinear", "bicubic", "lanczos"),
    )
    image_edge: int = opt(
        0,
        "split: pixels of a picture's longest edge before it is cut; 0 = those of one view",
        low=0,
        high=4096,
    )
    frames: int = opt(
        16,
        "how many frames of a video are seen, evenly from its first to its last",
        low=1,
        high=10_000,
    )
    fps: float = opt(
        0.0, "so many a second instead, at most `frames`; 0 = always `frames`", low=0, high=1000
    )

    @property
    def tokenizer_source(self) -> str:
        """The folder or id that the tokenizer comes from."""
        return self.tokenizer or self.llm or self.checkpoint


@dataclass(frozen=True)
class Train:
    """The table [train]: how a run behaves, whatever it trains."""

    output: str = opt(
        "out/run", "folder of the final model, its log and its checkpoints", decides=False
    )
    seed: int = opt(
        0,
        "decides initial weights and the order of samples, nothing else is random",
        low=0,
        high=2**63 - 1,  # the greatest integer of TOML
    )

    # The machine.
    precision: str = opt(
        "auto", "auto = bf16 where the hardware has it, else fp32", ("auto", "fp32", "bf16")
    )
    device: str = opt(
        "auto",
        "auto = cuda if there is one; mps, of Macs, is refused: nobody has tried it",
        ("auto", "cpu", "cuda"),
        decides=False,
    )
    workers: int = opt(
        2,
        "processes per rank that read, decode and tokenize ahead; 0 = in the main process",
        low=0,
        high=256,
        decides=False,
    )

    # A run that ends without a bad row is the same under both. One that stopped at a bad row has
    # computed what skipping would have.
    on_bad_row: str = opt(
        "stop",
        "stop at the first unusable row, or skip: log it, take the next",
        ("stop", "skip"),
        decides=False,
    )
    gradient_checkpointing: bool = opt(
        False, "recompute each block in backward: less memory, a third more time", decides=False
    )
    compile: bool = opt(
        False, "torch.compile every block: minutes at first, then less time a step", decides=False
    )

    # What is reported and kept.
    log_every: int = opt(10, "steps between progress lines", low=1, high=10**9, decides=False)
    save_every: int = opt(
        200, "steps between checkpoints to resume from", low=1, high=10**9, decides=False
    )
    keep: int = opt(2, "how many such checkpoints to keep", low=1, high=10_000, decides=False)
    keep_best: bool = opt(
        False,
        "also keep the lowest validation loss of a stage; the last stage's is OUTPUT/best",
        decides=False,
    )
    answers: int = opt(
        0,
        "at each validation, also show what the model answers to this many of the held-out rows",
        low=0,
        high=10_000,
        decides=False,
    )
    log: str = opt(
        "none",
        "also send the log there; either is an optional package",
        ("none", "tensorboard", "wandb"),
        decides=False,
    )

    # How a start of the run works.
    parallel: str = opt(
        "auto",
        "ddp copies the model to every rank, fsdp shards it; auto = ddp while it fits half a GPU",
        ("auto", "none", "ddp", "fsdp"),
        decides=False,
    )
    resume: str = opt(
        "", "go on from this checkpoint and no other; empty = the newest whole one", decides=False
    )
    accept_changes: str = opt(
        "",
        "go on although rows, pictures, tokenizer or weights have changed: the word for just these "
        "changes, which the refusal says",
        decides=False,
    )


# The parts of a model: what a recipe calls them, and their attributes in LLaVA.
PARTS = {"llm": "language_model", "vision": "vision_tower", "connector": "connector"}


@dataclass(frozen=True)
class Tune:
    """The table [stage.NAME.tune]: what trains, one field for each of PARTS."""

    llm: str = opt(
        "frozen",
        "frozen, full, lora, qlora-nf4, qlora-int8, or partial:N (blocks from N, norm and head)",
    )
    vision: str = opt(
        "frozen", "frozen, full, lora, qlora-nf4, qlora-int8, or partial:N (blocks N and later)"
    )
    connector: str = opt("full", "frozen, full, lora, qlora-nf4 or qlora-int8")


@dataclass(frozen=True)
class LoRA:
    """The table [stage.NAME.lora]: the adapters of the parts that [stage.NAME.tune] adapts."""

    r: int = opt(
        128,
        "rank of the adapters (Hu et al., 2021): their size, and what they can express",
        low=1,
        high=65536,
        auto=True,
    )
    alpha: float = opt(
        256.0, "an adapter's output is multiplied by alpha / r", low=1e-6, high=1e6, auto=True
    )
    dropout: float = opt(0.05, "share of an adapter's inputs that training drops", low=0, high=0.99)
    rslora: bool = opt(
        False, "alpha / sqrt(r) in its place, so that large ranks learn too (Kalajdzievski, 2023)"
    )
    dora: bool = opt(
        False, "train the length of each weight row beside its direction (Liu et al., 2024)"
    )
    targets: str = opt(
        "",
        "names or globs of linears, ours or Hugging Face's: q_proj,v_proj; "
        "empty = all but the head",
    )
    adapter: str = opt(
        "",
        "a PEFT folder to go on from: what it holds starts with its values, at its rank and alpha",
    )


@dataclass(frozen=True)
class Rates:
    """The table [stage.NAME.rate]: a learning rate for each of PARTS."""

    llm: float = opt(
        0.0, "learning rate of this part; 0 = the stage's learning_rate", low=0, high=100
    )
    vision: float = opt(
        0.0, "as above; a pretrained encoder usually wants a tenth", low=0, high=100
    )
    connector: float = opt(0.0, "as above", low=0, high=100)


@dataclass(frozen=True)
class Source:
    """A table [stage.NAME.mixture.SOURCE]: one of several data sets of a stage."""

    data: str = opt("", "as the stage's data", decides=False)
    images: str = opt("", "as the stage's images", decides=False)
    columns: dict = opt({}, "as the stage's columns")
    at_least: dict = opt({}, "as the stage's at_least")
    weight: float = opt(
        1.0,
        "an epoch takes weight x rows: 2 = each twice, 0.1 = a tenth, in the next epoch another",
        low=0,
        high=1000,
    )


@dataclass(frozen=True)
class Stage:
    """A table [stage.NAME]: one pass of the training loop."""

    # The data.
    # Where the data lies decides nothing: what is in it does, which training/made_from.py compares.
    data: str = opt(
        "",
        "rows: JSON, JSON lines, CSV, parquet, tar shards; a folder or glob of them, pictures with"
        " captions, or a Hugging Face id (user/dataset)",
        decides=False,
    )
    images: str = opt(
        "",
        "folder that the rows' image paths start from; empty = the data file's folder",
        decides=False,
    )
    columns: dict = opt(
        {}, 'what the rows call their parts: {image = "photo", question = "query", answer = "a"}'
    )
    at_least: dict = opt(
        {},
        "only rows that have so much in a column: {relevance_min = 4}; rows without a number there"
        " are left out",
    )
    mixture: dict[str, Source] = opt(
        {}, "[stage.NAME.mixture.SOURCE] tables: several sources instead of data"
    )
    validation: str | float = opt(
        "",
        "held-out rows for the validation loss: a file, or how many of the data to hold out by a"
        " hash of their pictures, else of their questions (inputs/holdout.py): a share (0.02) or a"
        " number (500); empty = none",
        low=0,
        high=10**9,
        decides=False,
    )
    validation_every: int = opt(
        200,
        "steps between validation passes (one more at the end of the stage)",
        low=1,
        high=10**9,
        decides=False,
    )
    template: str = opt(
        "pretrain",
        "chat template, see inputs/templates.py; empty = that of the model of model.checkpoint",
    )

    # What trains.
    tune: Tune = opt(Tune, "what trains in this stage")
    lora: LoRA = opt(LoRA, "adapters of the parts that tune says are lora or qlora")

    # The optimizer.
    rate: Rates = opt(Rates, "learning rate per part")
    learning_rate: float = opt(
        1e-3, "peak of the warm-up + cosine schedule", low=0, high=100, auto=True
    )
    weight_decay: float = opt(0.0, "AdamW, never on biases and norms", low=0, high=100)
    beta2: float = opt(
        0.999, "AdamW's second-moment decay; short runs want less", low=0, high=0.999999
    )
    warmup_ratio: float = opt(0.03, "share of the steps that warm up", low=0, high=1, auto=True)
    max_grad_norm: float = opt(
        1.0, "the gradient of a step is clipped to this norm; 1e9 = never", low=1e-9, high=1e9
    )

    # How long, and in what portions.
    epochs: float = opt(1.0, "passes over the data", low=0, high=100_000, auto=True)
    steps: int = opt(0, "stop after this many steps instead; 0 = epochs decide", low=0, high=10**9)
    global_batch: int = opt(
        128,
        "rows per optimizer step, whatever the ranks and micro-batches",
        low=1,
        high=1_000_000,
        auto=True,
    )
    micro_batch_tokens: int = opt(
        16384,
        "a micro-batch packs samples up to this many tokens; 0 = one sample each",
        low=0,
        high=10_000_000,
        decides=False,
    )
    max_tokens: int = opt(
        2048,
        "longest sample; a longer one loses text from its tail, never an image",
        low=1,
        high=10_000_000,
    )


@dataclass(frozen=True)
class Recipe:
    """A whole experiment."""

    model: Model = opt(Model, "the model")
    train: Train = opt(Train, "the run")
    stage: dict[str, Stage] = opt({}, "[stage.NAME] tables; each stage starts from the one before")
    published: dict = opt(
        {}, "scores that the original authors report, by benchmark", decides=False
    )


# ---------------------------------------------------------------------------------- what a model is


@dataclass(frozen=True)
class LLaVAConfig:
    """What makes a model, whether a recipe says it or the config.json of any layout."""

    # Hugging Face's config.json of each part, and preprocessor_config.json, verbatim.
    text: dict
    vision: dict
    preprocessor: dict = field(default_factory=dict)

    # As in Model.
    connector: str = "mlp2x_gelu"
    connector_options: dict = field(default_factory=dict)
    feature_layer: int = -2
    feature_select: str = "patch"
    feature_norm: bool = False
    image_mode: str = "square"

    template: str = "llama"

    # A factor on the connector's output. Only Gemma in transformers 5 needs one that is not 1.
    image_scale: float = 1.0

    # The names that the parts were loaded by, for the keys llm, vision and vision2.
    sources: dict = field(default_factory=dict)

    # As in Model.
    image_grids: str = Model.image_grids
    frames: int = Model.frames
    fps: float = Model.fps

    # For image mode split: pixels of the longest edge before a picture is cut, and the ids of each
    # string that stands between an item's features, as "\n" and "<row_1_col_2>".
    image_edge: int = 0
    image_marks: dict = field(default_factory=dict)
    image_enlarge: bool = False  # split_nanovlm: whether every picture gets that longest edge

    # As in Model.
    image_views: int = Model.image_views

    # SHA-256 of the adapters that are merged into the weights: none may be merged twice.
    merged_adapters: tuple[str, ...] = ()

    # The files that text, vision and images (the processor) were read from, for messages.
    places: dict = field(default_factory=dict, compare=False)

    def __post_init__(self):
        tower = self.vision.get("model_type")
        if (self.connector == "mof_mlp") != (tower == "mof"):
            raise UserError(
                "model.connector",
                f"{self.connector} with {tower}",
                "mof_mlp and the mixture of CLIP and DINOv2 (model.vision2) need each other",
            )


# --------------------------------------------------------------------- from a TOML file to a Recipe

# Nobody writes more than this, in bytes of a file, and in tables of tables or bases of bases.
LARGEST = 100_000
MOST_NESTED = 30


def load(argv: list[str], default: str | Path) -> tuple[Recipe, Path]:
    """Return the recipe that a command line names, and its file.

    argv: [recipe.toml] [section.key=value ...]
    default: the recipe's file where the command line names none.

    Raises UserError for a file that cannot be read, a circle of bases, bad TOML, an unknown key, a
    wrong type or choice, a number out of its range, and for fields that contradict each other.
    """
    for word in argv:
        check_text(word, "command line")

    names_a_file = bool(argv) and "=" not in argv[0]
    if names_a_file:
        path = Path(argv[0])
        overrides = argv[1:]
    else:
        path = Path(default)
        overrides = argv

    # Plain tables first, so that a base and the command line can change any part of them.
    table = _read(path, folder=Path(default).parent)
    for override in overrides:
        _override(table, override)

    # Then dataclasses, which check every key and value.
    recipe = _build(Recipe, table, str(path))
    _cross_check(recipe, path)
    return recipe, path


def _cross_check(recipe: Recipe, path: Path):
    """Raise UserError for what no field shows by itself."""
    if not recipe.stage:
        raise UserError(path, "no stage", "write a [stage.NAME] table")
    if not recipe.train.output.strip():
        raise UserError(f"{path}:train.output", "empty", "name a folder")

    for name, stage in recipe.stage.items():
        if not stage.steps and not stage.epochs:
            what = "neither epochs nor steps: it would train nothing"
            raise UserError(f"{path}:stage.{name}", what, "write epochs or steps above 0")

    for name, score in recipe.published.items():
        where = f"{path}:published.{name}"
        _check_range(_convert(score, float, where), where, 0, 1_000_000)


def parse_toml(text: str) -> dict:
    """Return the tables of a TOML text. Raises ValueError, and nothing else, if it is none.

    Python's reader raises RecursionError for deep nesting, and a ValueError of its own for an
    integer of more than 4,300 digits.
    """
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None

    # Headers and dotted keys nest without recursion, but whoever walks through the tables recurses.
    layer = [table]
    for _ in range(MOST_NESTED):
        layer = [inner for outer in layer for inner in _tables_in(outer)]
    if layer:
        raise ValueError("nested too deeply")
    return table


def _tables_in(value: dict | list) -> list[dict | list]:
    """Return the tables and arrays that are values of this one."""
    values = value
    if isinstance(value, dict):
        values = value.values()
    return [inner for inner in values if isinstance(inner, (dict, list))]


def _read(path: Path, folder: Path, above: tuple[Path, ...] = ()) -> dict:
    """Return the table of a TOML file, laid over that of its base.

    folder: where to look for what a misspelt name may have meant.
    above: the files that led here, each the base of the one before it.
    """
    if len(above) > MOST_NESTED:
        what = f"more than {MOST_NESTED} recipes, each the base of the one before"
        raise UserError(f"{above[-1]}:base", what, "write them as one")

    # A circle may also go through ever new names of one file, as a/../a/../a.
    if os.path.realpath(path) in [os.path.realpath(p) for p in above]:
        what = f"{path} is itself based on this recipe"
        raise UserError(f"{above[-1]}:base", what, "remove one base of the circle")

    try:
        table = parse_toml(_text_of(path))
    except (FileNotFoundError, NotADirectoryError):
        near = _nearest(path.name, sorted(p.name for p in folder.glob("*.toml")))
        if above:
            raise UserError(f"{above[-1]}:base", f"no such recipe {path.name}", near) from None
        raise UserError(path, "no such recipe", near) from None
    except OSError as e:
        raise UserError(path, f"cannot be read: {e.strerror}", "name a recipe's file") from None
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(path, "not UTF-8 text", "save it as UTF-8") from None
    except ValueError as e:
        raise UserError(path, f"not TOML: {e}", "mend that line") from None

    name = _convert(table.pop("base", ""), str, f"{path}:base")
    if Path(name) == Path():  # there is none
        return table
    base = path.parent / name
    return _merge(_read(base, base.parent, (*above, path)), table)


def _text_of(path: Path) -> str:
    """Return the text of a recipe's file. Raises OSError, UnicodeDecodeError or UserError."""
    # Reading from a pipe or a device might never end.
    if path.exists() and not path.is_file():
        raise UserError(path, "not a file", "name a recipe's file, as recipes/demo.toml")
    with open(path, "rb") as f:
        content = f.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise UserError(path, f"more than {LARGEST:,} bytes", "name a recipe's file")
    return content.decode("utf-8-sig")


def _merge(under: dict, over: dict) -> dict:
    """Return `over` laid over `under`: tables key by key, any other value as `over` has it.

    The order is that of `under`, followed by what `over` adds.
    """
    merged = dict(under)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            merged[key] = _merge(under[key], value)
        else:
            merged[key] = value
    return merged


def _override(table: dict, text: str):
    """Write `section.key=value` from the command line into the table."""
    dotted, equals, raw = text.partition("=")
    if not equals:
        fix = "write section.key=value, or one recipe.toml first"
        raise UserError(f"command line:{text}", "not an override", fix)

    # A string needs no quotes on the command line, and may have them. Anything else is TOML.
    kind = _type_of(dotted, table)
    if kind is str or raw == AUTO:
        value: object = _without_quotes(raw)
    elif kind == TEXT_OR_NUMBER:
        value = _number_or_text(raw)
    else:
        try:
            value = parse_toml(f"v = {raw}")["v"]
        except ValueError:
            what = f"{raw!r} is not a {_name_of(kind)}"
            fix = HOW_TO_WRITE.get(typing.get_origin(kind) or kind, "write {key = value}")
            raise UserError(f"command line:{dotted}", what, fix) from None

    # The tables on the way to the key need not be in the file.
    *outer, last = dotted.split(".")
    for depth, key in enumerate(outer, 1):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            what = f"{'.'.join(outer[:depth])} is not a table there"
            raise UserError(f"command line:{dotted}", what, "correct the recipe's file")
    table[last] = value


def _without_quotes(raw: str) -> str:
    """Return the text that a TOML string in quotes writes; any other text as it is."""
    if not re.fullmatch(r"\"[^\"\\]*\"|'[^']*'", raw):
        return raw
    return raw[1:-1]


def _number_or_text(raw: str) -> int | float | str:
    """Return the number that a text writes, or the text itself."""
    for kind in (int, float):
        try:
            return kind(raw)
        except ValueError:
            continue
    return raw


def _type_of(dotted: str, table: dict):
    """Return the type of the field that `a.b.c` names; None inside a table that takes any keys.

    The names of stages and sources are not in any dataclass; they must be in the recipe's table.
    """
    where = f"command line:{dotted}"
    keys = dotted.split(".")
    cls = Recipe
    for depth, key in enumerate(keys):
        # stage.NAME or mixture.SOURCE: any name that the recipe has.
        if typing.get_origin(cls) is dict:
            known = table
            for outer in keys[:depth]:
                known = known.get(outer, {})
                if not isinstance(known, dict):
                    fix = "correct the recipe's file"
                    raise UserError(where, f"{outer} is not a table there", fix)
            if key not in known:
                what = "unknown stage" if depth == 1 else "unknown source"
                fix = _nearest(key, known) if known else "add its table"
                raise UserError(where, what, fix)
            _, cls = typing.get_args(cls)  # of dict[str, Stage]

        # Inside a plain dict, as llm_config is: a value is what TOML makes of it.
        elif cls is dict:
            return None

        # Below a number or a string there are no keys. The field itself may have been meant.
        elif not is_dataclass(cls):
            raise UserError(where, "unknown key", _nearest(key, [".".join(keys[:depth])]))

        # A field of a dataclass.
        else:
            hints = typing.get_type_hints(cls)
            if key not in hints:
                raise UserError(where, "unknown key", _nearest(key, hints))
            cls = hints[key]
    return cls


def _build(cls, table: dict, where: str, path: str = ""):
    """Return the dataclass `cls` made from a TOML table, whose every key must be one of its fields.

    where: the recipe's file; path: the table's dotted name in it. Both are for messages.
    """
    if not isinstance(table, dict):
        raise UserError(f"{where}:{path}", "expected a table", f"write [{path}]")

    types = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    values = {}
    for key, value in table.items():
        full = f"{path}.{key}" if path else key
        if key not in known:
            raise UserError(f"{where}:{full}", "unknown key", _nearest(key, known))

        kind = types[key]
        if is_dataclass(kind):
            values[key] = _build(kind, value, where, full)
        elif typing.get_origin(kind) is dict:
            _, named = typing.get_args(kind)  # of dict[str, Stage]
            values[key] = _build_named(named, value, where, full)
        else:
            about = known[key].metadata
            if not (about["auto"] and value == AUTO):
                value = _convert(value, kind, f"{where}:{full}")
            if about["choices"] and value not in about["choices"]:
                what = f"{value!r} is not a choice"
                raise UserError(f"{where}:{full}", what, _nearest(value, about["choices"]))
            if isinstance(value, int | float) and not isinstance(value, bool):
                _check_range(value, f"{where}:{full}", about["low"], about["high"])
            values[key] = value
    return cls(**values)


def _build_named(cls, tables: dict, where: str, path: str) -> dict:
    """Return a `cls` for each named table below `path`: the stages, or the sources of a mixture."""
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise UserError(f"{where}:{path}", "expected named tables", f"write [{path}.NAME]")
    for name in tables:
        check_text(name, f"{where}:{path}")
        if not name.strip():
            raise UserError(f"{where}:{path}", "a table without a name", f"write [{path}.NAME]")
    return {name: _build(cls, table, where, f"{path}.{name}") for name, table in tables.items()}


# A field that names a file, or says how many.
TEXT_OR_NUMBER = str | float

# What to write on the command line or in a file for a value of a type.
HOW_TO_WRITE = {
    int: "write a whole number, as 3",
    float: "write a number, as 0.5",
    bool: "write true or false",
    str: 'write text in quotes, as "abc"',
    dict: "write {} or {key = value}",
    TEXT_OR_NUMBER: 'write a file in quotes, as "val.json", or a number, as 0.02',
}


def _convert(value, kind, where: str):
    """Return one TOML value as `kind`. Raises UserError for another type."""
    # In Python True is an int, but `seed = true` is a mistake.
    is_bool = isinstance(value, bool)

    # `fps = 1` is as good as 1.0. Of more than 64 bits an integer is none in TOML.
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(where, "an integer of more than 64 bits", "write a smaller one")
    takes_float = kind in (float, TEXT_OR_NUMBER)
    if takes_float and isinstance(value, int) and not is_bool:
        value = float(value)

    if not isinstance(value, kind) or (is_bool and kind is not bool):
        raise UserError(where, f"{value!r} is not a {_name_of(kind)}", HOW_TO_WRITE[kind])
    if isinstance(value, str):
        check_text(value, where)
    elif kind is dict:
        _check_free(value, where)
    return value


def _name_of(kind) -> str:
    """Return what messages and --help call a type."""
    if kind == TEXT_OR_NUMBER:
        return "str or float"
    return getattr(kind, "__name__", "value")


def _check_range(value: float, where: str, low: float, high: float):
    """Raise UserError for a number out of its range, or none, as NaN."""
    if not low <= value <= high:
        fix = f"write {_number(low)} to {_number(high)}"
        raise UserError(where, f"{value} is out of range", fix)


def _number(value: float) -> str:
    """Return a limit of a range for people: 1,000,000 or 1e-09."""
    if value == int(value):
        return f"{int(value):,}"
    return str(value)


def check_text(text: str, where: str):
    """Raise UserError for text that is not Unicode, or has control characters.

    Python reads bytes of the command line that are not UTF-8 as halves of surrogate pairs. No file
    can hold those; no path, name or number holds a control character on purpose.
    """
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cs":
            raise UserError(where, f"{text!r} is not UTF-8", "write it in UTF-8")
        if kind == "Cc":
            what = f"{text!r} has a control character"
            raise UserError(where, what, "write it without")


def _check_free(value, where: str, depth: int = 0):
    """Raise UserError for what a config.json could not say: dates, huge integers, deep nesting."""
    if depth > MOST_NESTED:
        raise UserError(where, "nested too deeply", "write it as a config.json has it")
    if isinstance(value, dict):
        for key, inner in value.items():
            check_text(key, where)
            _check_free(inner, f"{where}.{key}", depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_free(inner, where, depth + 1)
    elif isinstance(value, (str, bool, int, float)):
        _convert(value, type(value), where)
    else:
        what = f"{value} is a {type(value).__name__}"
        raise UserError(where, what, "write a number, text in quotes, true or false")


def _nearest(key: str, known: Iterable[str]) -> str:
    """Return the end of a message: the known name that `key` may have meant, or all of them."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"one of: {', '.join(known)}"


# ------------------------------------------------------------------------- from a Recipe to text


def dumps(recipe: Recipe) -> str:
    """Return the recipe as TOML, with every field. `load` reads it back."""
    lines: list[str] = []
    _write_table(recipe, "", lines)
    return "\n".join(lines)


def _write_table(part, path: str, lines: list[str]):
    """Append the dataclass `part` as the table [path]: its own fields, then the tables in it."""
    if path:
        lines.append(f"[{path}]")

    # In TOML a table's own fields come before the tables in it.
    nested = []
    for f in fields(part):
        value = getattr(part, f.name)
        full = f"{path}.{f.name}" if path else f.name
        if is_dataclass(value):
            nested.append((full, value))
        elif isinstance(value, dict) and value and all(map(is_dataclass, value.values())):
            for name, table in value.items():
                nested.append((f"{full}.{_key(name)}", table))
        else:
            lines.append(f"{f.name} = {_toml(value)}")

    if path:
        lines.append("")
    for full, table in nested:
        _write_table(table, full, lines)


def _key(name: str) -> str:
    """Return a key as TOML writes it: bare, or in quotes if it has other characters."""
    if re.fullmatch("[A-Za-z0-9_-]+", name):
        return name
    return _toml(name)


def _toml(value) -> str:
    """Return a value as inline TOML."""
    if isinstance(value, dict):
        pairs = [f"{_key(k)} = {_toml(v)}" for k, v in value.items()]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)  # inf and nan are written as Python does
    text = json.dumps(value, ensure_ascii=False)

    # The one control character that JSON writes as it is, and TOML forbids.
    return text.replace("\x7f", "\\u007f")


class Difference(NamedTuple):
    """A field that two recipes have different values of."""

    name: str  # section.key
    old: object  # None where there is no such field, stage or key
    new: object

    def __str__(self) -> str:
        return f"{self.name}: {self.old!r} -> {self.new!r}"


def differences(saved: str, recipe: Recipe) -> tuple[list[Difference], list[Difference]]:
    """Return what differs between a saved recipe.toml and a recipe: what decides, and the rest.

    saved: the text of the file. What it does not say has the default, so an older version's file
    is equal where the run is. Raises ValueError, and nothing else, if it is not TOML.
    """
    deciding: list[Difference] = []
    others: list[Difference] = []
    _compare(Recipe, parse_toml(saved), asdict(recipe), "", deciding, others)
    return deciding, others


def _compare(cls, old, new: dict, path: str, deciding: list, others: list):
    """Append each difference of the table [path] in two recipes. cls: its dataclass."""
    if not isinstance(old, dict):
        deciding.append(Difference(path, old, "a table"))
        return

    types = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    for name, f in known.items():
        full = f"{path}.{name}" if path else name
        kind = types[name]
        found = others
        if f.metadata["decides"]:
            found = deciding

        # A file of held-out rows may be another one. How many are held out decides what is left.
        if kind == TEXT_OR_NUMBER and float in (type(old.get(name)), type(new[name])):
            found = deciding

        if is_dataclass(kind):
            _compare(kind, old.get(name, {}), new[name], full, deciding, others)
        elif typing.get_origin(kind) is dict:
            _, named = typing.get_args(kind)  # of dict[str, Stage]
            _compare_named(named, old.get(name, {}), new[name], full, deciding, others)
        elif kind is dict:
            _compare_free(old.get(name, {}), new[name], full, found)
        elif old.get(name, f.default) != new[name]:
            found.append(Difference(full, old.get(name, f.default), new[name]))

    # A field that only another version has: nobody knows here what it decided.
    for name in old:
        if name not in known:
            deciding.append(Difference(f"{path}.{name}" if path else name, old[name], None))


def _compare_named(cls, old, new: dict, path: str, deciding: list, others: list):
    """Append each difference of the named tables below `path`: the stages, or a mixture's sources.

    Their order decides, too: a stage begins with what the one before it has trained.
    """
    if not isinstance(old, dict):
        deciding.append(Difference(path, old, "a table"))
        return
    if list(old) != list(new):
        deciding.append(Difference(path, list(old), list(new)))
        return
    for name, table in new.items():
        _compare(cls, old[name], table, f"{path}.{name}", deciding, others)


def _compare_free(old, new, path: str, found: list):
    """Append each difference of a table that takes any keys, in any order."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        if old != new:
            found.append(Difference(path, old, new))
        return
    for key in {**old, **new}:
        _compare_free(old.get(key), new.get(key), f"{path}.{key}", found)


def help_table() -> str:
    """Return every field with its type, default, reason and range, in the order of a recipe."""
    sections = {
        "model": Model,
        "train": Train,
        "stage.NAME": Stage,
        "stage.NAME.mixture.SOURCE": Source,
    }
    lines = [
        "",
        "* = a stopped run may go on with another value; no other field may change",
        f'"{AUTO}" = chosen by the number of rows, and printed (training/small_sets.py)',
    ]
    for path, cls in sections.items():
        _describe(cls, path, lines)

    lines.append("\n[published]")
    lines.append(" *BENCHMARK = NUMBER, as the original authors report it for this recipe")
    lines.append('\nbase = "FILE.toml" before all tables: the recipe that this one is laid over')
    return "\n".join(lines)


def _describe(cls, path: str, lines: list[str]):
    """Append a line for each field of the table [path], then the same for the tables in it."""
    lines.append(f"\n[{path}]")
    types = typing.get_type_hints(cls)
    nested = []
    for f in fields(cls):
        kind = types[f.name]
        if is_dataclass(kind):
            nested.append((kind, f"{path}.{f.name}"))
            continue

        default = f.default
        if f.default_factory is dict:
            default = {}
        mark = " " if f.metadata["decides"] else "*"
        shown = f"{_name_of(kind):<7}{json.dumps(default):<13}"
        line = f" {mark}{f.name:<24}{shown} {f.metadata['why']}"
        if f.metadata["low"] is not None:
            limits = f"{_number(f.metadata['low'])} to {_number(f.metadata['high'])}"
            if f.metadata["auto"]:
                limits += f', or "{AUTO}"'
            line += f" ({limits})"
        lines.append(line)

    for kind, full in nested:
        _describe(kind, full, lines)
