"""The text side of GGUF files in the real llama.cpp, which answers as the model does.

make test-gguf

Pictures are in test_llama_cpp_vision.py.
"""

import json
import re

import pytest
import tokenizers
import torch

import lora
from checkpoints import gguf, gguf_file, gguf_lora
from checkpoints.gguf_check import questions
from checkpoints.gguf_tokenizer import specification
from config import LoRA
from export import check_gguf
from inputs.templates import encode_prompt
from inputs.tokenizer import JsonTokenizer, load_tokenizer
from tests.tools.gguf_models import CHAT, LISTS, TOKENIZER, configurations, llava, with_chat
from tests.tools.llama_cpp import assistant, differences, needs_llama_cpp, serving, user
from tests.tools.vocabularies import (
    LLAMA,
    PHI,
    QWEN,
    VOCABULARIES,
    from_ranks,
    gather,
    load,
    shared,
    train_pieces,
    turns,
    write,
)

pytestmark = needs_llama_cpp

CONFIGURATIONS = configurations()

# Windows and original contexts of a few tokens are longer than the questions here.
CONFIGURATIONS["mistral-1"] |= {"sliding_window": 256}
CONFIGURATIONS["phi3-0"] |= {"original_max_position_embeddings": 256, "sliding_window": 2048}
CONFIGURATIONS["phi3-0"] |= {"max_position_embeddings": 2048}

QUESTION = "Who is it? And what?"


def write_text(folder, model, tokenizer=TOKENIZER, file_type="float32"):
    """Write the text file alone, and return its path."""
    path = folder / gguf.MODEL
    fields = gguf.text_fields(model, tokenizer)
    gguf_file.write_gguf(path, fields, gguf.text_tensors(model), file_type)
    return path


def first_distance(llama, model):
    """Return how far all log-probabilities of the first token are from ours, relative to ours."""
    ids = torch.tensor([encode_prompt(turns(QUESTION), TOKENIZER, "plain")])
    ours = torch.log_softmax(model.language_model(ids)[0, -1], -1)
    theirs = torch.full_like(ours, float("inf"))
    for token in llama.first([user(QUESTION)], len(ours)):
        theirs[token.id] = token.logprob
    return float((ours - theirs).abs().max() / ours.abs().max())


def own_answer(model, tokens=24):
    ids = torch.tensor([encode_prompt(turns(QUESTION), TOKENIZER, "plain")])
    new = model.generate(ids, max_new_tokens=tokens, eos_token_id=TOKENIZER.eos_id)
    return TOKENIZER.decode(new[0])


# llama.cpp's GELU is a table of float16.
GELU = 7e-4


@pytest.mark.parametrize(
    "name, distance",
    [
        ("llama-1", 1e-6),
        ("llama-2", 1e-6),
        ("llama-3", 1e-6),
        ("mistral-1", 1e-6),
        ("smollm3-0", 1e-6),
        ("phi3-0", 1e-6),
        ("phi3-1", 1e-6),
        ("qwen2-0", 2e-6),
        ("qwen3-0", 2e-6),
        ("gemma-0", GELU),
        ("gemma3_text-0", GELU),
        ("stablelm-0", 1e-6),
        ("stablelm-1", 1e-6),
        ("phi-0", GELU),
        ("openelm", 8e-6),
    ],
)
def test_a_family_answers_alike(name, distance, tmp_path):
    model = llava(CONFIGURATIONS[name])
    with serving(write_text(tmp_path, model), context=256) as llama:
        assert first_distance(llama, model) < distance
        if distance < GELU:
            assert llama.answer([user(QUESTION)], 24) == own_answer(model)


@pytest.mark.parametrize(
    "file_type, distance",
    [("float16", 1e-3), ("bfloat16", 1e-2), ("q8_0", 3e-2), ("q4_0", 0.3)],
)
def test_a_narrower_type_answers_nearly_alike(file_type, distance, tmp_path):
    hf = CONFIGURATIONS["llama-2"] | {"hidden_size": 96, "intermediate_size": 96}
    model = llava(hf)
    with serving(write_text(tmp_path, model, file_type=file_type), context=256) as llama:
        assert first_distance(llama, model) < distance


def test_a_context_is_only_as_long_as_both_are_alike(tmp_path):
    hf = CONFIGURATIONS["mistral-1"] | {"sliding_window": 32}
    with serving(write_text(tmp_path, llava(hf)), context=256) as llama:
        assert llama.answer([user("a")], 1)
        with pytest.raises(OSError, match="400"):
            llama.answer([user(QUESTION * 2)], 1)


# ------------------------------------------------------------------------------------ adapters


def test_an_adapter_is_as_good_as_merged(tmp_path):
    model = llava(CONFIGURATIONS["llama-1"])
    base = write_text(tmp_path, model)
    plain = own_answer(model)
    lora.apply(model, LoRA(r=4, alpha=6.0, dropout=0.0, rslora=True), ["language_model"])
    generator = torch.Generator().manual_seed(0)
    for adapter in lora.adapters(model).values():
        adapter.lora_B.data.normal_(0, 0.1, generator=generator)
    gguf_lora.write(tmp_path, model)
    lora.merge(model, torch.float32)
    assert own_answer(model) != plain
    with serving(base, context=256, adapter=tmp_path / gguf_lora.FILE) as llama:
        assert first_distance(llama, model) < 2e-6
        assert llama.answer([user(QUESTION)], 24) == own_answer(model)


# --------------------------------------------------------------------------------- tokenizers


def gpt2(folder):
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    return load_tokenizer(gather(folder, "openai-community--gpt2/*", **settings))


def phi3(folder):
    """Return a tokenizer whose control tokens take in the space behind them, as Phi-3's do."""
    spec = specification(load_tokenizer(write(folder, train_pieces())))
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] == "</s>"
    for content in ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"):
        i = len(spec["model"]["vocab"]) + len(spec["added_tokens"])
        added = spec["added_tokens"][0] | {"id": i, "content": content}
        spec["added_tokens"].append(added | {"rstrip": content != "<|endoftext|>"})
    settings = {"eos_token": "<|endoftext|>", "chat_template": PHI3_CHAT}
    files = {"tokenizer.json": spec, "tokenizer_config.json": settings}
    return JsonTokenizer({name: json.dumps(content).encode() for name, content in files.items()})


def gemma(folder):
    """Return a tokenizer that puts no word mark before a text, with steps as Gemma's."""
    spec = specification(load_tokenizer(write(folder, train_pieces())))
    blank = {"String": " "}
    spec["normalizer"] = {"type": "Replace", "pattern": blank, "content": "\u2581"}
    spec["pre_tokenizer"] = {
        "type": "Split",
        "pattern": blank,
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    files = {"tokenizer.json": spec, "tokenizer_config.json": {"eos_token": "</s>"}}
    return JsonTokenizer({name: json.dumps(content).encode() for name, content in files.items()})


PHI3_CHAT = (
    "{% for message in messages %}"
    "{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}"
    "{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)

TOKENIZERS = {
    "phi-2": ("phi", lambda folder: load(VOCABULARIES / PHI)),
    "gpt2": ("phi", gpt2),
    "qwen2": ("chat", lambda folder: load(VOCABULARIES / QWEN)),
    "arcade": ("phi", lambda folder: load_tokenizer(from_ranks(folder))),
    "llama-2": ("llama", lambda folder: load(VOCABULARIES / LLAMA)),
    "llava-1.5": ("chat", lambda folder: load(VOCABULARIES / "llava-hf--llava-1.5-7b-hf")),
    "phi-3": ("chat", phi3),
    "gemma": ("llama", gemma),
    "pieces": ("llama", lambda folder: load_tokenizer(write(folder, train_pieces()))),
    "legacy": ("llama", lambda folder: load_tokenizer(write(folder, train_pieces(), legacy=True))),
}


@shared
@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_have_the_same_ids(name, tmp_path):
    """Those of the golden texts, and of a conversation of two turns."""
    template, make = TOKENIZERS[name]
    tokenizer = make(tmp_path / "tokenizer")
    hf = {
        "model_type": "llama",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
    model = llava(hf, template=template)
    golden = json.loads((VOCABULARIES / "golden_ids.json").read_text())

    # The template writes the blank that becomes the first word mark. llama.cpp takes strings that
    # end a text in some vocabulary for control tokens in any other, too.
    blank = " " if tokenizer.marks_words and not tokenizer.config.get("legacy") else ""
    controls = ("</s>", "<|endoftext|>", *tokenizer.special)
    with serving(write_text(tmp_path, model, tokenizer, "float16")) as llama:
        texts = [text for text in golden["texts"] if text]
        texts = [text for text in texts if not any(token in text for token in controls)]
        if name == "phi-3":  # Metaspace adds no mark to a text that begins with a blank
            texts = [text for text in texts if not text.startswith(" ")]
        assert len(texts) >= 50
        for text in texts:
            ids, _ = tokenizer.encode(text)
            assert llama.token_ids(blank + text) == ids, text

        for values in (["What is it?"], ["What is it?", "A dog.", "Where is it, then?"]):
            messages = []
            for i, value in enumerate(values):
                messages.append(assistant(value) if i % 2 else user(value))
            ids = encode_prompt(turns(*values), tokenizer, template)
            assert llama.token_ids(llama.prompt(messages), special=True) == ids
            assert llama.prompt_tokens(messages) == len(ids)


# ------------------------------------------------------------------------- both files, together


@pytest.mark.parametrize(
    "name", ["gemma3_text-0", "openelm", "smollm3-0", "phi3-1", "stablelm-1", "mistral-0"]
)
def test_pictures_reach_every_family(name, tmp_path):
    """Others are in test_llama_cpp_vision.py. Gemma-3's graph scales embeddings of tokens alone."""
    model = llava(CONFIGURATIONS[name])
    gguf.write(tmp_path, model, TOKENIZER)
    asked = []
    for text, picture in questions():
        asked.append(([text], [picture] if picture else []))
    with serving(tmp_path / gguf.MODEL, tmp_path / gguf.MMPROJ, context=256) as llama:
        assert max(differences(llama, model, TOKENIZER, asked)) < 0.02


@pytest.mark.parametrize("template", ["llama", CHAT, LISTS])
@pytest.mark.parametrize("kind", ["bytes", "pieces", "legacy"])
def test_conversations_with_pictures(kind, template, tmp_path):
    """One picture and two turns, two pictures, and none."""
    tokenizer = TOKENIZER
    if kind != "bytes":
        model = load_tokenizer(write(tmp_path / "model", train_pieces()))
        fast = tokenizers.Tokenizer.from_str(json.dumps(specification(model)))
        settings = {"eos_token": "</s>", "legacy": kind == "legacy"}
        tokenizer = load_tokenizer(write(tmp_path / "json", fast, **settings))
    if template != "llama":
        tokenizer = with_chat(tokenizer, template)
        template = "chat"
    hf = CONFIGURATIONS["llama-0"] | {"vocab_size": tokenizer.vocab_size}
    model = llava(hf, template=template)
    gguf.write(tmp_path, model, tokenizer)

    disc, square, *_ = [question.picture for question in questions()]
    asked = [
        (["What is it?", "A dog.", "Where is it, then?"], [disc]),
        (["Which is red?"], [disc, square]),
        (["What is it?", "A dog.", "Where is it, then?"], []),
    ]
    with serving(tmp_path / gguf.MODEL, tmp_path / gguf.MMPROJ, context=256) as llama:
        assert max(differences(llama, model, tokenizer, asked)) < 0.02


# ---------------------------------------------------------------------------------- the check


def test_the_check_asks_both(tmp_path, capsys):
    model = llava(CONFIGURATIONS["llama-0"])
    gguf.write(tmp_path, model, TOKENIZER)
    check_gguf(tmp_path, model, TOKENIZER, None)
    *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch("check: [45] of 5 answers are the same", last)
