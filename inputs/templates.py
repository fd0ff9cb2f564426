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
eight templates, then `Chat`, which takes the Jinja template that a tokenizer brings along.

A mistake in a row is a UserError "<where>: <what>; fix: <action>", and the caller puts file and row
before it.
"""

from __future__ import annotations

import datetime
import difflib
import functools
import json
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from config import UserError
from inputs.tokenizer import JsonTokenizer, Mark, Offsets, Tokenizer
from packing import IGNORE, IMAGE_TOKEN

IMAGE = "<image>"


class Turn(NamedTuple):
    """One turn of a conversation."""

    speaker: str  # "human", "gpt" or, as the first, "system"
    value: str | None  # None: the answer that a prompt asks for


class Span(NamedTuple):
    """The characters text[start:end]."""

    start: int
    end: int


class Rendered(NamedTuple):
    """A conversation as one text, and what is known of places in it."""

    text: str
    answers: list[Span]  # what is supervised: each answer, its end token included
    marks: list[Mark]  # what is structure: images and control tokens, in order


class Tokenized(NamedTuple):
    """Three lists of one length."""

    ids: list[int]
    labels: list[int]  # the id where it is supervised, else IGNORE; not shifted
    offsets: Offsets  # the characters that each token stands for


# ----------------------------------------------------------------------------- the way of a row


def encode(conversation: list, tok: Tokenizer, template: str = "phi") -> tuple[list, list]:
    """Return (ids, labels) of a finished conversation: IMAGE_TOKEN per image, IGNORE where nothing
    is learned."""
    rendered = render(conversation, resolve(template, tok))
    tokenized = tokenize(*rendered, tok)
    return tokenized.ids, tokenized.labels


def encode_prompt(conversation: list, tok: Tokenizer, template: str = "phi") -> list[int]:
    """Return the ids of a conversation that waits for an answer.

    They are those that training has before the first supervised token of that answer.
    """
    rendered = render(conversation, resolve(template, tok), prompt=True)
    return tokenize(*rendered, tok).ids


def stop_id(tok: Tokenizer, template: str = "phi") -> int | None:
    """Return the id that ends an answer: the template's, else the tokenizer's eos, else None."""
    form = resolve(template, tok)
    return tok.eos_id if form.stop is None else form.stop


def render(conversation: list, template: Template | Chat, prompt: bool = False) -> Rendered:
    """Write a conversation out with a template that `resolve` has bound to a tokenizer.

    With prompt=True it ends with a human turn, or with a gpt turn of value None, and the text ends
    where the answer would start. Raises UserError.
    """
    check_turns(conversation, prompt)
    turns = arrange_turns(conversation, prompt)
    return template.write(turns, prompt)


def check_turns(conversation: list, prompt: bool):
    """Raise UserError unless the conversation is a list of turns with texts."""
    if not isinstance(conversation, list) or not conversation:
        raise UserError("conversations", "empty, or not a list", "give a human turn and a gpt turn")

    for i, turn in enumerate(conversation):
        where = f"conversations[{i}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise UserError(where, 'not {"from": ..., "value": ...}', "write the turn so")
        is_last = i == len(conversation) - 1
        is_open = prompt and is_last and turn["from"] == "gpt" and turn["value"] is None
        if not isinstance(turn["value"], str) and not is_open:
            kind = type(turn["value"]).__name__
            raise UserError(where, f"its value is {kind}, not text", "make it a string")


def arrange_turns(conversation: list, prompt: bool) -> list[Turn]:
    """Return the turns that are written, with images in their places.

    A leading "system" turn stays, human and gpt alternate behind it. As in TinyLLaVA, an answer
    before the first question is left out: ShareGPT's rows have them. Raises UserError.
    """
    turns = [Turn(turn["from"], turn["value"]) for turn in conversation]
    arranged = []
    first = 0
    if turns[0].speaker == "system":
        arranged.append(turns[0])
        first = 1
    if first < len(turns) and turns[first].speaker == "gpt":
        first += 1

    due = "human"
    for i in range(first, len(turns)):
        speaker, value = turns[i]
        if speaker != due:
            what = f"from {speaker!r}, {due!r} was due"
            raise UserError(f"conversations[{i}]", what, "alternate the two")
        if speaker == "human":
            arranged.append(Turn(speaker, place_images(value)))
            due = "gpt"
        else:
            if value is not None:
                arranged.append(turns[i])
            due = "human"

    # A prompt ends with a question, or with an answer that is still to come.
    waits = turns[-1].speaker == "human" or turns[-1].value is None
    if first == len(turns) or waits != prompt:
        last = "a human turn" if prompt else "a gpt turn"
        where = f"conversations[{len(turns) - 1}]"
        raise UserError(where, "wrong last turn", f"end with {last}")

    has_answer = any(turn.speaker == "gpt" and turn.value.strip() for turn in arranged)
    if not prompt and not has_answer:
        what = "nothing is supervised, every answer is empty"
        raise UserError("conversations", what, "remove the row")
    return arranged


def place_images(value: str) -> str:
    """Return what a human says with a single image moved to its front, as TinyLLaVA does; several
    images stay where they are."""
    count = value.count(IMAGE)
    if count == 0:
        return value
    if count == 1:
        words = value.replace(IMAGE, "").strip()
        value = f"{IMAGE}\n{words}"
    return value.strip()


def tokenize(text: str, answers: list[Span], marks: list[Mark], tok: Tokenizer) -> Tokenized:
    """Return ids, labels and offsets of what `render` gives, with bos if the tokenizer has one."""
    # A prompt ends where an answer starts and cannot end with half a token. So the text is cut
    # there, unless a mark at that place cuts it already.
    cuts = []
    for start, _ in answers:
        if start > 0 and not any(mark.start < start <= mark.end for mark in marks):
            cuts.append(Mark(start, start, None))
    marks_and_cuts = sorted(marks + cuts, key=lambda mark: (mark.start, mark.end))
    ids, offsets = tok.encode_around(text, marks_and_cuts)

    # One longer than the text: a token without width may stand behind the last character.
    supervised = [False] * (len(text) + 1)
    for start, end in answers:
        supervised[start:end] = [True] * (end - start)

    labels = []
    for i, (start, _) in zip(ids, offsets, strict=True):
        labels.append(i if supervised[start] else IGNORE)

    # A chat template may have written bos already.
    if tok.bos_id is not None and ids[:1] != [tok.bos_id]:
        ids = [tok.bos_id, *ids]
        labels = [IGNORE, *labels]
        offsets = [(0, 0), *offsets]
    return Tokenized(ids, labels, offsets)


# ------------------------------------------------------------------------ templates written here


@dataclass(frozen=True)
class Template:
    """`system`, then for every turn `question`, which is not supervised, and `answer` and `eos`,
    which are.

    In `question`, {q} stands for what the human says, images included, and {images} for that turn's
    images alone. In `answer`, {a} stands for the answer.
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

    def bind(self, tok: Tokenizer) -> Template:
        """Return this template with that tokenizer's eos and its id."""
        eos = tok.eos if self.eos is None else self.eos
        stop = tok.token_id(eos) if eos else None
        return replace(self, eos=eos, stop=stop)

    def misfit(self, tok: Tokenizer) -> str | None:
        """Return why this template cannot be used with that tokenizer, or None."""
        form = self.bind(tok)
        if form.eos == "" or form.stop is not None:
            return None
        return f"its eos {form.eos!r} is not one token of this tokenizer"

    def write(self, turns: list[Turn], prompt: bool) -> Rendered:
        """Write the turns out, see `render`. A prompt needs nothing of its own here."""
        text = self.system or ""
        answers = []
        marks = []
        for speaker, value in turns:
            if speaker == "system":
                # It stands first and replaces the template's own line.
                if self.system is None:
                    what = "this template has no system line"
                    raise UserError("conversations[0]", what, "remove the turn")
                line = value.strip()
                text = line + " " if line else ""

            elif speaker == "human":
                images = IMAGE * value.count(IMAGE)
                text += self.question.format(q=value, images=images)

            else:
                start = len(text)
                text += self.answer.format(a=value) + self.eos
                answers.append(Span(start, len(text)))
                if self.eos:
                    marks.append(Mark(len(text) - len(self.eos), len(text), self.stop))

        # Outside the answers, "<image>" is an image.
        for found in re.finditer(IMAGE, text):
            if not any(start <= found.start() < end for start, end in answers):
                marks.append(Mark(found.start(), found.end(), IMAGE_TOKEN))
        return Rendered(text, answers, sorted(marks))


# ------------------------------------------------------------------ the tokenizer's own template


KEY = "\ue000{}\ue001"  # around a number: characters of private use, which nobody strips or changes
KEYS = "(\ue000\\d+\ue001)"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}  # Hugging Face's names for them


@dataclass(frozen=True)
class KeyedTurn:
    """A turn in which each text is a key."""

    role: str
    parts: list[str]  # keys, and IMAGE where the human shows an image


@dataclass(frozen=True)
class Answer:
    """Where an answer lies in a rendered text."""

    start: int  # where the prompt for it ends
    end: int  # where its own text ends
    closing: Mark | None  # the control token behind it, if nothing but space is between


class Chat:
    """`chat`: the Jinja chat template in the tokenizer's folder, so a new model needs no code here.

    It is rendered as Hugging Face's `apply_chat_template` does. Such a template is a program: it
    gives the text of a conversation and does not say where in it the turns' texts lie. Searching
    for them would go wrong where one occurs twice, so their places are measured. The conversation
    is rendered once more with a key in the place of each text:

        text    <|im_start|>user\\nWho?<|im_end|>\\n<|im_start|>assistant\\nA dog.<|im_end|>\\n
        keyed   <|im_start|>user\\n [0]<|im_end|>\\n<|im_start|>assistant\\n   [1]<|im_end|>\\n

    What stands between the keys is the template's, and the texts lie where the keys are. Templates
    may strip the space around a text. Two more renderings, with that space before the keys and
    behind them, show how much of it stays. All parts so measured, put together, must give the text
    again. A template that changes a text, leaves it out or writes it twice is a UserError.

    Control strings are control tokens only outside the texts. An answer is supervised from where
    the prompt for it ends (what the template writes between the two, the model has to write) to the
    control token behind it, that one included.
    """

    eos = ""  # a Template's eos: here the Jinja template writes it

    def __init__(self, tok: Tokenizer | None = None):
        """Prepare the template of a tokenizer. Without one this is only the entry of TEMPLATES."""
        self.tok = tok
        self.stop = None  # the id that ends an answer
        self.closes = True  # whether the template writes it behind every answer
        self.lists = False  # whether it wants contents as [{"type": "text", "text": ...}]
        if tok is None:
            return

        self.jinja = compile_jinja(tok.chat_template)
        text, answer = self._probe()
        if answer.closing is not None:
            self.stop = answer.closing.id
            return

        # Nothing but space may follow: other text would be neither supervised nor an end.
        rest = text[answer.end :]
        if rest.strip() or tok.eos_id is None:
            what = f"no control token of this tokenizer ends an answer, but {rest!r}"
            raise UserError("template: chat", what, "use another template")
        self.closes = False
        self.stop = tok.eos_id

    def bind(self, tok: Tokenizer) -> Chat:
        """Return this template prepared for a tokenizer."""
        return bind_chat(tok)

    def misfit(self, tok: Tokenizer) -> str | None:
        """Return why this template cannot be used with that tokenizer, or None."""
        return None if tok.chat_template else "this tokenizer has no chat template"

    def write(self, turns: list[Turn], prompt: bool) -> Rendered:
        """Write the turns out, see `render`."""
        text, answers, marks = self._locate(turns, prompt)
        if not self.closes:
            spans = [Span(answer.start, answer.end) for answer in answers]
            if prompt:
                return Rendered(text, spans, marks)
            return self._close_last(text, spans, marks)

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
        marks = [mark for mark in marks if mark.end <= end]
        marks.append(Mark(end, len(text), self.stop))
        return Rendered(text, [*spans[:-1], Span(start, len(text))], marks)

    def _probe(self) -> tuple[str, Answer]:
        """Render the smallest conversation; find out on the way how the template wants contents."""
        turns = [Turn("human", "a"), Turn("gpt", "b")]
        errors = []
        for lists in (False, True):
            self.lists = lists
            try:
                text, answers, _ = self._locate(turns, prompt=False)
                return text, answers[0]
            except UserError as error:
                errors.append(error)

        # Contents as strings are the rule, so what is wrong with those is the mistake to report.
        raise errors[0]

    def _locate(self, turns: list[Turn], prompt: bool) -> tuple[str, list[Answer], list[Mark]]:
        """Return the rendered text, where its answers lie, and all its marks."""
        turns, texts = self._insert_keys(turns)
        text, keyed, spans = self._measure(turns, texts, prompt)

        # Control tokens and images are searched in a copy in which the turns' texts are blotted
        # out. The space in them stays, for some control tokens take it in.
        outside = text
        for start, end in spans.values():
            blotted = re.sub(r"\S", "\ue000", outside[start:end])
            outside = outside[:start] + blotted + outside[end:]
        marks = []
        for mark in self.tok.controls(outside):
            if outside[mark.start : mark.end].strip() != IMAGE:  # a token of some vocabularies
                marks.append(mark)
        for found in re.finditer(IMAGE, outside):
            marks.append(Mark(found.start(), found.end(), IMAGE_TOKEN))
        marks.sort()

        answers = []
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            asked = self._render(turns[:i], {}, prompt=True)
            if not keyed.startswith(asked):
                what = f"the chat template writes what is before turn {i} differently in its prompt"
                fix = "cut the row there, or use another template"
                raise UserError("conversations", what, fix)
            key = turn.parts[0]
            start, end = spans[key]
            # So many characters stand between the end of the prompt and the text.
            opening = keyed.index(key) - len(asked)
            closing = find_closing(text, end, marks)
            answers.append(Answer(start - opening, end, closing))
        return text, answers, marks

    def _insert_keys(self, turns: list[Turn]) -> tuple[list[KeyedTurn], dict[str, str]]:
        """Return the turns with keys for their texts, and {key: text}.

        "<image>" is an image only in what a human says or the system line; in an answer it is text.
        """
        keyed = []
        texts = {}
        for speaker, value in turns:
            if speaker == "gpt":
                pieces = [value]
            else:
                pieces = split_images(value, strip=self.lists)
            parts = []
            for piece in pieces:
                if piece == IMAGE and speaker != "gpt":
                    parts.append(IMAGE)
                else:
                    key = KEY.format(len(texts))
                    texts[key] = piece
                    parts.append(key)
            keyed.append(KeyedTurn(ROLES[speaker], parts))
        return keyed, texts

    def _measure(
        self, turns: list[KeyedTurn], texts: dict[str, str], prompt: bool
    ) -> tuple[str, str, dict[str, Span]]:
        """Return the rendering, the one with keys, and {key: span of its text in the first}.

        See the class for the method. Raises UserError.
        """
        what = "the chat template leaves a text or an image out, writes it twice or changes it"
        lost = UserError("conversations", what, "mend the row, or use another template")

        # Take the space around each text apart from its core.
        cores = {}
        space_before = {}
        space_behind = {}
        for key, value in texts.items():
            lead, core, trail = re.fullmatch(r"(\s*)(.*?)(\s*)", value, re.DOTALL).groups()
            cores[key] = core
            space_before[key] = lead + key
            space_behind[key] = key + trail

        text = self._render(turns, texts, prompt)
        keyed = self._render(turns, {}, prompt)

        # Split at the keys: the template's own words at even places, keys at odd places.
        plain = re.split(KEYS, keyed)
        before = re.split(KEYS, self._render(turns, space_before, prompt))
        behind = re.split(KEYS, self._render(turns, space_behind, prompt))
        keys = plain[1::2]
        if sorted(keys) != sorted(texts) or before[1::2] != keys or behind[1::2] != keys:
            raise lost
        if keyed.count(IMAGE) != sum(turn.parts.count(IMAGE) for turn in turns):
            raise lost

        # What the spaced renderings have more than the plain one is the space that stays.
        spans = {}
        written = plain[0]
        for k, key in enumerate(keys):
            ahead, rest = plain[2 * k], plain[2 * k + 2]
            lead = before[2 * k].removeprefix(ahead)
            trail = behind[2 * k + 2].removesuffix(rest)
            part = lead + cores[key] + trail
            spans[key] = Span(len(written), len(written) + len(part))
            written += part + rest
        if written != text:
            raise lost
        return text, keyed, spans

    def _render(self, turns: list[KeyedTurn], texts: dict[str, str], prompt: bool) -> str:
        """Return what the template makes of the turns, with texts[key] for a key that has one."""
        messages = []
        for turn in turns:
            parts = [texts.get(part, part) for part in turn.parts]
            if self.lists:
                content = []
                for part, said in zip(turn.parts, parts, strict=True):
                    if part == IMAGE:
                        content.append({"type": "image"})
                    else:
                        content.append({"type": "text", "text": said})
            else:
                content = "".join(parts)
            messages.append({"role": turn.role, "content": content})

        try:
            return self.jinja.render(
                **self.tok.named,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # what raise_exception says, or whatever its code comes to
            what = f"the chat template refuses them: {' '.join(str(error).split())[:200]}"
            fix = "mend the row, or use another template"
            raise UserError("conversations", what, fix) from error


@functools.lru_cache(4)
def bind_chat(tok: Tokenizer) -> Chat:
    """Return a tokenizer's chat template. Kept, since every row asks for it."""
    return Chat(tok)


def split_images(value: str, strip: bool) -> list[str]:
    """Return the texts and images of a turn in order.

    strip: where contents are a list, an image is no line of its own, so the texts beside it lose
    their line breaks.
    """
    pieces = re.split(f"({IMAGE})", value)
    if len(pieces) == 1:
        return pieces
    if strip:
        pieces = [piece.strip() for piece in pieces]
    return [piece for piece in pieces if piece]


def find_closing(text: str, end: int, marks: list[Mark]) -> Mark | None:
    """Return the mark behind the answer that ends at `end`, or None: only space may be between."""
    for mark in marks:
        if mark.end > end and not text[end : mark.start].strip():
            return mark
    return None


def compile_jinja(source: str):
    """Return a chat template, to `render` in the sandbox with the names that transformers gives it.

    Raises UserError where it is not Jinja or the package is missing.
    """
    try:
        import jinja2.sandbox
    except ImportError:
        what = "the package jinja2 is missing"
        raise UserError("template: chat", what, "pip install jinja2") from None

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    # {% generation %} around an answer is transformers' own tag, here no more than its inside.
    source = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source)
    source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # Jinja's own tojson escapes HTML.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        what = f"the chat template is not Jinja: {error}"
        raise UserError("template: chat", what, "copy it again") from error


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
    "chat": Chat(),  # the tokenizer's own
}


def resolve(name: str, tok: Tokenizer) -> Template | Chat:
    """Return the template of that name, bound to a tokenizer.

    Raises UserError for an unknown name and for a template that does not fit the tokenizer.
    """
    if name not in TEMPLATES:
        what = f"{name!r} is unknown"
        near = difflib.get_close_matches(str(name), TEMPLATES, n=1, cutoff=0.3)
        if near:
            what += f", did you mean {near[0]!r}?"
        raise UserError("template", what, f"use one of {', '.join(TEMPLATES)}")

    why = TEMPLATES[name].misfit(tok)
    if why is not None:
        fitting = [other for other, form in TEMPLATES.items() if form.misfit(tok) is None]
        fix = f"use one that fits it: {', '.join(fitting)}"
        raise UserError("template", f"{name!r}: {why}", fix)
    return TEMPLATES[name].bind(tok)


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer of one token per byte and every template's eos.

    `data.py check` sees the structure of rows with it where no tokenizer is named.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tok = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()

    ends = {template.eos for template in TEMPLATES.values() if template.eos}
    tok.add_special_tokens(sorted(ends))
    return JsonTokenizer(
        {
            "tokenizer.json": tok.to_str().encode(),
            "tokenizer_config.json": b'{"eos_token": "</s>"}',
        }
    )
