"""What the video benchmarks share: multiple choice about one clip, asked and read as TinyLLaVA-Video's tinyllava/eval
does (github.com/ZhangXJ199/TinyLLaVA-Video), whose numbers are the published ones.

An answer that no letter can be read off is guessed there; here it earns what a guess earns on average. Chance is
1 / number of choices, for each.
"""

from evals import first, grouped
from evals.mmmu import parse_choice

MAX_NEW_TOKENS = 1024


def letters(texts):
    """{letter: text} of options."""
    return {chr(65 + i): text for i, text in enumerate(texts)}


def letter_of(answer, choices):
    """The letter of the choice that is this text, of the last where two are alike. Raises ValueError."""
    found = [letter for letter, text in choices.items() if text == answer]
    if not found:
        raise ValueError(f"the answer {answer!r} is none of its choices")
    return found[-1]


def bracketed(question, choices):
    """The question, then "(A) ..." a line, as MVBench and MLVU list options."""
    return "\n".join(
        [question, *(f"({letter}) {text}" for letter, text in choices.items())]
    ).rstrip()


def example(where, name, video, prompt, choices, label, groups):
    """An example about the clip `video` (path from data_dir); `groups` are the scores that it counts for."""
    return {"id": name, "image": None, "video": video, "prompt": prompt, "label": label, "choices": choices,
            "groups": groups, "where": where}  # fmt: skip


def clip(data_dir, *names):
    """The path from data_dir of the first of these files or folders that is there. Raises UserError."""
    return first(data_dir, *names).relative_to(data_dir).as_posix()


def parse(answer, choices):
    """The letter among `choices` {letter: text} that an answer begins with, or that MMMU's rule finds; or None."""
    said = answer.strip()
    for mark in ",.!?;:'":
        said = said.strip(mark)
    return said[0] if said[:1] in choices else parse_choice(answer.strip(), choices)


def credit(answer, example):
    """(what an answer earns, what a guess does), 0 to 1."""
    label, choices = example["label"], example["choices"]
    said, chance = parse(answer, choices), 1 / len(choices)
    return said == label if said else (label in choices) * chance, chance


def score(examples, answers, order, credit=credit):
    """{group: {"score", "chance", "n"}} in this order of groups."""
    pairs = zip(examples, answers, strict=True)
    scores = grouped((e["groups"], *credit(answer, e)) for e, answer in pairs)
    return {name: scores[name] for name in order if name in scores}


def mean(scores):
    """The mean of scores, each counting the same, over all that they were taken of."""
    parts = list(scores.values())
    mean = {key: sum(s[key] for s in parts) / len(parts) for key in ("score", "chance")}
    return mean | {"n": sum(s["n"] for s in parts)}
