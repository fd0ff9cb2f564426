"""Wrong tokenizers and chat templates: every file of a folder, hostile rules, hostile Jinja.

    python -m tests.tools.fuzz.tokenizers --count 500 --seed 0

A case takes a small tokenizer, spoils one of its files and does what a training row and an answer
need: it loads the folder, encodes and decodes texts, and writes a conversation with the chat
template. The result is a UserError, or ids that the vocabulary has.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import sentencepiece
import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from inputs import templates
from inputs.tokenizer import load_tokenizer
from packing import IMAGE_TOKEN
from tests.tools import fuzz
from tests.tools.fuzz import Case, Violation, mutate, mutate_bytes, odd_json
from tests.tools.vocabularies import train_pieces, turns

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SETTINGS = {
    "eos_token": "<|im_end|>",
    "bos_token": {"content": "<|im_start|>", "lstrip": True},
    "add_bos_token": False,
    "legacy": True,
    "added_tokens_decoder": {"340": {"content": "<x>", "special": True, "rstrip": True}},
    "chat_template": [{"name": "default", "template": CHATML}, {"name": "tools", "template": "x"}],
}
TEXTS = (
    "",
    " ",
    "The dog sat on a mat, 3.14 <|im_end|> <x>\n",
    "\u00e9t\u00e9 \u4f60\u597d \U0001f600 \u200b\u0301",
    "a" * 3000,
    " " * 3000,
    "ab " * 1000,
)

# ----------------------------------------------------------------------------- good files


@cache
def good_files() -> dict[str, dict[str, bytes]]:
    """Return {kind: {name: bytes}} of small tokenizers."""
    sentences = ["the dog sat on a mat, what is this? a red dog"] * 9
    controls = ["<unk>", "<|im_start|>", "<|im_end|>"]

    split = pre_tokenizers.Split(library.Regex(r" ?\p{L}+|\p{N}|\s+(?!\S)|\s+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    qwen = library.Tokenizer(models.BPE())
    qwen.normalizer = normalizers.NFC()
    qwen.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    qwen.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=controls,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    qwen.train_from_iterator(sentences, trainer)

    llama = library.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    llama.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=controls, show_progress=False)
    llama.train_from_iterator(sentences, trainer)
    llama.pre_tokenizer = None
    llama.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    llama.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )

    # One with a table that maps characters to texts, as T5's.
    unigram = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=unigram,
        model_type="unigram",
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    beside = {
        "added_tokens.json": b'{"<|im_start|>": 341, "<|im_end|>": 342}',
        "special_tokens_map.json": b'{"unk_token": {"content": "<unk>"}}',
    }
    settings = {"tokenizer_config.json": json.dumps(SETTINGS).encode()}
    return {
        "qwen": {"tokenizer.json": qwen.to_str().encode(), **settings},
        "llama": {"tokenizer.json": llama.to_str().encode(), **settings},
        "pieces": {"tokenizer.model": train_pieces(), **beside, **settings},
        "unigram": {"tokenizer.model": unigram.getvalue(), **beside, **settings},
    }


# -------------------------------------------------------------------------------- spoiling


def spoil_rules(files: dict[str, bytes], rng: random.Random) -> str:
    """Put a hostile step into tokenizer.json, sometimes many times."""
    spec = json.loads(files["tokenizer.json"])
    part, step = rng.choice(
        [
            ("normalizer", replace_step(rng)),
            ("normalizer", {"type": "Prepend", "prepend": "a" * rng.choice((0, 1, 10**6))}),
            ("normalizer", {"type": "ByteLevel"}),
            ("normalizer", {"type": "Precompiled", "precompiled_charsmap": charsmap(rng)}),
            ("pre_tokenizer", split_step(rng)),
            (
                "pre_tokenizer",
                {"type": "Metaspace", "replacement": "a", "prepend_scheme": "always"},
            ),
            ("pre_tokenizer", {"type": "Digits", "individual_digits": True}),
            ("decoder", replace_step(rng)),
            ("decoder", {"type": "Strip", "content": "a", "start": big(rng), "stop": big(rng)}),
            (
                "decoder",
                {"type": "CTC", "pad_token": "", "word_delimiter_token": "a", "cleanup": True},
            ),
            ("decoder", {"type": "WordPiece", "prefix": "", "cleanup": True}),
        ]
    )
    names = {
        "normalizer": "normalizers",
        "pre_tokenizer": "pretokenizers",
        "decoder": "decoders",
    }
    steps = [step] * rng.choice((1, 1, 2, 40, 1000))
    if spec[part] is not None and rng.random() < 0.5:
        steps.insert(0, spec[part])
    value = json.dumps({"type": "Sequence", names[part]: steps})
    if len(steps) < 3:
        depth = rng.choice((0, 0, 1, 200, 10_000))
        value = f'{{"type": "Sequence", "{names[part]}": [' * depth + value + "]}" * depth
    spec[part] = None
    text = json.dumps(spec).replace(f'"{part}": null', f'"{part}": {value}', 1)
    files["tokenizer.json"] = text.encode()
    return f"{part}: {len(steps)} x {str(step)[:80]}"


def big(rng: random.Random) -> int:
    return rng.choice((0, 1, 10, 2**31, 2**63))


def expression(rng: random.Random) -> str:
    """Return a regular expression that is slow, matches nothing, or is none."""
    return rng.choice(
        (
            "(a|a)*b",
            "(a|aa)+$",
            r"(.*)*\n?z",
            r"(\s*\w*)*!",
            "(?:.?){22}z" if rng.random() < 0.5 else "(.?){1000}{1000}",
            ".?" * 23 + "[z-z]",
            "",
            "(?=a)",
            r"\b",
            "(",
            "(?<=a*)b",
            "[",
            "a{1,100000}{1,100000}",
            "(" * 20_000 + ")" * 20_000,
            r"(?<x>a\g<x>?b)",
            r"(\g<0>)",
            r"\k<x>",
            "x" * 10**6,
            r"(?i:\p{L}+)+\p{N}",
        )
    )


def pattern(rng: random.Random) -> dict:
    """Return a pattern: a text or an expression."""
    if rng.random() < 0.4:
        return {"String": rng.choice(("", "a", " ", "\u2581", "dog"))}
    return {"Regex": expression(rng)}


def replace_step(rng: random.Random) -> dict:
    content = rng.choice(("", "a", "aa", " a", "a" * 70, "a" * 10**6, "\u2581"))
    return {"type": "Replace", "pattern": pattern(rng), "content": content}


def split_step(rng: random.Random) -> dict:
    behavior = rng.choice(("Isolated", "Removed", "MergedWithPrevious", "Contiguous", "x"))
    invert = rng.random() < 0.3
    return {"type": "Split", "pattern": pattern(rng), "behavior": behavior, "invert": invert}


def charsmap(rng: random.Random) -> str:
    """Return the text of a table for Precompiled, mostly of noise."""
    size = rng.choice((0, 4, 1024))
    noise = size.to_bytes(4, "little") + rng.randbytes(size) + b"a" * 1000
    return base64.b64encode(noise[: rng.choice((3, 4, len(noise)))]).decode()


def spoil_field(files: dict[str, bytes], rng: random.Random) -> str:
    """Put a wrong value into tokenizer.json."""
    spec = json.loads(files["tokenizer.json"])
    if rng.random() < 0.2:
        mutated = mutate(spec, rng)
        spec = mutated.value
    else:
        # Not in the vocabulary, which has most of the values.
        outside = {key: value for key, value in spec.items() if key != "model"}
        outside["model"] = {k: v for k, v in spec["model"].items() if k not in ("vocab", "merges")}
        mutated = mutate(outside, rng)
        if isinstance(mutated.value, dict) and isinstance(mutated.value.get("model"), dict):
            mutated.value["model"] |= {k: spec["model"][k] for k in ("vocab", "merges")}
        spec = mutated.value
    files["tokenizer.json"] = json.dumps(spec).encode(errors="surrogatepass")
    return mutated.what


def spoil_settings(files: dict[str, bytes], rng: random.Random) -> str:
    """Put a wrong value into one of the small files."""
    name = rng.choice(sorted(set(files) - {"tokenizer.json", "tokenizer.model"}))
    if rng.random() < 0.15:
        files[name], what = odd_json(rng)
        return f"{name} {what}"
    mutated = mutate(json.loads(files[name]), rng)
    files[name] = json.dumps(mutated.value).encode(errors="surrogatepass")
    return f"{name} {mutated.what}"


def spoil_vocabulary(files: dict[str, bytes], rng: random.Random) -> str:
    """Change bytes of the vocabulary file, or put something else in its place."""
    (name,) = set(files) & {"tokenizer.json", "tokenizer.model"}
    if rng.random() < 0.15:
        files[name], what = odd_json(rng)
    else:
        files[name], what = mutate_bytes(files[name], rng)
    return f"{name} {what}"


def spoil_template(files: dict[str, bytes], rng: random.Random) -> str:
    """Write a hostile chat template."""
    if rng.random() < 0.1:
        source, what = odd_json(rng)
    else:
        text = jinja(rng, rng.choice((1, 2, 3)))
        if rng.random() < 0.5:
            text = CHATML + text
        source, what = text.encode(), text[:100]
    files["chat_template.jinja"] = source
    return what


def jinja(rng: random.Random, depth: int) -> str:
    """Return a piece of a template that loops, grows, or reaches for what it must not have."""
    size = rng.choice(("3", "99999", "10**6", "10**10", "2**62", "-1"))
    inner = "{{ messages[0].content }}"
    if depth > 0:
        inner = jinja(rng, depth - 1)
    return rng.choice(
        (
            f"{{% for i in range({size}) %}}{inner}{{% endfor %}}",
            "{% for i in range(99999) %}{% for j in range(99999) %}"
            f"{inner}{{% endfor %}}{{% endfor %}}",
            f"{{{{ 'a' * {size} }}}}{inner}",
            f"{{{{ ['a'] * {size} }}}}",
            f"{{{{ '%{rng.choice((9, 999999999, 99999999999))}d' | format(1) }}}}{inner}",
            f"{{{{ 'a' | center({size}) }}}}{inner}",
            f"{{{{ ('a ' * 99999) | wordwrap(1) | indent({size}) | length }}}}{inner}",
            f"{{% macro m(x) %}}{inner}{{{{ m(x + 1) }}}}{{% endmacro %}}{{{{ m(0) }}}}",
            "{% macro m(x) %}{% if x > 0 %}{{ m(x - 1) + m(x - 1) }}{% endif %}{% endmacro %}"
            f"{{{{ m({rng.choice((3, 40, 10**6))}) }}}}",
            "{% set n = namespace(s='a') %}"
            "{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}"
            f"{{{{ n.s | length }}}}{inner}",
            "{% set n = namespace(s='aa') %}"
            "{% for i in range(9) %}{% set n.s = n.s.join(n.s | list) %}"
            f"{{% endfor %}}{inner}",
            f"{{{{ 9 ** 9 ** 9 }}}}{inner}",
            f"{{{{ (10 ** {size}) | string | length }}}}",
            f"{{{{ messages | map(attribute='content') | join('x' * {size}) }}}}",
            "{{ raise_exception('a\nerror: b\x1b[2J' * 9999) }}",
            "{{ ''.__class__.__mro__ }}",
            "{{ cycler.__init__.__globals__ }}",
            "{{ strftime_now('%Y' * 99999) }}",
            "{% include '/etc/passwd' %}",
            "{{ " + "(" * rng.choice((10, 3000)) + "1" + ")" * 10 + " }}",
            "{% if 1 %}" * 3000,
            "{% for a in [1] %}" * 30 + inner + "{% endfor %}" * 30,
            "{{ " + "1+" * rng.choice((10, 99999)) + "1 }}",
            "{{ lipsum(n=99999) }}",
            "{{ messages | tojson(indent=10**8) }}",
            f"{{{{ (range(99999) | list) | batch(1) | list | length }}}}{inner}",
            f"{{% generation %}}{inner}{{% endgeneration %}}",
            "{% break %}",
            "{{ messages.append(messages) }}",
            "\ue0000\ue001" + inner,
        )
    )


SPOILS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "rules": (spoil_rules, ("qwen", "llama")),
    "field": (spoil_field, ("qwen", "llama")),
    "settings": (spoil_settings, ("qwen", "pieces")),
    "vocabulary": (spoil_vocabulary, ("qwen", "llama", "pieces", "pieces", "unigram", "unigram")),
    "template": (spoil_template, ("qwen", "pieces")),
}

# -------------------------------------------------------------------------------- what is tried


def use(folder: Path):
    """Load a tokenizer, encode and decode texts, and write a conversation."""
    tok = load_tokenizer(folder)
    for text in TEXTS:
        ids, offsets = tok.encode(text)
        check_ids(ids, tok)
        if len(ids) != len(offsets):
            raise Violation("ids without offsets")
        tok.decode(ids)
    tok.decode(range(0, tok.vocab_size, 1 + tok.vocab_size // 1000))

    if tok.chat_template is None:
        template = "plain"
    else:
        template = "chat"
    conversation = turns("<image>\nWho?  ", "A dog.", "Sure?", " Yes </s>")
    ids, _ = templates.encode(conversation, tok, template)
    check_ids(ids, tok)
    templates.encode_prompt(conversation[:3], tok, template)
    templates.stop_id(tok, template)


def check_ids(ids: list[int], tok):
    """Raise Violation for an id that an embedding of vocab_size rows does not have."""
    for i in ids:
        if i != IMAGE_TOKEN and not 0 <= i < tok.vocab_size:
            raise Violation(f"id {i} of a vocabulary of {tok.vocab_size}")


def case(rng: random.Random, folder: Path) -> Case:
    """Return the case of a random generator."""
    kind = rng.choice(sorted(SPOILS))
    spoil, bases = SPOILS[kind]
    base = rng.choice(bases)
    files = dict(good_files()[base])
    what = spoil(files, rng)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return Case(f"{kind} of {base}", what, partial(use, folder))


if __name__ == "__main__":
    fuzz.main(case, __doc__)
