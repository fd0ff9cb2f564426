"""What a recipe needs before it runs: its files, parameters, memory and hours.

    python train.py --list                                      # all recipes and their scores
    python train.py RECIPE [section.key=value ...] --dry-run    # what this one would take
    python train.py RECIPE ... --dry-run --memory 24            # and whether GPUs of 24 GB take it

A dry run loads no weights. It finds every file that the recipe names (`find_files`) and builds the
model from its config files on the meta device, so that parameters are exact. Of each stage it
prints the operations (estimate.py), the memory (memory.py) and, where a GPU is too small, what to
lower. The models that the published recipes name are planned without the Hub, too:
known_configs.json has their sizes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from checkpoints import gguf, layouts, weights
from checkpoints.files import read_json, write_file
from config import Model, Recipe, Stage, UserError, load
from data import Steps
from inputs import hub
from inputs.holdout import open_stage, validation_file
from inputs.rows import RowMixture, Rows, is_here
from inputs.sample import SampleSpec
from inputs.tokenizer import Tokenizer, load_tokenizer
from model import LLaVA
from training import small_sets
from training.estimate import GPUS, SHARE, RowSize, hours, mean_row, operations
from training.memory import Memory, measure, sharded
from training.ranks import print0

ASSUMED_ROWS = 100_000  # of a stage whose data is not there

KNOWN = Path(__file__).parent / "known_configs.json"

# The benchmarks whose published scores recipes state: those of pictures, and those of videos.
BENCHMARKS = ("VQAv2", "GQA", "SQA-I", "TextVQA", "MM-Vet", "POPE", "MME", "MMMU")
VIDEO = ("VideoMME", "MVBench", "LongVideoBench", "MLVU", "MMVU")


# ------------------------------------------------------------------------------------------- --list


def print_recipes(folder: Path):
    """Print tables of the recipes in a folder: their models, what trains, the published scores."""
    columns = ("recipe", "llm", "vision", "trains")
    pictures = [(*columns, *BENCHMARKS)]
    videos = [(*columns, *VIDEO)]

    for file in sorted(folder.glob("*.toml")):
        recipe, _ = load([str(file)], file)

        # One that names no model is a base for other recipes.
        model = recipe.model
        if not (model.llm or model.llm_config or model.checkpoint):
            continue

        if recipe.published.keys() & set(VIDEO):
            videos.append(_recipe_row(file.stem, recipe, VIDEO))
        else:
            pictures.append(_recipe_row(file.stem, recipe, BENCHMARKS))

    # A table of its heading alone is left out.
    for table in (pictures, videos):
        if len(table) > 1:
            _print_table(table)
        print0()
    print0("trains: c connector, l llm, v vision, stage > stage; (partial:N) from block N on")


def _recipe_row(name: str, recipe: Recipe, benchmarks: tuple[str, ...]) -> tuple[str, ...]:
    """Return the cells of a recipe in the table of --list."""
    c = recipe.model
    if c.checkpoint:
        llm = _short(c.checkpoint)
        vision = ""
    else:
        llm = _short(c.llm or "random")
        vision = _short(c.vision or "random")
        if c.vision2:
            vision += f" + {_short(c.vision2)}"

    stages = [_what_trains(stage) for stage in recipe.stage.values()]
    scores = [str(recipe.published.get(benchmark, "-")) for benchmark in benchmarks]
    return (name, llm, vision, " > ".join(stages), *scores)


def _short(name: str) -> str:
    """Return the last part of a Hugging Face id or of a path: a model without its organization."""
    return name.split("/")[-1]


def _what_trains(stage: Stage) -> str:
    """Return the parts that train, by their initials: c+l(lora), say."""
    trains = []
    for part in ("connector", "llm", "vision"):
        how = getattr(stage.tune, part)
        if how == "full":
            trains.append(part[0])
        elif how != "frozen":
            trains.append(f"{part[0]}({how})")
    return "+".join(trains)


def _print_table(table: list[tuple[str, ...]]):
    """Print rows with each column as wide as its widest cell."""
    widths = []
    for column in zip(*table, strict=True):
        widths.append(max(len(cell) for cell in column))

    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print0("  ".join(cells).rstrip())


# ------------------------------------------------------------------------------ where the files are


@dataclass(frozen=True)
class Found:
    """A path that a recipe names."""

    key: str  # as in the recipe: stage.NAME.data
    value: str
    where: str  # in words; MISSING and the reason if it is nowhere


def find_files(
    recipe: Recipe, scratch: Path, demo_data: Path | None
) -> tuple[list[Found], dict[str, Path | None]]:
    """Return every path of a recipe, and for each part that is loaded a folder with its JSON files.

    scratch: for JSON files that must be fetched. demo_data: the folder that train.py makes by
    itself.
    """
    found, folders = _find_models(recipe.model, scratch)
    for name, stage in recipe.stage.items():
        found += _find_data(name, stage)

    # Before its first run the demo has no data, and nothing is wrong with that.
    if demo_data and not demo_data.exists():
        for i, one in enumerate(found):
            if Path(one.value).is_relative_to(demo_data):
                found[i] = replace(one, where="train.py makes it")
    return found, folders


def _find_models(c: Model, scratch: Path) -> tuple[list[Found], dict[str, Path | None]]:
    """Find the parts of the model that are loaded from files, and the tokenizer."""
    # A part that the recipe describes by a table starts from random weights.
    parts = []
    if c.checkpoint:
        parts.append("checkpoint")
    else:
        if not c.llm_config:
            parts.append("llm")
        if not c.vision_config:
            parts.append("vision")
        if c.vision2:
            parts.append("vision2")

    weight_files = ["*.safetensors"]
    if c.allow_pickle:
        weight_files.append("*.bin")

    found = []
    folders = {}
    for part in parts:
        name = getattr(c, part)
        where, folders[part] = locate_part(name, weight_files, "config.json", scratch)
        found.append(Found(f"model.{part}", name, where))

    vocabularies = ["tokenizer.json", "tokenizer.model"]
    where, folder = locate_part(c.tokenizer_source, vocabularies, "tokenizer_config.json", scratch)
    if where.startswith("MISSING") and folder is not None and _names_tokenizer(folder):
        where = "named in its config.json"
    found.append(Found("model.tokenizer", c.tokenizer_source, where))
    folders["tokenizer"] = folder
    return found, folders


def _names_tokenizer(folder: Path) -> bool:
    """Return whether a folder without a vocabulary names one that is at hand, as nanoVLM's do."""
    try:
        load_tokenizer(folder)
    except UserError:
        return False
    return True


def _find_data(name: str, stage: Stage) -> list[Found]:
    """Find the data of a stage, or of each source of its mixture, and the held-out rows."""
    # Where the data stands in the recipe: in the stage itself, or in each source of a mixture.
    sources = {"": stage}
    if stage.mixture:
        sources = {f"mixture.{key}.": source for key, source in stage.mixture.items()}

    paths = {}
    if validation_file(stage):
        paths["validation"] = stage.validation
    for prefix, source in sources.items():
        paths[f"{prefix}data"] = source.data

        # A data set of the Hub has its pictures in it.
        if source.images or not hub.parse_id(source.data):
            own_folder = source.data
            if not Path(source.data).is_dir():
                own_folder = str(Path(source.data).parent)
            paths[f"{prefix}images"] = source.images or own_folder

    found = []
    for key, path in paths.items():
        where = "MISSING"
        if path and is_here(path):
            where = "found"
        elif hub.parse_id(path):
            where = "would be downloaded"
        found.append(Found(f"stage.{name}.{key}", path, where))
    return found


def locate_part(
    name: str, needs: list[str], asked_for: str, scratch: Path
) -> tuple[str, Path | None]:
    """Find a folder or a Hugging Face id, as checkpoints.files.resolve would, without its weights.

    needs: globs; a file of one of them must be there. asked_for: the file whose presence on the Hub
    stands for the rest. scratch: for what is fetched from there.

    Returns where it is, in words, and a folder with its JSON files; no folder if it is missing or
    if the Hub cannot be reached.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if _has_one_of(folder, needs):
            return "found", folder
        return f"MISSING: it has no {' or '.join(needs)}", folder

    looks_like_an_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not name:
        return "MISSING: not set", None
    if not looks_like_an_id:
        return "MISSING: no such folder", None

    # The cache may hold the small files of a model and not its weights.
    cached = try_to_load_from_cache(name, asked_for)
    if isinstance(cached, str) and _has_one_of(Path(cached).parent, needs):
        folder = Path(cached).parent
        return f"in the Hugging Face cache: {folder}", folder
    return _ask_the_hub(name, asked_for, scratch / name)


def _has_one_of(folder: Path, globs: list[str]) -> bool:
    """Say whether a folder has a file that one of the globs matches."""
    for glob in globs:
        if any(folder.glob(glob)):
            return True
    return False


def _ask_the_hub(name: str, asked_for: str, folder: Path) -> tuple[str, Path | None]:
    """Return whether the Hub has a model, in words, and `folder` with its small JSON files."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        # This asks once. A download would try again for a long time.
        get_hf_file_metadata(hf_hub_url(name, asked_for), timeout=10)

        # Not into the cache, where they would look like a model. A language model has no
        # preprocessor, and a tokenizer has neither of the two files.
        for file in ("config.json", "preprocessor_config.json"):
            with suppress(EntryNotFoundError):
                hf_hub_download(name, file, local_dir=folder)
    except HfHubHTTPError as e:
        status = e.response.status_code
        fix = "check the name, or log in for a gated model"
        return f"MISSING: the Hub answers {status}; {fix}", None
    except Exception as e:  # whatever its HTTP client raises without a network
        kind = type(e).__name__
        where = f"would be downloaded, but the Hub cannot be reached now ({kind})"
        known = read_json(KNOWN).get(name)
        if known is None:
            return where, None
        preprocessor = known.pop("preprocessor", None)
        write_file(folder / "config.json", json.dumps(known))
        if preprocessor is not None:
            write_file(folder / "preprocessor_config.json", json.dumps(preprocessor))
        return where, folder
    return "would be downloaded", folder


# ---------------------------------------------------------------------------------------- --dry-run


def options(argv: list[str]) -> tuple[bool, float | None, list[str]]:
    """Return whether the command line has --dry-run, the gigabytes of --memory, and the rest.

    Raises UserError for a --memory that is no number, or that stands alone.
    """
    rest = list(argv)
    is_dry_run = "--dry-run" in rest
    if is_dry_run:
        rest.remove("--dry-run")
    if "--memory" not in rest:
        return is_dry_run, None, rest

    at = rest.index("--memory")
    value = rest[at + 1] if at + 1 < len(rest) else ""
    try:
        memory = float(value)
    except ValueError:
        memory = 0.0
    if not is_dry_run or not 0 < memory < 10_000:
        fix = "write --dry-run --memory 24, in GB"
        raise UserError("command line:--memory", f"{value!r}", fix)
    del rest[at : at + 2]
    return is_dry_run, memory, rest


@dataclass(frozen=True)
class Script:
    """What train.py does to a model, handed over: planner.py stands below it on the floors."""

    adapt: Callable  # (model, stages): puts the adapters in
    set_trainable: Callable  # (model, tune)
    round_frozen: Callable  # (model)


def dry_run(
    recipe: Recipe,
    path: Path,
    script: Script,
    demo_data: Path | None = None,
    memory: float | None = None,
):
    """Print the plan of a recipe.

    demo_data: the folder that train.py makes by itself. memory: gigabytes of the GPUs at hand; None
    takes those of this machine's GPU.

    Raises UserError, after all is printed, for what is missing or cannot be reached.
    """
    print0(f"{path}, dry run")
    with tempfile.TemporaryDirectory() as scratch:
        found, folders = find_files(recipe, Path(scratch), demo_data)
        width = 1 + max((len(one.key) for one in found), default=0)
        for one in found:
            print0(f"  {one.key:<{width}} {one.value:<50} {one.where}")

        plan = make_plan(recipe, script, folders, memory)
        if plan is not None:
            plan.print()

    # The first that is missing; if none is, the first that cannot be reached.
    for one in found:
        if one.where.startswith("MISSING"):
            fix = "correct the path, or put it there"
            raise UserError(f"{path}:{one.key}", f"{one.value!r}: {one.where}", fix)
    for one in found:
        if "cannot be reached" in one.where:
            fix = "connect, or name a local folder"
            raise UserError(f"{path}:{one.key}", f"{one.value!r}: {one.where}", fix)


def make_plan(
    recipe: Recipe, script: Script, folders: dict[str, Path | None], memory: float | None = None
) -> Plan | None:
    """Return the plan of a recipe, whose parts lie in the folders of `find_files`.

    Returns None if the config files of a part are not there. A tokenizer that is not there makes
    the plan less exact.
    """
    parts = dict(folders)
    tokenizer_folder = parts.pop("tokenizer")
    if not all(parts.values()):
        return None
    local = {part: str(folder) for part, folder in parts.items()}
    if tokenizer_folder is not None and not recipe.model.checkpoint:
        local["tokenizer"] = str(tokenizer_folder)
    local_recipe = replace(recipe, model=replace(recipe.model, **local))
    tokenizer = None
    if tokenizer_folder is not None:
        with suppress(UserError):
            tokenizer = layouts.load_recipe_tokenizer(local_recipe.model)
    local_recipe = small_sets.fill(local_recipe, assumed=ASSUMED_ROWS)
    return Plan(local_recipe, script, tokenizer, memory)


class StageData(NamedTuple):
    """What the data of a stage make of it."""

    rows: Rows | RowMixture | None  # None: they are not there
    steps: int  # 0: not known
    row: RowSize  # one of them on average, or what is assumed


class Plan:
    """The numbers of a recipe whose files are found."""

    def __init__(
        self, recipe: Recipe, script: Script, tokenizer: Tokenizer | None, memory: float | None
    ):
        self.recipe = recipe
        self.script = script
        self.tokenizer = tokenizer
        self.bf16 = recipe.train.precision != "fp32"  # auto is bf16 on every GPU that is planned

        # The GPU at hand, in GB.
        self.room = memory
        if memory is None and torch.cuda.is_available():
            self.room = torch.cuda.get_device_properties(0).total_memory / 1e9

    def print(self):
        """Print the sizes of the model, then what each stage takes."""
        # The model is built without the blocks behind the feature layer, so they are not counted.
        model = self.build(self.recipe)
        sizes = [f"{name} {_count(part):,}" for name, part in model.named_children()]
        tokens = model.views.tokens_per_image
        print0(f"parameters: {', '.join(sizes)} (without blocks that never run); {tokens}")

        merged = self.build(self.recipe, adapted=False)
        print0(f"exports to: {', '.join(layouts.exports_to(merged))} (export.py --to)")
        try:
            gguf.check_expressible(merged)
        except UserError as refusal:
            print0(f"  not to llama.cpp: {refusal}")

        if self.room is None:
            print0("no GPU is here: what follows is what GPUs would take")
        for name in self.recipe.stage:
            self.print_stage(name)

        precision = "bfloat16" if self.bf16 else "float32"
        print0(f"\nmemory: a micro-batch of average rows in {precision}, see training/memory.py")
        print0(f"hours: at {SHARE:.0%} of the GPUs' peak in bfloat16, see training/estimate.py")
        print0("*: sharded over the GPUs (train.parallel fsdp, which auto takes where it must)")

    def build(self, recipe: Recipe, adapted: bool = True) -> LLaVA:
        """Return the recipe's model on the meta device, with or without its adapters."""
        stages = list(recipe.stage.values())
        template = stages[-1].template
        has_tokenizer = self.tokenizer is not None
        with weights.empty():
            model = LLaVA(layouts.config_from_recipe(recipe.model, template, has_tokenizer))
            if adapted:
                self.script.adapt(model, stages)
        return model

    def measure(self, recipe: Recipe, name: str, row: RowSize) -> tuple[LLaVA, Memory]:
        """Return the model of a stage, with what trains, and its memory."""
        stage = recipe.stage[name]
        model = self.build(recipe)
        model.language_model.model.gradient_checkpointing = recipe.train.gradient_checkpointing
        model.vision_tower.gradient_checkpointing = recipe.train.gradient_checkpointing
        self.script.set_trainable(model, stage.tune)
        if self.bf16:
            self.script.round_frozen(model)
        return model, measure(model, stage, row, self.bf16)

    def data_of(self, name: str) -> StageData:
        """Return what is known of the data of a stage."""
        stage = self.recipe.stage[name]
        views = self.build(self.recipe).views

        # With data the rows and steps are counted, else they are assumed.
        sources = list(stage.mixture.values()) or [stage]
        rows = None
        steps = stage.steps
        if all(source.data and is_here(source.data) for source in sources):
            rows = open_stage(stage, f"stage.{name}", self.recipe.train.workers).training
            steps = len(Steps(rows, None, stage, self.recipe.train))
        spec = None
        if self.tokenizer is not None:
            spec = SampleSpec(self.tokenizer, stage.template, stage.max_tokens, views)
        row = mean_row(rows, stage.template, views, spec)
        return StageData(rows, steps, row)

    def print_stage(self, name: str):
        """Print what trains in a stage, its steps, a row of its data, and its memory and hours."""
        stage = self.recipe.stage[name]
        rows, steps, row = self.data_of(name)
        model, memory = self.measure(self.recipe, name, row)

        # Without steps the number of rows is not known, so the hours are for that many.
        if steps:
            size = f"{steps} steps of {stage.global_batch} rows"
            planned = steps * stage.global_batch
            per = ""
        else:
            size = "steps unknown: no data"
            planned = ASSUMED_ROWS
            per = f" per {ASSUMED_ROWS:,} rows"
        trained = _count(model, trained_only=True)
        total = _count(model)
        print0(f"\nstage {name}: {size}; trains {trained:,} of {total:,} parameters")

        seen = f"{row.views:.2f} views of {row.positions:.0f} tokens"
        text = f"{row.text:.0f} text tokens, {row.supervised:.0f} supervised"
        source = "assumed: no data"
        if rows and row.is_exact:
            source = f"data: {len(rows)} rows, tokenized"
        elif rows:
            source = f"data: {len(rows)} rows, tokens guessed from characters"
        one = "a row"
        if row.samples > 1:
            why = "a sample for each answer: the chat template rewrites earlier turns"
            print0(f"  a row is {row.samples:.2f} samples, {why}")
            one = "a sample"
        print0(f"  {one} has {seen}, {text} ({source})")

        kinds = [f"{kind} {n / 1e9:.1f}" for kind, n in memory.by_kind.items()]
        print0(f"  GB per GPU, estimate: {memory.total / 1e9:.1f} = {' + '.join(kinds)}")

        _print_cells(f"  hours{per}, estimate:", list(GPUS))
        work = operations(model, stage, row, self.recipe.train.gradient_checkpointing)
        for gpus in (1, 8):
            cells = []
            for gpu in GPUS.values():
                cell = "too small"
                mark = fits(memory, model, gpus, 1e9 * gpu.memory)
                if mark is not None:
                    time = hours(planned, work, gpu, gpus)
                    cell = f"{max(time, 0.01):.2f}{mark}"
                cells.append(cell)
            _print_cells(f"    on {gpus} of them", cells)
        self.print_what_to_lower(name, row, model, memory)

    def print_what_to_lower(self, name: str, row: RowSize, model: LLaVA, memory: Memory):
        """Say whether a stage fits the GPU at hand; of one that does not, what would make it fit.

        Without a GPU at hand, it is the smallest of the table.
        """
        room = self.room
        if room is None:
            room = min(gpu.memory for gpu in GPUS.values())
        for gpus in (1, 8):
            mark = fits(memory, model, gpus, 1e9 * room)
            if mark is not None:
                if self.room is not None:
                    what = "one GPU" if gpus == 1 else f"{gpus} GPUs, sharded,"
                    print0(f"  it fits {what} of {room:.0f} GB")
                if gpus == 1:
                    return

        # Each change is made on top of those before it.
        print0(f"  for one GPU of {room:.0f} GB, lower:")
        for change, recipe in self.smaller_recipes(name, row):
            _, smaller = self.measure(recipe, name, row)
            fit = ", which fits" if smaller.total <= 1e9 * room else ""
            print0(f"    {change:<50} {smaller.total / 1e9:.1f} GB{fit}")
            if fit:
                return
        print0("    no setting is left: it takes a smaller model, or more GPUs")

    def smaller_recipes(self, name: str, row: RowSize) -> Iterator[tuple[str, Recipe]]:
        """Yield (the change, the recipe with it and with all changes before), by what is lost."""
        recipe = self.recipe
        if not recipe.train.gradient_checkpointing:
            recipe = replace(recipe, train=replace(recipe.train, gradient_checkpointing=True))
            yield "train.gradient_checkpointing=true", recipe

        stage = recipe.stage[name]
        if stage.micro_batch_tokens > 2 * row.tokens:
            recipe = _with_stage(recipe, name, micro_batch_tokens=int(row.tokens) + 1)
            change = f"stage.{name}.micro_batch_tokens={int(row.tokens) + 1}"
            yield f"{change} (one row)", recipe

        for how in ("lora", "qlora-nf4"):
            if stage.tune.llm in ("full", "lora") and stage.tune.llm != how:
                recipe = _with_stage(recipe, name, tune=replace(stage.tune, llm=how))
                yield f"stage.{name}.tune.llm={how}", recipe


def _with_stage(recipe: Recipe, name: str, **changes) -> Recipe:
    """Return a recipe in which fields of one stage have other values."""
    stage = replace(recipe.stage[name], **changes)
    return replace(recipe, stage=recipe.stage | {name: stage})


def fits(memory: Memory, model: LLaVA, gpus: int, room: float) -> str | None:
    """Say whether a stage fits GPUs with `room` bytes: "" if each holds the model, "*" if sharded.

    Returns None if it does not fit.
    """
    if memory.total <= room:
        return ""
    if gpus > 1 and sharded(memory, model, gpus).total <= room:
        return "*"
    return None


def _print_cells(head: str, cells: list[str]):
    """Print a row of the table of hours: its head, then a cell for each GPU."""
    print0(head.ljust(35), *(f"{cell:>10}" for cell in cells))


def _count(module: nn.Module, trained_only: bool = False) -> int:
    """Return the number of a module's parameters."""
    total = 0
    for p in module.parameters():
        if p.requires_grad or not trained_only:
            total += p.numel()
    return total
