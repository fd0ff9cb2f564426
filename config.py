"""Recipes: frozen dataclasses -> a TOML file -> `section.key=value` overrides -> `--help`.

    torchrun train.py recipes/qwen2-siglip-base.toml stage.finetune.learning_rate=1e-5 train.output=out/mine

A recipe says what an experiment is: a model, how the run behaves, and its stages in order. Each field is
written once, here, with its reason; `--help` prints this file's table. An unknown key is an error that names
the nearest known one, and the resolved recipe (every field, defaults included) is saved beside the checkpoint.
`base = "FILE.toml"` lays a recipe over another one, table by table, so that it states only what differs.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import tomllib
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path


class UserError(ValueError):
    """A mistake the user can mend. Printed as one line: `error: <file>:<row or key>: <what>; fix: <action>`."""

    def __init__(self, where, what: str, fix: str):
        super().__init__(f"{where}: {what}; fix: {fix}")


def opt(default, why: str, choices: tuple[str, ...] = (), compare: bool = True):
    """A field: its default, the reason it exists, for an enumeration its values, and whether it decides what runs."""
    metadata = {"why": why, "choices": choices}
    if isinstance(default, (dict, type)):
        return field(
            default_factory=dict if default == {} else default, metadata=metadata, compare=compare
        )
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Model:
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
    feature_layer: int = opt(
        -2, "which hidden state of the encoder is used; 0 = embeddings, -1 = last block"
    )
    feature_select: str = opt(
        "patch", "patch drops token 0, as LLaVA does; cls_patch keeps all", ("patch", "cls_patch")
    )
    image_mode: str = opt(
        "square", "square resizes; pad makes a square first; tiles, anyres: high resolution, see views.py",
        ("square", "pad", "tiles", "anyres"),
    )  # fmt: skip
    image_grids: str = opt(
        "1x2 2x1 2x2 3x1 1x3", "tiles, anyres: the grids to choose from, rows x columns"
    )
    frames: int = opt(16, "how many frames of a video are seen, evenly from its first to its last")
    fps: float = opt(0.0, "so many a second instead, at most `frames`; 0 = always `frames`")

    @property
    def text(self) -> str:
        """Where the tokenizer is."""
        return self.tokenizer or self.llm or self.checkpoint


@dataclass(frozen=True)
class Train:
    output: str = opt("out/run", "folder of the final model, its log and its checkpoints")
    seed: int = opt(0, "decides initial weights and the order of samples, nothing else is random")
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
    parallel: str = field(  # not compared: a run may go on with another, or with other ranks
        default="auto", compare=False,
        metadata={"why": "ddp copies the model to every rank, fsdp shards it; auto = ddp while it fits half a GPU",
                  "choices": ("auto", "none", "ddp", "fsdp")},
    )  # fmt: skip
    resume: str = field(
        default="", compare=False,
        metadata={"why": "go on from this checkpoint and no other; empty = the newest whole one", "choices": ()},
    )  # fmt: skip


@dataclass(frozen=True)
class Tune:
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
        "names or globs of linears, ours or Hugging Face's: q_proj,v_proj; empty = all but the head",
    )
    adapter: str = opt(
        "",
        "a PEFT folder to go on from: what it holds starts with its values, at its rank and alpha",
    )


@dataclass(frozen=True)
class Rates:
    llm: float = opt(0.0, "learning rate of this part; 0 = the stage's learning_rate")
    vision: float = opt(0.0, "as above; a pretrained encoder usually wants a tenth")
    connector: float = opt(0.0, "as above")


@dataclass(frozen=True)
class Source:
    data: str = opt("", "as the stage's data")
    images: str = opt("", "as the stage's images")
    weight: float = opt(
        1.0,
        "an epoch takes weight x rows: 2 = each twice, 0.1 = a tenth, in the next epoch another",
    )


@dataclass(frozen=True)
class Stage:
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
    template: str = opt("pretrain", "chat template, see templates.py")
    tune: Tune = opt(Tune, "what trains in this stage")
    lora: LoRA = opt(LoRA, "adapters of the parts that tune says are lora or qlora")
    rate: Rates = opt(Rates, "learning rate per part")
    learning_rate: float = opt(1e-3, "peak of the warm-up + cosine schedule")
    weight_decay: float = opt(0.0, "AdamW, never on biases and norms")
    beta2: float = opt(0.999, "AdamW's second-moment decay; short runs want less")
    warmup_ratio: float = opt(0.03, "share of the steps that warm up")
    max_grad_norm: float = opt(1.0, "the gradient of a step is clipped to this norm")
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
    model: Model = opt(Model, "the model")
    train: Train = opt(Train, "the run")
    stage: dict[str, Stage] = opt({}, "[stage.NAME] tables; each stage starts from the one before")
    published: dict = opt(
        {}, "scores that the original authors report, by benchmark", compare=False
    )


@dataclass(frozen=True)
class LLaVAConfig:
    """What makes a model, whatever layout it came from; text and vision are Hugging Face config dicts, verbatim."""

    text: dict
    vision: dict
    preprocessor: dict = field(default_factory=dict)
    connector: str = "mlp2x_gelu"
    connector_options: dict = field(default_factory=dict)
    feature_layer: int = -2
    feature_select: str = "patch"
    image_mode: str = "square"
    template: str = "llama"
    image_scale: float = (
        1.0  # on the connector's output; only Gemma in transformers 5 needs another
    )
    sources: dict = field(
        default_factory=dict
    )  # llm, vision, vision2: the names the parts were loaded by
    image_grids: str = Model.image_grids
    frames: int = Model.frames
    fps: float = Model.fps

    def __post_init__(self):
        if (self.connector == "mof_mlp") != (self.vision.get("model_type") == "mof"):
            raise UserError("model.connector", f"{self.connector} with {self.vision.get('model_type')}",
                            "mof_mlp and the mixture of CLIP and DINOv2 (model.vision2) need each other")  # fmt: skip


def _nearest(key: str, known) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"one of: {', '.join(known)}"


def _convert(value, kind, where: str, choices: tuple[str, ...]):
    """One TOML value as `kind`, or an error that says which type was expected."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, Path):
        value = str(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(where, f"{value!r} is not a {kind.__name__}", f"write a {kind.__name__}")
    if choices and value not in choices:
        raise UserError(where, f"{value!r} is not a choice", _nearest(str(value), choices))
    return value


def _build(cls, table: dict, where: str, path: str = ""):
    """The dataclass `cls` from a TOML table; every key of the table must be a field."""
    if not isinstance(table, dict):
        raise UserError(f"{where}:{path}", "expected a table", f"write [{path}]")
    hints, known = typing.get_type_hints(cls), {f.name: f for f in fields(cls)}
    values = {}
    for key, value in table.items():
        full = f"{path}.{key}" if path else key
        if key not in known:
            raise UserError(f"{where}:{full}", "unknown key", _nearest(key, known))
        kind = hints[key]
        if is_dataclass(kind):
            values[key] = _build(kind, value, where, full)
        elif typing.get_origin(kind) is dict:  # stage: name -> Stage, mixture: name -> Source
            if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
                raise UserError(f"{where}:{full}", "expected named tables", f"write [{full}.NAME]")
            inner = typing.get_args(kind)[1]
            values[key] = {
                name: _build(inner, v, where, f"{full}.{name}") for name, v in value.items()
            }
        else:
            values[key] = _convert(value, kind, f"{where}:{full}", known[key].metadata["choices"])
    return cls(**values)


def _leaf_type(dotted: str, table: dict):
    """The type of the field that `a.b.c` names (stage names come from the recipe), for reading its override."""
    cls = Recipe
    keys = dotted.split(".")
    for depth, key in enumerate(keys):
        hints = typing.get_type_hints(cls) if is_dataclass(cls) else {}
        if typing.get_origin(cls) is dict:
            known = table
            for outer in keys[:depth]:
                known = known.get(outer, {})
            if key not in known:
                what = f"unknown {'stage' if depth == 1 else 'source'}"
                raise UserError(
                    f"command line:{dotted}",
                    what,
                    _nearest(key, known) if known else "add its table",
                )
            cls = typing.get_args(cls)[1]
        elif cls is dict:
            return None  # inside llm_config or vision_config: whatever TOML makes of the value
        elif key not in hints:
            raise UserError(
                f"command line:{dotted}",
                "unknown key",
                _nearest(key, hints or [".".join(keys[:depth])]),
            )
        else:
            cls = hints[key]
    return cls


def _override(table: dict, text: str):
    dotted, eq, raw = text.partition("=")
    if not eq:
        raise UserError(
            f"command line:{text}",
            "not an override",
            "write section.key=value, or one recipe.toml first",
        )
    kind = _leaf_type(dotted, table)
    value: object = raw
    if kind is not str:
        try:
            value = tomllib.loads(f"v = {raw}")["v"]
        except tomllib.TOMLDecodeError:
            expected = getattr(kind, "__name__", "value")
            raise UserError(
                f"command line:{dotted}", f"{raw!r} is not a {expected}", f"write a {expected}"
            ) from None
    for key in dotted.split(".")[:-1]:
        table = table.setdefault(key, {})
    table[dotted.split(".")[-1]] = value


def _merge(under: dict, over: dict) -> dict:
    """Tables key by key, anything else as `over` has it; the order is that of `under`, then what `over` adds."""
    both = {
        k: _merge(under[k], v)
        for k, v in over.items()
        if isinstance(v, dict) and isinstance(under.get(k), dict)
    }
    return under | over | both


def _read(path: Path, folder: Path, above: tuple[Path, ...] = ()) -> dict:
    """A recipe's table laid over its base's. `above` led here, `folder` holds what a misspelt name may have meant."""
    if path.resolve() in [p.resolve() for p in above]:
        raise UserError(
            f"{above[-1]}:base",
            f"{path} is itself based on this recipe",
            "remove one base of the circle",
        )
    try:
        table = tomllib.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError):
        near = _nearest(path.name, sorted(p.name for p in folder.glob("*.toml")))
        where, what = (
            (f"{above[-1]}:base", f"no such recipe {path.name}")
            if above
            else (path, "no such recipe")
        )
        raise UserError(where, what, near) from None
    except tomllib.TOMLDecodeError as e:
        raise UserError(path, f"not TOML: {e}", "mend that line") from None
    base = path.parent / _convert(table.pop("base", ""), str, f"{path}:base", ())
    return table if base == path.parent else _merge(_read(base, base.parent, (*above, path)), table)


def load(argv: list[str], default: str | Path) -> tuple[Recipe, Path]:
    """The recipe that a command line `[recipe.toml] [section.key=value ...]` names, and its file.

    Raises UserError for a missing file, a circle of bases, bad TOML, an unknown key, a wrong type or a wrong choice.
    """
    argv = list(argv)
    path = Path(argv.pop(0)) if argv and "=" not in argv[0] else Path(default)
    table = _read(path, Path(default).parent)
    for text in argv:
        _override(table, text)
    recipe = _build(Recipe, table, str(path))
    if not recipe.stage:
        raise UserError(path, "no stage", "write a [stage.NAME] table")
    return recipe, path


def dumps(recipe) -> str:
    """The recipe as TOML with every field that decides what runs written out; `load` reads it back equal."""
    lines: list[str] = []

    def inline(value) -> str:
        if isinstance(value, dict):
            return (
                "{"
                + ", ".join(f"{k} = {inline(v)}" for k, v in value.items() if v is not None)
                + "}"
            )
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(inline, value)) + "]"
        return json.dumps(value, ensure_ascii=False)

    def table(part, path: str):
        nested = []
        if path:
            lines.append(f"[{path}]")
        for f in (f for f in fields(part) if f.compare):
            value, full = getattr(part, f.name), f"{path}.{f.name}" if path else f.name
            if is_dataclass(value):
                nested.append((full, value))
            elif isinstance(value, dict) and value and all(is_dataclass(v) for v in value.values()):
                nested += [(f"{full}.{name}", v) for name, v in value.items()]
            else:
                lines.append(f"{f.name} = {inline(value)}")
        if path:
            lines.append("")
        for full, value in nested:
            table(value, full)

    table(recipe, "")
    return "\n".join(lines)


MIXTURE = "stage.NAME.mixture.SOURCE"


def help_table() -> str:
    """Every field with its type, default and reason, in the order of a recipe."""
    rows: list[str] = []

    def walk(cls, path: str):
        hints = typing.get_type_hints(cls)
        rows.append(f"\n[{path}]")
        for f in fields(cls):
            kind = hints[f.name]
            if is_dataclass(kind):
                continue
            default = json.dumps({} if f.default_factory is dict else f.default)
            why = f.metadata["why"]
            rows.append(f"  {f.name:<24}{kind.__name__:<7}{default:<14}{why}")
        for f in fields(cls):
            if is_dataclass(hints[f.name]):
                walk(hints[f.name], f"{path}.{f.name}")

    for section, cls in (
        ("model", Model),
        ("train", Train),
        ("stage.NAME", Stage),
        (MIXTURE, Source),
    ):
        walk(cls, section)
    rows.append(
        "\n[published]\n  BENCHMARK = NUMBER, as the original authors report it for this recipe"
    )
    return (
        "\n".join(rows)
        + '\n\nbase = "FILE.toml" before all tables: the recipe that this one is laid over'
    )


def parser(doc: str) -> argparse.ArgumentParser:
    """argparse with the script's docstring as its help, and its complaints in the one-line form."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)

    def error(message: str):
        sys.exit(f"error: command line: {message}; fix: see python {made.prog} --help")

    made.error = error
    return made


def cli(main, doc: str, fields_help: bool = False):
    """Run a script: `--help` prints its docstring, and a mistake of the user ends it with one line and exit code 1.

    A mistake of the user is a ValueError that says its fix (UserError, or what templates.py raises); any other
    exception is one of ours and keeps its traceback.
    """
    if {"-h", "--help"} & set(sys.argv[1:]) and fields_help:
        print(doc.strip() + "\n" + help_table())
        return
    try:
        main(sys.argv[1:])
    except ValueError as e:
        if "; fix: " not in str(e):
            raise
        sys.stdout.flush()
        sys.exit(f"error: {e}")
