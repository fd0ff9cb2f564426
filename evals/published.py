"""The published number that stands beside a score.

TinyLLaVA's authors published numbers of their models; each recipe in recipes/ has those of its
model in the table [published]. The recipe whose model is named most like the measured one counts.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import config
from config import UserError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def add_published(scores: dict[str, dict], task, model_config):
    """Put the published number beside the score that the task's PUBLISHED names.

    It gets the keys "published" and "published_of", whose number it is.
    """
    if not hasattr(task, "PUBLISHED"):
        return
    name, source = task.PUBLISHED
    if name not in scores:
        return

    if isinstance(source, str):
        found = nearest(source, model_names(model_config))
        if found is None:
            return
        number, model = found
    else:
        model, number = next(iter(source.items()))
    scores[name]["published"] = number
    scores[name]["published_of"] = model


def model_names(model_config) -> dict[str, str]:
    """Return the names of a model's parts: where they came from, or else their model type."""
    names = {
        "llm": str(model_config.text.get("model_type", "")),
        "vision": str(model_config.vision.get("model_type", "")),
    }
    for part, source in model_config.sources.items():
        if source:
            names[part] = str(source)
    return names


def nearest(column: str, names: dict[str, str]) -> tuple[float, str] | None:
    """Return the number in this column of the recipe named most like `names`, and its name.

    None if no recipe has one. A recipe that cannot be read is left out, and a line says so: scores
    do not wait for what only stands beside them.
    """
    best = None
    best_likeness = -1.0
    for file in sorted(RECIPES.glob("*.toml")):
        try:
            recipe, _ = config.load([str(file)], file)
        except UserError as error:
            print(f"published numbers without {file.name}: {error}")
            continue
        number = recipe.published.get(column)
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue

        # The language model counts twice as much as the encoder.
        likeness = 2 * similarity(recipe.model.llm, names["llm"])
        likeness += similarity(recipe.model.vision, names["vision"])
        if likeness > best_likeness:
            best_likeness = likeness
            best = number, file.stem
    return best


def similarity(a: str, b: str) -> float:
    """Return how alike two names are, 0 to 1, without the folder or owner before them."""
    a = a.split("/")[-1].lower()
    b = b.split("/")[-1].lower()
    return difflib.SequenceMatcher(None, a, b).ratio()
