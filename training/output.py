"""The output folder of a run: who may write there, and what is there at the end.

    .barellava           the mark that the folder is ours (checkpoints/owned.py)
    recipe.toml          the resolved recipe of the last start
    made_from.json       what the recipe's files hold: sizes and hashes (made_from.py)
    log.jsonl            every event (run_log.py)
    checkpoints/         to resume from; removed at the end (checkpoints/resume.py)
    PREEMPTED            only while the run is stopped
    config.json ...      the finished model; config.json is written last
    README.md loss.png   how the model came about (model_card.py)
    adapter/             a copy of the adapters, if the model has some (checkpoints/peft.py)
    best/                with train.keep_best: the model of the lowest validation loss

`own_folder`, `claim`, `begin` and `check_room` run before training, `export_model` after it.

From its first checkpoint on, a run has a recipe, and what that names has a content. Each checkpoint
holds both. The same command goes on; a start that would train something else is refused, and what
differs is named. Before the first checkpoint nothing can be lost, so any recipe may begin.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import config
import lora
from checkpoints import peft, resume, seal
from checkpoints.files import remove_temporaries, write_file, writing
from checkpoints.layouts import load_recipe_tokenizer
from checkpoints.owned import MARK, own
from config import Recipe, UserError, printable
from inputs.tokenizer import Tokenizer
from model import LLaVA
from training import made_from, model_card, run_log, state
from training.ranks import Ranks, print0
from training.run_log import reporting

# The files that write_file makes in this folder; those of the finished model come only at its end.
WRITTEN = (
    MARK,
    "recipe.toml",
    "made_from.json",
    "log.jsonl",
    "PREEMPTED",
    "README.md",
    "loss.png",
    "config.json",
)


def own_folder(recipe: Recipe):
    """Make the output folder ours. Raises UserError if it is, or may be, somebody else's.

    Nothing is written to a folder before this has been called. Only rank 0 calls it.
    """
    text = recipe.train.output
    folder = Path(text)
    fix = "name a new folder, like out/mine"
    if not text.strip():
        raise UserError("train.output", "no folder is named", fix)
    with writing(folder):
        if folder.resolve() == Path.cwd():
            raise UserError("train.output", f"{text!r} is the current directory", fix)
    own(folder, "run")


def claim(recipe: Recipe, ranks: Ranks) -> bool:
    """Return whether there is something to train: False if this recipe's model is in the folder.

    Raises UserError if the finished model there is another recipe's. A run that is not finished is
    looked at by `begin`: it has a recipe from its first checkpoint on, and not before.
    """
    is_finished = False
    if ranks.is_first:
        output = Path(recipe.train.output)
        is_finished = (output / "config.json").exists()
        if is_finished:
            compare_recipes(output, read_saved_recipe(output), recipe)

            # A run that was killed at its very end may have left them.
            resume.discard(output / "checkpoints")

        # No other run may write here, so these are of writes that were killed.
        with reporting("removing what killed writes left"):
            for name in WRITTEN:
                remove_temporaries(output / name)
    return not ranks.broadcast(is_finished)


def read_saved_recipe(output: Path) -> str:
    """Return the text of recipe.toml. Raises UserError if it cannot be read."""
    file = output / "recipe.toml"
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        what = f"cannot be read ({getattr(e, 'strerror', None) or 'not UTF-8'})"
        fix = "set train.output to a new folder, or restore the file"
        raise UserError(file, f"{what}, so nobody knows which recipe was trained", fix) from None


def earlier_recipe(recipe: Recipe) -> str:
    """Return the recipe.toml of a run that has begun in the output folder; "" if none has.

    A run without a checkpoint can still become any other. A file that cannot be read is `claim`'s
    and `begin`'s to speak of.
    """
    output = Path(recipe.train.output)
    is_finished = (output / "config.json").exists()
    if not is_finished and not seal.listed(output / "checkpoints"):
        return ""
    try:
        return (output / "recipe.toml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def compare_recipes(output: Path, saved: str, recipe: Recipe) -> list[config.Difference]:
    """Return what differs from the recipe of a run and does not decide what is trained.

    saved: the run's recipe. Raises UserError for differences that decide, and names them all.
    """
    try:
        deciding, others = config.differences(saved, recipe)
    except ValueError:
        fix = "set train.output to a new folder, or restore the file"
        raise UserError(output / "recipe.toml", "not a recipe", fix) from None
    if deciding:
        named = "; ".join(str(difference) for difference in deciding)
        what = f"another recipe was trained here ({named})"
        fix = "set train.output to a new folder, or put the old value back"
        raise UserError(output, what, fix)
    return others


@dataclass
class Origin:
    """What a run is made from, and how that differs from what it was when the run began."""

    record: dict  # goes into the folder and into every checkpoint
    changes: list[dict]  # events for log.jsonl


def begin(recipe: Recipe, checkpoint: Path | None) -> Origin:
    """Return what a start that goes on from this checkpoint is made from. Rank 0 calls it.

    Raises UserError if what decides the result has changed since the checkpoint was made, and the
    recipe does not accept that. A checkpoint of another folder is a choice of the user's
    (train.resume): all differences from its run are said, and none is refused.
    """
    output = Path(recipe.train.output)

    # What is said of this one start says nothing of a later one.
    train = replace(recipe.train, resume="", accept_changes="")
    text = config.dumps(replace(recipe, train=train))
    if checkpoint is None:
        contents = made_from.look(recipe, recipe.stage)
        return Origin({"recipe": text, "contents": contents}, [])

    recorded = resume.made_from(checkpoint)
    is_own = checkpoint.parent.resolve() == (output / "checkpoints").resolve()

    # The recipe.
    changes = []
    if is_own:
        saved = recorded.get("recipe")
        if saved is None:  # a checkpoint of an older version
            saved = read_saved_recipe(output)
        others = compare_recipes(output, saved, recipe)
    else:
        deciding, others = config.differences(recorded.get("recipe", text), recipe)
        others = deciding + others
    for name, old, new in others:
        if name in ("train.resume", "train.accept_changes"):
            continue
        changes.append({"what": name, "old": old, "new": new})

    # What it names. What stages need that are done cannot change the result any more.
    stages = list(recipe.stage)
    done = seal.manifest(checkpoint)["state"]["stage"]
    before = recorded.get("contents", {})
    found = made_from.look(recipe, stages[done:])
    compared = made_from.compare(before, found)
    if is_own and compared.deciding and recipe.train.accept_changes != compared.key:
        # All of them may be more than a message holds.
        for what in compared.deciding:
            print0(f"changed: {printable(what)}")
        what = f"not what the run began with: {'; '.join(compared.deciding)}"
        fix = "put it back, set train.output to a new folder, "
        fix += f"or go on with it: train.accept_changes={compared.key}"
        raise UserError(output, what, fix)
    for what in compared.deciding + compared.others:
        changes.append({"what": what})
    return Origin({"recipe": text, "contents": {**before, **found}}, changes)


def write_origin(recipe: Recipe, origin: Origin, index: int, start: int):
    """Write what this start is made from into the folder, and begin its log.

    index, start: the stage in which it goes on, and how many of its steps are done. What was logged
    after that is done again. Raises UserError if the folder cannot be written.
    """
    output = Path(recipe.train.output)
    with writing(output):
        write_file(output / "recipe.toml", origin.record["recipe"])
        write_file(output / "made_from.json", json.dumps(origin.record["contents"], indent=1))

    stages = list(recipe.stage)
    log = output / "log.jsonl"
    with reporting("cleaning log.jsonl"):
        run_log.forget_after(log, stages, index, start)
    with reporting("removing PREEMPTED"):
        (output / "PREEMPTED").unlink(missing_ok=True)

    # What differs from the beginning of the run.
    stage = stages[min(index, len(stages) - 1)]
    for change in origin.changes:
        said = change["what"]
        if "old" in change:
            said += f": {change['old']!r} -> {change['new']!r}"
        print0(f"changed: {printable(said)}")
        with reporting("logging a change"):
            run_log.append(log, run_log.event_line("changed", stage, step=start, **change))


def check_room(model: LLaVA, recipe: Recipe):
    """Raise UserError unless the disk takes this stage's checkpoints and the final model."""
    output = Path(recipe.train.output)

    # A trained parameter takes 12 bytes: its value and two moments, in float32.
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    checkpoint = 12 * trained
    final = 4 * lora.count(model)  # float32, of quantized weights too

    # One more than are kept, because an old one goes only after the new one is whole.
    most = recipe.train.keep + 1
    if recipe.train.keep_best:
        most += 1
    there = len(seal.listed(output / "checkpoints"))
    missing = max(1, most - there)
    size = checkpoint * missing + final
    resume.need_room(output, size, f"{missing} checkpoints and the model")


def export_model(recipe: Recipe, tensors: dict, output: Path):
    """Write the finished model with all that belongs to it, and remove the checkpoints.

    tensors: of the last checkpoint. config.json comes last and says that the run is finished.
    """
    checkpoints = output / "checkpoints"
    tokenizer = load_recipe_tokenizer(recipe.model)
    with writing(output):
        if recipe.train.keep_best:
            export_best(recipe, tokenizer, output)

        # The checkpoints go last: until then the run can still be finished by the same command.
        tokenizer.save(output)
        with reporting("README.md and loss.png"):
            model_card.write_model_card(output, recipe)
        _save_model(recipe, tensors, output)
        resume.discard(checkpoints)


def export_best(recipe: Recipe, tokenizer: Tokenizer, output: Path):
    """Write the model of the last stage's lowest validation loss, or say why there is none."""
    best = seal.best(output / "checkpoints", list(recipe.stage)[-1])
    if best is None:
        print0("warning: no whole checkpoint has a validation loss, so there is no best/")
        return
    try:
        seal.verify(best)
    except (OSError, ValueError) as e:
        print0(f"warning: {best} is damaged ({printable(e)}), so there is no best/")
        return
    tokenizer.save(output / "best")
    best_tensors, _ = resume.read(best)
    _save_model(recipe, best_tensors, output / "best")


def _save_model(recipe: Recipe, tensors: dict, folder: Path):
    """Write the model that a checkpoint makes. Its adapters are merged, and also kept apart."""
    stages = list(recipe.stage.values())
    model = state.build(recipe, tensors, stages[-1])
    base = recipe.model.llm or recipe.model.checkpoint
    model = peft.merge_and_save_adapters(model, folder, base)
    model.save(folder)
