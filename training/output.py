"""The output folder of a run: who may write there, and what is there at the end.

    recipe.toml          the resolved recipe. The same command goes on; another recipe is refused
    log.jsonl            every event (run_log.py)
    checkpoints/         to resume from; removed at the end (checkpoints/resume.py)
    PREEMPTED            only while the run is stopped
    config.json ...      the finished model; config.json is written last
    README.md loss.png   how the model came about (model_card.py)
    adapter/             a copy of the adapters, if the model has some (checkpoints/peft.py)
    best/                with train.keep_best: the model of the lowest validation loss

`claim` and `check_room` run before training, `export_model` after it.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import config
import lora
from checkpoints import peft, resume, seal
from checkpoints.files import resolve, write_file, writing
from config import Recipe, UserError
from inputs.tokenizer import load_tokenizer
from model import LLaVA
from training import model_card, state
from training.ranks import Ranks


def claim(recipe: Recipe, ranks: Ranks) -> bool:
    """Write recipe.toml into the output folder. Return False if this very run is finished.

    Raises UserError if another recipe was trained there.
    """
    output = Path(recipe.train.output)
    saved = output / "recipe.toml"

    # Which checkpoint this start begins from says nothing about a later one.
    train = replace(recipe.train, resume="")
    text = config.dumps(replace(recipe, train=train))

    # A start that failed on a mistake of the recipe has written no log. It may be mended in place.
    has_begun = (output / "log.jsonl").exists()
    if has_begun and saved.exists():
        try:
            deciding, _ = config.differences(saved.read_text(), recipe)
        except ValueError as e:
            raise UserError(saved, f"not TOML: {e}", "mend it, or set train.output") from None
        if deciding:
            what = f"another recipe was trained here ({deciding[0]})"
            raise UserError(saved, what, "set train.output, or remove the folder")

    if (output / "config.json").exists():
        return False

    # No rank goes on before the recipe is there.
    if ranks.is_first:
        write_file(saved, text)
    ranks.barrier()
    return True


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
    last_stage = list(recipe.stage)[-1]
    tokenizer = load_tokenizer(resolve(recipe.model.tokenizer_source, small=True))
    with writing(output):
        if recipe.train.keep_best:
            best = seal.best(checkpoints, last_stage)
            if best is not None:
                tokenizer.save(output / "best")
                best_tensors, _ = resume.read(best)
                _save_model(recipe, best_tensors, output / "best")

        # The checkpoints go last: until then the run can still be finished by the same command.
        tokenizer.save(output)
        model_card.write_model_card(output, recipe)
        _save_model(recipe, tensors, output)
        shutil.rmtree(checkpoints, ignore_errors=True)


def _save_model(recipe: Recipe, tensors: dict, folder: Path):
    """Write the model that a checkpoint makes. Its adapters are merged, and also kept apart."""
    stages = list(recipe.stage.values())
    model = state.build(recipe, tensors, stages[-1])
    base = recipe.model.llm or recipe.model.checkpoint
    model = peft.merge_and_save_adapters(model, folder, base)
    model.save(folder)
