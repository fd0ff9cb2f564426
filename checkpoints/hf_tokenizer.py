"""Tokenizer and chat template as Hugging Face's processors read them, for the ids we train on.

    image_token(tokenizer, vocab)            # the id of `<image>`
    tokenizer_files(tokenizer, token)        # tokenizer.json and tokenizer_config.json
    chat_files(tokenizer, "vicuna")          # chat_template.jinja and generation_config.json

tokenizer: one of inputs/tokenizer.py.
"""

from __future__ import annotations

import json

import sentencepiece
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from config import UserError
from inputs import templates

WORD_MARK = "\u2581"  # what SentencePiece puts before a word: a low line

# --------------------------------------------------------------------------------------- tokenizer


def image_token(tokenizer, vocab: int) -> int:
    """Return the id of an image position: the tokenizer's `<image>`, or the first unused id.

    vocab: the rows of the embedding, for a model without a tokenizer.
    """
    if tokenizer is None:
        return vocab
    known = tokenizer.token_id("<image>")
    if known is None:
        return tokenizer.vocab_size
    return known


def tokenizer_files(tokenizer, token: int, video: int | None = None) -> dict[str, dict | str]:
    """Return tokenizer.json and tokenizer_config.json, with `<image>` as a control token.

    token: the id that it must get. video: that of `<video>`, for a layout that has one. The class
    is transformers' plain one, which takes tokenizer.json as it is; its Llama classes rebuild it,
    each version in another way. Raises UserError for a tokenizer.model that cannot become a
    tokenizer.json.
    """
    if "tokenizer.json" in tokenizer.files:
        fast = tokenizers.Tokenizer.from_str(tokenizer.files["tokenizer.json"].decode())
    else:
        fast = from_pieces(tokenizer)

    if _prepends_word_mark(fast) and not tokenizer.config.get("legacy"):
        # This older form puts a word mark behind every control token too; training rows have it in
        # front only.
        fast.normalizer = normalizers.Sequence([])
        fast.pre_tokenizer = pre_tokenizers.Metaspace(WORD_MARK, "first", split=False)

    named = {"image_token": "<image>"}
    wanted = {"<image>": token}
    if video is not None:
        named["video_token"] = "<video>"
        wanted["<video>"] = video
    for mark, index in wanted.items():
        fast.add_special_tokens([tokenizers.AddedToken(mark, special=True, normalized=False)])
        got = fast.token_to_id(mark)
        if got != index:
            raise UserError(
                "tokenizer.json", f"{mark} became {got}, not {index}", "report this file"
            )

    settings = {}
    for key in ("model_max_length", "clean_up_tokenization_spaces"):
        if key in tokenizer.config:
            settings[key] = tokenizer.config[key]
    settings["pad_token"] = tokenizer.eos
    settings |= tokenizer.named
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        # An answer continues from the last token of each prompt in a batch, so short prompts are
        # padded in front.
        "padding_side": "left",
        "extra_special_tokens": named,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {"tokenizer.json": fast.to_str(pretty=True), "tokenizer_config.json": settings}


def _prepends_word_mark(fast: tokenizers.Tokenizer) -> bool:
    """Return whether a normalizer makes the word mark, as in older files of Llama's tokenizer."""
    if fast.normalizer is None:
        return False
    normalizer = json.loads(fast.normalizer.__getstate__())
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Prepend" for step in steps)


def from_pieces(tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer.model, a SentencePiece BPE with byte fallback, as a `tokenizers` one.

    Raises UserError for one of another kind.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files["tokenizer.model"])
    names = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
    vocab = {name: i for i, name in enumerate(names)}
    control = [i for i in range(len(names)) if pieces.is_control(i) or pieces.is_unknown(i)]

    # Each piece is cut at all its places.
    if max(map(len, names)) > 1000:
        what = "has a piece of more than 1000 characters"
        raise UserError("tokenizer.model", what, "give a tokenizer.json beside it")

    # The file has scores, not merges. A piece is made from any two pieces that it consists of.
    merges = []
    for i, name in enumerate(names):
        if i in control or pieces.is_byte(i):
            continue
        pairs = []
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in vocab and right in vocab:
                pairs.append((vocab[left], vocab[right]))
        for left, right in sorted(pairs):
            merges.append((-pieces.get_score(i), (names[left], names[right])))

    # The best score is merged first. The sort is stable: equal scores stay in the order of ids.
    merges.sort(key=lambda merge: merge[0])
    bpe = tokenizers.models.BPE(
        vocab,
        [pair for _, pair in merges],
        unk_token=names[pieces.unk_id()],
        fuse_unk=True,
        byte_fallback=True,
    )

    fast = tokenizers.Tokenizer(bpe)
    fast.pre_tokenizer = pre_tokenizers.Metaspace(WORD_MARK, "first", split=False)
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace(WORD_MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens(
        [tokenizers.AddedToken(names[i], special=True, normalized=False) for i in control]
    )
    if tokenizer.bos_id is not None:
        bos = tokenizer.token(tokenizer.bos_id)
        fast.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)]
        )

    # Words, accents, Chinese; runs of blanks, a rare blank, and a character that is spelled in
    # bytes.
    for text in (
        "Once upon a time, 3.14 \u00e9t\u00e9 \u4e2d\u6587",
        "two  spaces\n\ttab \u1680 \U0001f600",
    ):
        if fast.encode(text, add_special_tokens=False).ids != pieces.encode(text):
            what = "is no BPE of Llama's kind"
            raise UserError("tokenizer.model", what, "give a tokenizer.json beside it")
    return fast


# ----------------------------------------------------------------------------------- chat template

# Makes every content a string. It may come as one, or as a list of {"type": "text" | "image" |
# "video"}. One image or video goes in front, as in training; several stay where they are.
FLATTEN = """\
{%- set ns = namespace(turns=[], text='', mark='', images=0) -%}
{%- for message in messages -%}
{%- if message.content is string -%}{%- set ns.text = message.content -%}
{%- else -%}
{%- set ns.text = '' -%}{%- set ns.images = 0 -%}
{%- for part in message.content if part.type in ('image', 'video') -%}
{%- set ns.images = ns.images + 1 -%}{%- set ns.mark = '<' + part.type + '>\\n' -%}
{%- endfor -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{%- set ns.text = ns.text + part.text -%}
{%- elif ns.images > 1 -%}{%- set ns.text = ns.text + '<' + part.type + '>\\n' -%}{%- endif -%}
{%- endfor -%}
{%- if ns.images == 1 -%}{%- set ns.text = ns.mark + ns.text | trim -%}{%- endif -%}
{%- endif -%}
{%- set ns.turns = ns.turns + [{'role': message.role, 'content': ns.text}] -%}
{%- endfor -%}
{%- set messages = ns.turns -%}
"""

# The conversation in one of our templates. Words in capitals stand for its strings.
TURNS = """\
{%- if messages[0].role == 'system' -%}
{%- set text = messages[0].content | trim -%}{{ text + ' ' if text else '' }}
{%- set messages = messages[1:] -%}
{%- else -%}{{ SYSTEM }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ BEFORE_QUESTION + message.content + AFTER_QUESTION }}
{%- else -%}{{ BEFORE_ANSWER + message.content + AFTER_ANSWER }}{%- endif -%}
{%- endfor -%}
"""


def chat_files(tokenizer, name: str) -> dict[str, dict | str]:
    """Return chat_template.jinja and generation_config.json of a model with that template."""
    template = templates.choose_template(name, tokenizer)
    generation = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": templates.stop_id(tokenizer, name),
        "pad_token_id": tokenizer.pad_id,
    }
    return {
        "chat_template.jinja": chat_template(template, tokenizer),
        "generation_config.json": generation,
    }


def chat_template(template, tokenizer) -> str:
    """Return a template as Jinja: it renders what the template renders, character for character."""
    flatten = FLATTEN
    if tokenizer.marks_words:
        # A Llama vocabulary starts the text behind an image with a word mark of its own, as LLaVA's
        # training rows have it. transformers puts one at the very front only, so the template has a
        # blank, which gives the other.
        spaced = "ns.text | replace('<image>', '<image> ') | replace('<video>', '<video> ')}"
        flatten = flatten.replace("ns.text}", spaced)

    if isinstance(template, templates.ChatTemplate):
        if template.lists:  # it takes lists of parts itself
            return tokenizer.chat_template
        return flatten + tokenizer.chat_template

    return flatten + turns_of(template)


def turns_of(template: templates.Template) -> str:
    """Return one of our templates as Jinja, for messages whose contents are strings."""
    question = template.question.replace("{images}", "{q}")
    before_question, _, after_question = question.partition("{q}")
    before_answer, _, after_answer = template.answer.partition("{a}")
    words = {
        "SYSTEM": template.system or "",
        "BEFORE_QUESTION": before_question,
        "AFTER_QUESTION": after_question,
        "BEFORE_ANSWER": before_answer,
        "AFTER_ANSWER": after_answer + template.eos,
    }

    turns = TURNS
    for word, text in words.items():
        turns = turns.replace(word, json.dumps(text, ensure_ascii=False))  # Jinja reads its strings
    return turns
