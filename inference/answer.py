"""Questions in, answers out: from a text that somebody asks to the text that a model answers.

    questions = ["How many?", "<image>\\nWhich colour?"]
    texts = answer(model, tokenizer, questions, [[], [item]], max_new_tokens=64)

`answer` is all that evaluation and the training log need. The chat of generate.py has turns and
streams what it says, and visualize.py looks into the tokens: they use the pieces below it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inputs.templates import IMAGE, encode_prompt, stop_id
from packing import Item


def answer(
    model,
    tokenizer,
    questions: Sequence[str],
    items_of_each: Sequence[Sequence[Item]],
    template: str | None = None,
    **options,
) -> list[str]:
    """Return the model's answer to each question, without the space around it.

    items_of_each: the pictures and videos that each question is about, in the order of its
    `<image>` placeholders. If a question has another number of placeholders than items, they are
    put in front of it. All questions are answered in one batch.
    template: the name of the chat template; None = the model's own.
    options: those of LLaVA.generate, except eos_token_id, which the template decides.

    Raises UserError if the template cannot write a prompt.
    """
    made = answer_tokens(model, tokenizer, questions, items_of_each, template, **options)
    return [tokenizer.decode(tokens).strip() for tokens in made]


def answer_tokens(
    model,
    tokenizer,
    questions: Sequence[str],
    items_of_each: Sequence[Sequence[Item]],
    template: str | None = None,
    **options,
) -> list[list[int]]:
    """Return the tokens of each answer, without the stop token. The arguments are `answer`'s."""
    template = template or model.config.template

    # One flat list of items: the model hands them out by the placeholders in the prompts.
    prompts = []
    all_items = []
    for question, items in zip(questions, items_of_each, strict=True):
        ids = prompt_ids(question, len(items), tokenizer, template)
        prompts.append(torch.tensor(ids))
        all_items.extend(items)

    stop = stop_id(tokenizer, template)
    made = model.generate(prompts, images=all_items, eos_token_id=stop, **options)
    return [before_stop(tokens, stop) for tokens in made.tolist()]


def prompt_ids(question: str, items: int, tokenizer, template: str) -> list[int]:
    """Return the ids of a prompt with one question, one IMAGE_TOKEN for each of its items."""
    turn = {"from": "human", "value": place_images(question, items)}
    return encode_prompt([turn], tokenizer, template)


def place_images(question: str, items: int) -> str:
    """Return the question with one `<image>` for each item.

    If it has as many already, they stay where they are; otherwise they are put in front.
    """
    if question.count(IMAGE) == items:
        return question
    return f"{IMAGE}\n" * items + question.replace(IMAGE, "")


def before_stop(tokens: list[int], stop: int | None) -> list[int]:
    """Return the tokens before the first stop token, or all of them if there is none."""
    if stop in tokens:
        return tokens[: tokens.index(stop)]
    return tokens
