"""The published number that stands beside a score: of TinyLLaVA's recipe whose model is named most alike."""

import difflib
from pathlib import Path

import config

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def nearest(column, sources):
    """(number, recipe's name) that TinyLLaVA's authors published for the model whose names are most like `sources`."""

    def alike(a, b):
        return difflib.SequenceMatcher(
            None, a.split("/")[-1].lower(), b.split("/")[-1].lower()
        ).ratio()

    best = None
    for file in sorted(RECIPES.glob("*.toml")):
        recipe, _ = config.load([str(file)], file)
        if column in recipe.published:
            names = ((recipe.model.llm, sources["llm"]), (recipe.model.vision, sources["vision"]))
            likeness = 2 * alike(*names[0]) + alike(*names[1])
            if best is None or likeness > best[0]:
                best = likeness, recipe.published[column], file.stem
    return best[1:]


def add_published(scores, task, c):
    """Puts what PUBLISHED says beside that score; c: the model's config."""
    name, source = getattr(task, "PUBLISHED", (None, None))
    if name in scores:
        names = {"llm": c.text.get("model_type", ""), "vision": c.vision.get("model_type", "")}
        names |= {key: value for key, value in c.sources.items() if value}
        number, of = (
            nearest(source, names)
            if isinstance(source, str)
            else next((n, m) for m, n in source.items())
        )
        scores[name] |= {"published": number, "published_of": of}
