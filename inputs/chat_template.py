"""The Jinja chat template in a tokenizer's folder, so that a new model needs no template of ours.

    template = bind_chat(tok)                 # `templates.resolve("chat", tok)` gives the same
    text, answers, marks = template.write(turns, prompt=False)

Such a template is a program: it gives the text of a conversation and does not say where in it the
turns' texts lie. `ChatTemplate` finds that out; its docstring has the method.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
from dataclasses import dataclass
from typing import NamedTuple

from config import UserError
from inputs import bounded
from inputs.conversation import IMAGE, Rendered, Span, Turn
from inputs.tokenizer import Mark, Tokenizer
from packing import IMAGE_TOKEN

# A key is a number between two characters of private use, which no template strips or changes.
KEY = "\ue000{}\ue001"
KEYS = "(\ue000\\d+\ue001)"
KEYED = 1  # the place of the variant with keys among those of `ChatTemplate._variants`

# What stands around the reasoning in an answer. Some templates look for the second one.
THINKING = ("<think>", "</think>")

REASONED = "<think>\nr\n</think>\n\nb"  # an answer with reasoning, to try a template

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}  # Hugging Face's names for them


@dataclass(frozen=True)
class KeyedTurn:
    """A turn in which each text is a key."""

    role: str
    parts: list[str]  # keys, IMAGE where the human shows an image, THINKING in an answer


@dataclass(frozen=True)
class AnswerPlace:
    """Where an answer lies in a rendered text."""

    start: int  # where the prompt for it ends
    end: int  # where its own texts end
    closing: Mark | None  # the control token behind it, if nothing but space is between


class Piece(NamedTuple):
    """A part of what is said in a turn."""

    value: str
    is_text: bool  # else it is an image, a string of THINKING, or space beside one


class Measured(NamedTuple):
    """A rendering, and where in it the turns' texts lie."""

    text: str
    keyed: str  # the same rendering with a key in the place of each text
    spans: dict[str, Span]  # of a key: where its text lies in `text`


class Located(NamedTuple):
    """A rendering with all that `Chat.write` needs to know of it."""

    text: str
    answers: list[AnswerPlace]
    marks: list[Mark]  # images and control tokens, in order


class UnboundChat:
    """The entry "chat" of templates.TEMPLATES, which becomes a Chat when it gets its tokenizer."""

    eos = ""  # a Template's eos: here the Jinja template writes it

    def bind(self, tok: Tokenizer) -> ChatTemplate:
        """Return the tokenizer's own template. Raise UserError if it cannot be used."""
        return bind_chat(tok)

    def misfit(self, tok: Tokenizer) -> str | None:
        """Return why this template cannot be used with that tokenizer, or None."""
        if tok.chat_template:
            return None
        return "this tokenizer has no chat template"


class Wanted(NamedTuple):
    """A text that a template is to make."""

    conversation: int  # its place in a list
    turns: int  # how many of its turns
    prompt: bool  # whether the beginning of an answer follows


class JinjaTemplate:
    """The source of a chat template, to render in a process with limits, see bounded.py."""

    def __init__(self, source: str):
        self.source = source
        self.over = None  # why it was given up: each row would wait for its limit again

    def render(
        self, names: dict[str, str], conversations: list[list[dict]], wanted: list[Wanted]
    ) -> list[str]:
        """Return the text of each beginning of a conversation that is wanted.

        names: what the template may use beside its messages. Raise UserError if it refuses one, is
        not Jinja, or needs more than it may have.
        """
        reply = {}
        if self.over is None:
            request = {
                "job": "render",
                "source": self.source,
                "names": names,
                "conversations": conversations,
                "wanted": wanted,
            }
            try:
                reply = bounded.ask(request)
            except bounded.OverLimit as error:
                self.over = f"the chat template {error}"
        if self.over is not None:
            raise UserError("template: chat", self.over, "use another template")
        if "not_jinja" in reply:
            what = f"the chat template is not Jinja: {reply['not_jinja']}"
            raise UserError("template: chat", what, "copy it again")
        if "refused" in reply:  # what raise_exception says, or whatever its code comes to
            what = f"the chat template refuses them: {reply['refused'][:200]}"
            fix = "mend the row, or use another template"
            raise UserError("conversations", what, fix)
        return reply["texts"]


@functools.lru_cache(4)
def read_jinja(source: str) -> JinjaTemplate:
    """Return a chat template. It is kept, because it knows whether it was given up."""
    return JinjaTemplate(source)


@functools.lru_cache(4)
def bind_chat(tok: Tokenizer) -> ChatTemplate:
    """Return a tokenizer's chat template. It is kept, because every row asks for it."""
    return ChatTemplate(tok)


class ChatTemplate:
    """The chat template of one tokenizer.

    It is rendered as Hugging Face's `apply_chat_template` does. To find the turns' texts in what it
    gives, searching for them would go wrong where one occurs twice. So their places are measured:
    the conversation is rendered once more with a key in the place of each text.

        text    <|im_start|>user\\nWho?<|im_end|>\\n<|im_start|>assistant\\nA dog.<|im_end|>\\n
        keyed   <|im_start|>user\\n [0]<|im_end|>\\n<|im_start|>assistant\\n   [1]<|im_end|>\\n

    What stands between the keys is the template's, and the texts lie where the keys are. Templates
    may strip the space around a text. Two more renderings, with that space before the keys and
    behind them, show how much of it stays. All parts so measured, put together, must give the text
    again. A template that changes a text, leaves it out or writes it twice is a UserError.

    Control strings are control tokens only outside the texts. An answer is supervised from where
    the prompt for it ends (what the template writes between the two, the model has to write) to the
    control token behind it, that one included.

    Some templates take an answer apart at "</think>" (`splits`): the reasoning before it and the
    words behind it are two texts then, each with a key.

    Some write a turn differently once another question follows (`rewrites`). Qwen3's leaves out the
    reasoning of an answer then:

        the last one      <|im_start|>assistant\\n<think>\\nFur.\\n</think>\\n\\nA dog.<|im_end|>
        an earlier one    <|im_start|>assistant\\nA dog.<|im_end|>

    LLaVA-OneVision's writes "assistant \\n" before an answer and ends the prompt for one with
    "assistant\\n": the space comes once the answer is there.

    A conversation has no single text then that shows every answer as inference writes it. So it
    becomes one sample for each answer (`templates.render_samples`), and `write` supervises only the
    last answer: before it stands the prompt for it, whatever that leaves out of earlier answers.
    """

    def __init__(self, tok: Tokenizer):
        """Find out how the template wants contents and how it ends an answer.

        Raise UserError if it is not Jinja, the package for it is missing, or it does not end an
        answer in a way that can be learned.
        """
        if importlib.util.find_spec("jinja2") is None:
            what = "the package jinja2 is missing"
            raise UserError("template: chat", what, "pip install jinja2")

        self.tok = tok
        self.jinja = read_jinja(tok.chat_template)
        self.lists = False  # whether it wants contents as [{"type": "text", "text": ...}]
        self.splits = False  # whether it takes an answer apart at "</think>"
        self.rewrites = False  # whether it writes a turn differently once a question follows
        text, answer = self._probe()

        # Most templates write a control token behind every answer.
        self.closes = answer.closing is not None
        if self.closes:
            self.stop = answer.closing.id  # the id that ends an answer
        else:
            # The others end the last answer with the tokenizer's eos, see `_close_last`. Nothing
            # but space may follow: other text would be neither supervised nor an end.
            rest = text[answer.end :]
            if rest.strip() or tok.eos_id is None:
                what = f"no control token of this tokenizer ends an answer, but {rest!r}"
                raise UserError("template: chat", what, "use another template")
            self.stop = tok.eos_id

        self.splits = self._probe_splits()
        self.rewrites = self._probe_rewrites()

    def write(self, turns: list[Turn], prompt: bool) -> Rendered:
        """Write the turns out, see `templates.render`. Raise UserError."""
        text, answers, marks = self._locate(turns, prompt)
        if not self.closes:
            spans = [Span(answer.start, answer.end) for answer in answers]
            if prompt:
                return Rendered(text, spans, marks)
            return self._close_last(text, spans, marks)

        # An answer is supervised with the control token behind it.
        spans = []
        for answer in answers:
            if answer.closing is None or answer.closing.id != self.stop:
                end = self.tok.token(self.stop)
                what = f"the chat template does not end every answer with {end!r}"
                raise UserError("conversations", what, "use another template")
            spans.append(Span(answer.start, answer.closing.end))
        return Rendered(text, spans, marks)

    def _close_last(self, text: str, spans: list[Span], marks: list[Mark]) -> Rendered:
        """Put the tokenizer's eos behind the last answer.

        LLaVA-1.5-hf gets its earlier answers without an end, as its template writes them, and stops
        with </s> right behind the last word. So only the last answer is given an end: it is a part
        of no prompt.
        """
        start, end = spans[-1]
        text = text[:end] + self.tok.eos

        # What the template wrote behind the answer is cut off, its marks as well.
        marks = [mark for mark in marks if mark.end <= end]
        marks.append(Mark(end, len(text), self.stop))
        return Rendered(text, [*spans[:-1], Span(start, len(text))], marks)

    def _probe(self) -> tuple[str, AnswerPlace]:
        """Return the smallest conversation, rendered, and its answer. Set `lists` on the way."""
        turns = [Turn("human", "a"), Turn("gpt", "b")]
        errors = []
        for lists in (False, True):
            self.lists = lists
            try:
                located = self._locate(turns, prompt=False)
                return located.text, located.answers[0]
            except UserError as error:
                errors.append(error)

        # Contents as strings are the rule, so what is wrong with those is the mistake to report.
        raise errors[0]

    def _probe_splits(self) -> bool:
        """Say whether the template writes an answer with reasoning otherwise than as it is."""
        turns = [Turn("human", "a"), Turn("gpt", REASONED), Turn("human", "c"), Turn("gpt", "d")]
        keyed_turns, texts = self._insert_keys(turns)
        [key] = keyed_turns[1].parts
        conversations = [self._messages(keyed_turns, texts)]
        del texts[key]
        conversations.append(self._messages(keyed_turns, texts))

        # The answer as the last one, and as an earlier one.
        for n in (2, 4):
            wanted = [Wanted(0, n, False), Wanted(1, n, False)]

            # A template that refuses the conversation takes nothing apart.
            with contextlib.suppress(UserError):
                text, keyed = self.jinja.render(self.tok.named, conversations, wanted)
                if text != keyed.replace(key, REASONED):
                    return True
        return False

    def _probe_rewrites(self) -> bool:
        """Say whether a turn is written differently once a question follows."""
        question = Turn("human", "a")
        conversations = [
            [question, Turn("gpt", "b")],
            [question, Turn("gpt", REASONED)],
            [Turn("system", "s"), question, Turn("gpt", "b")],
        ]
        for turns in conversations:
            # One that the template refuses says nothing about the others.
            with contextlib.suppress(UserError):
                if self._is_rewritten(turns):
                    return True
        return False

    def _is_rewritten(self, turns: list[Turn]) -> bool:
        """Say whether a conversation of one answer is written differently before another question.

        Raise UserError if the template refuses it.
        """
        text, [answer], _ = self._locate(turns, prompt=False)
        end = answer.end
        if self.closes:
            end = answer.closing.end

        # The same conversation with one more question and answer.
        keyed_turns, texts = self._insert_keys([*turns, Turn("human", "c"), Turn("gpt", "d")])
        messages = self._messages(keyed_turns, texts)
        wanted = [Wanted(0, len(messages), False)]
        [longer] = self.jinja.render(self.tok.named, [messages], wanted)
        return not longer.startswith(text[:end])

    def _locate(self, turns: list[Turn], prompt: bool) -> Located:
        """Return the rendered text, where its answers lie, and all its marks. Raise UserError.

        Where the template rewrites earlier turns, only the last answer has a place, and that of a
        prompt is still to come.
        """
        keyed_turns, texts = self._insert_keys(turns)
        places = [i for i, turn in enumerate(keyed_turns) if turn.role == "assistant"]
        optional = set()  # keys of texts that may be left out
        if self.rewrites:
            earlier = places
            places = []
            if not prompt:
                places = earlier[-1:]
                earlier = earlier[:-1]
            for i in earlier:
                optional.update(keyed_turns[i].parts)

        # All renderings of the row are one request: the four of `_measure`, and the prompt for each
        # answer, in which keys stand for the texts.
        conversations = self._variants(keyed_turns, texts)
        wanted = [Wanted(k, len(turns), prompt) for k in range(4)]
        wanted += [Wanted(KEYED, i, True) for i in places]
        renderings = self.jinja.render(self.tok.named, conversations, wanted)
        measured = self._measure(keyed_turns, texts, optional, renderings[:4])
        prompts = renderings[4:]
        if not prompt:
            # The last answer is written as inference sees it, also where that is not how the
            # template writes a finished one.
            measured = put_behind_prompt(measured, keyed_turns[-1], prompts[-1])
        marks = self._find_marks(measured)

        answers = []
        for i, asked in zip(places, prompts, strict=True):
            # What stands before the answer must be what a prompt for it will be.
            if not measured.keyed.startswith(asked):
                what = f"the chat template writes what is before turn {i} differently in its prompt"
                fix = "cut the row there, or use another template"
                raise UserError("conversations", what, fix)

            # Between the end of the prompt and the answer's first text stand `opening` characters,
            # which the model has to write, too.
            keys = keys_in_order(keyed_turns[i], measured)
            start, _ = measured.spans[keys[0]]
            _, end = measured.spans[keys[-1]]
            opening = measured.keyed.index(keys[0]) - len(asked)
            closing = find_closing(measured.text, end, marks)
            answers.append(AnswerPlace(start - opening, end, closing))
        return Located(measured.text, answers, marks)

    def _find_marks(self, measured: Measured) -> list[Mark]:
        """Return the images and control tokens of a rendering, in order."""
        # They are searched in a copy in which the turns' texts are blotted out. The space in the
        # texts stays, for some control tokens take it in.
        outside = measured.text
        for start, end in measured.spans.values():
            blotted = re.sub(r"\S", "\ue000", outside[start:end])
            outside = outside[:start] + blotted + outside[end:]

        # Some vocabularies have a control token <image>. Here it is an image.
        marks = []
        for mark in self.tok.controls(outside):
            if outside[mark.start : mark.end].strip() != IMAGE:
                marks.append(mark)
        for found in re.finditer(IMAGE, outside):
            marks.append(Mark(found.start(), found.end(), IMAGE_TOKEN))
        return sorted(marks)

    def _insert_keys(self, turns: list[Turn]) -> tuple[list[KeyedTurn], dict[str, str]]:
        """Return the turns with keys for their texts, and {key: text}.

        "<image>" is an image only in what a human says or the system line; in an answer it is text.
        """
        keyed = []
        texts = {}
        for speaker, value in turns:
            if speaker == "gpt" and self.splits:
                pieces = split_thinking(value)
            elif speaker == "gpt":
                pieces = [Piece(value, is_text=True)]
            else:
                pieces = []
                for piece in split_images(value, strip=self.lists):
                    pieces.append(Piece(piece, is_text=piece != IMAGE))
            parts = []
            for piece, is_text in pieces:
                if not is_text:
                    parts.append(piece)
                else:
                    key = KEY.format(len(texts))
                    texts[key] = piece
                    parts.append(key)
            keyed.append(KeyedTurn(ROLES[speaker], parts))
        return keyed, texts

    def _variants(self, turns: list[KeyedTurn], texts: dict[str, str]) -> list[list[dict]]:
        """Return the messages of the four renderings that `_measure` needs, see the class."""
        space_before = {}
        space_behind = {}
        for key, value in texts.items():
            lead, _, trail = take_space_apart(value)
            space_before[key] = lead + key
            space_behind[key] = key + trail
        variants = (texts, {}, space_before, space_behind)
        return [self._messages(turns, written) for written in variants]

    def _measure(
        self,
        turns: list[KeyedTurn],
        texts: dict[str, str],
        optional: set[str],
        renderings: list[str],
    ) -> Measured:
        """Return the rendering and where the texts lie in it; see the class for the method.

        renderings: of `_variants`. Raise UserError for a template that does not write each text
        once, as it is; those of `optional` keys it may leave out.
        """
        text, keyed, before, behind = renderings

        # Split at the keys: the template's own words at even places, keys at odd places.
        plain = re.split(KEYS, keyed)
        before = re.split(KEYS, before)
        behind = re.split(KEYS, behind)
        keys = plain[1::2]
        left_out = optional.difference(keys)
        expected = sorted(key for key in texts if key not in left_out)
        if sorted(keys) != expected or before[1::2] != keys or behind[1::2] != keys:
            raise lost_text()
        images = sum(turn.parts.count(IMAGE) for turn in turns)
        if keyed.count(IMAGE) != images:
            raise lost_text()

        # Put the text together again, part by part. What the spaced renderings have more than the
        # plain one is the space that stays.
        spans = {}
        written = plain[0]
        for k, key in enumerate(keys):
            ahead, rest = plain[2 * k], plain[2 * k + 2]
            lead = before[2 * k].removeprefix(ahead)
            trail = behind[2 * k + 2].removesuffix(rest)
            _, core, _ = take_space_apart(texts[key])
            part = lead + core + trail
            start = len(written)
            spans[key] = Span(start, start + len(part))
            written += part + rest

        # This is the proof that the spans are right.
        if written != text:
            raise lost_text()
        return Measured(text, keyed, spans)

    def _messages(self, turns: list[KeyedTurn], texts: dict[str, str]) -> list[dict]:
        """Return the turns as a template wants them, with texts[key] for a key that has one."""
        messages = []
        for turn in turns:
            parts = [texts.get(part, part) for part in turn.parts]
            if self.lists and turn.role == "assistant":
                content = list_content(["".join(parts)], [False])
            elif self.lists:
                is_image = [part == IMAGE for part in turn.parts]
                content = list_content(parts, is_image)
            else:
                content = "".join(parts)
            messages.append({"role": turn.role, "content": content})

        return messages


def lost_text() -> UserError:
    """Return the error for a template that does not write each text once, as it is."""
    what = "the chat template leaves a text or an image out, writes it twice or changes it"
    return UserError("conversations", what, "mend the row, or use another template")


def keys_in_order(turn: KeyedTurn, measured: Measured) -> list[str]:
    """Return the keys of a turn's texts, in the order in which the template writes them."""
    keys = [part for part in turn.parts if part in measured.spans]
    return sorted(keys, key=measured.keyed.index)


def put_behind_prompt(measured: Measured, answer: KeyedTurn, asked: str) -> Measured:
    """Return a rendering in which its last answer stands behind the prompt for it, `asked`.

    Only the space before the answer may change. A prompt that differs in more is left to the
    caller, and so is one behind which the template begins the answer.
    """
    first_key = keys_in_order(answer, measured)[0]
    first = measured.keyed.index(first_key)
    written = measured.keyed[:first]
    common = written.rstrip()
    if written.startswith(asked) or asked.rstrip() != common:
        return measured

    # In `written` there are keys, but what follows the last of them is the same in the text.
    space = asked[len(common) :]
    start, _ = measured.spans[first_key]
    end_of_common = start - (len(written) - len(common))
    text = measured.text[:end_of_common] + space + measured.text[start:]

    shift = len(asked) - len(written)
    spans = {}
    for key, (begin, end) in measured.spans.items():
        if measured.keyed.index(key) >= first:
            spans[key] = Span(begin + shift, end + shift)
        else:
            spans[key] = Span(begin, end)
    return Measured(text, asked + measured.keyed[first:], spans)


def take_space_apart(text: str) -> tuple[str, str, str]:
    """Return the space in front of a text, the text without it, and the space behind it."""
    without_lead = text.lstrip()
    core = without_lead.rstrip()
    lead = text[: len(text) - len(without_lead)]
    return lead, core, without_lead[len(core) :]


def split_images(value: str, strip: bool) -> list[str]:
    """Return the texts and images of a turn in order: "<image>\\nWho?" is ["<image>", "\\nWho?"].

    With `strip` the texts beside an image lose their line breaks: where contents are a list, an
    image is no line of its own.
    """
    pieces = re.split(f"({IMAGE})", value)
    if len(pieces) == 1:
        return pieces
    if strip:
        pieces = [piece.strip() for piece in pieces]
    return [piece for piece in pieces if piece]


def split_thinking(value: str) -> list[Piece]:
    """Return the pieces of an answer in order: reasoning, what is said, THINKING around them.

    "<think>It barks.</think>A dog." has the texts "It barks." and "A dog.". What is said stands
    last and may be empty. An answer without "</think>" is a single text.
    """
    opening, closing = THINKING
    if closing not in value:
        return [Piece(value, is_text=True)]
    *before, said = re.split(f"({opening}|{closing})", value)
    pieces = []
    for piece in before:
        is_space = not piece.strip()
        pieces.append(Piece(piece, is_text=piece not in THINKING and not is_space))
    return [*pieces, Piece(said, is_text=True)]


def list_content(parts: list[str], is_image: list[bool]) -> list[dict]:
    """Return the contents of a turn as the list that newer templates want."""
    content = []
    for part, shows_image in zip(parts, is_image, strict=True):
        if shows_image:
            content.append({"type": "image"})
        else:
            content.append({"type": "text", "text": part})
    return content


def find_closing(text: str, end: int, marks: list[Mark]) -> Mark | None:
    """Return the mark behind the answer that ends at `end`; None if other text comes first."""
    for mark in marks:
        if mark.end > end:
            if text[end : mark.start].strip():
                return None
            return mark
    return None
