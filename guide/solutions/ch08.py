"""Chapter 8, does it see? A solution."""

from collections import Counter, defaultdict


def chair(described: list[list[str]], present: list[set[str]]) -> dict[str, float]:
    """Return CHAIR (Rohrbach et al., 2018) of some descriptions, in percent."""
    named = 0
    invented = 0
    descriptions_that_invent = 0
    there = 0
    found = 0
    for objects, truth in zip(described, present, strict=True):
        wrong = [name for name in objects if name not in truth]
        named += len(objects)
        invented += len(wrong)
        if wrong:
            descriptions_that_invent += 1
        there += len(truth)
        found += len(truth.intersection(objects))
    return {
        "CHAIRi": 100 * invented / named,
        "CHAIRs": 100 * descriptions_that_invent / len(described),
        "recall": 100 * found / there,
    }


def blind_accuracy(seen: list[tuple[str, str]], asked: list[tuple[str, str]]) -> float:
    """Return the share of right answers, 0 to 1, of a program that sees no pictures."""
    answers = defaultdict(Counter)
    for question, answer in seen:
        answers[question][answer] += 1

    right = 0
    for question, answer in asked:
        counted = answers[question]
        if not counted:
            continue
        # Sorted first: max takes the first of equal ones.
        if answer == max(sorted(counted), key=counted.get):
            right += 1
    return right / len(asked)
