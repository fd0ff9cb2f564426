"""Answer questions: from the texts of questions to the texts of the model's answers.

    questions = ["How many?", "<image>\\nWhich colour?"]
    texts = answer(model, tokenizer, questions, [[], [item]], max_new_tokens=64)

`answer` is all that evaluation and the training log need. The chat of generate.py has turns and
streams its answers, and visualize.py looks into their tokens: these two use the pieces that stand
below `answer`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inputs.templates import IMAGE, encode_prompt, stop_id
from packing import Item


def answer(
    model,
    tokenizer,
    questions: Sequence[str | list[dict]],
    items_of_each: Sequence[Sequence[Item]],
    template: str | None = None,
    **options,
) -> list[str]:
    """Return the model's answer to each question, without the space around it.

    questions: each a text, or the turns of a conversation that ends with a human turn. Such turns
    have their `<image>` placeholders where they belong.
    items_of_each: the pictures and videos that each question is about, in the order of its
    `<image>` placeholders. If a question has another number of placeholders than items, they are
    put in front of it. All questions are answered in one batch.
    template: the name of the chat template; None = the model's own.
    options: those of LLaVA.generate, except eos_token_id, which the template decides.

    Raises UserError if the template cannot write a prompt.
    """
    answers = answer_tokens(model, tokenizer, questions, items_of_each, template, **options)
    return [tokenizer.decode(tokens).strip() for tokens in answers]


def answer_tokens(
    model,
    tokenizer,
    questions: Sequence[str | list[dict]],
    items_of_each: Sequence[Sequence[Item]],
    template: str | None = None,
    **options,
) -> list[list[int]]:
    """Return the tokens of each answer, without the stop token. The arguments are `answer`'s."""
    template = template or model.config.template

    # `generate` takes one flat list of items, and hands them to the placeholders of all prompts
    # in their order.
    prompts = []
    all_items = []
    for question, items in zip(questions, items_of_each, strict=True):
        ids = prompt_ids(question, len(items), tokenizer, template)
        prompts.append(torch.tensor(ids))
        all_items.extend(items)

    # The answers come as one tensor, in which short ones are padded with the stop token.
    stop = stop_id(tokenizer, template)
    padded = model.generate(prompts, images=all_items, eos_token_id=stop, **options)
    return [before_stop(tokens, stop) for tokens in padded.tolist()]


def prompt_ids(question: str | list[dict], images: int, tokenizer, template: str) -> list[int]:
    """Return the ids of a prompt with one question and so many images, each an IMAGE_TOKEN.

    A question in the form of turns has its placeholders already.
    """
    if isinstance(question, list):
        return encode_prompt(question, tokenizer, template)
    turn = {"from": "human", "value": place_images(question, images)}
    return encode_prompt([turn], tokenizer, template)


def place_images(question: str, images: int) -> str:
    """Return the question with so many `<image>` placeholders.

    If it has as many already, they stay where they are. Otherwise they are put in front, as the
    datasets of LLaVA have them.
    """
    if question.count(IMAGE) == images:
        return question

    # Those in the text go: which of them would stand for which image is not known.
    text = question.replace(IMAGE, "")
    return f"{IMAGE}\n" * images + text


def before_stop(tokens: list[int], stop: int | None) -> list[int]:
    """Return the tokens before the first stop token, or all of them if there is none."""
    if stop in tokens:
        return tokens[: tokens.index(stop)]
    return tokens
