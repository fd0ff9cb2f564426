"""Tokenizers for tests: the published ones of ../shared, and how to make small ones."""

import base64
import io
import json
import shutil
from functools import cache

import pytest
import sentencepiece
import tokenizers

from inputs.tokenizer import load_tokenizer
from tests.tools.environment import SHARED

VOCABULARIES = SHARED / "assets/tokenizers"
LLAMA, PHI, QWEN = "meta-llama--Llama-2-7b-hf", "microsoft--phi-2", "Qwen--Qwen2-0.5B"

shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared with the golden data")
load = cache(load_tokenizer)  # the real ones take half a second each


LINE_BREAKS = [
    "User: What is this?\n\nAssistant: A horse\n\n and\n a dog.",
    "\n\n",
    "How many?\n\n\n",
]


def turns(*values):
    """human, gpt, human, ... in LLaVA's form."""
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(values)]


def reassemble(text, offsets):
    """The text again, from spans that share a character where one is several tokens."""
    out, reach = "", 0
    for start, end in offsets:
        assert 0 <= start <= end <= len(text)
        out += text[max(start, reach) : end]
        reach = max(reach, end)
    return out


def train_pieces(**options):
    """The bytes of a sentencepiece vocabulary with byte fallback, as Llama's."""
    out = io.BytesIO()
    sentences = [
        "USER: what is this? ASSISTANT: a red dog on a mat",
        "the cat sat on a blue mat, it is near",
    ] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=out,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return out.getvalue()


def write(folder, model, **config):
    """A tokenizer folder: `model` is a tokenizers.Tokenizer or the bytes of a tokenizer.model."""
    folder.mkdir(exist_ok=True)
    if isinstance(model, bytes):
        (folder / "tokenizer.model").write_bytes(model)
    else:
        model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def gather(folder, *sources, **config):
    """A tokenizer folder from files of several; `config` goes into its tokenizer_config.json."""
    folder.mkdir()
    for source in sources:
        for file in sorted(VOCABULARIES.glob(source)):
            shutil.copy(file, folder / file.name)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(settings | config))
    return folder


def byte_level(controls: list[str], size: int):
    """Return a byte-level vocabulary with these control tokens, in which line breaks merge."""
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=controls,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(LINE_BREAKS * 5, trainer)
    return fast


def from_ranks(folder):
    """A tokenizer.json of arcade100k's kind, from its ranks.

    The two halves of a token are what the lower ranks merge it to.
    """
    source = VOCABULARIES / "stabilityai--stablelm-2-zephyr-1_6b"
    lines = (source / "cl100k_base.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}

    def halves(token):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            places = range(len(parts) - 1)
            k = min(places, key=lambda k: ranks.get(parts[k] + parts[k + 1], len(ranks)))
            parts[k : k + 2] = [parts[k] + parts[k + 1]]
        return parts

    # byte-level BPE writes the byte b as a printable character: itself, or one behind U+0100
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + k) for k, byte in enumerate(hidden)
    }
    show = lambda token: "".join(map(table.get, token))  # noqa: E731
    merges = [tuple(map(show, halves(token))) for token in ranks if len(token) > 1]
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE({show(token): i for token, i in ranks.items()}, merges)
    )
    special = json.loads((source / "arcade100k_special_tokens.json").read_text())
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(special["pattern"]), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, byte_level])
    file = json.loads(model.to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {
        "special": True
    }
    special["special_tokens"] |= {"<no token>": 100256}  # ids without a gap
    file["added_tokens"] = [
        {"id": i, "content": token, **flags}
        for token, i in sorted(special["special_tokens"].items(), key=lambda item: item[1])
    ]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(file))
    return folder
