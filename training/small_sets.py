"""What a recipe leaves to the rows: a number for each "auto", and a template for an empty one.

    recipe = fill(recipe)                        # before anything computes with it
    recipe = fill(recipe, earlier=saved_text)    # of a run that goes on: its numbers stay

The defaults of a recipe are made for hundreds of thousands of rows. Of thirty they make one step of
128, which changes next to nothing. recipes/own.toml says "auto" in their place, and this file
chooses by the number of rows and by what trains, prints what it chose and why, and the resolved
recipe beside the checkpoints has the numbers. What the user writes is never touched.

The rules, one function each in RULES, with n rows to train on:

    validation     a tenth of the rows, at most 500 (inputs/holdout.py)
    global_batch   the power of two below the root of n, at most 128, which LLaVA takes for 665,000.
                   Adapters lose more by large batches than a whole model does (Schulman et al.,
                   LoRA Without Regret, 2025)
    epochs         3, as instruction tuning usually has; 1 where that is 25,000 samples or more. A
                   small set is repeated until it makes 100 steps, at most 25 times: OpenAI's
                   fine-tuning service takes the same 3, 25,000 and 25
    warmup_ratio   a tenth of less than 500 steps, else LLaVA's 0.03: three steps in a hundred are
                   too few for AdamW to see how large the gradients are
    lora.r         the power of two below the root of n, from 8 (which Hu et al., 2021, found
                   enough) to TinyLLaVA's 128: few rows have little to say, and a large adapter
                   learns them by heart
    lora.alpha     2 r, as TinyLLaVA has it
    learning_rate  TinyLLaVA's for a language model of width 2560: 2e-4 for adapters, 2e-5 for
                   whole parts; and 1e-3 for the connector alone. Narrower models want larger ones:
                   the best rate falls with width to the power 0.78 (Schulman et al., measured from
                   1B to 70B; it also holds for the demo's width of 128)

tests/training/test_small_sets.py has the numbers for sets of 10 to 1,000,000 rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import config
import lora
from checkpoints import layouts, weights
from config import AUTO, Recipe, Stage, UserError
from data import Order, template_of
from inputs.holdout import how_many_to_hold_out, open_stage
from model import LLaVA
from training.ranks import print0

# See the rules above.
LARGEST = 128  # batch, and rank
SMALLEST_RANK = 8
EPOCHS = 3
MOST_EPOCHS = 25
SAMPLES = 25_000
STEPS = 100
MANY_STEPS = 500
WIDTH = 2560
ADAPTER_RATE = 2e-4
WHOLE_RATE = 2e-5
CONNECTOR_RATE = 1e-3
FALL = 0.78


class Facts(NamedTuple):
    """What the rules choose by, besides the stage."""

    samples: int  # of an epoch
    rows: int  # of the data, before some were held out
    width: int  # of the language model
    ranks: int


class Choice(NamedTuple):
    """What a rule has chosen."""

    value: float | str
    why: str  # "" if the stage makes no use of it, which is then not printed


# ---------------------------------------------------------------------------------------- the rules


def choose_validation(stage: Stage, facts: Facts) -> Choice:
    value = how_many_to_hold_out(facts.rows)
    if not value:
        return Choice(value, "")
    return Choice(value, f"a tenth of {facts.rows} rows, at most 500")


def choose_batch(stage: Stage, facts: Facts) -> Choice:
    size = min(LARGEST, power_below_root(facts.samples))
    if size < facts.ranks:
        return Choice(facts.ranks, "one sample for each rank")
    return Choice(size, f"many steps from {facts.samples} rows")


def choose_epochs(stage: Stage, facts: Facts) -> Choice:
    if stage.steps:
        return Choice(1.0, "")
    epochs = min(EPOCHS, max(1, SAMPLES // facts.samples))
    why = f"{steps_of(stage, facts, epochs)} steps"
    if steps_of(stage, facts, epochs) < STEPS:
        epochs = math.ceil(STEPS * stage.global_batch / facts.samples)
        epochs = min(MOST_EPOCHS, epochs)
        why = f"again and again, for {steps_of(stage, facts, epochs)} steps"
    return Choice(float(epochs), why)


def choose_warmup(stage: Stage, facts: Facts) -> Choice:
    steps = stage.steps or steps_of(stage, facts, stage.epochs)
    ratio = 0.03
    if steps < MANY_STEPS:
        ratio = 0.1
    return Choice(ratio, f"the first {math.ceil(ratio * steps)} of {steps} steps")


def choose_rank(stage: Stage, facts: Facts) -> Choice:
    rank = min(LARGEST, max(SMALLEST_RANK, power_below_root(facts.samples)))
    why = f"what {facts.samples} rows have to say fits in small adapters"
    if rank == LARGEST:
        why = "many rows"
    if not has_adapters(stage):
        why = ""
    return Choice(rank, why)


def choose_alpha(stage: Stage, facts: Facts) -> Choice:
    why = "2 r"
    if not has_adapters(stage):
        why = ""
    return Choice(2.0 * stage.lora.r, why)


def choose_rate(stage: Stage, facts: Facts) -> Choice:
    if is_adapted(stage.tune.llm):
        rate = ADAPTER_RATE
        what = "adapters of"
    elif stage.tune.llm != "frozen" or stage.tune.vision != "frozen":
        rate = WHOLE_RATE
        what = "weights of"
    else:
        return Choice(CONNECTOR_RATE, "the connector alone")

    rate *= (WIDTH / facts.width) ** FALL
    why = f"{what} a language model of width {facts.width}"
    return Choice(float(f"{rate:.1e}"), why)


# In this order: a later one goes by what the earlier ones have chosen.
RULES: dict[str, Callable[[Stage, Facts], Choice]] = {
    "validation": choose_validation,
    "global_batch": choose_batch,
    "epochs": choose_epochs,
    "warmup_ratio": choose_warmup,
    "lora.r": choose_rank,
    "lora.alpha": choose_alpha,
    "learning_rate": choose_rate,
}


def power_below_root(n: int) -> int:
    """Return the largest power of two that is at most the square root of n."""
    return 2 ** (math.isqrt(n).bit_length() - 1)


def steps_of(stage: Stage, facts: Facts, epochs: float) -> int:
    """Return how many steps so many epochs take, as data.Steps counts them."""
    return max(1, math.ceil(round(epochs * facts.samples) / stage.global_batch))


def has_adapters(stage: Stage) -> bool:
    """Say whether a stage trains adapters."""
    tune = stage.tune
    return is_adapted(tune.llm) or is_adapted(tune.vision) or is_adapted(tune.connector)


def is_adapted(how: str) -> bool:
    """Say whether a way to tune is by adapters."""
    return how == "lora" or how in lora.QUANTIZED


# ------------------------------------------------------------------------------- the whole recipe


def fill(recipe: Recipe, earlier: str = "", ranks: int = 1, assumed: int = 0) -> Recipe:
    """Return the recipe with a number for each "auto" and with the names of its templates.

    earlier: recipe.toml of the run that goes on. What it says stays, so that a change of the rows
    is seen as that, and not as another recipe.
    ranks: how many there are; a step has a sample for each.
    assumed: how many rows to choose for where the data is not there; 0 raises UserError.

    Raises UserError for rows or a model that cannot be opened, where they decide something.
    """
    before = tables_of(earlier)
    stages = {}
    for name, stage in recipe.stage.items():
        table = before.get(name, {})
        for field in ("template", *RULES):
            if get(stage, field) in ("", AUTO):
                stage = take_over(stage, field, table)

        if not stage.template:
            stage = replace(stage, template=template_of(recipe.model, stage, f"stage.{name}"))
            print0(f"{name}: template {stage.template}, which {recipe.model.checkpoint} has")
        stages[name] = fill_stage(recipe, name, stage, ranks, assumed)
    return replace(recipe, stage=stages)


def fill_stage(recipe: Recipe, name: str, stage: Stage, ranks: int, assumed: int) -> Stage:
    """Return a stage with a number for each "auto", and print what was chosen and why."""
    if not any(get(stage, field) == AUTO for field in RULES):
        return stage
    stage, said = choose(stage, look(recipe, name, stage, ranks, assumed))
    print0(f"{name}: chosen by the rows (training/small_sets.py)")
    for line in said:
        print0(f"  {line}")
    return stage


def choose(stage: Stage, facts: Facts) -> tuple[Stage, list[str]]:
    """Return a stage with a number for each "auto", and a line for each that it makes use of."""
    said = []
    for field, rule in RULES.items():
        if get(stage, field) != AUTO:
            continue
        value, why = rule(stage, facts)
        stage = put(stage, field, value)
        if why:
            said.append(f"{field:<14} {value:<8g} {why}")
    return stage, said


def look(recipe: Recipe, name: str, stage: Stage, ranks: int, assumed: int) -> Facts:
    """Return what the rules need to know of a stage. Raises UserError, see `fill`."""
    # The width is in the model's config files. Nothing is loaded.
    with weights.empty():
        model = LLaVA(layouts.config_from_recipe(recipe.model, stage.template))
    width = model.language_model.config.width

    try:
        opened = open_stage(stage, f"stage.{name}", recipe.train.workers)
    except UserError:
        if not assumed:
            raise
        print0(f"{name}: no data, so it is chosen for {assumed:,} rows")
        return Facts(assumed, assumed, width, ranks)

    rows = opened.training
    total = len(rows)
    if opened.held_out is not None:
        total += len(opened.held_out)
    samples = Order(len(rows), recipe.train.seed, rows.parts).n
    return Facts(samples, total, width, ranks)


def tables_of(text: str) -> dict[str, dict]:
    """Return the tables of the stages in the text of a recipe.toml; {} if it is none."""
    try:
        tables = config.parse_toml(text).get("stage", {})
        return {name: table for name, table in tables.items() if isinstance(table, dict)}
    except (ValueError, AttributeError):
        return {}  # output.py says what is wrong with it


def take_over(stage: Stage, field: str, table: dict) -> Stage:
    """Return the stage with what the table of an earlier start has for a field, if it has."""
    value: object = table
    for key in field.split("."):
        if not isinstance(value, dict):
            return stage
        value = value.get(key)
    if value is None or type(value) not in (int, float, str):
        return stage
    return put(stage, field, value)


def get(stage: Stage, field: str):
    """Return the value of a field; "lora.r" is one of the table in it."""
    value = stage
    for key in field.split("."):
        value = getattr(value, key)
    return value


def put(stage: Stage, field: str, value) -> Stage:
    """Return the stage with another value of a field."""
    table, _, key = field.rpartition(".")
    if not table:
        return replace(stage, **{key: value})
    return replace(stage, **{table: replace(getattr(stage, table), **{key: value})})
