"""Tokenizers with character offsets, and chat templates that make ids and labels together.

    python templates.py --model DIR --template phi ROWS.json              # see what is supervised
    python templates.py --model DIR --template phi ROWS.json --row 3      # one row, counted from 0
    python templates.py --model DIR --template chat ROWS.jsonl --limit 20  # the language model's own format

A conversation is LLaVA's: [{"from": "human", "value": "<image>\\nWho?"}, {"from": "gpt", "value": "A dog."}].
`render` writes it out as one text and says which characters are answers and which are control tokens; `tokenize`
turns that into ids and labels by looking where each token starts. Nothing is tokenised twice and counted, so the
two cannot drift apart.

Every ValueError reads "<where>: <what>; fix: <action>"; a caller only has to put file and row before it.
"""

import datetime
import difflib
import functools
import itertools
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

import config
from config import UserError

IMAGE = "<image>"
IMAGE_TOKEN = -200  # TinyLLaVA's id for "an image goes here"; negative, so no vocabulary can contain it
IGNORE = -100  # the label that torch's cross-entropy leaves out

# ---------------------------------------------------------------- tokenizers

OWN_FILES = (  # what belongs to a tokenizer, hence what `save` writes
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json "
    "vocab.json merges.txt chat_template.jinja chat_template.json"
).split()
MODEL_FILES = ("generation_config.json", "config.json")  # the model's, read only for eos_token_id
# How a vocab.json is used depends on code, which its tokenizer_class names: the regex of its words, or GPT-2's
WORDS = {
    "GPT2Tokenizer": None,
    "CodeGenTokenizer": None,
    "Qwen2Tokenizer": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def load_tokenizer(path):
    """A folder with `tokenizer.json`, `tokenizer.model`, or `vocab.json` and `merges.txt`; or a file -> Tokenizer.

    In a folder with both, `tokenizer.json` wins: it alone is sure to hold tokens that were added later, and the
    golden rows are equal through either. The config files beside it are read for bos, eos, pad and chat template.
    Raises ValueError when there is no tokenizer or it cannot be read.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    names = [name for name in (*OWN_FILES, *MODEL_FILES) if (folder / name).is_file()]
    files = {name: (folder / name).read_bytes() for name in names}
    if path.is_file():  # this vocabulary and no other
        files = {k: v for k, v in files.items() if k not in ("tokenizer.json", "tokenizer.model")}
        files["tokenizer.model" if path.suffix == ".model" else "tokenizer.json"] = path.read_bytes()
    elif {"vocab.json", "merges.txt"} <= files.keys() and not {"tokenizer.json", "tokenizer.model"} & files.keys():
        files["tokenizer.json"] = byte_level(files, path)
    for name, kind in (("tokenizer.json", JsonTokenizer), ("tokenizer.model", PieceTokenizer)):
        if name in files:
            try:
                return kind(files)
            except Exception as error:  # both libraries raise what they like on a damaged file
                what = " ".join(str(error).split())[:200] or type(error).__name__
                raise ValueError(f"{path}:{name}: cannot be loaded: {what}; fix: copy it again") from error
    what = "has neither tokenizer.json nor tokenizer.model" if folder.is_dir() else "no such folder or file"
    if ranks := sorted(folder.glob("*.tiktoken")):
        what = f"{ranks[0].name} needs its repository's code, which is never run"
        raise UserError(f"{path}:tokenizer", what, "copy tokenizer.json from the newer revision of the repository")
    raise UserError(f"{path}:tokenizer", what, "name a folder that holds one of the two")


def byte_level(files, path):
    """`vocab.json` and `merges.txt`, as GPT-2, Phi-2 and Qwen2 use them -> the bytes of a tokenizer.json."""
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if kind not in WORDS:
        what = f"the tokenizer_class is {kind}, so how vocab.json splits words is not known"
        raise UserError(f"{path}:tokenizer_config.json", what, f"copy tokenizer.json too, or use {', '.join(WORDS)}")
    pairs = [tuple(line.split(" ")) for line in files["merges.txt"].decode().split("\n")]
    pairs = [pair for pair in pairs if len(pair) == 2 and pair[0] != "#version:"]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(json.loads(files["vocab.json"]), pairs))
    model.decoder = decoders.ByteLevel()
    model.pre_tokenizer = level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not WORDS[kind])
    if WORDS[kind]:
        model.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(tokenizers.Regex(WORDS[kind]), "isolated")
        model.pre_tokenizer = pre_tokenizers.Sequence([words, level])
    added = sorted((int(i), token) for i, token in settings.get("added_tokens_decoder", {}).items())
    model.add_tokens([tokenizers.AddedToken(**token) for _, token in added])
    model.add_special_tokens([s for s in named_tokens(files).values() if model.token_to_id(s) is not None])
    if lost := [token["content"] for i, token in added if model.token_to_id(token["content"]) != i]:
        what = f"the ids of added tokens leave a gap before {lost[0]!r}"
        raise UserError(f"{path}:tokenizer_config.json", what, "copy tokenizer.json too")
    return model.to_str().encode()


def named_tokens(files):
    """{"bos_token": string, ...}: the tokens that the config files give a role, without those that are null."""
    named = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        named |= json.loads(files.get(name, b"{}"))
    named = {k: v["content"] if isinstance(v, dict) else v for k, v in named.items() if k.endswith("_token")}
    return {k: v for k, v in named.items() if isinstance(v, str)}


class Tokenizer:
    """What both kinds share. Made by `load_tokenizer`.

    vocab_size    1 + the largest id
    special       {string: id} of the control tokens, which stand for structure and not for their spelling
    bos_id        the id that opens every sequence, or None when this tokenizer does not prepend one
    eos_id, eos   id and string of the end token, or None; pad_id likewise
    named         {"bos_token": string, ...}, for chat templates
    token_id(string) -> id or None; token(id) -> string or None

    It keeps the bytes of its files: `save` needs no folder that may be gone by then, and a pickle (for a
    DataLoader worker) is those bytes, read again.

    A Llama vocabulary puts a word mark before a text. Text behind a control token gets none (Hugging Face's
    `"legacy": false`: TinyLlama's and the golden rows'), unless the config says `"legacy": true`. Hence the models
    `_first` for the beginning of a text, `_bare` without the mark, and `_later`, which is one of the two.
    """

    def __init__(self, files):
        self.files = files
        self.config = json.loads(files.get("tokenizer_config.json", b"{}"))
        lead, end = self._load()  # ids that the vocabulary file itself knows as bos and eos, or None
        self._later = self._first if self.config.get("legacy") is True else self._bare
        self.named = named_tokens(files)
        ids = {"bos_token": lead} | {role: self.token_id(token) for role, token in self.named.items()}
        if lead is not None:
            self.named.setdefault("bos_token", self.token(lead))
        asked = self.config.get("add_bos_token")
        prepends = lead is not None if asked is None else asked
        self.bos_id, self.pad_id = ids["bos_token"] if prepends else None, ids.get("pad_token")
        models = (json.loads(files.get(name, b"{}")) for name in MODEL_FILES)
        ends = (ids.get("eos_token"), *(model.get("eos_token_id") for model in models), end)
        ends = [e[0] if isinstance(e, list) else e for e in ends if e is not None]
        self.eos_id = ends[0] if ends else None
        self.eos = self.token(self.eos_id) if ends else None
        if ends:
            self.named.setdefault("eos_token", self.eos)
        takes, longest = self._takes, sorted(self.special, key=len, reverse=True)
        forms = [r"\s*" * takes(s, "lstrip") + re.escape(s) + r"\s*" * takes(s, "rstrip") for s in longest]
        self._controls = re.compile("|".join(forms) or "(?!)")

    def __reduce__(self):
        return type(self), (self.files,)

    def encode(self, text, special=True):
        """text -> (ids, offsets), without bos. Token k touches the characters text[start:end] of offsets[k].

        Together the spans cover the text; tokens that are parts of one character share it or stand at it with
        no width. With special=False a control token's string is text like any other.
        """
        return self.encode_around(text, self.controls(text) if special else [])

    def controls(self, text):
        """[(start, end, id)] of the control tokens in a text, with the space around that some take in (Phi-3's do)."""
        return [
            (*m.span(), self.special.get(m[0], self.special.get(m[0].strip()))) for m in self._controls.finditer(text)
        ]

    def encode_around(self, text, marks):
        """As `encode`, where `marks`, sorted (start, end, id), are the only places that become given ids.

        Control strings in the text between them are plain text. Behind an image a text begins anew, word mark
        included, as in TinyLLaVA. An id None adds nothing: no token reaches across it.
        """
        ids, offsets, cursor, model = [], [], 0, self._first
        for start, end, mark in [*marks, (len(text), len(text), None)]:
            if cursor < start:
                pieces, spans = self._pieces(model, text[cursor:start])
                # A normaliser may drop characters (an accent under NFC): the token before takes them.
                nexts = [s for s, _ in spans[1:]] + [start - cursor]
                spans = [(s, max(e, n)) for (s, e), n in zip(spans, nexts, strict=False)]  # CLIP: " " has no tokens
                ids += pieces
                offsets += [(cursor + s, cursor + e) for s, e in spans]
            if mark is not None:
                ids.append(mark)
                offsets.append((start, end))
            cursor, model = end, {None: self._bare, IMAGE_TOKEN: self._first}.get(mark, self._later)
        return ids, offsets

    def decode(self, ids):
        """ids -> text, without control tokens, images, and ids that no token has (an embedding's padding)."""
        ids, controls = [i for i in map(int, ids) if i >= 0], set(self.special.values())
        return self._first.decode([i for i in ids if i not in controls and self.token(i) is not None])

    def save(self, folder):
        """Writes the tokenizer's own files, chat template included, into `folder`, each one whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (name for name in OWN_FILES if name in self.files):
            temporary = folder / f".{name}.{os.getpid()}"
            with open(temporary, "wb") as file:
                file.write(self.files[name])
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / name)

    @property
    def marks_words(self):
        """Whether a text begins with a word mark, as it does in Llama's vocabularies."""
        return self._first is not self._bare

    @property
    def chat_template(self):
        """The Jinja source of the chat template, the newest place first, or None."""
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode()
        found = self.config.get("chat_template")
        found = found or json.loads(self.files.get("chat_template.json", b"{}")).get("chat_template")
        return {f["name"]: f["template"] for f in found}.get("default") if isinstance(found, list) else found


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`, through `tokenizers`."""

    def _load(self):
        self._first = self._bare = first = tokenizers.Tokenizer.from_str(self.files["tokenizer.json"].decode())
        first.no_truncation()  # some files carry these two: they would cut, or fill up
        first.no_padding()
        lead = first.encode("").ids  # shows what the post-processor puts before every text
        first.post_processor = None  # bos is ours to add, and ByteLevel's cuts spaces out of the offsets
        first.encode_special_tokens = True  # control strings in plain text are spelled out
        self.token_id, self.token = first.token_to_id, first.id_to_token
        added = first.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self._takes = lambda token, side: getattr(added[self.special[token]], side)  # space on that side
        self.vocab_size = max([first.get_vocab_size(False), *(i + 1 for i in added)])
        # The word mark comes from a Prepend normalizer (older files) or a Metaspace pre-tokenizer (newer ones).
        steps = json.loads(first.normalizer.__getstate__()) if first.normalizer else {}
        steps = steps.get("normalizers", [steps])
        rest = [step for step in steps if step.get("type") != "Prepend"]
        space = first.pre_tokenizer
        opens = isinstance(space, pre_tokenizers.Metaspace) and space.prepend_scheme == "first"
        if opens or len(rest) < len(steps):
            self._bare = bare = tokenizers.Tokenizer.from_str(first.to_str())
            bare.encode_special_tokens = True
            if opens:
                bare.pre_tokenizer = pre_tokenizers.Metaspace(space.replacement, "never", space.split)
            if len(rest) < len(steps):
                normalizer = normalizers.Sequence([])
                normalizer.__setstate__(json.dumps({"type": "Sequence", "normalizers": rest}).encode())
                bare.normalizer = normalizer
        return lead[0] if lead else None, None

    def _pieces(self, model, text):
        encoding = model.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets


class PieceTokenizer(Tokenizer):
    """`tokenizer.model`, through `sentencepiece`."""

    def _load(self):
        proto = self.files["tokenizer.model"]
        self._first = first = sentencepiece.SentencePieceProcessor(model_proto=proto)
        # Protobuf merges what is appended: normalizer_spec (field 3) {add_dummy_prefix (field 3): false}.
        self._bare = sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        size = first.vocab_size()
        controls = [i for i in range(size) if first.is_control(i) or first.is_unknown(i)]
        self.special = {first.id_to_piece(i): i for i in controls}
        self.special |= json.loads(self.files.get("added_tokens.json", b"{}"))
        added = {int(i): token for i, token in self.config.get("added_tokens_decoder", {}).items()}
        self.special |= {token["content"]: i for i, token in added.items() if token.get("special", True)}
        self._takes = lambda token, side: added.get(self.special[token], {}).get(side, False)
        # A vocabulary may spell a control token as a piece of text (Gemma's <end_of_turn>). Typed text is cut there.
        typed = [s for s, i in self.special.items() if i < size and i not in controls and len(s) > 1]
        self._typed = re.compile("|".join(f"(?<={re.escape(s[0])})(?={re.escape(s[1:])})" for s in typed) or "(?!)")
        self._added = {i: token for token, i in self.special.items()}
        self.vocab_size = max(size, 1 + max(self._added))
        return [i if i >= 0 else None for i in (first.bos_id(), first.eos_id())]

    def token_id(self, token):
        i = self.special.get(token, self._first.piece_to_id(token))
        return i if self.token(i) == token else None

    def token(self, i):
        return self._added.get(i) or (self._first.id_to_piece(i) if i < self._first.vocab_size() else None)

    def _pieces(self, model, text):
        cuts = [0, *(m.start() for m in self._typed.finditer(text)), len(text)]
        ids, spans = [], []
        for start, end in itertools.pairwise(cuts):
            if hasattr(model, "encode_as_offset_mapping"):  # sentencepiece 0.2.2 and later
                found = model.encode_as_offset_mapping(text[start:end])
                pieces, offsets = found["ids"], found["offsets"]
            else:
                found = model.encode(text[start:end], out_type="immutable_proto").pieces
                pieces, offsets = [p.id for p in found], [(p.begin, p.end) for p in found]
            ids, spans = ids + list(pieces), spans + [(start + s, start + e) for s, e in offsets]
            model = self._bare
        return ids, spans


# ---------------------------------------------------------------- templates


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
                    raise UserError("conversations[0]", "this template has no system line", "remove the turn")
                text = value.strip() and value.strip() + " "
            elif role == "human":
                text += self.question.format(q=value, images=IMAGE * value.count(IMAGE))
            else:
                start, text = len(text), text + self.answer.format(a=value) + self.eos
                spans.append((start, len(text)))
        marks = [(*m.span(), IMAGE_TOKEN) for m in re.finditer(IMAGE, text)]
        marks = [mark for mark in marks if not any(start <= mark[0] < end for start, end in spans)]
        return text, spans, sorted(marks + [(end - len(self.eos), end, self.stop) for _, end in spans if self.eos])


class Chat:
    """`chat`: the Jinja chat template in the tokenizer's own folder; a new language model then needs no code.

    It is rendered as `apply_chat_template` of Hugging Face's transformers does, in a sandbox. Where the turns' texts
    lie is measured, not searched for: the same conversation is rendered with a key in the place of each text, and
    twice more with the text's own outer space before, or behind, the key, for templates that strip it. The measured
    parts must give the real rendering again, else ValueError. Outside the texts, control strings are control tokens.

    An answer is supervised from where the prompt for it ends (what the template writes between the two, the model
    has to write) to the control token behind it, that one included.
    """

    eos, KEY = "", "\ue000{}\ue001"  # of private use: nobody strips, splits or changes it

    def __init__(self, tok=None):
        self.tok = tok

    def misfit(self, tok):
        return None if tok.chat_template else "this tokenizer has no chat template"

    @staticmethod
    @functools.lru_cache(4)
    def bind(tok):
        form, failure = Chat(tok), None
        form.jinja = _compile(tok.chat_template)
        for form.lists in (False, True):  # contents as strings, or as [{"type": "text", "text": ...}]
            try:
                text, [(_, end, closing)], _ = form._place([("human", "a"), ("gpt", "b")], False)
                break
            except ValueError as error:
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
        if self.closes and any(closing is None or closing[2] != self.stop for _, _, closing in answers):
            what = f"the chat template does not end every answer with {self.tok.token(self.stop)!r}"
            raise UserError("conversations", what, "use another template")
        spans = [(start, closing[1] if self.closes else end) for start, end, closing in answers]
        if not self.closes and not prompt:
            # LLaVA-1.5-hf gets its earlier answers without an end, as the template writes them, and stops with </s>
            # right behind the word. So the last answer alone, whose end is no part of any prompt, is given one.
            start, end = spans.pop()
            text = text[:end] + self.tok.eos
            spans.append((start, len(text)))
            marks = [*(m for m in marks if m[1] <= end), (end, len(text), self.stop)]
        return text, spans, marks

    def _place(self, turns, prompt):
        """[(from, text)] -> the rendering; (start, end, the mark behind it or None) of each answer; all marks."""
        roles = {"human": "user", "gpt": "assistant", "system": "system"}
        turns = [(roles[role], self._parts(role, value)) for role, value in turns]
        texts = [part for _, parts in turns for part in parts if part is not None]
        cores = [re.fullmatch(r"(\s*)(.*?)(\s*)", text, re.DOTALL).groups() for text in texts]
        text = self._render(turns, prompt, lambda k: texts[k])
        keyed = self._render(turns, prompt, self.KEY.format)
        before = self._render(turns, prompt, lambda k: cores[k][0] + self.KEY.format(k))
        behind = self._render(turns, prompt, lambda k: self.KEY.format(k) + cores[k][2])
        plain, left, right = (re.split("\ue000(\\d+)\ue001", s) for s in (keyed, before, behind))
        order, found, written = [int(k) for k in plain[1::2]], {}, plain[0]
        if sorted(order) == list(range(len(texts))) and plain[1::2] == left[1::2] == right[1::2]:
            for i, k in enumerate(order):
                lead, trail = left[2 * i].removeprefix(plain[2 * i]), right[2 * i + 2].removesuffix(plain[2 * i + 2])
                found[k] = (len(written), len(written) + len(lead + cores[k][1] + trail))
                written += lead + cores[k][1] + trail + plain[2 * i + 2]
        images = sum(parts.count(None) for _, parts in turns)
        if written != text or len(found) < len(texts) or keyed.count(IMAGE) != images:
            what = "the chat template leaves a text or an image out, writes it twice or changes it"
            raise UserError("conversations", what, "mend the row, or use another template")
        outside = text
        for start, end in found.values():
            outside = outside[:start] + re.sub(r"\S", "\ue000", outside[start:end]) + outside[end:]
        marks = [m for m in self.tok.controls(outside) if outside[m[0] : m[1]].strip() != IMAGE]
        marks = sorted(marks + [(*m.span(), IMAGE_TOKEN) for m in re.finditer(IMAGE, outside)])
        answers, k = [], 0
        for i, (role, parts) in enumerate(turns):
            if role == "assistant":
                asked = self._render(turns[:i], True, self.KEY.format)
                if not keyed.startswith(asked):
                    what = f"the chat template writes what is before turn {i} differently in its prompt"
                    raise UserError("conversations", what, "cut the row there, or use another template")
                start, end = found[k][0] - keyed.index(self.KEY.format(k)) + len(asked), found[k][1]
                closing = (m for m in marks if m[1] > end and not text[end : m[0]].strip())
                answers.append((start, end, next(closing, None)))
            k += len(parts) - parts.count(None)
        return text, answers, marks

    def _parts(self, role, value):
        """A turn as texts, and None for an image. In a list an image is not a line, so the text loses its break."""
        parts = re.split(f"({IMAGE})", value) if role != "gpt" else [value]
        if len(parts) > 1:
            parts = [part for part in (map(str.strip, parts) if self.lists else parts) if part]
        return [None if part == IMAGE and role != "gpt" else part for part in parts]

    def _render(self, turns, prompt, text):
        """What the template makes of the turns when text number k is text(k)."""
        count, messages = itertools.count(), []
        for role, parts in turns:
            parts = [part if part is None else text(next(count)) for part in parts]
            content = "".join(IMAGE if part is None else part for part in parts)
            if self.lists:
                content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
            messages.append({"role": role, "content": content})
        names = dict(messages=messages, tools=None, documents=None, add_generation_prompt=prompt)
        try:
            return self.jinja.render(**self.tok.named, **names)
        except Exception as error:  # what raise_exception says, or whatever its code comes to
            what = f"the chat template refuses them: {' '.join(str(error).split())[:200]}"
            raise UserError("conversations", what, "mend the row, or use another template") from error


def _compile(source):
    """Jinja source -> template, in the sandbox and with the names that transformers gives a chat template."""
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("template: chat", "the package jinja2 is missing", "pip install jinja2") from None

    class Generation(Extension):
        tags = {"generation"}  # around an answer, for transformers; here no more than what is inside

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message):
        raise TemplateError(message)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes HTML
    env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    try:
        return env.from_string(source)
    except TemplateError as error:
        raise UserError("template: chat", f"the chat template is not Jinja: {error}", "copy it again") from error


TEMPLATES = {
    "pretrain": Template(system=None, question="{images}", answer="{a}\n", eos=""),  # images and a caption
    "phi": Template(eos="<|endoftext|>"),  # Phi-2, StableLM-2, Qwen1.5
    "llama": Template(eos="</s>"),  # TinyLlama, OpenELM
    "gemma": Template(eos="<eos>"),
    "qwen2_base": Template(eos="<|endoftext|>"),
    "qwen2_instruct": Template(eos="<|im_end|>"),
    "plain": Template(system=""),  # any tokenizer, and no tokens spent on a system line: the demo
    "chat": Chat(),  # the tokenizer's own
}


def resolve(name, tok):
    """The template of that name, bound to a tokenizer. ValueError: unknown name, or it does not fit the tokenizer."""
    if name not in TEMPLATES:
        near = difflib.get_close_matches(str(name), TEMPLATES, 1, 0.3)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UserError("template", f"{name!r} is unknown{hint}", f"use one of {', '.join(TEMPLATES)}")
    if why := TEMPLATES[name].misfit(tok):
        fits = ", ".join(k for k, form in TEMPLATES.items() if not form.misfit(tok))
        raise UserError("template", f"{name!r}: {why}", f"use one that fits it: {fits}")
    return TEMPLATES[name].bind(tok)


def render(conversation, template, prompt=False):
    """Conversation, bound template -> (text, answer_spans, marks).

    One text; (start, end) of every answer in it, its end token included; sorted (start, end, id) of what is
    structure, images and control tokens. The same strings typed into a question or an answer are no structure, so
    that data cannot end a turn. (TinyLLaVA takes them for structure, and the row then loses all its labels.)

    A leading "system" turn replaces the system line. One image is moved to the front of its turn,
    `<image>\\n{q}`, as TinyLLaVA does; several stay where they are. An answer before the first question is left
    out, also as TinyLLaVA does (ShareGPT rows begin so).
    prompt=True: the conversation ends with a human turn, or a gpt turn of value None, and the text ends where
    the answer would start. Raises ValueError.
    """
    if not isinstance(conversation, list) or not conversation:
        raise UserError("conversations", "empty, or not a list", "give a human turn and a gpt turn")
    for i, turn in enumerate(conversation):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise UserError(f"conversations[{i}]", 'not {"from": ..., "value": ...}', "write the turn so")
        open_end = prompt and turn["from"] == "gpt" and turn["value"] is None and i == len(conversation) - 1
        if not isinstance(turn["value"], str) and not open_end:
            kind = type(turn["value"]).__name__
            raise UserError(f"conversations[{i}]", f"its value is {kind}, not text", "make it a string")
    turns = [(i, turn["from"], turn["value"]) for i, turn in enumerate(conversation)]
    written = [turns.pop(0)[1:]] if turns[0][1] == "system" else []
    if turns and turns[0][1] == "gpt":
        turns.pop(0)
    words, due = "", "human"
    for i, role, value in turns:
        if role != due:
            raise UserError(f"conversations[{i}]", f"from {role!r}, {due!r} was due", "alternate the two")
        if role == "human" and IMAGE in value:
            one = value.count(IMAGE) == 1
            value = (f"{IMAGE}\n{value.replace(IMAGE, '').strip()}" if one else value).strip()
        elif role == "gpt":
            words += (value or "").strip()
        if value is not None:
            written.append((role, value))
        due = "gpt" if due == "human" else "human"
    waits = bool(turns) and (due == "gpt" or turns[-1][2] is None)
    if not turns or waits != prompt:
        last = "a human turn" if prompt else "a gpt turn"
        raise UserError(f"conversations[{len(conversation) - 1}]", "wrong last turn", f"end with {last}")
    if not prompt and not words:
        raise UserError("conversations", "nothing is supervised, every answer is empty", "remove the row")
    return template.write(written, prompt)


def tokenize(text, answer_spans, marks, tok):
    """What `render` gives -> (ids, labels, offsets), three lists of one length.

    A token is supervised when its first character lies in an answer. There is a cut where an answer starts: no
    token reaches across, for no prompt can end with half a token. bos is not doubled.
    """
    cuts = [at for at, _ in answer_spans if at and not any(start < at <= end for start, end, _ in marks)]
    ids, offsets = tok.encode_around(text, sorted(marks + [(at, at, None) for at in cuts]))
    inside = bytearray(len(text) + 1)  # one longer: a token without width may stand behind the text
    for start, end in answer_spans:
        inside[start:end] = b"\1" * (end - start)
    labels = [i if inside[start] else IGNORE for i, (start, _) in zip(ids, offsets, strict=True)]
    if tok.bos_id is not None and ids[:1] != [tok.bos_id]:
        ids, labels, offsets = [tok.bos_id, *ids], [IGNORE, *labels], [(0, 0), *offsets]
    return ids, labels, offsets


def encode(conversation, tok, template="phi"):
    """A finished conversation -> (ids, labels): IMAGE_TOKEN per image, IGNORE where not supervised."""
    return tokenize(*render(conversation, resolve(template, tok)), tok)[:2]


def encode_prompt(conversation, tok, template="phi"):
    """A conversation that waits for an answer -> ids, ending where supervision starts in training."""
    return tokenize(*render(conversation, resolve(template, tok), prompt=True), tok)[0]


def stop_id(tok, template="phi"):
    """The id that ends an answer. `pretrain` has no eos: the tokenizer's own, which may be None."""
    form = resolve(template, tok)
    return tok.eos_id if form.stop is None else form.stop


# ---------------------------------------------------------------- the viewer


def show(text, labels, offsets, colour):
    """The text, with the characters of supervised tokens in green, or between [[ and ]]."""
    opening, closing = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    lit = bytearray(len(text))
    for label, (start, end) in zip(labels, offsets, strict=True):
        if label != IGNORE:
            lit[start:end] = b"\1" * (end - start)
    parts = []
    for run in re.finditer(rb"\x00+|\x01+", lit):
        part = text[slice(*run.span())].replace("\033", "\\033")  # data must not steer the terminal
        parts.append(opening + part + closing if lit[run.start()] else part)
    return "".join(parts)


def read_rows(path):
    """A .json list or a .jsonl file -> list of rows. Raises ValueError."""
    number, rows, fix = 0, None, "fix: give rows as a list in .json, or one a line in .jsonl"
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".jsonl"):
            rows = []
            for line in filter(str.strip, text.split("\n")):  # not splitlines: JSON may hold U+2028 as it is
                number = len(rows)
                rows.append(json.loads(line))
        else:
            rows = json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}:{number}: cannot be read: {error}; {fix}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}:0: not a list of rows, or empty; {fix}")
    return rows


def main():
    parser = config.parser(__doc__)
    parser.add_argument("rows", help="LLaVA rows, .json or .jsonl")
    parser.add_argument("--model", required=True, help="folder with a tokenizer")
    parser.add_argument("--template", default="phi", help=", ".join(TEMPLATES))
    parser.add_argument("--row", type=int, help="only this row, counted from 0")
    parser.add_argument("--limit", type=int, default=5, help="at most this many rows")
    options = parser.parse_args()
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    where = ""
    try:
        tok, rows = load_tokenizer(options.model), read_rows(options.rows)
        where = "templates.py:--"
        form = resolve(options.template, tok)
        numbers = range(len(rows))[: options.limit] if options.row is None else [options.row]
        tokens = supervised = 0
        for number in numbers:
            where = f"{options.rows}:{number}: "
            if not 0 <= number < len(rows):
                raise ValueError(f"there are only {len(rows)} rows; fix: a --row from 0 to {len(rows) - 1}")
            if not isinstance(rows[number], dict) or "conversations" not in rows[number]:
                raise ValueError("no conversations in it; fix: give LLaVA rows")
            text, spans, marks = render(rows[number]["conversations"], form)
            ids, labels, offsets = tokenize(text, spans, marks, tok)
            lit = sum(label != IGNORE for label in labels)
            tokens, supervised = tokens + len(ids), supervised + lit
            print(f"--- row {number}: {len(ids)} tokens, {lit} supervised, {ids.count(IMAGE_TOKEN)} images")
            print(show(text, labels, offsets, colour))
        print(f"=== {len(numbers)} rows: {tokens} tokens, {supervised} supervised")
    except ValueError as error:
        sys.exit(f"error: {where}{error}")


if __name__ == "__main__":
    main()
