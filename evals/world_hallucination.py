"""What a model says of the demo world's pictures that is not in them.

Files: those of evals/world.py. Two things are asked of the held-out pictures:

    false_yes_random, ...   whether an object is there that is not, by POPE's kinds of negatives
                            (Li et al., 2023): the percentage answered with yes
    CHAIRs, CHAIRi          to describe the picture: the percentage of the descriptions with an
                            object that is not there, and of the objects that they name (Rohrbach
                            et al., 2018)
    recall                  the percentage of a picture's objects that its description names

Less is better, but for the recall: who names nothing invents nothing. evals/chair.py is CHAIR on
photographs, where nobody knows all that is there. Here the row's scene says so.

An object is named where a colour and a shape stand side by side.
"""

from __future__ import annotations

import re

from evals import world
from evals.pope import yes_or_no
from evals.scores import Result, group_scores

MAX_NEW_TOKENS = 48  # the longest captions of the world have about thirty
PROMPT = "What is where?"  # as demo/world.py has it


def examples(data_dir):
    """Return the existence questions with the answer no, then a description of each picture.

    The pictures are those of the questions about attributes. Own keys: "split", which is
    "captions" for a description; "label" has then the (colour, shape) of the objects that are
    there; "names", one dict for all: {"colour": those of the world, "shape": likewise}.
    """
    questions = []
    captions = []
    names = {"colour": set(), "shape": set()}
    for example in world.examples(data_dir):
        for colour, shape in example["objects"]:
            names["colour"].add(colour)
            names["shape"].add(shape)

        if example["split"] == "attributes":
            caption = {
                "id": example["id"],
                "image": example["image"],
                "prompt": PROMPT,
                "label": example["objects"],
                "names": names,
                "split": "captions",
                "where": example["where"],
            }
            captions.append(caption)
        elif example["split"].startswith("existence") and example["label"] == "no":
            questions.append(example)
    return questions + captions


def score(examples, answers):
    """Return the rates of false yes, CHAIRs, CHAIRi and recall; a ratio of nothing is 0."""
    false_yes = []
    captions = 0
    invented = 0
    with_invention = 0
    named = 0
    present = 0
    recalled = 0
    for example, answer in zip(examples, answers, strict=True):
        if example["split"] != "captions":
            name = example["split"].replace("existence", "false_yes")
            false_yes.append(Result([name], yes_or_no(answer) == "yes"))
            continue

        truth = set(example["label"])
        said = objects_named(answer, example["names"])
        wrong = [pair for pair in said if pair not in truth]
        captions += 1
        invented += len(wrong)
        with_invention += bool(wrong)
        named += len(said)
        present += len(truth)
        recalled += len(truth & set(said))

    scores = group_scores(false_yes)
    for of_group in scores.values():
        of_group["chance"] = None
    if captions:
        ratios = {
            "CHAIRs": with_invention / captions,
            "CHAIRi": invented / max(named, 1),
            "recall": recalled / max(present, 1),
        }
        for name, ratio in ratios.items():
            scores[name] = {"score": 100 * ratio, "chance": None, "n": captions}
    return scores


def objects_named(text, names):
    """Return the (colour, shape) of each object that a description names, in its order.

    names: {"colour": the colours that there are, "shape": the shapes}.
    """
    found = []
    words = re.findall(r"\w+", text.lower())
    for colour, shape in zip(words, words[1:], strict=False):
        if colour in names["colour"] and shape in names["shape"]:
            found.append((colour, shape))
    return found
