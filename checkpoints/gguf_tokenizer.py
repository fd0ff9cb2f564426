"""The tokenizer and the chat template of a GGUF file, for the ids that we train on.

    fields = tokenizer_fields(model, tokenizer)     # keys of model.gguf: tokenizer.*

llama.cpp splits text with code of its own. For byte-level BPE `tokenizer.ggml.pre` names one of its
ways to split a text into words, and PRE has those that are exactly the steps of a tokenizer.json.
For SentencePiece it merges pieces by their scores. A tokenizer that does anything else is refused.

A word mark, which SentencePiece puts before a text, llama.cpp puts behind every control token, too.
Where ours does not, it is told to add none, and the chat template has a blank where a text begins.
"""

from __future__ import annotations

import json
import re

from checkpoints.hf_tokenizer import WORD_MARK, from_pieces, turns_of
from config import UserError
from inputs import templates
from inputs.tokenizer import WORDS, JsonTokenizer, Tokenizer

# What llama.cpp calls the kinds of a token.
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The steps of a byte-level pre-tokenizer as `steps` returns them, and whether words that are in the
# vocabulary are not merged again -> llama.cpp's name for it.
PRE = {
    (("bytes", "words"), False): "gpt-2",
    (("digits", "bytes", "words"), False): "smollm",
    ((WORDS["Qwen2Tokenizer"], "bytes"), False): "qwen2",
    ((LLAMA3, "bytes"), False): "smaug-bpe",
    ((LLAMA3, "bytes"), True): "llama-bpe",
}

IS_BYTE = re.compile("<0x[0-9A-F]{2}>")  # how SentencePiece spells a byte

# ---------------------------------------------------------------------------------------- the keys


def tokenizer_fields(model, tokenizer: Tokenizer | None) -> dict:
    """Return the keys of a model's tokenizer: tokens, how to split text, template, stop token.

    Raises UserError for a tokenizer that llama.cpp has no twin of.
    """
    if tokenizer is None:
        raise refusal("no tokenizer", "put one into the model's folder")
    name = model.config.template
    spec = specification(tokenizer)
    fields = token_lists(spec, tokenizer, model.language_model.config.vocab)
    if spec["model"].get("byte_fallback"):
        fields |= piece_fields(spec, fields["tokenizer.ggml.tokens"])
    else:
        fields |= byte_level_fields(spec)
    fields |= spaces_behind_controls(spec)

    # What ends an answer ends it there, too.
    ids = {
        "bos": tokenizer.bos_id,
        "eos": templates.stop_id(tokenizer, name),
        "padding": tokenizer.pad_id,
    }
    for role, token in ids.items():
        if token is not None:
            fields[f"tokenizer.ggml.{role}_token_id"] = token
    fields["tokenizer.ggml.add_bos_token"] = tokenizer.bos_id is not None
    fields["tokenizer.ggml.add_eos_token"] = False
    fields["tokenizer.ggml.add_space_prefix"] = marks_behind_controls(tokenizer)

    template = templates.choose_template(name, tokenizer)
    fields["tokenizer.chat_template"] = chat_template(template, tokenizer)
    return fields


def check_tokens(tokens: list[str], tokenizer: Tokenizer):
    """Raise UserError unless each id of a file is the tokenizer's, or of no token."""
    for i, token in enumerate(tokens):
        if token != tokenizer.token(i) and not (tokenizer.token(i) is None and token == unused(i)):
            what = f"id {i} is {token!r}, and {tokenizer.token(i)!r} in the tokenizer"
            raise UserError("model.gguf", what, "report this tokenizer")


def unused(i: int) -> str:
    """Return the name of a row of the embedding that is of no token."""
    return f"[PAD{i}]"


def refusal(what: str, fix: str = "use the tokenizer of a model that llama.cpp knows") -> UserError:
    """Return the error for a tokenizer that cannot be expressed."""
    return UserError("--to gguf", what, fix)


def specification(tokenizer: Tokenizer) -> dict:
    """Return the content of a tokenizer.json: the tokenizer's own, or what its pieces become."""
    if isinstance(tokenizer, JsonTokenizer):
        return json.loads(tokenizer.files["tokenizer.json"])
    return json.loads(from_pieces(tokenizer).to_str())


def byte_level_fields(spec: dict) -> dict:
    """Return the keys of a byte-level BPE."""
    bpe = spec["model"]
    if (
        bpe["type"] != "BPE"
        or bpe.get("continuing_subword_prefix")
        or bpe.get("end_of_word_suffix")
    ):
        raise refusal(
            f"a tokenizer of kind {bpe['type']}, neither byte-level BPE nor SentencePiece's"
        )

    # llama.cpp does not normalize. NFC changes nothing in text that is composed, as most is.
    normalizer = spec.get("normalizer") or {}
    if normalizer.get("type", "NFC") != "NFC":
        raise refusal(f"a tokenizer with the normalizer {normalizer['type']}")

    words = (steps(spec.get("pre_tokenizer") or {}), bool(bpe.get("ignore_merges")))
    if words not in PRE:
        raise refusal("a pre-tokenizer that llama.cpp has no name for")
    if not bpe["merges"]:
        raise refusal("a byte-level BPE without merges")
    merges = []
    for merge in bpe["merges"]:
        if not isinstance(merge, str):
            merge = " ".join(merge)
        merges.append(merge)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRE[words],
        "tokenizer.ggml.merges": merges,
    }


def steps(pre_tokenizer: dict) -> tuple[str, ...]:
    """Return the steps of a pre-tokenizer, each as a word or as its regular expression.

    A step that PRE does not know is its JSON.
    """
    found = []
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        kind = step.get("type")
        regex = step.get("pattern", {}).get("Regex")
        isolates = step.get("behavior") == "Isolated" and not step.get("invert")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            found.append("bytes")
            if step.get("use_regex", True):
                found.append("words")
        elif kind == "Digits" and step.get("individual_digits"):
            found.append("digits")
        elif kind == "Split" and regex and isolates:
            found.append(regex)
        else:
            found.append(json.dumps(step))
    return tuple(found)


def piece_fields(spec: dict, tokens: list[str]) -> dict:
    """Return the keys of a SentencePiece BPE, in which a space is a word mark."""
    bpe = spec["model"]
    if bpe["type"] != "BPE" or not bpe.get("fuse_unk") or bpe.get("ignore_merges"):
        raise refusal("a SentencePiece tokenizer that is no BPE of Llama's kind")

    # What llama.cpp does to a text: a word mark for each blank, and perhaps one more in front.
    normalizer = spec.get("normalizer") or {}
    for step in normalizer.get("normalizers", [normalizer]):
        is_mark = step.get("content") == WORD_MARK and step["pattern"] == {"String": " "}
        if step and step["type"] != "Prepend" and not is_mark:
            raise refusal(f"a SentencePiece tokenizer with the normalizer {step['type']}")
    words = spec.get("pre_tokenizer") or {}
    splits_at_blanks = words.get("pattern") == {"String": " "}  # of which none are left
    is_metaspace = words.get("type") == "Metaspace" and not words.get("split", True)
    if words.get("prepend_scheme") == "always":
        is_metaspace = False  # it marks each text between control tokens
    if words and not is_metaspace and not (splits_at_blanks and normalizer):
        raise refusal(f"a SentencePiece tokenizer with the pre-tokenizer {words['type']}")

    # Single characters are made by no merge; the score of what is no piece is never asked for.
    ranks = first_merges(bpe)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": [-float(ranks.get(token, len(ranks))) for token in tokens],
        "tokenizer.ggml.unknown_token_id": bpe["vocab"][bpe["unk_token"]],
    }


def first_merges(bpe: dict) -> dict[str, int]:
    """Return the rank of the first merge that makes each piece.

    llama.cpp merges any two neighbours that make a piece, those of the best score first. So all
    merges into a piece must be in the list, one behind the other. Raises UserError otherwise.
    """
    vocab = bpe["vocab"]
    ranks: dict[str, int] = {}
    counts: dict[str, int] = {}
    last = ""
    for rank, merge in enumerate(bpe["merges"]):
        if isinstance(merge, str):
            merge = merge.split(" ")
        piece = "".join(merge)
        if piece in ranks and piece != last:
            raise refusal(f"a SentencePiece tokenizer whose merges into {piece!r} are apart")
        ranks.setdefault(piece, rank)
        counts[piece] = counts.get(piece, 0) + 1
        last = piece

    for piece, count in counts.items():
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        if sum(left in vocab and right in vocab for left, right in pairs) != count:
            raise refusal(f"a SentencePiece tokenizer without some merges into {piece!r}")
    return ranks


def token_lists(spec: dict, tokenizer: Tokenizer, rows: int) -> dict:
    """Return the keys of tokens and their kinds, one for each of `rows` embeddings."""
    tokens = [unused(i) for i in range(rows)]
    kinds = [UNUSED] * rows
    largest = tokenizer.largest_plain_id()
    if largest >= rows:
        raise refusal(f"token {largest} of the tokenizer has no embedding, there are {rows}")

    bpe = spec["model"]
    for token, i in bpe["vocab"].items():
        if i < rows:
            tokens[i] = token
            kinds[i] = NORMAL
            if bpe.get("byte_fallback") and IS_BYTE.fullmatch(token):
                kinds[i] = BYTE

    # Added tokens that are no control tokens are found in any text.
    for added in spec.get("added_tokens", []):
        if not added["special"] and added["id"] < rows:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = USER_DEFINED
    for token, i in tokenizer.special.items():
        if i < rows:
            tokens[i] = token
            kinds[i] = CONTROL
            if token == bpe.get("unk_token"):
                kinds[i] = UNKNOWN
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}


# The added tokens of Phi-3 that leave the space behind them in the text. All others take it in, and
# llama.cpp does the same for a model of this name, which must have all of these.
PHI3 = "phi-3"
KEEP_SPACE = {"<unk>", "<s>", "<|endoftext|>"}
TAKES_SPACE = "</s>"


def spaces_behind_controls(spec: dict) -> dict:
    """Return what makes llama.cpp take in the space that added tokens take in.

    Raises UserError for tokens that do it in another way than those of Phi-3.
    """
    names = set()
    taking = set()
    for added in spec.get("added_tokens", []):
        names.add(added["content"])
        if added["lstrip"] or added["single_word"]:
            raise refusal(f"a tokenizer whose {added['content']!r} looks at what is before it")
        if added["rstrip"]:
            taking.add(added["content"])
    if not taking:
        return {}
    if not KEEP_SPACE < names or TAKES_SPACE not in names or taking != names - KEEP_SPACE:
        raise refusal(f"a tokenizer whose {min(taking)!r} takes in the space behind it")
    return {"general.name": PHI3}


# ----------------------------------------------------------------------------------- chat template

# Sets ns.text to the whole text of a message.
TEXT_OF_CONTENT = """\
{%- if message.content is string -%}{%- set ns.text = message.content -%}
{%- else -%}
{%- set ns.text = '' -%}
{%- for part in message.content -%}{%- set ns.text = ns.text + part.text -%}{%- endfor -%}
{%- endif -%}
"""

# Makes every content a string. llama.cpp's server writes a mark with a random name into it for each
# picture. One picture goes in front, as in training; several stay where they are.
FLATTEN = (
    """\
{%- set ns = namespace(turns=[], text='', words='') -%}
{%- for message in messages -%}
"""
    + TEXT_OF_CONTENT
    + """\
{%- set pieces = ns.text.split('<__media') -%}
{%- set ns.text = pieces[0] -%}
{%- for piece in pieces[1:] -%}
{%- set name = piece.split('__>')[0] -%}
{%- set ns.words = piece[(name | length) + 3:] -%}
{%- if pieces | length == 2 -%}
{%- set ns.words = (ns.text + ns.words) | trim -%}
{%- set ns.text = '' -%}
{%- endif -%}
{%- set ns.text = ns.text + '<__media' + name + '__>' + BEHIND_IMAGE + ns.words -%}
{%- endfor -%}
{%- set ns.turns = ns.turns + [{'role': message.role, 'content': ns.text}] -%}
{%- endfor -%}
{%- set messages = ns.turns -%}
"""
)

# Makes every content a list, for a template that wants one. A picture is a part of it, and the
# template writes `<image>` where it wants it. What is written is kept, and then gets the marks.
LISTS = (
    """\
{%- set ns = namespace(turns=[], parts=[], marks=[], text='') -%}
{%- for message in messages -%}
"""
    + TEXT_OF_CONTENT
    + """\
{%- set pieces = ns.text.replace('<image>', '<__image>').split('<__media') -%}
{%- set ns.parts = [] -%}
{%- if pieces | length == 1 -%}
{%- set ns.parts = [{'type': 'text', 'text': pieces[0]}] -%}
{%- elif pieces | length > 2 and pieces[0] | trim -%}
{%- set ns.parts = [{'type': 'text', 'text': pieces[0] | trim}] -%}
{%- endif -%}
{%- for piece in pieces[1:] -%}
{%- set name = piece.split('__>')[0] -%}
{%- set ns.marks = ns.marks + ['<__media' + name + '__>'] -%}
{%- set ns.parts = ns.parts + [{'type': 'image'}] -%}
{%- set ns.text = piece[(name | length) + 3:] -%}
{%- if pieces | length == 2 -%}{%- set ns.text = pieces[0] + ns.text -%}{%- endif -%}
{%- if ns.text | trim -%}
{%- set ns.parts = ns.parts + [{'type': 'text', 'text': ns.text | trim}] -%}
{%- endif -%}
{%- endfor -%}
{%- set ns.turns = ns.turns + [{'role': message.role, 'content': ns.parts}] -%}
{%- endfor -%}
{%- set messages = ns.turns -%}
{%- set written %}TURNS{% endset -%}
{%- for piece in written.split('<image>') -%}
{%- if not loop.first -%}{{- ns.marks[loop.index0 - 1] + (BLANK if piece else '') -}}{%- endif -%}
{{- piece.replace('<__image>', '<image>') -}}
{%- endfor -%}
"""
)


def chat_template(template, tokenizer: Tokenizer) -> str:
    """Return a template as Jinja for llama.cpp: it renders what the template renders.

    A vocabulary that marks words has a mark where a text begins, and behind each picture. There the
    text has a blank, unless llama.cpp makes all marks itself.
    """
    blank = ""
    if tokenizer.marks_words and not marks_behind_controls(tokenizer):
        blank = " "

    if isinstance(template, templates.ChatTemplate):
        question = [{"from": "human", "value": "Who?"}]
        rendered = templates.render(question, template, prompt=True)
        begins_with_text = all(mark.start > 0 for mark in rendered.marks)
        turns = tokenizer.chat_template
    else:
        begins_with_text = bool(template.system) or not template.question.startswith("{")
        turns = turns_of(template)

    first = ""
    if blank and begins_with_text:
        first = "{{- ' ' -}}"
    if getattr(template, "lists", False):
        written = first + turns.removesuffix("\n")
        return LISTS.replace("BLANK", json.dumps(blank)).replace("TURNS", written)
    flatten = FLATTEN.replace("BEHIND_IMAGE", json.dumps(blank + "\n"))
    return flatten + first + turns


def marks_behind_controls(tokenizer: Tokenizer) -> bool:
    """Return whether text behind a control token begins with a word mark, too."""
    return tokenizer.marks_words and bool(tokenizer.config.get("legacy"))
