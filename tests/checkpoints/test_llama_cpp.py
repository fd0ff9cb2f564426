"""The text side of GGUF files in the real llama.cpp, which answers as the model does.

make test-gguf

Pictures are in test_llama_cpp_vision.py.
"""

import json

import pytest
import torch

import lora
from checkpoints import gguf, gguf_file, gguf_lora
from checkpoints.gguf_check import both_answers
from config import LoRA
from inputs.templates import encode_prompt
from inputs.tokenizer import load_tokenizer
from tests.tools.gguf_models import TOKENIZER, configurations, llava
from tests.tools.llama_cpp import assistant, needs_llama_cpp, serving, user
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
            llama.answer([user(QUESTION * 3)], 1)


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


TOKENIZERS = {
    "phi-2": ("phi", lambda folder: load(VOCABULARIES / PHI)),
    "gpt2": ("phi", gpt2),
    "qwen2": ("chat", lambda folder: load(VOCABULARIES / QWEN)),
    "arcade": ("phi", lambda folder: load_tokenizer(from_ranks(folder))),
    "llama-2": ("llama", lambda folder: load(VOCABULARIES / LLAMA)),
    "llava-1.5": ("chat", lambda folder: load(VOCABULARIES / "llava-hf--llava-1.5-7b-hf")),
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
        assert len(texts) >= 60
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


# ---------------------------------------------------------------------------------- the check


def test_the_check_asks_both(tmp_path):
    model = llava(CONFIGURATIONS["llama-0"])
    gguf.write(tmp_path, model, TOKENIZER)
    answers = both_answers(tmp_path, model, TOKENIZER)
    assert len(answers) == 5 and answers[-1].question == "Who are you?"
    assert sum(ours == theirs for _, ours, theirs in answers) >= 4
