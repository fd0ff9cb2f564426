"""Tokenizers with character offsets, and chat templates that make ids and labels together.

    python templates.py --model DIR --template phi ROWS.json              # see what is supervised
    python templates.py --model DIR --template phi ROWS.json --row 3      # one row, counted from 0
    python templates.py --model DIR --template pretrain ROWS.jsonl --limit 20

A conversation is LLaVA's: [{"from": "human", "value": "<image>\\nWho?"}, {"from": "gpt", "value": "A dog."}].
`render` writes it out as one text and says which characters are answers; `tokenize` turns that into ids and
labels by looking where each token starts. Nothing is tokenised twice and counted: the two cannot drift apart.

Every ValueError reads "<where>: <what>; fix: <action>"; a caller only has to put file and row before it.
"""

import difflib
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers.normalizers import Sequence
from tokenizers.pre_tokenizers import Metaspace

import config

IMAGE = "<image>"
IMAGE_TOKEN = -200  # TinyLLaVA's id for "an image goes here"; negative, so no vocabulary can contain it
IGNORE = -100  # the label that torch's cross-entropy leaves out

# ---------------------------------------------------------------- tokenizers

OWN_FILES = (  # what belongs to a tokenizer, hence what `save` writes
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json "
    "vocab.json merges.txt chat_template.jinja chat_template.json"
).split()
MODEL_FILES = ("generation_config.json", "config.json")  # the model's, read only for eos_token_id


def load_tokenizer(path):
    """A folder with `tokenizer.json` or `tokenizer.model`, or one such file -> Tokenizer.

    In a folder with both, `tokenizer.json` wins: it alone is sure to hold tokens that were added later, and the
    golden rows are equal through either. The config files beside it are read for bos, eos and pad.
    Raises ValueError when there is no tokenizer or it cannot be read.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    names = [name for name in (*OWN_FILES, *MODEL_FILES) if (folder / name).is_file()]
    files = {name: (folder / name).read_bytes() for name in names}
    if path.is_file():  # this vocabulary and no other
        files = {k: v for k, v in files.items() if k not in ("tokenizer.json", "tokenizer.model")}
        files["tokenizer.model" if path.suffix == ".model" else "tokenizer.json"] = path.read_bytes()
    for name, kind in (("tokenizer.json", JsonTokenizer), ("tokenizer.model", PieceTokenizer)):
        if name in files:
            try:
                return kind(files)
            except Exception as error:  # both libraries raise what they like on a damaged file
                what = " ".join(str(error).split())[:200] or type(error).__name__
                raise ValueError(f"{path}:{name}: cannot be loaded: {what}; fix: copy it again") from error
    what = "has neither tokenizer.json nor tokenizer.model" if folder.is_dir() else "no such folder or file"
    raise ValueError(f"{path}:tokenizer: {what}; fix: name a folder that holds one of the two")


class Tokenizer:
    """What both kinds share. Made by `load_tokenizer`.

    vocab_size    1 + the largest id
    special       {string: id} of the control tokens, which stand for structure and not for their spelling
    bos_id        the id that opens every sequence, or None when this tokenizer does not prepend one
    eos_id, eos   id and string of the end token, or None; pad_id likewise
    token_id(string) -> id or None; token(id) -> string or None

    It keeps the bytes of its files: `save` needs no folder that may be gone by then, and a pickle (for a
    DataLoader worker) is those bytes, read again.

    A Llama vocabulary puts a word mark before a text. Text behind a control token gets none (Hugging Face's
    `"legacy": false`: TinyLlama's and the golden rows'), unless the config says `"legacy": true`. Hence two
    models: `_first` for the beginning of a text, and `_later` without the mark.
    """

    def __init__(self, files):
        self.files = files
        self.config = json.loads(files.get("tokenizer_config.json", b"{}"))
        lead, end = self._load()  # ids that the vocabulary file itself knows as bos and eos, or None
        named = json.loads(files.get("special_tokens_map.json", b"{}")) | self.config
        ids = {"bos_token": lead}
        for role in ("bos_token", "eos_token", "pad_token"):
            token = named.get(role)
            if token is not None:
                ids[role] = self.token_id(token["content"] if isinstance(token, dict) else token)
        asked = self.config.get("add_bos_token")
        prepends = lead is not None if asked is None else asked
        self.bos_id, self.pad_id = ids["bos_token"] if prepends else None, ids.get("pad_token")
        models = (json.loads(files.get(name, b"{}")) for name in MODEL_FILES)
        ends = (ids.get("eos_token"), *(model.get("eos_token_id") for model in models), end)
        ends = [e[0] if isinstance(e, list) else e for e in ends if e is not None]
        self.eos_id = ends[0] if ends else None
        self.eos = self.token(self.eos_id) if ends else None

    def __reduce__(self):
        return type(self), (self.files,)

    def encode(self, text, special=True):
        """text -> (ids, offsets), without bos. Token k touches the characters text[start:end] of offsets[k].

        Together the spans cover the text; tokens that are parts of one character share it or stand at it with
        no width. With special=False a control token's string is text like any other.
        """
        strings = sorted(self.special, key=len, reverse=True) if special else ()
        found = re.finditer("|".join(map(re.escape, strings)) or "(?!)", text)
        return self.encode_around(text, [(*m.span(), self.special[m[0]]) for m in found])

    def encode_around(self, text, marks):
        """As `encode`, where `marks`, sorted (start, end, id), are the only places that become given ids.

        Control strings in the text between them are plain text. Behind an image a text begins anew, word mark
        included, as in TinyLLaVA.
        """
        ids, offsets, cursor, model = [], [], 0, self._first
        for start, end, mark in [*marks, (len(text), len(text), None)]:
            if cursor < start:
                pieces, spans = self._pieces(model, text[cursor:start])
                # A normaliser may drop characters (an accent under NFC): the token before takes them.
                nexts = [s for s, _ in spans[1:]] + [start - cursor]
                spans = [(s, max(e, n)) for (s, e), n in zip(spans, nexts, strict=True)]
                ids += pieces
                offsets += [(cursor + s, cursor + e) for s, e in spans]
            if mark is not None:
                ids.append(mark)
                offsets.append((start, end))
            cursor, model = end, self._first if mark == IMAGE_TOKEN else self._later
        return ids, offsets

    def decode(self, ids):
        """ids -> text, without control tokens, images, and ids that no token has (an embedding's padding)."""
        ids, controls = [i for i in map(int, ids) if i >= 0], set(self.special.values())
        return self._first.decode([i for i in ids if i not in controls and self.token(i) is not None])

    def save(self, folder):
        """Writes the tokenizer's own files into `folder`, each one whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (name for name in OWN_FILES if name in self.files):
            temporary = folder / f".{name}.{os.getpid()}"
            with open(temporary, "wb") as file:
                file.write(self.files[name])
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / name)


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`, through `tokenizers`."""

    def _load(self):
        self._first = self._later = first = tokenizers.Tokenizer.from_str(self.files["tokenizer.json"].decode())
        first.no_truncation()  # some files carry these two: they would cut, or fill up
        first.no_padding()
        lead = first.encode("").ids  # shows what the post-processor puts before every text
        first.post_processor = None  # bos is ours to add, and ByteLevel's cuts spaces out of the offsets
        first.encode_special_tokens = True  # control strings in plain text are spelled out
        self.token_id, self.token = first.token_to_id, first.id_to_token
        added = first.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self.vocab_size = max([first.get_vocab_size(False), *(i + 1 for i in added)])
        # The word mark comes from a Prepend normalizer (older files) or a Metaspace pre-tokenizer (newer ones).
        steps = json.loads(first.normalizer.__getstate__()) if first.normalizer else {}
        steps = steps.get("normalizers", [steps])
        rest = [step for step in steps if step.get("type") != "Prepend"]
        space = first.pre_tokenizer
        opens = isinstance(space, Metaspace) and space.prepend_scheme == "first"
        if (opens or len(rest) < len(steps)) and self.config.get("legacy") is not True:
            self._later = later = tokenizers.Tokenizer.from_str(first.to_str())
            later.encode_special_tokens = True
            if opens:
                later.pre_tokenizer = Metaspace(space.replacement, "never", space.split)
            if len(rest) < len(steps):
                normalizer = Sequence([])
                normalizer.__setstate__(json.dumps({"type": "Sequence", "normalizers": rest}).encode())
                later.normalizer = normalizer
        return lead[0] if lead else None, None

    def _pieces(self, model, text):
        encoding = model.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets


class PieceTokenizer(Tokenizer):
    """`tokenizer.model`, through `sentencepiece`."""

    def _load(self):
        proto = self.files["tokenizer.model"]
        self._first = self._later = first = sentencepiece.SentencePieceProcessor(model_proto=proto)
        if self.config.get("legacy") is not True:
            # Protobuf merges what is appended: normalizer_spec (field 3) {add_dummy_prefix (field 3): false}.
            self._later = sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        size = first.vocab_size()
        controls = [i for i in range(size) if first.is_control(i) or first.is_unknown(i)]
        self.special = {first.id_to_piece(i): i for i in controls}
        self.special |= json.loads(self.files.get("added_tokens.json", b"{}"))
        added = self.config.get("added_tokens_decoder", {})
        self.special |= {token["content"]: int(i) for i, token in added.items()}
        self._added = {i: token for token, i in self.special.items()}
        self.vocab_size = max(size, 1 + max(self._added))
        return [i if i >= 0 else None for i in (first.bos_id(), first.eos_id())]

    def token_id(self, token):
        i = self.special.get(token, self._first.piece_to_id(token))
        return i if self.token(i) == token else None

    def token(self, i):
        return self._added.get(i) or (self._first.id_to_piece(i) if i < self._first.vocab_size() else None)

    def _pieces(self, model, text):
        if hasattr(model, "encode_as_offset_mapping"):  # sentencepiece 0.2.2 and later
            found = model.encode_as_offset_mapping(text)
            return found["ids"], found["offsets"]
        found = model.encode(text, out_type="immutable_proto").pieces
        return [piece.id for piece in found], [(piece.begin, piece.end) for piece in found]


# ---------------------------------------------------------------- templates


@dataclass(frozen=True)
class Template:
    """`system`, then for every turn `question` (not supervised), `answer` and `eos` (supervised).

    {q} is what the human says, images included; {images} that turn's images alone; {a} the answer.
    system=None: no place for one. eos="": none. eos=None: the tokenizer's own.
    """

    system: str | None = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    question: str = "USER: {q} ASSISTANT:"
    answer: str = " {a}"
    eos: str | None = None


TEMPLATES = {
    "pretrain": Template(system=None, question="{images}", answer="{a}\n", eos=""),  # images and a caption
    "phi": Template(eos="<|endoftext|>"),  # Phi-2, StableLM-2, Qwen1.5
    "llama": Template(eos="</s>"),  # TinyLlama, OpenELM
    "gemma": Template(eos="<eos>"),
    "qwen2_base": Template(eos="<|endoftext|>"),
    "qwen2_instruct": Template(eos="<|im_end|>"),
    "plain": Template(system=""),  # any tokenizer, and no tokens spent on a system line: the demo
}


def resolve(name, tok):
    """The template of that name, its eos filled in. ValueError: unknown name, or an eos that is not one token."""
    if name not in TEMPLATES:
        near = difflib.get_close_matches(str(name), TEMPLATES, 1, 0.3)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"template: {name!r} is unknown{hint}; fix: use one of {', '.join(TEMPLATES)}")
    ends = {k: tok.eos if form.eos is None else form.eos for k, form in TEMPLATES.items()}
    fits = [k for k, eos in ends.items() if eos == "" or (eos and tok.token_id(eos) is not None)]
    if name not in fits:
        what = f"eos {ends[name]!r} of {name!r} is not one token of this tokenizer"
        raise ValueError(f"template: {what}; fix: use one that fits it: {', '.join(fits)}")
    return replace(TEMPLATES[name], eos=ends[name])


def render(conversation, template, prompt=False):
    """Conversation -> (text, answer_spans): one text, and (start, end) of every answer in it, eos included.

    A leading "system" turn replaces the system line. One image is moved to the front of its turn,
    `<image>\\n{q}`, as TinyLLaVA does; several stay where they are. An answer before the first question is left
    out, also as TinyLLaVA does (ShareGPT rows begin so).
    prompt=True: the conversation ends with a human turn, or a gpt turn of value None, and the text ends where
    the answer would start. Raises ValueError.
    """
    if not isinstance(conversation, list) or not conversation:
        raise ValueError("conversations: empty, or not a list; fix: give a human turn and a gpt turn")
    for i, turn in enumerate(conversation):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise ValueError(f'conversations[{i}]: not {{"from": ..., "value": ...}}; fix: write the turn so')
        open_end = prompt and turn["from"] == "gpt" and turn["value"] is None and i == len(conversation) - 1
        if not isinstance(turn["value"], str) and not open_end:
            kind = type(turn["value"]).__name__
            raise ValueError(f"conversations[{i}]: its value is {kind}, not text; fix: make it a string")
    turns = list(enumerate(conversation))
    text = template.system or ""
    if conversation[0]["from"] == "system":
        if template.system is None:
            raise ValueError("conversations[0]: this template has no system line; fix: remove the turn")
        text = turns.pop(0)[1]["value"].strip()
        text += " " if text else ""
    if turns and turns[0][1]["from"] == "gpt":
        turns.pop(0)
    spans, words, due = [], "", "human"
    for i, turn in turns:
        value = turn["value"]
        if turn["from"] != due:
            raise ValueError(f"conversations[{i}]: from {turn['from']!r}, {due!r} was due; fix: alternate the two")
        if due == "human":
            count = value.count(IMAGE)
            value = value.replace(IMAGE, "").strip() if count == 1 else value
            value = f"{IMAGE}\n{value}" if count == 1 else value
            text += template.question.format(q=value.strip() if count else value, images=IMAGE * count)
        elif value is not None:
            start, words = len(text), words + value.strip()
            text += template.answer.format(a=value) + template.eos
            spans.append((start, len(text)))
        due = "gpt" if due == "human" else "human"
    waits = bool(turns) and (due == "gpt" or value is None)
    if not turns or waits != prompt:
        last = "a human turn" if prompt else "a gpt turn"
        raise ValueError(f"conversations[{len(conversation) - 1}]: wrong last turn; fix: end with {last}")
    if not prompt and not words:
        raise ValueError("conversations: nothing is supervised, every answer is empty; fix: remove the row")
    return text, spans


def tokenize(text, answer_spans, tok, eos):
    """text and its answers -> (ids, labels, offsets), three lists of one length.

    A token is supervised when its first character lies in an answer. Only what the template wrote is structure:
    an `<image>` outside the answers (IMAGE_TOKEN) and the eos that ends an answer. The same strings typed into
    a question or an answer are tokenised as they are spelled, so that data cannot end a turn. (TinyLLaVA takes
    them for structure, and the row then loses all its labels.)
    """
    inside = bytearray(len(text) + 1)  # one longer: a token without width may stand behind the text
    for start, end in answer_spans:
        inside[start:end] = b"\1" * (end - start)
    marks = [(*m.span(), IMAGE_TOKEN) for m in re.finditer(IMAGE, text) if not inside[m.start()]]
    if eos:
        marks += [(end - len(eos), end, tok.token_id(eos)) for _, end in answer_spans]
    ids, offsets = tok.encode_around(text, sorted(marks))
    labels = [i if inside[start] else IGNORE for i, (start, _) in zip(ids, offsets, strict=True)]
    if tok.bos_id is not None:
        ids, labels, offsets = [tok.bos_id, *ids], [IGNORE, *labels], [(0, 0), *offsets]
    return ids, labels, offsets


def encode(conversation, tok, template="phi"):
    """A finished conversation -> (ids, labels): IMAGE_TOKEN per image, IGNORE where not supervised."""
    form = resolve(template, tok)
    return tokenize(*render(conversation, form), tok, form.eos)[:2]


def encode_prompt(conversation, tok, template="phi"):
    """A conversation that waits for an answer -> ids, ending where supervision starts in training."""
    form = resolve(template, tok)
    return tokenize(*render(conversation, form, prompt=True), tok, form.eos)[0]


def stop_id(tok, template="phi"):
    """The id that ends an answer. `pretrain` has no eos: the tokenizer's own, which may be None."""
    form = resolve(template, tok)
    return tok.token_id(form.eos) if form.eos else tok.eos_id


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
    parser.add_argument("--model", required=True, help="folder with tokenizer.json or tokenizer.model")
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
            text, spans = render(rows[number]["conversations"], form)
            ids, labels, offsets = tokenize(text, spans, tok, form.eos)
            lit = sum(label != IGNORE for label in labels)
            tokens, supervised = tokens + len(ids), supervised + lit
            print(f"--- row {number}: {len(ids)} tokens, {lit} supervised, {ids.count(IMAGE_TOKEN)} images")
            print(show(text, labels, offsets, colour))
        print(f"=== {len(numbers)} rows: {tokens} tokens, {supervised} supervised")
    except ValueError as error:
        sys.exit(f"error: {where}{error}")


if __name__ == "__main__":
    main()
