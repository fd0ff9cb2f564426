"""Recipes: what an experiment is, how a TOML file becomes one, and how the command line works.

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
    dumps, help_table                 back to TOML; the table that --help prints
    parser, cli                       the command line, the same for every script of the project
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import tomllib
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path


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


class UserError(ValueError):
    """A mistake that the user can mend, printed as one line:

    error: <file>:<row or key>: <what>; fix: <action>
    """

    def __init__(self, where, what: str, fix: str):
        # All three may quote what a file holds.
        where = printable(where, 1000)
        super().__init__(f"{where}: {printable(what)}; fix: {printable(fix, 2000)}")


def opt(default, why: str, choices: tuple[str, ...] = (), compare: bool = True):
    """Return a field of a recipe.

    default: a value, {} for a table of anything, or a dataclass of this file for a table of its
    fields.
    why: the reason the field exists, as --help prints it.
    choices: the only values it takes; empty = any value of its type.
    compare: whether it decides what a run computes. If not, it is left out of the saved recipe and
    of comparisons, so a stopped run may go on with another value.
    """
    metadata = {"why": why, "choices": choices}

    # Tables are made anew for each recipe: dataclasses forbid to share a default that can change.
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata, compare=compare)
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata, compare=compare)

    return field(default=default, metadata=metadata, compare=compare)


# ------------------------------------------------------------------------------- what a recipe says


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
    connector_options: dict = opt({}, "sizes of a resampler or qformer, see connectors.py")
    tokenizer: str = opt("", "folder with tokenizer.json or tokenizer.model; empty = the llm's")
    llm_config: dict = opt(
        {}, "build the llm from these config.json fields with random weights, load nothing"
    )
    vision_config: dict = opt({}, "the same for the vision encoder")
    allow_pickle: bool = opt(
        False, "also read pytorch_model.bin (tensors only) where a folder has no safetensors"
    )

    # What the connector gets from the encoder.
    feature_layer: int = opt(
        -2, "which hidden state of the encoder is used; 0 = embeddings, -1 = last block"
    )
    feature_select: str = opt(
        "patch", "patch drops token 0, as LLaVA does; cls_patch keeps all", ("patch", "cls_patch")
    )

    # What the encoder gets from a picture or a video.
    image_mode: str = opt(
        "square",
        "square resizes; pad makes a square first; tiles, anyres: high resolution, "
        "see inputs/tiling.py",
        ("square", "pad", "tiles", "anyres"),
    )
    image_grids: str = opt(
        "1x2 2x1 2x2 3x1 1x3", "tiles, anyres: the grids to choose from, rows x columns"
    )
    frames: int = opt(16, "how many frames of a video are seen, evenly from its first to its last")
    fps: float = opt(0.0, "so many a second instead, at most `frames`; 0 = always `frames`")

    @property
    def tokenizer_source(self) -> str:
        """The folder or id that the tokenizer comes from."""
        return self.tokenizer or self.llm or self.checkpoint


@dataclass(frozen=True)
class Train:
    """The table [train]: how a run behaves, whatever it trains."""

    output: str = opt("out/run", "folder of the final model, its log and its checkpoints")
    seed: int = opt(0, "decides initial weights and the order of samples, nothing else is random")

    # The machine.
    precision: str = opt(
        "auto", "auto = bf16 where the hardware has it, else fp32", ("auto", "fp32", "bf16")
    )
    device: str = opt("auto", "auto = cuda if there is one", ("auto", "cpu", "cuda"))
    workers: int = opt(
        2, "processes per rank that read, decode and tokenize ahead; 0 = in the main process"
    )
    on_bad_row: str = opt(
        "stop", "stop at the first unusable row, or skip: log it, take the next", ("stop", "skip")
    )
    gradient_checkpointing: bool = opt(
        False, "recompute each block in backward: less memory, a third more time"
    )
    compile: bool = opt(False, "torch.compile every block: minutes at first, then less time a step")

    # What is reported and kept.
    log_every: int = opt(10, "steps between progress lines")
    save_every: int = opt(200, "steps between checkpoints to resume from")
    keep: int = opt(2, "how many such checkpoints to keep")
    keep_best: bool = opt(
        False, "also keep the lowest validation loss of a stage; the last stage's is OUTPUT/best"
    )
    answers: int = opt(
        0, "at each validation, also show what the model answers to this many of the held-out rows"
    )
    log: str = opt(
        "none",
        "also send the log there; either is an optional package",
        ("none", "tensorboard", "wandb"),
    )

    # A stopped run may go on with other values of these, so they are not compared.
    parallel: str = opt(
        "auto",
        "ddp copies the model to every rank, fsdp shards it; auto = ddp while it fits half a GPU",
        ("auto", "none", "ddp", "fsdp"),
        compare=False,
    )
    resume: str = opt(
        "", "go on from this checkpoint and no other; empty = the newest whole one", compare=False
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
        128, "rank of the adapters (Hu et al., 2021): their size, and what they can express"
    )
    alpha: float = opt(256.0, "an adapter's output is multiplied by alpha / r")
    dropout: float = opt(0.05, "share of an adapter's inputs that training drops")
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

    llm: float = opt(0.0, "learning rate of this part; 0 = the stage's learning_rate")
    vision: float = opt(0.0, "as above; a pretrained encoder usually wants a tenth")
    connector: float = opt(0.0, "as above")


@dataclass(frozen=True)
class Source:
    """A table [stage.NAME.mixture.SOURCE]: one of several data sets of a stage."""

    data: str = opt("", "as the stage's data")
    images: str = opt("", "as the stage's images")
    weight: float = opt(
        1.0,
        "an epoch takes weight x rows: 2 = each twice, 0.1 = a tenth, in the next epoch another",
    )


@dataclass(frozen=True)
class Stage:
    """A table [stage.NAME]: one pass of the training loop."""

    # The data.
    data: str = opt(
        "", "LLaVA rows: a .json list, a .jsonl file, or tar shards (a folder or glob of them)"
    )
    images: str = opt(
        "", "folder that the rows' image paths start from; empty = the data file's folder"
    )
    mixture: dict[str, Source] = opt(
        {}, "[stage.NAME.mixture.SOURCE] tables: several sources instead of data"
    )
    validation: str = opt("", "held-out rows for the validation loss; empty = none")
    validation_every: int = opt(
        200, "steps between validation passes (one more at the end of the stage)"
    )
    template: str = opt("pretrain", "chat template, see inputs/templates.py")

    # What trains.
    tune: Tune = opt(Tune, "what trains in this stage")
    lora: LoRA = opt(LoRA, "adapters of the parts that tune says are lora or qlora")

    # The optimizer.
    rate: Rates = opt(Rates, "learning rate per part")
    learning_rate: float = opt(1e-3, "peak of the warm-up + cosine schedule")
    weight_decay: float = opt(0.0, "AdamW, never on biases and norms")
    beta2: float = opt(0.999, "AdamW's second-moment decay; short runs want less")
    warmup_ratio: float = opt(0.03, "share of the steps that warm up")
    max_grad_norm: float = opt(1.0, "the gradient of a step is clipped to this norm")

    # How long, and in what portions.
    epochs: float = opt(1.0, "passes over the data")
    steps: int = opt(0, "stop after this many steps instead; 0 = epochs decide")
    global_batch: int = opt(128, "samples per optimizer step, whatever the ranks and micro-batches")
    micro_batch_tokens: int = opt(
        16384, "a micro-batch packs samples up to this many tokens; 0 = one sample each"
    )
    max_tokens: int = opt(
        2048, "longest sample; a longer one loses text from its tail, never an image"
    )


@dataclass(frozen=True)
class Recipe:
    """A whole experiment."""

    model: Model = opt(Model, "the model")
    train: Train = opt(Train, "the run")
    stage: dict[str, Stage] = opt({}, "[stage.NAME] tables; each stage starts from the one before")
    published: dict = opt(
        {}, "scores that the original authors report, by benchmark", compare=False
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


def load(argv: list[str], default: str | Path) -> tuple[Recipe, Path]:
    """Return the recipe that a command line names, and its file.

    argv: [recipe.toml] [section.key=value ...]
    default: the recipe's file where the command line names none.

    Raises UserError for a missing file, a circle of bases, bad TOML, an unknown key, a wrong type
    or a wrong choice.
    """
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
    if not recipe.stage:
        raise UserError(path, "no stage", "write a [stage.NAME] table")
    return recipe, path


def _read(path: Path, folder: Path, above: tuple[Path, ...] = ()) -> dict:
    """Return the table of a TOML file, laid over that of its base.

    folder: where to look for what a misspelt name may have meant.
    above: the files that led here, each the base of the one before it.
    """
    if path.resolve() in [p.resolve() for p in above]:
        what = f"{path} is itself based on this recipe"
        raise UserError(f"{above[-1]}:base", what, "remove one base of the circle")

    try:
        table = tomllib.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError):
        near = _nearest(path.name, sorted(p.name for p in folder.glob("*.toml")))
        if above:
            raise UserError(f"{above[-1]}:base", f"no such recipe {path.name}", near) from None
        raise UserError(path, "no such recipe", near) from None
    except tomllib.TOMLDecodeError as e:
        raise UserError(path, f"not TOML: {e}", "mend that line") from None

    name = _convert(table.pop("base", ""), str, f"{path}:base", ())
    if Path(name) == Path():  # there is none
        return table
    base = path.parent / name
    return _merge(_read(base, base.parent, (*above, path)), table)


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

    # A string needs no quotes on the command line. Anything else is read as TOML.
    kind = _type_of(dotted, table)
    if kind is str:
        value: object = raw
    else:
        try:
            value = tomllib.loads(f"v = {raw}")["v"]
        except tomllib.TOMLDecodeError:
            expected = getattr(kind, "__name__", "value")
            what = f"{raw!r} is not a {expected}"
            raise UserError(f"command line:{dotted}", what, f"write a {expected}") from None

    # The tables on the way to the key need not be in the file.
    *outer, last = dotted.split(".")
    for key in outer:
        table = table.setdefault(key, {})
    table[last] = value


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
            choices = known[key].metadata["choices"]
            values[key] = _convert(value, kind, f"{where}:{full}", choices)
    return cls(**values)


def _build_named(cls, tables: dict, where: str, path: str) -> dict:
    """Return a `cls` for each named table below `path`: the stages, or the sources of a mixture."""
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise UserError(f"{where}:{path}", "expected named tables", f"write [{path}.NAME]")
    return {name: _build(cls, table, where, f"{path}.{name}") for name, table in tables.items()}


def _convert(value, kind, where: str, choices: tuple[str, ...]):
    """Return one TOML value as `kind`. Raises UserError for another type or choice."""
    # In Python True is an int, but `seed = true` is a mistake.
    is_bool = isinstance(value, bool)

    # `fps = 1` is as good as 1.0.
    if kind is float and isinstance(value, int) and not is_bool:
        value = float(value)

    if not isinstance(value, kind) or (is_bool and kind is not bool):
        raise UserError(where, f"{value!r} is not a {kind.__name__}", f"write a {kind.__name__}")
    if choices and value not in choices:
        raise UserError(where, f"{value!r} is not a choice", _nearest(str(value), choices))
    return value


def _nearest(key: str, known: Iterable[str]) -> str:
    """Return the end of a message: the known name that `key` may have meant, or all of them."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"one of: {', '.join(known)}"


# ------------------------------------------------------------------------- from a Recipe to text


def dumps(recipe: Recipe) -> str:
    """Return the recipe as TOML, with every field that decides what runs. `load` reads it back.

    A run that goes on compares this text with its recipe.toml, so it must not change from version
    to version where the recipe does not.
    """
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
        if not f.compare:
            continue
        value = getattr(part, f.name)
        full = f"{path}.{f.name}" if path else f.name
        if is_dataclass(value):
            nested.append((full, value))
        elif isinstance(value, dict) and value and all(map(is_dataclass, value.values())):
            for name, table in value.items():
                nested.append((f"{full}.{name}", table))
        else:
            lines.append(f"{f.name} = {_toml(value)}")

    if path:
        lines.append("")
    for full, table in nested:
        _write_table(table, full, lines)


def _toml(value) -> str:
    """Return a value as inline TOML. TOML has no null: keys whose value is None are left out."""
    if isinstance(value, dict):
        pairs = [f"{k} = {_toml(v)}" for k, v in value.items() if v is not None]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def help_table() -> str:
    """Return every field with its type, default and reason, in the order of a recipe."""
    sections = {
        "model": Model,
        "train": Train,
        "stage.NAME": Stage,
        "stage.NAME.mixture.SOURCE": Source,
    }
    lines: list[str] = []
    for path, cls in sections.items():
        _describe(cls, path, lines)

    lines.append("\n[published]")
    lines.append("  BENCHMARK = NUMBER, as the original authors report it for this recipe")
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
        what = f"{f.name:<24}{kind.__name__:<7}{json.dumps(default):<13}"
        lines.append(f"  {what} {f.metadata['why']}")

    for kind, full in nested:
        _describe(kind, full, lines)


# --------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints in the one-line form."""

    def error(self, message: str):
        """End with one line, where argparse would also print the usage."""
        sys.exit(f"error: command line: {message}; fix: see python {self.prog} --help")


def parser(doc: str) -> Parser:
    """Return a parser for a script; `--help` prints its docstring as it stands."""
    return Parser(description=doc, formatter_class=argparse.RawTextHelpFormatter)


def cli(main: Callable[[list[str]], object], doc: str, fields_help: bool = False):
    """Run a script: call main with the command line; end with one line if the user made a mistake.

    A mistake of the user is a ValueError that says its fix: a UserError, or what
    inputs/templates.py raises. Its line goes to stderr, and the exit code is 1. Any other exception
    is a mistake of ours and keeps its traceback.

    fields_help: answer --help here, with the docstring and every field of a recipe. Otherwise
    main's own parser answers it.
    """
    argv = sys.argv[1:]
    asks_for_help = "-h" in argv or "--help" in argv
    if asks_for_help and fields_help:
        print(doc.strip() + "\n" + help_table())
        return

    try:
        main(argv)
    except ValueError as e:
        if "; fix: " not in str(e):
            raise
        sys.stdout.flush()  # what was printed before stays above the error
        sys.exit(f"error: {e}")
