"""templates.py: golden ids and labels, offsets, structure that data cannot forge, errors, the viewer.

python -m pytest tests/test_templates.py
"""

import io
import json
import pickle
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

import templates
from templates import IGNORE, IMAGE_TOKEN, TEMPLATES, encode, encode_prompt, load_tokenizer, render, stop_id

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
VOCABULARIES = SHARED / "assets/tokenizers"
LLAMA, PHI, QWEN = "meta-llama--Llama-2-7b-hf", "microsoft--phi-2", "Qwen--Qwen2-0.5B"

shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared with the golden data")
load = cache(load_tokenizer)  # the real ones take half a second each

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


def turns(*values):
    """human, gpt, human, ... in LLaVA's form."""
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(values)]


def reassemble(text, offsets):
    """The text again, from spans that share a character where one character is several tokens."""
    out, reach = "", 0
    for start, end in offsets:
        assert 0 <= start <= end <= len(text)
        out += text[max(start, reach) : end]
        reach = max(reach, end)
    return out


# ---------------------------------------------------------------- vocabularies made here


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Byte-level BPE, no bos, three control tokens, and a ByteLevel post-processor that would trim spaces."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.normalizer = tokenizers.normalizers.NFC()
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_end|>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["USER: what is this? ASSISTANT: a red dog on a mat"] * 9, trainer)
    model.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    model.enable_truncation(8)  # as some published files have these two; a loader that obeys would cut, or fill
    model.enable_padding(length=64)
    return write(tmp_path_factory.mktemp("tiny"), model, eos_token="<|endoftext|>", pad_token="<|im_end|>")


def train_pieces(**options):
    """The bytes of a sentencepiece vocabulary with byte fallback, as Llama's."""
    out = io.BytesIO()
    sentences = ["USER: what is this? ASSISTANT: a red dog on a mat", "the cat sat on a blue mat, it is near"] * 9
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


@pytest.fixture(scope="session")
def piece_model():
    return train_pieces()


@pytest.fixture(scope="session")
def llama_json():
    """A tokenizer.json as Llama-2's: a Prepend normalizer makes the word mark."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    model.train_from_iterator(["the dog sat on a mat, say </s>"] * 9, trainer)
    model.pre_tokenizer = None
    steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    model.normalizer = tokenizers.normalizers.Sequence(steps)
    return model


def write(folder, model, **config):
    """A tokenizer folder: `model` is a tokenizers.Tokenizer or the bytes of a tokenizer.model."""
    folder.mkdir(exist_ok=True)
    if isinstance(model, bytes):
        (folder / "tokenizer.model").write_bytes(model)
    else:
        model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------- golden data


GOLDEN = [
    ("phi", "phi", PHI),
    ("qwen2_base", "qwen2_base", QWEN),
    ("qwen2_instruct", "qwen2_instruct", QWEN),
    ("llama", "llama", LLAMA),
    ("llama", "llama", f"{LLAMA}/tokenizer.model"),
    ("pretrain-phi", "pretrain", PHI),
    ("pretrain-qwen2", "pretrain", QWEN),
    ("pretrain-llama", "pretrain", LLAMA),
    ("pretrain-llama", "pretrain", f"{LLAMA}/tokenizer.model"),
]


@shared
@pytest.mark.parametrize("file, template, vocabulary", GOLDEN)
def test_golden_rows(file, template, vocabulary):
    """Ids and labels of every row; and a prompt is what training has before the first supervised token."""
    tok = load(VOCABULARIES / vocabulary)
    rows = json.loads((SHARED / "golden/templates" / f"{file}.json").read_text())
    assert len(rows) >= 46
    for number, row in enumerate(rows):
        ids, labels = encode(row["conversations"], tok, template)
        assert ids == row["input_ids"], number
        assert labels == row["labels"], number
        start = row["conversations"][0]["from"] == "gpt"  # the stray first answer
        question = row["conversations"][: start + 1]
        first = next(k for k, label in enumerate(labels) if label != IGNORE)
        assert encode_prompt(question, tok, template) == ids[:first], number


@shared
@pytest.mark.parametrize(
    "name, vocabulary, special",
    [
        ("llama2_sentencepiece", f"{LLAMA}/tokenizer.model", False),
        ("llama2_fast", f"{LLAMA}/tokenizer.model", True),
        ("llama2_fast", f"{LLAMA}/tokenizer.json", True),
        ("phi-2", PHI, True),
        ("qwen2.5", QWEN, True),
        ("llava15_fast_with_bos", "llava-hf--llava-1.5-7b-hf", True),
    ],
)
def test_golden_ids(name, vocabulary, special):
    tok, golden = load(VOCABULARIES / vocabulary), json.loads((VOCABULARIES / "golden_ids.json").read_text())
    for text, expected in zip(golden["texts"], golden["ids"][name], strict=True):
        ids, offsets = tok.encode(text, special=special)
        assert (ids if "bos" not in name else [tok.bos_id, *ids]) == expected, text
        assert reassemble(text, offsets) == text or not ids


@shared
@pytest.mark.parametrize(
    "name, vocabulary", [("llama-spm", f"{LLAMA}/tokenizer.model"), ("phi-2", PHI), ("qwen2", QWEN)]
)
def test_llama_cpp_pairs(name, vocabulary):
    tok, stem = load(VOCABULARIES / vocabulary), VOCABULARIES / "llama.cpp-pairs" / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{stem}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [[int(i) for i in line.split()] for line in Path(f"{stem}.out").read_text().splitlines()]
    assert len(expected) >= 40
    assert [tok.encode(text)[0] for text in texts[: len(expected)]] == expected


@shared
def test_stories_folder_with_sentencepiece_only():
    tok = load_tokenizer(SHARED / "assets/weights/stories260K-hf")
    assert (tok.vocab_size, tok.bos_id, tok.eos_id, tok.pad_id) == (512, 1, 2, None)
    golden = json.loads((SHARED / "assets/weights/karpathy--tinyllamas-stories260K/golden_greedy.json").read_text())
    start = "Once upon a time, there was a little girl named Lily."
    assert tok.encode(start)[0] == golden["greedy_ids_from_bos"][: len(tok.encode(start)[0])]
    ids, labels = encode(turns("Who?", "Lily."), tok, "llama")
    assert ids[0] == 1 and ids[-1] == labels[-1] == 2 and labels[0] == IGNORE


@shared
def test_published_phi_prompt():
    """The prompt that a published TinyLLaVA-Phi-2 run was given."""
    golden = SHARED / "assets/weights/tinyllava--TinyLLaVA-Phi-2-SigLIP-3.1B-golden/golden_input_ids.txt"
    expected = [int(float(line)) for line in golden.read_text().split()]
    assert encode_prompt(turns("<image>\nWhat are these?"), load(VOCABULARIES / PHI), "phi") == expected


@shared
def test_real_specials_and_decode():
    assert load(VOCABULARIES / LLAMA).special == {"<unk>": 0, "<s>": 1, "</s>": 2}
    qwen = load(VOCABULARIES / QWEN)
    assert (qwen.bos_id, qwen.eos, qwen.pad_id) == (None, "<|im_end|>", 151643)
    ids, labels = encode(turns("<image>\nWho? 你好", "A naïve 🙂 dog."), qwen, "qwen2_base")
    text = qwen.decode([*ids, 151900])  # 151900: a row of the padded embedding, no token
    assert text.endswith("USER: \nWho? 你好 ASSISTANT: A naïve 🙂 dog.")
    assert qwen.decode([i for i in labels if i != IGNORE]) == " A naïve 🙂 dog."
    llama = load(VOCABULARIES / LLAMA / "tokenizer.model")
    assert llama.decode([1, -200, *llama.encode("A naïve 🙂 dog.")[0], 2]) == "A naïve 🙂 dog."


# ---------------------------------------------------------------- tokenizers


def test_attributes(tiny, piece_model, tmp_path):
    tok = load_tokenizer(tiny)
    assert (tok.bos_id, tok.eos_id, tok.eos, tok.pad_id) == (None, 0, "<|endoftext|>", 1)
    assert tok.vocab_size == 1 + max(tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json")).get_vocab().values())
    assert tok.token_id("</s>") == tok.special["</s>"] == 2 and tok.token_id("no such token") is None
    pieces = load_tokenizer(write(tmp_path / "a", piece_model))
    assert (pieces.bos_id, pieces.eos_id, pieces.eos) == (1, 2, "</s>")
    assert pieces.token_id("</s>") == 2 and pieces.token_id("no such token") is None
    assert load_tokenizer(write(tmp_path / "b", piece_model, add_bos_token=False)).bos_id is None
    assert load_tokenizer(write(tmp_path / "b", piece_model, add_bos_token=None)).bos_id == 1
    added = {"340": {"content": "<extra>"}}
    more = load_tokenizer(write(tmp_path / "c", piece_model, added_tokens_decoder=added, eos_token="<extra>"))
    assert (more.vocab_size, more.eos_id, more.eos) == (341, 340, "<extra>")
    assert more.encode("a<extra>")[0][-1] == 340 and more.decode([*more.encode("a mat")[0], 340, 335]) == "a mat"


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
    model.post_processor = tokenizers.processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 2)])
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
        for i, (start, end) in zip(ids, offsets, strict=True):  # what a control token spells stands where it says
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
    assert [legacy.encode(text)[0] for text in texts] == [llama_json.encode(text).ids for text in texts]

    newer = tokenizers.Tokenizer.from_str(llama_json.to_str())
    newer.normalizer = None
    newer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    expected = [newer.encode(text).ids for text in texts]
    assert expected != [llama_json.encode(text).ids for text in texts]
    for name, model in (("b", newer), ("c", llama_json)):
        assert [load_tokenizer(write(tmp_path / name, model)).encode(text)[0] for text in texts] == expected


def test_added_tokens(tiny, piece_model, tmp_path):
    """The longest control string wins; added tokens that are not special are text; added_tokens.json counts."""
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


def test_a_file_is_that_vocabulary_and_no_other(tiny, piece_model, tmp_path):
    folder = write(tmp_path / "a", piece_model)
    (folder / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    assert load_tokenizer(folder).token_id("</s>") == load_tokenizer(tiny).token_id("</s>")
    tok = load_tokenizer(folder / "tokenizer.model")
    assert tok.encode("a dog")[0] == load_tokenizer(write(tmp_path / "b", piece_model)).encode("a dog")[0]
    tok.save(tmp_path / "c")
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == ["tokenizer.model", "tokenizer_config.json"]


def test_save_and_pickle_need_no_source_folder(tiny, piece_model, tmp_path):
    for name, source in (("json", tiny), ("piece", write(tmp_path / "p", piece_model, legacy=True))):
        files = {file.name: file.read_bytes() for file in source.iterdir()}
        (source / "config.json").write_text('{"eos_token_id": 5}')  # the model's: read, not saved
        tok = load_tokenizer(source)
        (source / "config.json").unlink()
        again = pickle.loads(pickle.dumps(tok))
        tok.save(tmp_path / name / "deep")
        assert {file.name: file.read_bytes() for file in (tmp_path / name / "deep").iterdir()} == files
        for other in (again, load_tokenizer(tmp_path / name / "deep")):
            assert [other.encode(text) for text in TEXTS] == [tok.encode(text) for text in TEXTS]
        assert (again.eos_id, again.bos_id, again.vocab_size) == (tok.eos_id, tok.bos_id, tok.vocab_size)


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


# ---------------------------------------------------------------- templates

SYSTEM = TEMPLATES["phi"].system


def supervised(conversation, tok, template):
    """The characters of each run of supervised tokens, from the offsets of the tokens themselves."""
    form = templates.resolve(template, tok)
    text, spans = render(conversation, form)
    ids, labels, offsets = templates.tokenize(text, spans, tok, form.eos)
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))
    return re.findall(r"\[\[(.*?)\]\]", templates.show(text, labels, offsets, colour=False), re.DOTALL)


def test_render_is_the_published_format():
    text, spans = render(turns("<image>\nWhat?", "A dog.", "Red?", "No."), TEMPLATES["llama"])
    assert text == SYSTEM + "USER: <image>\nWhat? ASSISTANT: A dog.</s>USER: Red? ASSISTANT: No.</s>"
    assert [text[a:b] for a, b in spans] == [" A dog.</s>", " No.</s>"]
    text, spans = render(turns("<image>\nDescribe.", "A dog."), TEMPLATES["pretrain"])
    assert (text, [text[a:b] for a, b in spans]) == ("<image>A dog.\n", ["A dog.\n"])
    assert SYSTEM.startswith("A chat between") and SYSTEM.endswith("questions. ")
    ends = {name: form.eos for name, form in TEMPLATES.items()}
    assert ends == {
        "pretrain": "",
        "phi": "<|endoftext|>",
        "llama": "</s>",
        "gemma": "<eos>",
        "qwen2_base": "<|endoftext|>",
        "qwen2_instruct": "<|im_end|>",
        "plain": None,
    }


@pytest.mark.parametrize(
    "question, shown",
    [
        ("What? <image>", "<image>\nWhat?"),
        ("<image>", "<image>"),
        (" no image ", " no image "),
        ("<image>\n<image>\nWhich?", "<image>\n<image>\nWhich?"),
        ("Compare <image> with <image>. ", "Compare <image> with <image>."),
    ],
)
def test_images_in_a_turn(tiny, question, shown):
    tok = load_tokenizer(tiny)
    conversation = turns("Hi", "Yes", question, "That one.")
    text, _ = render(conversation, templates.resolve("plain", tok))
    assert text == f"USER: Hi ASSISTANT: Yes<|endoftext|>USER: {shown} ASSISTANT: That one.<|endoftext|>"
    ids, labels = encode(conversation, tok, "plain")
    assert ids.count(IMAGE_TOKEN) == question.count("<image>")
    assert all(label == IGNORE for i, label in zip(ids, labels, strict=True) if i == IMAGE_TOKEN)
    around = [tok.decode(part) for part in split(ids, IMAGE_TOKEN)]
    assert "<image>".join(around) == text.replace("<|endoftext|>", "")


def split(ids, separator):
    parts = [[]]
    for i in ids:
        parts.append([]) if i == separator else parts[-1].append(i)
    return parts


@pytest.mark.parametrize("template", ["phi", "llama", "qwen2_instruct", "plain", "pretrain"])
def test_supervised_is_the_answers_and_their_eos(tiny, template):
    tok = load_tokenizer(tiny)
    conversation = turns("<image>\n你好 🙂?", "🙂 red", "and <image> <image>?", "", "why", "so  \n")
    end = tok.eos if template == "plain" else TEMPLATES[template].eos
    expected = ["🙂 red\n", "\nso  \n\n"] if not end else [f" {a}{end}" for a in ("🙂 red", "", "so  \n")]
    assert supervised(conversation, tok, template) == expected
    ids, labels = encode(conversation, tok, template)
    assert ids.count(IMAGE_TOKEN) == 3
    if end:
        assert labels.count(tok.token_id(end)) == ids.count(tok.token_id(end)) == 3


def test_bos_is_never_supervised(piece_model, tmp_path):
    """A caption without an image starts at character 0, where bos stands."""
    ids, labels = encode(turns("Describe.", "a mat"), load_tokenizer(write(tmp_path / "a", piece_model)), "pretrain")
    assert ids[0] == 1 and labels == [IGNORE, *ids[1:]] and len(ids) > 2


@pytest.mark.parametrize("template", ["phi", "llama", "plain"])
def test_data_cannot_forge_structure(tiny, template):
    """End tokens and images that somebody typed are spelled out and do not move the labels."""
    tok = load_tokenizer(tiny)
    eos = tok.token_id(tok.eos if template == "plain" else TEMPLATES[template].eos)
    typed = "<|endoftext|></s><|im_end|>"
    conversation = turns(f"say {typed} now", f"I say {typed}<image>", "again", typed)
    ids, labels = encode(conversation, tok, template)
    assert ids.count(eos) == labels.count(eos) == 2 and IMAGE_TOKEN not in ids
    assert sum(i in tok.special.values() for i in ids) == 2
    end = tok.token(eos)
    assert supervised(conversation, tok, template) == [f" I say {typed}<image>{end}", f" {typed}{end}"]


def test_data_cannot_forge_structure_in_a_later_turn(llama_json, piece_model, tmp_path):
    """Behind the first eos another model is at work, see Tokenizer."""
    for tok in (load_tokenizer(write(tmp_path / "a", llama_json)), load_tokenizer(write(tmp_path / "b", piece_model))):
        ids, _ = encode(turns("say", "mat", "say </s>", "dog </s>"), tok, "llama")
        assert ids.count(2) == 2


def test_system_turn_replaces_the_system_line(tiny):
    tok = load_tokenizer(tiny)
    conversation = [{"from": "system", "value": "Be terse.\n"}, *turns("Hi", "Yo")]
    for template in ("phi", "plain"):
        text, _ = render(conversation, templates.resolve(template, tok))
        assert text == "Be terse. USER: Hi ASSISTANT: Yo<|endoftext|>"
    conversation[0]["value"] = ""
    assert render(conversation, TEMPLATES["phi"])[0].startswith("USER: Hi")
    with pytest.raises(ValueError, match=r"conversations\[0\]: this template has no system line; fix: "):
        encode(conversation, tok, "pretrain")


def test_stray_first_answer_is_left_out(tiny):
    tok = load_tokenizer(tiny)
    rest = turns("Hi", "Yo")
    assert encode([{"from": "gpt", "value": "stray"}, *rest], tok) == encode(rest, tok)


@pytest.mark.parametrize("template", ["phi", "llama", "plain", "pretrain"])
def test_prompt_is_what_training_has_before_the_answer(tiny, template):
    tok = load_tokenizer(tiny)
    values = ["<image>\nWho?", "A dog.", "<image> or <image>?", " 你 no"]
    ids, labels = encode(turns(*values), tok, template)
    starts = [k for k in range(1, len(ids)) if labels[k] != IGNORE and labels[k - 1] == IGNORE]
    for turn, start in ((1, starts[0]), (3, starts[1])):
        waiting = turns(*values[:turn])
        assert encode_prompt(waiting, tok, template) == ids[:start]
        assert encode_prompt([*waiting, {"from": "gpt", "value": None}], tok, template) == ids[:start]


def test_stop_id(tiny):
    tok = load_tokenizer(tiny)
    assert [stop_id(tok, name) for name in ("phi", "qwen2_instruct", "llama")] == [0, 1, 2]
    assert stop_id(tok, "plain") == stop_id(tok, "pretrain") == tok.eos_id == 0


@pytest.mark.parametrize(
    "conversation, what",
    [
        ([], "conversations: empty"),
        ("Hi", "conversations: empty, or not a list"),
        ([["human", "Hi"]], r"conversations\[0\]: not \{"),
        ([{"from": "human"}], r"conversations\[0\]: not \{"),
        ([{"from": "human", "value": 3}], r"conversations\[0\]: its value is int, not text"),
        (turns("Hi", None), r"conversations\[1\]: its value is NoneType, not text"),
        (turns("Hi", "Yo", "Again"), r"conversations\[2\]: wrong last turn"),
        ([{"from": "gpt", "value": "Yo"}], r"conversations\[0\]: wrong last turn"),
        ([{"from": "user", "value": "Hi"}], r"conversations\[0\]: from 'user', 'human' was due"),
        ([*turns("Hi"), *turns("Hi", "Yo")], r"conversations\[1\]: from 'human', 'gpt' was due"),
        ([*turns("Hi", "Yo"), {"from": "system", "value": ""}], r"conversations\[2\]: from 'system', 'human'"),
        (turns("Hi", " ", "Hi", "\n"), "nothing is supervised"),
    ],
)
def test_bad_conversations(tiny, conversation, what):
    with pytest.raises(ValueError, match=f"{what}.*; fix: ") as error:
        encode(conversation, load_tokenizer(tiny), "phi")
    assert "\n" not in str(error.value)
    if "last turn" in what:
        assert str(error.value).endswith("; fix: end with a gpt turn")


@pytest.mark.parametrize(
    "conversation", [turns("Hi", "Yo"), [], [{"from": "gpt", "value": None}], turns("Hi", None, "Hi"), turns("Hi", 3)]
)
def test_bad_prompts(tiny, conversation):
    with pytest.raises(ValueError, match=r"conversations.*; fix: "):
        encode_prompt(conversation, load_tokenizer(tiny), "phi")


def test_bad_templates(tiny, piece_model, tmp_path):
    tok = load_tokenizer(tiny)
    with pytest.raises(ValueError, match="'qwen2_bas' is unknown, did you mean 'qwen2_base'.*; fix: use one of pretr"):
        encode(turns("Hi", "Yo"), tok, "qwen2_bas")
    with pytest.raises(ValueError, match="eos '<eos>' of 'gemma' is not one token.*fits it: pretrain, phi, llama, qw"):
        encode_prompt(turns("Hi"), tok, "gemma")
    pieces = load_tokenizer(write(tmp_path / "a", piece_model))
    with pytest.raises(ValueError, match="<|endoftext|>.*; fix: .*fits it: pretrain, llama, plain$"):
        stop_id(pieces, "phi")
    (tiny / "tokenizer_config.json").rename(tiny / "away")
    try:
        with pytest.raises(ValueError, match="eos None of 'plain' is not one token"):
            encode(turns("Hi", "Yo"), load_tokenizer(tiny), "plain")
    finally:
        (tiny / "away").rename(tiny / "tokenizer_config.json")


# ---------------------------------------------------------------- the command line


def run(*arguments):
    command = [sys.executable, str(ROOT / "templates.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)


@pytest.fixture
def rows(tmp_path):
    data = [{"conversations": turns("<image>\nWho?", f"Dog {k}\u2028 你.", "Sure?", "Yes.")} for k in range(7)]
    (tmp_path / "rows.json").write_text(json.dumps(data), encoding="utf-8")
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in data)
    (tmp_path / "rows.jsonl").write_text(lines + "\n", encoding="utf-8")
    return tmp_path / "rows.json"


def test_viewer(tiny, rows):
    """The three commands of the docstring."""
    done = run("--model", tiny, "--template", "phi", rows, "--row", 3)
    tok = load_tokenizer(tiny)
    ids, labels = encode(turns("<image>\nWho?", "Dog 3\u2028 你.", "Sure?", "Yes."), tok, "phi")
    count = f"{len(ids)} tokens, {len(labels) - labels.count(IGNORE)} supervised"
    shown = "USER: <image>\nWho? ASSISTANT:[[ Dog 3\u2028 你.<|endoftext|>]]"
    assert done.stdout == (
        f"--- row 3: {count}, 1 images\n{SYSTEM}{shown}USER: Sure? ASSISTANT:[[ Yes.<|endoftext|>]]\n"
        f"=== 1 rows: {count}\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert run("--model", tiny, "--template", "phi", rows).stdout.count("\n--- row") == 4  # five, the first on top
    done = run("--model", tiny, "--template", "pretrain", rows.with_suffix(".jsonl"), "--limit", 20)
    assert done.stdout.count("<image>[[Dog") == 7 and "=== 7 rows: " in done.stdout


def test_colours(tiny, rows, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["templates.py", "--model", str(tiny), str(rows)])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for value, colour in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", value)
        templates.main()
        out = capsys.readouterr().out
        assert ("ASSISTANT:\033[32m Yes." in out, "ASSISTANT:[[ Yes." in out) == (colour, not colour)
    assert templates.show("ab\033c", [IGNORE, 5, IGNORE], [(0, 1), (1, 2), (2, 4)], True) == "a\033[32mb\033[0m\\033c"


def test_command_line_errors(tiny, rows, tmp_path):
    (tmp_path / "bad.json").write_text('[{"conversations": [{"from": "bot", "value": "Hi"}]}, {}]')
    (tmp_path / "bad.jsonl").write_text('{"conversations": []}\n{"conversations"\n')
    (tmp_path / "none.json").write_text("[]")
    cases = [
        ((tmp_path / "bad.json",), r"bad.json:0: conversations\[0\]: from 'bot', 'human' was due; fix: "),
        ((tmp_path / "bad.json", "--row", 1), r"bad.json:1: no conversations in it; fix: "),
        ((tmp_path / "bad.jsonl",), r"bad.jsonl:1: cannot be read: .*; fix: "),
        ((tmp_path / "none.json",), r"none.json:0: not a list of rows, or empty; fix: "),
        ((tmp_path / "absent.json",), r"absent.json:0: cannot be read: .*; fix: "),
        ((rows, "--row", 7), r"rows.json:7: there are only 7 rows; fix: a --row from 0 to 6"),
        ((rows, "--template", "fi"), r"templates.py:--template: 'fi' is unknown, did you mean 'phi'\?; fix: "),
        ((rows, "--model", tmp_path / "absent"), r"absent:tokenizer: no such folder or file; fix: "),
        ((), r"command line: .*rows.*; fix: "),
    ]
    for arguments, what in cases:
        done = run("--model", tiny, *arguments)
        assert done.returncode == 1, arguments
        assert re.fullmatch(f"error: [^\n]*{what}[^\n]*\n", done.stderr), done.stderr
