"""Chat templates that make token ids and labels together, and a viewer of what is supervised.

    python -m inputs.templates --model DIR --template phi ROWS.json              # see what is supervised
    python -m inputs.templates --model DIR --template phi ROWS.json --row 3      # one row, counted from 0
    python -m inputs.templates --model DIR --template chat ROWS.jsonl --limit 20  # the language model's own format

A conversation is LLaVA's: [{"from": "human", "value": "<image>\\nWho?"}, {"from": "gpt", "value": "A dog."}].
`render` writes it out as one text and says which characters are answers and which are control tokens; `tokenize`
turns that into ids and labels by looking where each token starts, so the two cannot drift apart.

A mistake in a row is a UserError "<where>: <what>; fix: <action>"; the caller puts file and row before it.
"""

import difflib
import functools
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import config
from config import UserError
from inputs.tokenizer import JsonTokenizer as JsonTokenizer
from inputs.tokenizer import Tokenizer, load_tokenizer
from packing import IGNORE, IMAGE_TOKEN

IMAGE = "<image>"


@dataclass(frozen=True)
class Template:
    """`system`, then for every turn `question` (not supervised), `answer` and `eos` (supervised).

    {q} is what the human says, images included; {images} that turn's images alone; {a} the answer.
    system=None: no place for one. eos="": none. eos=None: the tokenizer's own. stop: the id of eos, once bound.
    """

    system: str | None = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    question: str = "USER: {q} ASSISTANT:"
    answer: str = " {a}"
    eos: str | None = None
    stop: int | None = None

    def bind(self, tok):
        eos = tok.eos if self.eos is None else self.eos
        return replace(self, eos=eos, stop=tok.token_id(eos) if eos else None)

    def misfit(self, tok):
        """Why this template cannot be used with that tokenizer, or None."""
        form = self.bind(tok)
        fits = form.eos == "" or form.stop is not None
        return None if fits else f"its eos {form.eos!r} is not one token of this tokenizer"

    def write(self, turns, prompt):
        """[(from, text)] -> (text, answer_spans, marks), see `render`."""
        text, spans = self.system or "", []
        for role, value in turns:
            if role == "system":
                if self.system is None:
                    raise UserError(
                        "conversations[0]", "this template has no system line", "remove the turn"
                    )
                text = value.strip() and value.strip() + " "
            elif role == "human":
                text += self.question.format(q=value, images=IMAGE * value.count(IMAGE))
            else:
                start, text = len(text), text + self.answer.format(a=value) + self.eos
                spans.append((start, len(text)))
        marks = [(*m.span(), IMAGE_TOKEN) for m in re.finditer(IMAGE, text)]
        marks = [mark for mark in marks if not any(start <= mark[0] < end for start, end in spans)]
        return (
            text,
            spans,
            sorted(marks + [(end - len(self.eos), end, self.stop) for _, end in spans if self.eos]),
        )


class Chat:
    """`chat`: the Jinja chat template in the tokenizer's own folder; a new language model then needs no code.

    It is rendered as Hugging Face's `apply_chat_template` does. Where the turns' texts lie is measured, not searched
    for: the conversation is rendered with a key in the place of each text, and twice more with the text's own outer
    space before, or behind, the key, for templates that strip it. The measured parts must give the real rendering
    again, else UserError. Outside the texts, control strings are control tokens.
    An answer is supervised from where the prompt for it ends (what the template writes between the two, the model
    has to write) to the control token behind it, that one included.
    """

    eos, KEY = "", "\ue000{}\ue001"  # of private use: nobody strips, splits or changes it
    ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

    def __init__(self, tok=None):
        self.tok = tok

    def misfit(self, tok):
        return None if tok.chat_template else "this tokenizer has no chat template"

    @staticmethod
    @functools.lru_cache(4)
    def bind(tok):
        form, failure = Chat(tok), None
        form.jinja = tok.compile_chat_template()
        for form.lists in (
            False,
            True,
        ):  # contents as strings, or as [{"type": "text", "text": ...}]
            try:
                text, [(_, end, closing)], _ = form._place([("human", "a"), ("gpt", "b")], False)
                break
            except UserError as error:
                failure = failure or error
        else:
            raise failure
        form.closes, form.stop = closing is not None, closing[2] if closing else tok.eos_id
        if closing is None and (text[end:].strip() or tok.eos_id is None):
            what = f"no control token of this tokenizer ends an answer, but {text[end:]!r}"
            raise UserError("template: chat", what, "use another template")
        return form

    def write(self, turns, prompt):
        """[(from, text)] -> (text, answer_spans, marks), see `render`."""
        text, answers, marks = self._place(turns, prompt)
        if self.closes and any(
            closing is None or closing[2] != self.stop for _, _, closing in answers
        ):
            what = f"the chat template does not end every answer with {self.tok.token(self.stop)!r}"
            raise UserError("conversations", what, "use another template")
        spans = [(start, closing[1] if self.closes else end) for start, end, closing in answers]
        if not self.closes and not prompt:
            # LLaVA-1.5-hf gets its earlier answers without an end, as the template writes them, and stops with </s>
            # right behind the word. So the last answer alone, whose end is no part of any prompt, is given one.
            start, end = spans[-1]
            text = text[:end] + self.tok.eos
            spans[-1] = (start, len(text))
            marks = [*(m for m in marks if m[1] <= end), (end, len(text), self.stop)]
        return text, spans, marks

    def _place(self, turns, prompt):
        """[(from, text)] -> the rendering; (start, end, the mark behind it or None) of each answer; all marks."""
        turns, texts = self._keys(turns)
        text, keyed, found = self._measure(turns, texts, prompt)
        outside = text
        for start, end in found.values():
            outside = outside[:start] + re.sub(r"\S", "\ue000", outside[start:end]) + outside[end:]
        marks = [m for m in self.tok.controls(outside) if outside[m[0] : m[1]].strip() != IMAGE]
        marks = sorted(marks + [(*m.span(), IMAGE_TOKEN) for m in re.finditer(IMAGE, outside)])
        answers = []
        for i, (role, parts) in enumerate(turns):
            if role == "assistant":
                asked = self._render(turns[:i], {}, True)
                if not keyed.startswith(asked):
                    what = f"the chat template writes what is before turn {i} differently in its prompt"
                    raise UserError(
                        "conversations", what, "cut the row there, or use another template"
                    )
                start, end = found[parts[0]]
                closing = (m for m in marks if m[1] > end and not text[end : m[0]].strip())
                answers.append(
                    (start - keyed.index(parts[0]) + len(asked), end, next(closing, None))
                )
        return text, answers, marks

    def _keys(self, turns):
        """[(from, text)] -> [(role, parts)], each part a key or an image; and {key: text}."""
        keyed, texts = [], {}
        for role, value in turns:
            parts = [value] if role == "gpt" else re.split(f"({IMAGE})", value)
            if len(parts) > 1:  # in a list an image is not a line, so the text loses its break
                parts = [part for part in (map(str.strip, parts) if self.lists else parts) if part]
            for i, part in enumerate(parts):
                if part != IMAGE or role == "gpt":
                    parts[i] = self.KEY.format(len(texts))
                    texts[parts[i]] = part
            keyed.append((self.ROLES[role], parts))
        return keyed, texts

    def _measure(self, turns, texts, prompt):
        """The rendering; the one with keys; {key: (start, end)} of the texts in the first. See the class."""
        cores = {
            key: re.fullmatch(r"(\s*)(.*?)(\s*)", text, re.DOTALL).groups()
            for key, text in texts.items()
        }
        text, keyed = self._render(turns, texts, prompt), self._render(turns, {}, prompt)
        before = self._render(
            turns, {key: lead + key for key, (lead, _, _) in cores.items()}, prompt
        )
        behind = self._render(
            turns, {key: key + trail for key, (_, _, trail) in cores.items()}, prompt
        )
        plain, left, right = (re.split("(\ue000\\d+\ue001)", s) for s in (keyed, before, behind))
        order, found, written = plain[1::2], {}, plain[0]
        if sorted(order) == sorted(texts) and order == left[1::2] == right[1::2]:
            gaps = zip(plain[:-1:2], left[:-1:2], right[2::2], plain[2::2], strict=True)
            for key, (ahead, lead, trail, rest) in zip(order, gaps, strict=True):
                part = lead.removeprefix(ahead) + cores[key][1] + trail.removesuffix(rest)
                found[key] = (len(written), len(written) + len(part))
                written += part + rest
        if (
            written != text
            or len(found) < len(texts)
            or keyed.count(IMAGE) != sum(p.count(IMAGE) for _, p in turns)
        ):
            what = "the chat template leaves a text or an image out, writes it twice or changes it"
            raise UserError("conversations", what, "mend the row, or use another template")
        return text, keyed, found

    def _render(self, turns, texts, prompt):
        """What the template makes of the turns, with texts[key] in the place of a key where there is one."""
        messages = []
        for role, parts in turns:
            said = "".join(texts.get(p, p) for p in parts)
            if self.lists:
                said = [
                    {"type": "image"} if p == IMAGE else {"type": "text", "text": texts.get(p, p)}
                    for p in parts
                ]
            messages.append({"role": role, "content": said})
        names = dict(messages=messages, tools=None, documents=None, add_generation_prompt=prompt)
        try:
            return self.jinja.render(**self.tok.named, **names)
        except Exception as error:  # what raise_exception says, or whatever its code comes to
            what = f"the chat template refuses them: {' '.join(str(error).split())[:200]}"
            raise UserError(
                "conversations", what, "mend the row, or use another template"
            ) from error


TEMPLATES = {
    "pretrain": Template(
        system=None, question="{images}", answer="{a}\n", eos=""
    ),  # images and a caption
    "phi": Template(eos="<|endoftext|>"),  # Phi-2, StableLM-2, Qwen1.5
    "llama": Template(eos="</s>"),  # TinyLlama, OpenELM
    "gemma": Template(eos="<eos>"),
    "qwen2_base": Template(eos="<|endoftext|>"),
    "qwen2_instruct": Template(eos="<|im_end|>"),
    "plain": Template(system=""),  # any tokenizer, and no tokens spent on a system line: the demo
    "chat": Chat(),  # the tokenizer's own
}


def resolve(name: str, tok: Tokenizer):
    """The template of that name, bound to a tokenizer. ValueError: unknown name, or it does not fit the tokenizer."""
    if name not in TEMPLATES:
        near = difflib.get_close_matches(str(name), TEMPLATES, 1, 0.3)
        hint = "".join(f", did you mean {other!r}?" for other in near)
        raise UserError(
            "template", f"{name!r} is unknown{hint}", f"use one of {', '.join(TEMPLATES)}"
        )
    if why := TEMPLATES[name].misfit(tok):
        fits = ", ".join(k for k, form in TEMPLATES.items() if not form.misfit(tok))
        raise UserError("template", f"{name!r}: {why}", f"use one that fits it: {fits}")
    return TEMPLATES[name].bind(tok)


def render(conversation, template, prompt=False):
    """Conversation, bound template -> (text, answer_spans, marks).

    One text; (start, end) of every answer in it, its end token included; sorted (start, end, id) of what is
    structure, images and control tokens. The same strings typed into a question or an answer are no structure, so
    that data cannot end a turn. (TinyLLaVA takes them for structure, and the row then loses all its labels.)

    A leading "system" turn replaces the system line. As in TinyLLaVA, one image is moved to the front of its turn,
    `<image>\\n{q}` (several stay where they are), and an answer before the first question, as ShareGPT's rows have,
    is left out. prompt=True: the conversation ends with a human turn, or a gpt turn of value None, and the text
    ends where the answer would start. Raises UserError.
    """
    if not isinstance(conversation, list) or not conversation:
        raise UserError("conversations", "empty, or not a list", "give a human turn and a gpt turn")
    for i, turn in enumerate(conversation):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise UserError(
                f"conversations[{i}]", 'not {"from": ..., "value": ...}', "write the turn so"
            )
        open_end = (
            prompt
            and turn["from"] == "gpt"
            and turn["value"] is None
            and i == len(conversation) - 1
        )
        if not isinstance(turn["value"], str) and not open_end:
            kind = type(turn["value"]).__name__
            raise UserError(
                f"conversations[{i}]", f"its value is {kind}, not text", "make it a string"
            )
    turns = [(turn["from"], turn["value"]) for turn in conversation]
    written = [turns.pop(0)] if turns[0][0] == "system" else []
    if turns and turns[0][0] == "gpt":
        turns.pop(0)
    for i, (role, value) in enumerate(turns, len(conversation) - len(turns)):
        due = "gpt" if written and written[-1][0] == "human" else "human"
        if role != due:
            raise UserError(
                f"conversations[{i}]", f"from {role!r}, {due!r} was due", "alternate the two"
            )
        if role == "human" and IMAGE in value:
            one = value.count(IMAGE) == 1
            value = (f"{IMAGE}\n{value.replace(IMAGE, '').strip()}" if one else value).strip()
        if value is not None:
            written.append((role, value))
    if not turns or (len(turns) % 2 == 1 or turns[-1][1] is None) != prompt:
        last = "a human turn" if prompt else "a gpt turn"
        raise UserError(
            f"conversations[{len(conversation) - 1}]", "wrong last turn", f"end with {last}"
        )
    if not prompt and not any(value.strip() for role, value in written if role == "gpt"):
        raise UserError(
            "conversations", "nothing is supervised, every answer is empty", "remove the row"
        )
    return template.write(written, prompt)


def tokenize(text, answer_spans, marks, tok: Tokenizer):
    """What `render` gives -> (ids, labels, offsets), three lists of one length.

    A token is supervised when its first character lies in an answer. There is a cut where an answer starts: no
    token reaches across, for no prompt can end with half a token. bos is not doubled.
    """
    cuts = [
        at for at, _ in answer_spans if at and not any(start < at <= end for start, end, _ in marks)
    ]
    ids, offsets = tok.encode_around(text, sorted(marks + [(at, at, None) for at in cuts]))
    inside = bytearray(len(text) + 1)  # one longer: a token without width may stand behind the text
    for start, end in answer_spans:
        inside[start:end] = b"\1" * (end - start)
    labels = [i if inside[start] else IGNORE for i, (start, _) in zip(ids, offsets, strict=True)]
    if tok.bos_id is not None and ids[:1] != [tok.bos_id]:
        ids, labels, offsets = [tok.bos_id, *ids], [IGNORE, *labels], [(0, 0), *offsets]
    return ids, labels, offsets


def encode(conversation, tok: Tokenizer, template="phi"):
    """A finished conversation -> (ids, labels): IMAGE_TOKEN per image, IGNORE where not supervised."""
    return tokenize(*render(conversation, resolve(template, tok)), tok)[:2]


def encode_prompt(conversation, tok: Tokenizer, template="phi"):
    """A conversation that waits for an answer -> ids, ending where supervision starts in training."""
    return tokenize(*render(conversation, resolve(template, tok), prompt=True), tok)[0]


def stop_id(tok: Tokenizer, template="phi"):
    """The id that ends an answer. `pretrain` has no eos: the tokenizer's own, which may be None."""
    form = resolve(template, tok)
    return tok.eos_id if form.stop is None else form.stop


def show(text, labels, offsets, colour):
    """The text, supervised characters in green or between [[ and ]]. Data must not steer a terminal: no escapes."""
    opening, closing = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    lit = bytearray(len(text))
    for label, (start, end) in zip(labels, offsets, strict=True):
        if label != IGNORE:
            lit[start:end] = b"\1" * (end - start)
    runs = [
        (run, text[slice(*run.span())].replace("\033", "\\033"))
        for run in re.finditer(rb"\x00+|\x01+", lit)
    ]
    return "".join(opening + part + closing if run[0][0] else part for run, part in runs)


def read_rows(path):
    """A .json list or a .jsonl file -> list of rows. Raises UserError."""
    rows, lines, fix = (
        [],
        path.endswith(".jsonl"),
        "give rows as a list in .json, or one a line in .jsonl",
    )
    try:
        text = Path(path).read_text(encoding="utf-8")
        for part in (
            filter(str.strip, text.split("\n")) if lines else [text]
        ):  # splitlines would cut at U+2028 too
            rows.append(json.loads(part))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}:{len(rows)}", f"cannot be read: {error}", fix) from error
    rows = rows if lines else rows[0]
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}:0", "not a list of rows, or empty", fix)
    return rows


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and every template's eos: lets `check` see a row's structure where no tokenizer is named."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(sorted({t.eos for t in TEMPLATES.values() if t.eos}))
    files = {
        "tokenizer.json": tok.to_str().encode(),
        "tokenizer_config.json": b'{"eos_token": "</s>"}',
    }
    return JsonTokenizer(files)


def main(arguments):
    parser = config.parser(__doc__)
    parser.add_argument("rows", help="LLaVA rows, .json or .jsonl")
    parser.add_argument("--model", required=True, help="folder with a tokenizer")
    parser.add_argument("--template", default="phi", help=", ".join(TEMPLATES))
    parser.add_argument("--row", type=int, help="only this row, counted from 0")
    parser.add_argument("--limit", type=int, default=5, help="at most this many rows")
    options = parser.parse_args(arguments)
    tok, rows, where = load_tokenizer(options.model), read_rows(options.rows), "templates.py:--"
    numbers = range(len(rows))[: options.limit] if options.row is None else [options.row]
    tokens = supervised = 0
    try:
        form = resolve(options.template, tok)
        for number in numbers:
            where = f"{options.rows}:{number}: "
            if not 0 <= number < len(rows):
                raise ValueError(
                    f"there are only {len(rows)} rows; fix: a --row from 0 to {len(rows) - 1}"
                )
            if not isinstance(rows[number], dict) or "conversations" not in rows[number]:
                raise ValueError("no conversations in it; fix: give LLaVA rows")
            text, spans, marks = render(rows[number]["conversations"], form)
            ids, labels, offsets = tokenize(text, spans, marks, tok)
            lit = sum(label != IGNORE for label in labels)
            tokens, supervised = tokens + len(ids), supervised + lit
            print(
                f"--- row {number}: {len(ids)} tokens, {lit} supervised, {ids.count(IMAGE_TOKEN)} images"
            )
            print(
                show(text, labels, offsets, sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
            )
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    print(f"=== {len(numbers)} rows: {tokens} tokens, {supervised} supervised")


if __name__ == "__main__":
    config.cli(main, __doc__)
