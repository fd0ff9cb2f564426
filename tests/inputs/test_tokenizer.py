"""tokenizer.py: golden ids, offsets, control tokens, word marks, files, errors.

python -m pytest tests/inputs/test_tokenizer.py
"""

import json
import pickle
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from config import UserError
from inputs.templates import byte_tokenizer, encode
from inputs.tokenizer import load_tokenizer, with_controls
from packing import IMAGE_TOKEN
from tests.tools.vocabularies import (
    LLAMA,
    PHI,
    QWEN,
    VOCABULARIES,
    from_ranks,
    gather,
    load,
    reassemble,
    shared,
    train_pieces,
    turns,
    write,
)

TEXTS = [
    "Hello world",
    "  two  spaces ",
    "\ttab\nand newline\r\n",
    "naïve café, Führer",
    "你好世界 🙂🙃 Привет",
    "👩‍👩‍👧 family, e\u0301 combining, ﬁ ligature",
    "A man</s>is<|endoftext|>here <image> <unk>",
    "\u0000\u200b\u3000",
    "",
]


@shared
@pytest.mark.parametrize(
    "name, vocabulary, special",
    [
        ("llama2_sentencepiece", f"{LLAMA}/tokenizer.model", False),
        ("llama2_fast", f"{LLAMA}/tokenizer.model", True),
        ("llama2_fast", f"{LLAMA}/tokenizer.json", True),
        ("llava15_fast_with_bos", "llava-hf--llava-1.5-7b-hf", True),
        ("phi-2", PHI, True),
        ("gpt2", "vocab.json and merges.txt", True),
        ("qwen2.5", QWEN, True),
        ("qwen2.5", "vocab.json and merges.txt", True),
        ("arcade100k_on_cl100k_ranks", "ranks", True),
        ("clip", "openai--clip-vit-large-patch14", True),
    ],
)
def test_golden_ids(name, vocabulary, special, tmp_path):
    if vocabulary == "ranks":
        tok = load_tokenizer(from_ranks(tmp_path / "a"))
    elif name == "gpt2" and "and" in vocabulary:
        settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
        tok = load_tokenizer(gather(tmp_path / "a", "openai-community--gpt2/*", **settings))
    elif "and" in vocabulary:
        config, rest = "Qwen--Qwen2.5-0.5B-Instruct/*", (f"{QWEN}/vocab.json", f"{QWEN}/merges.txt")
        tok = load_tokenizer(
            gather(tmp_path / "a", config, *rest, tokenizer_class="Qwen2TokenizerFast")
        )
    else:
        tok = load(VOCABULARIES / vocabulary)
    golden = json.loads((VOCABULARIES / "golden_ids.json").read_text())
    lead = [tok.bos_id] if name in ("llava15_fast_with_bos", "clip") else []
    tail = [49407] if name == "clip" else []
    assert len(golden["texts"]) == 72
    for text, expected in zip(golden["texts"], golden["ids"][name], strict=True):
        ids, offsets = tok.encode(text, special=special)
        assert [*lead, *ids, *tail] == expected, text
        assert name == "clip" or reassemble(text, offsets) == text  # CLIP's drops spaces


# ------------------------------------------------------------ against the references, on many lines

# First and last code points: scripts, marks, right to left, symbols, private use, controls.
RANGES = (
    "20-7e a0-24f 300-36f 370-3ff 400-4ff 590-5ff 600-6ff 900-97f e00-e7f 1780-17ff "
    "1ea0-1ef9 2000-206f 2190-22ff "
    "3000-30ff 4e00-9fff ac00-d7a3 e000-e0ff fb00-fb4f ff00-ffef 1d400-1d7ff 1f300-1faff "
    "20000-2a6df 0-1f 7f-9f "
    "f0000-f00ff"
)
BITS = [
    "    ",
    "\t",
    "\t\t\t",
    "\n",
    "\r\n",
    "\n\n \n",
    "  ",
    " " * 9,
    "123456",
    "3.14",
    "'s",
    "'LL",
    "don't",
    "Hello",
]
BITS += [
    "👩\u200d👩\u200d👧",
    "🏳️\u200d🌈",
    "🇩🇪",
    "👍🏽",
    "é",
    "e\u0301",
    "\u1100\u1161\u11a8",
    "각",
    "\u212b",
    "ﬁ",
    " world",
]
BITS += [
    "<|im_end",
    "<s",
    "</s >",
    "<|endoftext|",
    "<0x0A>",
    "▁",
    "▁▁",
    "Ġ",
    "\ufeff",
    "\u200f",
    "مرحبا",
    "שלום",
    "def f(x):",
]
CONTROLS = ["</s>", "<s>", "<|endoftext|>", "<|im_end|>", "<unk>", "<|im_start|>"]


def lines(count, bits):
    """Yield lines of a few runs, each of one script, among bits that tokenizers treat specially."""
    chance = random.Random(0)
    ranges = [[int(end, 16) for end in pair.split("-")] for pair in RANGES.split()]
    for _ in range(count):
        script, parts = chance.choice(ranges), []
        for _ in range(chance.randint(1, 12)):
            if chance.random() < 0.5:
                parts.append(
                    "".join(chr(chance.randint(*script)) for _ in range(chance.randint(1, 6)))
                )
            else:
                parts.append(chance.choice([*bits, " "]))
                script = chance.choice(ranges) if chance.random() < 0.3 else script
        yield "".join(parts)


@shared
@pytest.mark.parametrize("vocabulary", [PHI, QWEN])
def test_many_lines_against_transformers(vocabulary):
    """Control strings as control tokens, and spelled out (transformers' split_special_tokens)."""
    transformers = pytest.importorskip("transformers")
    tok, reference = (
        load(VOCABULARIES / vocabulary),
        transformers.AutoTokenizer.from_pretrained(VOCABULARIES / vocabulary),
    )
    for text in lines(2000, BITS + CONTROLS):
        for special in (True, False):
            ids, offsets = tok.encode(text, special)
            expected = reference.encode(
                text, add_special_tokens=False, split_special_tokens=not special
            )
            assert ids == expected, ascii(text)
            assert reassemble(text, offsets) == text, ascii(text)
            assert [start for start, _ in offsets] == sorted(start for start, _ in offsets), ascii(
                text
            )


@shared
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_many_lines_against_sentencepiece(file):
    """Llama-2. sentencepiece spells control strings out, so special=False. (transformers 5 adds no
    word mark to a text that begins with a space, which sentencepiece and transformers 4 do.)"""
    tok = load(VOCABULARIES / LLAMA / file)
    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(VOCABULARIES / LLAMA / "tokenizer.model")
    )
    for text in lines(2000, BITS + CONTROLS):
        ids, offsets = tok.encode(text, special=False)
        assert ids == reference.encode(text), ascii(text)
        assert reassemble(text, offsets) == text, ascii(text)
        assert [start for start, _ in offsets] == sorted(start for start, _ in offsets), ascii(text)


@shared
@pytest.mark.parametrize(
    "name, vocabulary", [("llama-spm", f"{LLAMA}/tokenizer.model"), ("phi-2", PHI), ("qwen2", QWEN)]
)
def test_llama_cpp_pairs(name, vocabulary):
    tok, stem = (
        load(VOCABULARIES / vocabulary),
        VOCABULARIES / "llama.cpp-pairs" / f"ggml-vocab-{name}.gguf",
    )
    texts = Path(f"{stem}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [
        [int(i) for i in line.split()] for line in Path(f"{stem}.out").read_text().splitlines()
    ]
    assert len(expected) >= 40
    assert [tok.encode(text)[0] for text in texts[: len(expected)]] == expected


# --------------------------------------------------------------------------------------- tokenizers


def test_attributes(tiny, piece_model, tmp_path):
    tok = load_tokenizer(tiny)
    assert (tok.bos_id, tok.eos_id, tok.eos, tok.pad_id) == (None, 0, "<|endoftext|>", 1)
    assert tok.vocab_size == 1 + max(
        tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json")).get_vocab().values()
    )
    assert (
        tok.token_id("</s>") == tok.special["</s>"] == 2 and tok.token_id("no such token") is None
    )
    pieces = load_tokenizer(write(tmp_path / "a", piece_model))
    assert (pieces.bos_id, pieces.eos_id, pieces.eos) == (1, 2, "</s>")
    assert pieces.named == {"bos_token": "<s>", "eos_token": "</s>"}
    assert pieces.token_id("</s>") == 2 and pieces.token_id("no such token") is None
    assert load_tokenizer(write(tmp_path / "b", piece_model, add_bos_token=False)).bos_id is None
    assert load_tokenizer(write(tmp_path / "b", piece_model, add_bos_token=None)).bos_id == 1
    assert load_tokenizer(write(tmp_path / "b", piece_model, bos_token="</s>")).bos_id == 2
    added = {"340": {"content": "<extra>"}}
    more = load_tokenizer(
        write(tmp_path / "c", piece_model, added_tokens_decoder=added, eos_token="<extra>")
    )
    assert (more.vocab_size, more.eos_id, more.eos) == (341, 340, "<extra>")
    assert (
        more.encode("a<extra>")[0][-1] == 340
        and more.decode([*more.encode("a mat")[0], 340, 335]) == "a mat"
    )


def test_a_vocabulary_without_bos(tmp_path):
    tok = load_tokenizer(write(tmp_path / "a", train_pieces(bos_id=-1)))
    assert tok.bos_id is None and tok.eos == "</s>"
    assert tok.token_id("<unk>") not in encode(turns("mat", "dog"), tok, "llama")[0]


def test_eos_from_the_models_config(piece_model, tmp_path):
    folder = write(tmp_path / "a", piece_model)
    (folder / "config.json").write_text('{"eos_token_id": [7, 2]}')
    assert load_tokenizer(folder).eos_id == 7
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert load_tokenizer(folder).eos_id == 2


def test_bos_comes_from_the_post_processor(tiny, tmp_path):
    model = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    model.post_processor = tokenizers.processors.TemplateProcessing(
        "</s> $A", special_tokens=[("</s>", 2)]
    )
    tok = load_tokenizer(write(tmp_path / "a", model))
    assert tok.bos_id == 2 and tok.encode("a mat")[0][0] != 2
    assert encode(turns("q", "a"), tok, "phi")[0][0] == 2
    assert load_tokenizer(write(tmp_path / "b", model, add_bos_token=False)).bos_id is None


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_cover_the_text(tiny, piece_model, tmp_path, text):
    for tok in (load_tokenizer(tiny), load_tokenizer(write(tmp_path / "a", piece_model))):
        ids, offsets = tok.encode(text)
        assert len(ids) == len(offsets) and (ids or not text)
        assert reassemble(text, offsets) == text
        assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)
        for i, (start, end) in zip(
            ids, offsets, strict=True
        ):  # what a control token spells stands where it says
            assert i not in tok.special.values() or text[start:end] == tok.token(i)


def test_offsets_name_the_right_characters(tiny):
    tok, text = load_tokenizer(tiny), "the dog 🙂 on a mat, </s> 你 a dog"
    ids, offsets = tok.encode(text)
    assert " dog" in [text[s:e] for s, e in offsets] and "</s>" in [text[s:e] for s, e in offsets]
    for i, (start, end) in zip(ids, offsets, strict=True):
        if text[start:end].isascii() and i not in tok.special.values():
            assert tok.decode([i]) == text[start:end]


def test_special_strings_are_text_when_asked(tiny, piece_model, tmp_path):
    for tok in (load_tokenizer(tiny), load_tokenizer(write(tmp_path / "a", piece_model))):
        assert tok.encode("a</s>")[0][-1] == 2
        plain = tok.encode("a</s>", special=False)[0]
        assert 2 not in plain and tok.decode(plain) == "a</s>"


def test_word_mark_behind_a_control_token(piece_model, tmp_path):
    """sentencepiece: none, unless the config says legacy. After an image there is one."""
    default = load_tokenizer(write(tmp_path / "a", piece_model))
    legacy = load_tokenizer(write(tmp_path / "b", piece_model, legacy=True))
    dog = default.token_id("▁dog")
    assert dog is not None and default.encode("dog")[0] == [dog]
    assert legacy.encode("</s>dog")[0] == [2, dog]
    bare = default.encode("</s>dog")[0]
    assert "".join(map(default.token, bare[1:])) == "dog"
    assert default.encode_around("dogX", [(3, 4, IMAGE_TOKEN)])[0] == [dog, IMAGE_TOKEN]
    assert default.encode_around("Xdog", [(0, 1, IMAGE_TOKEN)])[0] == [IMAGE_TOKEN, dog]


def test_word_mark_in_both_json_forms(llama_json, tmp_path):
    """Metaspace "first" as `tokenizers` itself does it; a Prepend normalizer gives the same ids."""
    texts = ["dog", "dog</s>dog on", "</s>dog", "dog</s> dog", "a dog</s></s>mat"]
    legacy = load_tokenizer(write(tmp_path / "a", llama_json, legacy=True))
    assert [legacy.encode(text)[0] for text in texts] == [
        llama_json.encode(text).ids for text in texts
    ]

    newer = tokenizers.Tokenizer.from_str(llama_json.to_str())
    newer.normalizer = None
    newer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    expected = [newer.encode(text).ids for text in texts]
    assert expected != [llama_json.encode(text).ids for text in texts]
    for name, model in (("b", newer), ("c", llama_json)):
        assert [
            load_tokenizer(write(tmp_path / name, model)).encode(text)[0] for text in texts
        ] == expected


def test_added_tokens(tiny, piece_model, tmp_path):
    """The longest control string wins; added tokens that are not special are text."""
    model = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    size = model.get_vocab_size()
    model.add_tokens(["redgreen"])
    model.add_special_tokens(["</s>2"])
    tok = load_tokenizer(write(tmp_path / "a", model))
    assert tok.vocab_size == size + 2 and "redgreen" not in tok.special
    assert tok.encode("redgreen</s>2</s>")[0] == [size, size + 1, 2]
    assert tok.decode([size, size + 1, 2]) == "redgreen"
    folder = write(tmp_path / "b", piece_model)
    (folder / "added_tokens.json").write_text('{"<image_pad>": 340}')
    assert load_tokenizer(folder).encode("<image_pad>")[0] == [340]


def test_a_vocabulary_may_spell_control_tokens(tmp_path):
    """Gemma's <end_of_turn> is a piece that sentencepiece finds in any text: typed text is cut."""
    pieces = train_pieces(user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "<table>"])
    added = {
        "3": {"content": "<start_of_turn>", "special": True},
        "4": {"content": "<end_of_turn>", "special": True},
    }
    added["5"] = {"content": "<table>", "special": False}
    tok = load_tokenizer(write(tmp_path / "a", pieces, added_tokens_decoder=added))
    text = "a <end_of_turn><table><start_of_turn>dog"
    ids, offsets = tok.encode(text)
    assert [i for i in ids if i in (3, 4, 5)] == [4, 5, 3] and reassemble(text, offsets) == text
    ids, offsets = tok.encode(text, special=False)
    assert [i for i in ids if i in (3, 4, 5)] == [5] and reassemble(text, offsets) == text
    assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)
    assert tok.decode(ids) == text and "".join(map(tok.token, ids)).count("▁") == 1 + text.count(
        " "
    )


def test_control_tokens_that_take_in_space(tiny, tmp_path):
    """As Phi-3's <|end|> does; `tokenizers` is the reference."""
    model = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    model.no_truncation()
    model.no_padding()
    model.add_special_tokens(
        [tokenizers.AddedToken("<|r|>", rstrip=True), tokenizers.AddedToken("<|l|>", lstrip=True)]
    )
    tok = load_tokenizer(write(tmp_path / "a", model))
    for text in ("a<|r|> \n dog", "a <|l|> dog", "a \n<|l|><|r|>", "<|r|>  <|l|>  </s> a"):
        ids, offsets = tok.encode(text)
        assert ids == model.encode(text, add_special_tokens=False).ids
        assert reassemble(text, offsets) == text
    assert tok.encode("a<|r|> \n dog")[1][1] == (1, 9)


def test_vocab_and_merges(tiny, tmp_path):
    """tokenizer_class says how words are split; without one that is known nothing is loaded."""
    model = json.loads((tiny / "tokenizer.json").read_text())["model"]
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(
        f"{pair if isinstance(pair, str) else ' '.join(pair)}\n" for pair in model["merges"]
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    size = len(model["vocab"])
    added = {
        f"{size + 1}": {"content": "<|x|>", "special": True},
        "1": {"content": "<|im_end|>", "special": True},
    }

    def settings(**config):
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    with pytest.raises(
        ValueError,
        match="tokenizer_config.json: the tokenizer_class is None.*; fix: copy tokenizer.json",
    ):
        load_tokenizer(folder)
    settings(tokenizer_class="BartTokenizer")
    with pytest.raises(ValueError, match="the tokenizer_class is BartTokenizer.*; fix: "):
        load_tokenizer(folder)
    settings(tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=added)
    with pytest.raises(ValueError, match=r"leave a gap before '<\|x\|>'; fix: copy tokenizer.json"):
        load_tokenizer(folder)
    added[f"{size}"] = {"content": "<|w|>", "special": True}
    settings(
        tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=added, eos_token="<|endoftext|>"
    )
    tok = load_tokenizer(folder)
    text = "the dog 🙂 e\u0301 <|x|> on12 a mat"
    ids, offsets = tok.encode(text)
    assert (tok.special["<|x|>"], tok.eos_id, tok.vocab_size) == (size + 1, 0, size + 2)
    assert reassemble(text, offsets) == text and tok.decode(ids) == text.replace(
        "e\u0301", "é"
    ).replace("<|x|>", "")
    tok.save(tmp_path / "b")  # the tokenizer.json that was made is saved too, and gives the same
    assert load_tokenizer(tmp_path / "b" / "tokenizer.json").encode(text) == (ids, offsets)


def test_a_file_is_that_vocabulary_and_no_other(tiny, piece_model, tmp_path):
    folder = write(tmp_path / "a", piece_model)
    (folder / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    assert load_tokenizer(folder).token_id("</s>") == load_tokenizer(tiny).token_id("</s>")
    tok = load_tokenizer(folder / "tokenizer.model")
    assert (
        tok.encode("a dog")[0]
        == load_tokenizer(write(tmp_path / "b", piece_model)).encode("a dog")[0]
    )
    tok.save(tmp_path / "c")
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_save_and_pickle_need_no_source_folder(tiny, piece_model, tmp_path):
    for name, source in (
        ("json", tiny),
        ("piece", write(tmp_path / "p", piece_model, legacy=True)),
    ):
        files = {file.name: file.read_bytes() for file in source.iterdir()}
        (source / "config.json").write_text('{"eos_token_id": 5}')  # the model's: read, not saved
        tok = load_tokenizer(source)
        (source / "config.json").unlink()
        again = pickle.loads(pickle.dumps(tok))
        tok.save(tmp_path / name / "deep")
        assert {
            file.name: file.read_bytes() for file in (tmp_path / name / "deep").iterdir()
        } == files
        for other in (again, load_tokenizer(tmp_path / name / "deep")):
            assert [other.encode(text) for text in TEXTS] == [tok.encode(text) for text in TEXTS]
        assert (again.eos_id, again.bos_id, again.vocab_size) == (
            tok.eos_id,
            tok.bos_id,
            tok.vocab_size,
        )


def test_load_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("damaged")
        with pytest.raises(ValueError, match=f"{name}: cannot be loaded: .+; fix: "):
            load_tokenizer(tmp_path / name)
    with pytest.raises(ValueError, match="neither tokenizer.json nor tokenizer.model; fix: "):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such folder or file; fix: "):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty/arcade100k.tiktoken").touch()
    with pytest.raises(
        ValueError,
        match="arcade100k.tiktoken needs its repository's code, .*; fix: copy tokenizer.json",
    ):
        load_tokenizer(tmp_path / "empty")


TOKENIZER_MISTAKES = [
    ("tokenizer_config.json", {"legacy": "yes"}, ":legacy"),
    ("tokenizer_config.json", {"add_bos_token": 1}, ":add_bos_token"),
    ("tokenizer_config.json", {"eos_token": {"content": 3}}, ":eos_token.content"),
    ("tokenizer_config.json", {"eos_token": {}}, ":eos_token.content"),
    ("special_tokens_map.json", {"bos_token": {"content": None}}, ":bos_token.content"),
    ("generation_config.json", {"eos_token_id": "2"}, ":eos_token_id"),
    ("generation_config.json", {"eos_token_id": [-1]}, ":eos_token_id.0"),
    ("config.json", {"eos_token_id": 2**40}, ":eos_token_id"),
    ("tokenizer_config.json", [], ""),
    ("generation_config.json", "[" * 50_000, ""),
]


@pytest.mark.parametrize("name, content, field", TOKENIZER_MISTAKES)
def test_a_wrong_field_of_a_tokenizer_is_named(name, content, field, tmp_path):
    byte_tokenizer().save(tmp_path)
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / name}{field}: ")


@pytest.mark.parametrize(
    "name, content, field",
    [
        ("added_tokens.json", {"<x>": "341"}, ":<x>"),
        ("added_tokens.json", {"<x>": 2**40}, ":<x>"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, ":added_tokens_decoder.x"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"350": 3}},
            ":added_tokens_decoder.350",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"350": {"content": "<x>", "rstrip": 3}}},
            ":added_tokens_decoder.350.rstrip",
        ),
    ],
)
def test_a_wrong_added_token_is_named(name, content, field, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_pieces())
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / name}{field}: ")


@pytest.mark.parametrize("template", [3, {"a": 1}, [3], [{"name": "default"}], [{"name": 1}]])
def test_a_chat_template_that_is_no_text(template, tmp_path):
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer_config.json:chat_template.*; fix: "):
        _ = tokenizer.chat_template
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="chat_template.jinja: not UTF-8"):
        _ = load_tokenizer(tmp_path).chat_template


def test_pairs_that_are_damaged_are_one_line(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": "x"}')
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(UserError, match="cannot be loaded: .*; fix: copy it again"):
        load_tokenizer(tmp_path)


def test_an_id_far_beyond_the_others_is_refused(tmp_path):
    """The library would list every id below it that is not used."""
    byte_tokenizer().save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["vocab"]["a"] = 2**30
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="model.vocab: an id of the vocabulary is 1073741824, more"):
        load_tokenizer(tmp_path)

    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(UserError, match="vocab.json:a: 1073741824 is not a whole number"):
        load_tokenizer(tmp_path)


def test_new_control_tokens_get_ids_behind_all_others(tmp_path):
    byte_tokenizer().save(tmp_path)
    before = load_tokenizer(tmp_path)
    after = with_controls(before, ["<one>", "<two>"])
    assert [after.token_id("<one>"), after.token_id("<two>")] == [
        before.vocab_size,
        before.vocab_size + 1,
    ]
    assert after.vocab_size == before.vocab_size + 2
    text = "a<two>\nb<one>"
    ids = [before.encode("a")[0], [before.vocab_size + 1], before.encode("\nb")[0]]
    assert after.encode(text)[0] == [*ids[0], *ids[1], *ids[2], before.vocab_size]
    assert before.encode(text)[0] == before.encode(text, special=False)[0]

    # What it has already stays, and a pickle and a folder keep what is new.
    assert with_controls(after, ["<two>", "<one>"]) is after
    after.save(tmp_path / "saved")
    for copy in (pickle.loads(pickle.dumps(after)), load_tokenizer(tmp_path / "saved")):
        assert copy.encode(text) == after.encode(text)


def test_the_list_of_added_tokens_is_kept_whole(tmp_path):
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {}}')
    tokenizer = with_controls(load_tokenizer(tmp_path), ["<one>"])
    listed = json.loads(tokenizer.files["tokenizer_config.json"])["added_tokens_decoder"]
    assert listed == {
        str(tokenizer.token_id("<one>")): {
            "content": "<one>",
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
    }


def test_a_closed_vocabulary_takes_no_control_tokens(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_pieces())
    with pytest.raises(UserError, match="no control token <one>.*fix: give a folder with"):
        with_controls(load_tokenizer(tmp_path), ["<one>"])
