"""Chat templates: from a conversation to one text, and from the text to token ids and labels.

A conversation is a list of turns, as LLaVA's rows have it. `render` writes it out as one text, and
`tokenize` makes ids and labels of the text. With Llama-2's tokenizer and the template "plain":

    conversation  [{"from": "human", "value": "<image>\\nWho?"}, {"from": "gpt", "value": "A dog."}]

    text          USER: <image>\\nWho? ASSISTANT: A dog.</s>
    answers       [29:40], which is " A dog.</s>"
    marks         [6:13] is an image, [36:40] is the control token 2

    ids           1   3148 1001 29901 29871 -200 ... 13566 29901   319    11203  29889  2
    token         <s> ▁US  ER   :     ▁     image    ANT   :       ▁A     ▁dog   .      </s>
    label         -   -    -    -     -     -        -     -       319    11203  29889  2

A token is supervised when its first character lies in an answer. Searching the ids for those of the
answer would go wrong: 319 is also the beginning of " ASSISTANT". And tokenizing the parts one by
one would go wrong, because tokens reach across parts. The marks say what is structure. The same
characters typed into a question or an answer are plain text, so that data cannot end a turn.

Read `encode`, `render` and `tokenize` for the way of a row, then `Template`, which is seven of the
eight templates in `TEMPLATES`. The eighth, "chat", is the Jinja template that a tokenizer brings
along (chat_template.py). What a conversation must be is in conversation.py.

A mistake in a row is a UserError "<where>: <what>; fix: <action>", and the caller puts file and row
before it.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from config import UserError
from inputs.chat_template import ChatTemplate, UnboundChat
from inputs.conversation import IMAGE, Rendered, Span, Turn, arrange_turns, check_turns
from inputs.tokenizer import JsonTokenizer, Mark, Offsets, Tokenizer
from packing import IGNORE, IMAGE_TOKEN


class Tokenized(NamedTuple):
    """Three lists of one length."""

    ids: list[int]
    labels: list[int]  # the id where it is supervised, else IGNORE; not shifted
    offsets: Offsets  # the characters that each token stands for


# ----------------------------------------------------------------------------- the way of a row


def encode(conversation: list, tok: Tokenizer, template: str = "phi") -> tuple[list, list]:
    """Return (ids, labels) of a finished conversation, two lists of one length.

    An image is one IMAGE_TOKEN in the ids. Labels are IGNORE where nothing is learned. `template`
    is a name in TEMPLATES. With one that rewrites earlier turns this is the sample of the last
    answer, see `encode_samples`. Raise UserError for a conversation that cannot be written with it.
    """
    rendered = render(conversation, choose_template(template, tok))
    tokenized = tokenize(*rendered, tok)
    return tokenized.ids, tokenized.labels


def encode_samples(
    conversation: list, tok: Tokenizer, template: str = "phi"
) -> list[tuple[list, list]]:
    """Return (ids, labels) of each sample that a finished conversation becomes.

    It is one, in which all answers are supervised; or one for each answer, see `render_samples`.
    Raise UserError for a conversation that cannot be written with this template.
    """
    samples = []
    for rendered in render_samples(conversation, choose_template(template, tok)):
        tokenized = tokenize(*rendered, tok)
        samples.append((tokenized.ids, tokenized.labels))
    return samples


def encode_prompt(conversation: list, tok: Tokenizer, template: str = "phi") -> list[int]:
    """Return the ids of a conversation that waits for an answer.

    They are those that training has before the first supervised token of that answer. The
    conversation ends with a human turn. Raise UserError for one that cannot be written so.
    """
    rendered = render(conversation, choose_template(template, tok), prompt=True)
    return tokenize(*rendered, tok).ids


def stop_id(tok: Tokenizer, template: str = "phi") -> int | None:
    """Return the id that ends an answer: the template's, else the tokenizer's eos, else None."""
    form = choose_template(template, tok)
    if form.stop is None:
        return tok.eos_id
    return form.stop


def largest_id(tok: Tokenizer, template: str) -> int:
    """Return the largest id that a row may have: of plain text, or one that the template writes."""
    largest = tok.largest_plain_id()
    example = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A dog."}]

    # A template that cannot write this may still write rows, and says at a row what is wrong.
    with contextlib.suppress(UserError):
        ids, _ = encode(example, tok, template)
        largest = max(largest, *ids)
    return largest


def render(conversation: list, template: Template | ChatTemplate, prompt: bool = False) -> Rendered:
    """Write a conversation out with a template that `choose_template` has bound to a tokenizer.

    With prompt=True it ends with a human turn, or with a gpt turn of value None, and the text ends
    where the answer would start. Raise UserError for a conversation that is neither.
    """
    check_turns(conversation, prompt)
    turns = arrange_turns(conversation, prompt)
    return template.write(turns, prompt)


def render_samples(conversation: list, template: Template | ChatTemplate) -> list[Rendered]:
    """Write a finished conversation out, as one text or as one for each answer.

    A template that `rewrites` shows an answer as inference does only where it is the last one. So
    there each answer gets its own text: the prompt for it, then the answer, which alone is
    supervised. Raise UserError as `render` does.
    """
    check_turns(conversation, prompt=False)
    turns = arrange_turns(conversation, prompt=False)
    if not template.rewrites:
        return [template.write(turns, prompt=False)]
    samples = []
    for i, turn in enumerate(turns):
        if turn.speaker == "gpt":
            samples.append(template.write(turns[: i + 1], prompt=False))
    return samples


def tokenize(text: str, answers: list[Span], marks: list[Mark], tok: Tokenizer) -> Tokenized:
    """Return ids, labels and offsets of what `render` gives, with bos if the tokenizer has one."""
    # A prompt ends where an answer starts and cannot end with half a token. So the text is cut
    # there in training, too, unless a mark at that place cuts it already.
    cuts = []
    for start, _ in answers:
        is_cut = any(mark.start < start <= mark.end for mark in marks)
        if start > 0 and not is_cut:
            cuts.append(Mark(start, start, None))
    marks_and_cuts = sorted(marks + cuts, key=lambda mark: (mark.start, mark.end))
    ids, offsets = tok.encode_around(text, marks_and_cuts)

    # One longer than the text: a token without width may stand behind the last character.
    supervised = [False] * (len(text) + 1)
    for start, end in answers:
        supervised[start:end] = [True] * (end - start)

    # A token belongs to where its first character lies.
    labels = []
    for token_id, (start, _) in zip(ids, offsets, strict=True):
        if supervised[start]:
            labels.append(token_id)
        else:
            labels.append(IGNORE)

    # A chat template may have written bos already.
    if tok.bos_id is not None and ids[:1] != [tok.bos_id]:
        ids = [tok.bos_id, *ids]
        labels = [IGNORE, *labels]
        offsets = [(0, 0), *offsets]
    return Tokenized(ids, labels, offsets)


# ------------------------------------------------------------------------ templates written here


@dataclass(frozen=True)
class Template:
    """A template that is written here: a system line, then `question`, `answer` and `eos` in turn.

    Only `answer` and `eos` are supervised. In `question`, {q} stands for what the human says, with
    its images, and {images} for these images alone. In `answer`, {a} stands for the answer.
    """

    # None: this template has no place for a system line.
    system: str | None = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    question: str = "USER: {q} ASSISTANT:"
    answer: str = " {a}"
    eos: str | None = None  # what ends an answer. None: the tokenizer's own. "": nothing
    stop: int | None = None  # the id of eos, known once the template is bound to a tokenizer

    rewrites = False  # it writes a turn the same, whatever follows

    def bind(self, tok: Tokenizer) -> Template:
        """Return this template with that tokenizer's eos and its id."""
        eos = self.eos
        if eos is None:
            eos = tok.eos

        stop = None
        if eos:
            stop = tok.token_id(eos)
        return replace(self, eos=eos, stop=stop)

    def misfit(self, tok: Tokenizer) -> str | None:
        """Return why this template cannot be used with that tokenizer, or None."""
        form = self.bind(tok)
        if form.eos == "" or form.stop is not None:
            return None
        return f"its eos {form.eos!r} is not one token of this tokenizer"

    def write(self, turns: list[Turn], prompt: bool) -> Rendered:
        """Write the turns out, see `render`. Raise UserError for a system turn without a place.

        A prompt needs nothing of its own here: it ends behind a question.
        """
        text = self.system or ""
        answers = []
        marks = []
        for speaker, value in turns:
            if speaker == "system":
                # It stands first and replaces the template's own line.
                if self.system is None:
                    what = "this template has no system line"
                    raise UserError("conversations[0]", what, "remove the turn")
                text = value.strip()
                if text:
                    text += " "

            elif speaker == "human":
                images = IMAGE * value.count(IMAGE)
                text += self.question.format(q=value, images=images)

            else:
                start = len(text)
                text += self.answer.format(a=value) + self.eos
                end = len(text)
                answers.append(Span(start, end))
                if self.eos:
                    marks.append(Mark(end - len(self.eos), end, self.stop))

        # Outside the answers, "<image>" is an image.
        for found in re.finditer(IMAGE, text):
            in_answer = any(start <= found.start() < end for start, end in answers)
            if not in_answer:
                marks.append(Mark(found.start(), found.end(), IMAGE_TOKEN))
        return Rendered(text, answers, sorted(marks))


# ------------------------------------------------------------------------------ templates by name


TEMPLATES = {
    # Images and a caption, nothing else: to pretrain the connector.
    "pretrain": Template(system=None, question="{images}", answer="{a}\n", eos=""),
    "phi": Template(eos="<|endoftext|>"),  # Phi-2, StableLM-2, Qwen1.5
    "llama": Template(eos="</s>"),  # TinyLlama, OpenELM
    "gemma": Template(eos="<eos>"),
    "qwen2_base": Template(eos="<|endoftext|>"),
    "qwen2_instruct": Template(eos="<|im_end|>"),
    "plain": Template(system=""),  # any tokenizer, and no tokens spent on a system line: the demo
    "chat": UnboundChat(),  # the tokenizer's own
}


def choose_template(name: str, tok: Tokenizer) -> Template | ChatTemplate:
    """Return the template of that name, bound to a tokenizer: its eos and stop are known then.

    Raise UserError for an unknown name, and for a template that does not fit the tokenizer.
    """
    if name not in TEMPLATES:
        what = f"{name!r} is unknown"
        near = difflib.get_close_matches(str(name), TEMPLATES, n=1, cutoff=0.3)
        if near:
            what += f", did you mean {near[0]!r}?"
        raise UserError("template", what, f"use one of {', '.join(TEMPLATES)}")

    template = TEMPLATES[name]
    why = template.misfit(tok)
    if why is not None:
        fitting = [other for other, form in TEMPLATES.items() if form.misfit(tok) is None]
        fix = f"use one that fits it: {', '.join(fitting)}"
        raise UserError("template", f"{name!r}: {why}", fix)
    return template.bind(tok)


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer of one token per byte, to which every template but "chat" fits.

    `data.py check` sees the structure of rows with it where no tokenizer is named.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tok = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()

    # Each template's eos must be one token.
    ends = {template.eos for template in TEMPLATES.values() if template.eos}
    tok.add_special_tokens(sorted(ends))
    return JsonTokenizer(
        {
            "tokenizer.json": tok.to_str().encode(),
            "tokenizer_config.json": b'{"eos_token": "</s>"}',
        }
    )
