"""templates.py: golden ids and labels, structure that data cannot forge, chat templates, errors.

python -m pytest tests/inputs/test_templates.py
"""

import itertools
import json
import pickle
import re
import sys

import pytest
import tokenizers
from PIL import Image

import data
from inputs import templates, tokenizer
from inputs.preview import show_supervised
from inputs.templates import TEMPLATES, encode, encode_prompt, render, stop_id
from inputs.tokenizer import load_tokenizer
from packing import IGNORE, IMAGE_TOKEN
from tests.tools.environment import SHARED, run
from tests.tools.vocabularies import (
    LLAMA,
    PHI,
    QWEN,
    VOCABULARIES,
    gather,
    load,
    shared,
    turns,
    write,
)

# -------------------------------------------------------------------------------------- golden data


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
    """Ids and labels of every row; a prompt is what training has before the first label."""
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
def test_stories_folder_with_sentencepiece_only():
    tok = load_tokenizer(SHARED / "assets/weights/stories260K-hf")
    assert (tok.vocab_size, tok.bos_id, tok.eos_id, tok.pad_id) == (512, 1, 2, None)
    golden = json.loads(
        (SHARED / "assets/weights/karpathy--tinyllamas-stories260K/golden_greedy.json").read_text()
    )
    start = "Once upon a time, there was a little girl named Lily."
    assert tok.encode(start)[0] == golden["greedy_ids_from_bos"][: len(tok.encode(start)[0])]
    ids, labels = encode(turns("Who?", "Lily."), tok, "llama")
    assert ids[0] == 1 and ids[-1] == labels[-1] == 2 and labels[0] == IGNORE


@shared
def test_published_phi_prompt():
    """The prompt that a published TinyLLaVA-Phi-2 run was given."""
    golden = (
        SHARED / "assets/weights/tinyllava--TinyLLaVA-Phi-2-SigLIP-3.1B-golden/golden_input_ids.txt"
    )
    expected = [int(float(line)) for line in golden.read_text().split()]
    assert (
        encode_prompt(turns("<image>\nWhat are these?"), load(VOCABULARIES / PHI), "phi")
        == expected
    )


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


# ---------------------------------------------------------------------------------------- templates

SYSTEM = TEMPLATES["phi"].system


def supervised(conversation, tok, template):
    """Return the characters of each run of supervised tokens, by the tokens' own offsets."""
    form = templates.choose_template(template, tok)
    text, spans, marks = render(conversation, form)
    ids, labels, offsets = templates.tokenize(text, spans, marks, tok)
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))
    shown = show_supervised(text, labels, offsets, colour=False)
    return re.findall(r"\[\[(.*?)\]\]", shown, re.DOTALL)


def test_render_is_the_published_format():
    text, spans, _ = render(turns("<image>\nWhat?", "A dog.", "Red?", "No."), TEMPLATES["llama"])
    assert (
        text == SYSTEM + "USER: <image>\nWhat? ASSISTANT: A dog.</s>USER: Red? ASSISTANT: No.</s>"
    )
    assert [text[a:b] for a, b in spans] == [" A dog.</s>", " No.</s>"]
    text, spans, _ = render(turns("<image>\nDescribe.", "A dog."), TEMPLATES["pretrain"])
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
        "chat": "",
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
    text, _, _ = render(conversation, templates.choose_template("plain", tok))
    assert (
        text
        == f"USER: Hi ASSISTANT: Yes<|endoftext|>USER: {shown} ASSISTANT: That one.<|endoftext|>"
    )
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
    expected = (
        ["🙂 red\n", "\nso  \n\n"] if not end else [f" {a}{end}" for a in ("🙂 red", "", "so  \n")]
    )
    assert supervised(conversation, tok, template) == expected
    ids, labels = encode(conversation, tok, template)
    assert ids.count(IMAGE_TOKEN) == 3
    if end:
        assert labels.count(tok.token_id(end)) == ids.count(tok.token_id(end)) == 3


def test_bos_is_never_supervised(piece_model, tmp_path):
    """A caption without an image starts at character 0, where bos stands."""
    ids, labels = encode(
        turns("Describe.", "a mat"), load_tokenizer(write(tmp_path / "a", piece_model)), "pretrain"
    )
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
    assert supervised(conversation, tok, template) == [
        f" I say {typed}<image>{end}",
        f" {typed}{end}",
    ]


def test_data_cannot_forge_structure_in_a_later_turn(llama_json, piece_model, tmp_path):
    """Behind the first eos another model is at work, see Tokenizer."""
    for tok in (
        load_tokenizer(write(tmp_path / "a", llama_json)),
        load_tokenizer(write(tmp_path / "b", piece_model)),
    ):
        ids, _ = encode(turns("say", "mat", "say </s>", "dog </s>"), tok, "llama")
        assert ids.count(2) == 2


def test_system_turn_replaces_the_system_line(tiny):
    tok = load_tokenizer(tiny)
    conversation = [{"from": "system", "value": "Be terse.\n"}, *turns("Hi", "Yo")]
    for template in ("phi", "plain"):
        text, _, _ = render(conversation, templates.choose_template(template, tok))
        assert text == "Be terse. USER: Hi ASSISTANT: Yo<|endoftext|>"
    conversation[0]["value"] = ""
    assert render(conversation, TEMPLATES["phi"])[0].startswith("USER: Hi")
    with pytest.raises(
        ValueError, match=r"conversations\[0\]: this template has no system line; fix: "
    ):
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
        assert (
            encode_prompt([*waiting, {"from": "gpt", "value": None}], tok, template) == ids[:start]
        )


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
        ([{"from": "gpt", "value": "Yo"}], r"conversations\[0\]: an answer without a question"),
        ([{"from": "user", "value": "Hi"}], r"conversations\[0\]: from 'user', 'human' was due"),
        ([*turns("Hi"), *turns("Hi", "Yo")], r"conversations\[1\]: from 'human', 'gpt' was due"),
        (
            [*turns("Hi", "Yo"), {"from": "system", "value": ""}],
            r"conversations\[2\]: from 'system', 'human'",
        ),
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
    "conversation",
    [
        turns("Hi", "Yo"),
        [],
        [{"from": "gpt", "value": None}],
        turns("Hi", None, "Hi"),
        turns("Hi", 3),
    ],
)
def test_bad_prompts(tiny, conversation):
    with pytest.raises(ValueError, match=r"conversations.*; fix: "):
        encode_prompt(conversation, load_tokenizer(tiny), "phi")


def test_bad_templates(tiny, piece_model, tmp_path):
    tok = load_tokenizer(tiny)
    with pytest.raises(
        ValueError,
        match="'qwen2_bas' is unknown, did you mean 'qwen2_base'.*; fix: use one of pretr",
    ):
        encode(turns("Hi", "Yo"), tok, "qwen2_bas")
    with pytest.raises(
        ValueError,
        match="'gemma': its eos '<eos>' is not one token.*fits it: pretrain, phi, llama, qw",
    ):
        encode_prompt(turns("Hi"), tok, "gemma")
    pieces = load_tokenizer(write(tmp_path / "a", piece_model))
    with pytest.raises(
        ValueError, match="<|endoftext|>.*; fix: .*fits it: pretrain, llama, plain$"
    ):
        stop_id(pieces, "phi")
    (tiny / "tokenizer_config.json").rename(tiny / "away")
    try:
        with pytest.raises(ValueError, match="'plain': its eos None is not one token"):
            encode(turns("Hi", "Yo"), load_tokenizer(tiny), "plain")
    finally:
        (tiny / "away").rename(tiny / "tokenizer_config.json")


# --------------------------------------------------------------- chat: the tokenizer's own template

# Written here in the manner of ...; {% generation %} says what transformers takes for the answers.
CHAT = {
    "chatml": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are "
        "helpful.<|im_end|>\n{% endif %}"
        "{%- for m in messages %}\n{{- '<|im_start|>' + m.role + '\n' }}"
        "{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('No system\nrole') }}{% endif %}"
        "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' }}"
        "{% if role == 'model' %}{%- generation -%}"
        "{{ m['content'] | trim + '<end_of_turn>' }}{%endgeneration%}"
        "{% else %}{{ m['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}"
        "{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "zephyr": (  # <|User|> is no token of the vocabulary
        "{% for m in messages %}\n{{ '<|' + m['role'] | capitalize + '|>\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
        "{% endgeneration %}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{{ '\n' }}"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|Assistant|>' }}\n"
        "{% endif %}\n{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{% generation %}"
        "{{ ' ' + m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ raise_exception('Only user and assistant') }}{% endif %}{% endfor %}"
    ),
}
ENDS = dict(
    chatml="<|im_end|>",
    llama3="<|eot_id|>",
    gemma="<end_of_turn>",
    phi3="<|end|>",
    zephyr="</s>",
    mistral="</s>",
)
SPECIALS = (
    "<s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> "
    "<start_of_turn> <end_of_turn>"
)


@pytest.fixture(scope="session")
def chatty(tmp_path_factory):
    """chatty(template) -> a folder: byte-level BPE that merges line breaks, and prepends <s>."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(tokenizer.WORDS["Qwen2Tokenizer"]), "isolated"
    )
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, byte_level])
    model.decoder = tokenizers.decoders.ByteLevel()
    phi3 = [
        tokenizers.AddedToken(f"<|{name}|>", rstrip=True)
        for name in ("user", "assistant", "system", "end")
    ]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*SPECIALS.split(), *phi3, "<image>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(
        ["what is this?\n\n\na red dog [INST] system\n\n", "a\n\nb "] * 9, trainer
    )
    model.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 0)]
    )
    folders = (tmp_path_factory.mktemp("chatty") / str(k) for k in itertools.count())

    def make(template, **config):
        named = {"bos_token": "<s>", "eos_token": "</s>"} | config
        return load_tokenizer(write(next(folders), model, **named, chat_template=template))

    return make


def bare(template):
    return re.sub(r"\{%-? ?(end)?generation ?-?%\}", "", template)


def messages(conversation):
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in conversation]


@pytest.mark.parametrize("name", CHAT)
def test_chat_against_transformers(chatty, name, tmp_path):
    """Ids, and what is supervised, are transformers' own, with and without {% generation %}."""
    transformers = pytest.importorskip("transformers")
    tok = chatty(CHAT[name])
    tok.save(tmp_path)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>"
    )
    conversations = [
        turns("Hi", "Yo"),
        turns("what is this?", "a red dog 🙂", "你好?\n\nred", "naïve\n\na dog", "a", "b"),
    ]
    if name not in ("gemma", "mistral"):
        conversations.append(
            [{"from": "system", "value": "Be terse."}, *turns("Hi", "Yo", "a dog?", "No.")]
        )
    lead = [] if "bos_token" in CHAT[name] else [tok.bos_id]  # the template writes bos, or we do
    for conversation in conversations:
        expected = reference.apply_chat_template(
            messages(conversation),
            chat_template=CHAT[name],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, labels = encode(conversation, tok, "chat")
        assert ids == lead + expected["input_ids"]
        mask = [0] * len(lead) + expected["assistant_masks"]
        assert labels == [i if on else IGNORE for i, on in zip(ids, mask, strict=True)]
        assert encode(conversation, chatty(bare(CHAT[name])), "chat") == (ids, labels)
        prompt = encode_prompt(conversation[:-1], tok, "chat")
        assert prompt == ids[: len(prompt)] and labels[len(prompt)] != IGNORE
        asked = messages(conversation[:-1])
        reply = reference.apply_chat_template(
            asked, chat_template=CHAT[name], add_generation_prompt=True, return_dict=False
        )
        assert prompt == lead + reply
    assert ids.count(tok.bos_id) == 1
    assert tok.token(stop_id(tok, "chat")) == ENDS[name]


@pytest.mark.parametrize("name", CHAT)
def test_chat_supervises_answers_and_their_end(chatty, name):
    """With outer space, which some templates strip; empty answers; and what data cannot forge."""
    tok = chatty(bare(CHAT[name]))
    typed = SPECIALS + "<|end|><|user|><image>[INST]"
    conversation = turns(
        " \nHi\n",
        "\n\n Yo \n",
        f"say {typed}".replace("<image>", ""),
        f"{typed} ",
        "",
        "",
        "\n",
        "\n",
    )
    answers = [turn["value"] for turn in conversation[1::2]]
    answers = [answer.strip() for answer in answers] if "trim" in CHAT[name] else answers
    space = " " if name == "mistral" else ""  # its template puts one before each answer
    answers = [space + answer + ENDS[name] for answer in answers]
    ids, labels = encode(conversation, tok, "chat")
    if name == "phi3":  # whose tokens take in the space behind them
        answers = [answer.lstrip() + "\n" for answer in answers]
    assert supervised(conversation, tok, "chat") == answers
    end = tok.token_id(ENDS[name])
    assert labels.count(end) == 4
    starts = [k for k in range(1, len(ids)) if labels[k] != IGNORE and labels[k - 1] == IGNORE]
    assert len(starts) == 4
    for k, start in enumerate(
        starts
    ):  # also where a line break before the answer would merge with one in it
        assert encode_prompt(conversation[: 2 * k + 1], tok, "chat") == ids[:start]
    controls = [i for i in ids if i in tok.special.values()]
    plain = [
        i for i in encode(turns(*["Hi", "Yo"] * 4), tok, "chat")[0] if i in tok.special.values()
    ]
    assert controls == plain and IMAGE_TOKEN not in ids
    assert [i for i in labels if i in tok.special.values()] == [end] * 4


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", ["zephyr", "mistral"])
def test_chat_with_sentencepiece(piece_model, tmp_path, name, legacy):
    """As TinyLlama's and Mistral's. The cut before an answer marks no word in it."""
    tok = load_tokenizer(
        write(tmp_path / "a", piece_model, legacy=legacy, chat_template=bare(CHAT[name]))
    )
    conversation = turns("what <s>is</s>?", "a dog</s>", "the mat", "red")
    space = " " if name == "mistral" else ""  # its template puts one before each answer
    answers = [f"{space}a dog</s></s>", f"{space}red</s>"]
    assert supervised(conversation, tok, "chat") == answers
    ids, labels = encode(conversation, tok, "chat")
    assert ids.count(1) == 1 and ids[0] == 1
    assert ids.count(2) == {"zephyr": 4, "mistral": 2}[name] and labels.count(2) == 2
    words = ["".join(map(tok.token, run)) for run in split([i for i in labels if i != IGNORE], 2)]
    words = [re.sub("<0x(..)>", lambda byte: chr(int(byte[1], 16)), word) for word in words]
    assert words == [answer.removesuffix("</s>").replace(" ", "▁") for answer in answers] + [""]
    for k in (1, 3):
        prompt = encode_prompt(conversation[:k], tok, "chat")
        assert prompt == ids[: len(prompt)] and labels[len(prompt)] != IGNORE


def test_chat_images(chatty):
    tok = chatty(CHAT["chatml"])
    conversation = turns("What? <image>", "<image>", "a <image> b <image>", "c", "<image>", "d")
    text, spans, marks = render(conversation, templates.choose_template("chat", tok))
    assert [text[start:end] for start, end in spans] == [
        "<image><|im_end|>",
        "c<|im_end|>",
        "d<|im_end|>",
    ]
    assert (
        "user\n<image>\nWhat?<|im_end|>" in text and "user\na <image> b <image><|im_end|>" in text
    )
    ids, labels = encode(conversation, tok, "chat")
    assert (
        ids.count(IMAGE_TOKEN) == 4
        and tok.token_id("<image>") not in ids
        and IMAGE_TOKEN not in labels
    )
    assert sum(mark == IMAGE_TOKEN for _, _, mark in marks) == 4


LISTS = (  # as Idefics'
    "{% for m in messages %}{{ m.role | capitalize }}:{% for c in m.content %}"
    "{% if c.type == 'image' %}{{ ' <image>' }}{% else %}{{ ' ' + c.text }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:"
    "{% endif %}"
)


def test_chat_contents_as_lists(chatty):
    tok = chatty(LISTS)
    system = {"from": "system", "value": "Look."}
    conversation = [
        system,
        *turns("Which? <image>", "<image> 1", "a <image> b <image>.", "c", " no ", "d"),
    ]
    text, spans, _ = render(conversation, templates.choose_template("chat", tok))
    end = "<|im_end|>\n"
    assert text == (
        f"System: Look.{end}User: <image> Which?{end}Assistant: <image> 1{end}"
        f"User: a <image> b <image> .{end}Assistant: c{end}User:  no {end}Assistant: d{end}"
    )
    assert [text[start:end] for start, end in spans] == [
        " <image> 1<|im_end|>",
        " c<|im_end|>",
        " d<|im_end|>",
    ]
    ids, labels = encode(conversation, tok, "chat")
    assert ids.count(IMAGE_TOKEN) == 3 and tok.token_id("<image>") not in ids
    prompt = encode_prompt(conversation[:4], tok, "chat")
    assert prompt == ids[: len(prompt)] and labels[len(prompt)] != IGNORE


def test_chat_without_an_end(chatty):
    """As llava-hf's: the tokenizer's eos, right behind the last answer, ends the conversation."""
    template = (
        "{% for m in messages %}{{ m.role | upper + ': ' + m.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    tok = chatty(template)
    conversation = turns("Hi</s>", "Yo</s>", "a dog?", "No. ")
    text, spans, _ = render(conversation, templates.choose_template("chat", tok))
    assert text == "USER: Hi</s> ASSISTANT: Yo</s> USER: a dog? ASSISTANT: No. </s>"
    assert [text[start:end] for start, end in spans] == [" Yo</s>", " No. </s>"]
    ids, labels = encode(conversation, tok, "chat")
    assert ids.count(tok.eos_id) == labels.count(tok.eos_id) == 1 and ids[
        -1
    ] == tok.eos_id == stop_id(tok, "chat")
    prompt = encode_prompt(conversation[:3], tok, "chat")
    assert (
        prompt == ids[: len(prompt)] and labels[len(prompt)] != IGNORE and tok.eos_id not in prompt
    )


def test_chat_supervises_what_no_prompt_holds(chatty):
    """What a template adds between prompt and answer, the model has to write itself."""
    thinks = bare(CHAT["chatml"]).replace(
        "{{ m.content + '<|im_end|>' }}{% else %}",
        "{{ '<t>\n' + m.content + '<|im_end|>' }}{% else %}",
    )
    assert supervised(turns("Hi", "Yo"), chatty(thinks), "chat") == ["<t>\nYo<|im_end|>"]
    silent = bare(CHAT["chatml"]).replace("if add_generation_prompt", "if false")
    assert supervised(turns("Hi", "Yo"), chatty(silent), "chat") == [
        "<|im_start|>assistant\nYo<|im_end|>"
    ]


SYSTEM_TURN = [{"from": "system", "value": "a"}]
LOST = (
    "conversations: the chat template leaves a text or an image out, writes it twice or changes it"
)
WITHOUT_SYSTEM = "{% for m in messages if m.role != 'system' %}"
# These two do what no probe shows: in conversations of three answers.
LONG = "{{ '!' if messages | length > 5 }}" + bare(CHAT["chatml"])
THIRD_END = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}"
    "{{ '</s>' if loop.index0 < 5 else '<|im_end|>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template, conversation, what",
    [
        (
            CHAT["gemma"],
            SYSTEM_TURN + turns("Hi", "Yo"),
            "conversations: .* refuses them: No system role",
        ),
        (CHAT["chatml"].replace("m.content", "m.content | upper"), turns("Hi", "Yo"), LOST),
        (
            CHAT["chatml"].replace("m.content", "m.content.split('>')[-1]"),
            turns("Hi", "a > b"),
            LOST,
        ),
        (CHAT["chatml"].replace("m.content", "m.content + m.content"), turns("Hi", "Yo"), LOST),
        (
            CHAT["chatml"].replace("m.content", "('' if m.content[0] == ' ' else m.content)"),
            turns(" Hi", "Yo"),
            LOST,
        ),
        (LISTS.replace("{{ ' <image>' }}", ""), turns("<image>\nHi", "Yo"), LOST),
        (
            LISTS.replace("{% for m in messages %}", WITHOUT_SYSTEM),
            SYSTEM_TURN + turns("Hi", "Yo"),
            LOST,
        ),
        (
            LONG,
            turns("Hi", "Yo", "a", "b", "c", "d"),
            "conversations: .* before turn 1 differently in its",
        ),
        (
            "{% for m in messages %}{{ m.content }}### {% endfor %}",
            turns("Hi", "Yo"),
            "no control token .* but '### '",
        ),
        (
            "{% for m in messages %}{{ m.content }}!</s>{% endfor %}",
            turns("Hi", "Yo"),
            "no control .* but '!</s>'",
        ),
        (
            THIRD_END,
            turns("Hi", "Yo", "a", "b", "c", "d"),
            "conversations: .* does not end every answer with '</s>'",
        ),
        (
            "{% for m in messages %}",
            turns("Hi", "Yo"),
            "template: chat: the chat template is not Jinja: ",
        ),
        (
            "{{ messages[0].content.__class__.__mro__ }}",
            turns("Hi", "Yo"),
            "refuses them: .*unsafe",
        ),
        ("{{ messages.append(1) }}", turns("Hi", "Yo"), "refuses them: .*unsafe"),
        (
            [{"name": "tools", "template": "x"}],
            turns("Hi", "Yo"),
            "'chat': this tokenizer has no chat template",
        ),
        (
            None,
            turns("Hi", "Yo"),
            "'chat': this tokenizer has no chat template; fix: .*pretrain, .*, plain$",
        ),
    ],
)
def test_chat_errors(chatty, template, conversation, what):
    tok = chatty(template)
    with pytest.raises(ValueError, match=what) as error:
        encode(conversation, tok, "chat")
    assert "\n" not in str(error.value) and "; fix: " in str(error.value)


def test_chat_needs_an_end_token(tiny, tmp_path):
    template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    model = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    tok = load_tokenizer(write(tmp_path / "a", model, chat_template=template))
    with pytest.raises(ValueError, match="template: chat: no control token .*; fix: "):
        stop_id(tok, "chat")


def test_chat_needs_jinja(chatty, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        ValueError, match="template: chat: the package jinja2 is missing; fix: pip install jinja2"
    ):
        encode(turns("Hi", "Yo"), chatty(CHAT["chatml"]), "chat")


def test_chat_names(chatty):
    """What transformers lets a template use."""
    names = (
        "{{ strftime_now('%Y') | length }}{{ {'b': '<é>', 'a': 1} | tojson }}"
        "{{ [1] | tojson(indent=1) }}"
        "{{ pad_token }}{{ tools is none }}{{ documents is none }}{% for m in messages %}   \n"
        "    {% if m.role == 'x' %}{% continue %}\n    {% endif %}\n{{ m.content }}</s>{% endfor %}"
    )
    text = render(
        turns("Hi", "Yo"), templates.choose_template("chat", chatty(names, pad_token=None))
    )[0]
    assert text == '4{"b": "<é>", "a": 1}[\n 1\n]TrueTrue   \nHi</s>   \nYo</s>'


def test_chat_template_files(chatty, tmp_path):
    """chat_template.jinja, then tokenizer_config.json, then chat_template.json; all are saved."""
    tok = chatty(
        [{"name": "tools", "template": "x"}, {"name": "default", "template": CHAT["chatml"]}]
    )
    assert tok.chat_template == CHAT["chatml"]
    tok.save(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHAT["zephyr"]}))
    assert load_tokenizer(tmp_path).chat_template == CHAT["chatml"]
    (tmp_path / "tokenizer_config.json").unlink()
    tok = load_tokenizer(tmp_path)
    assert tok.chat_template == CHAT["zephyr"]
    (tmp_path / "chat_template.jinja").write_text(CHAT["mistral"], encoding="utf-8")
    tok = load_tokenizer(tmp_path)
    assert tok.chat_template == CHAT["mistral"] and tok.named["bos_token"] == "<s>"
    tok.save(tmp_path / "b")
    assert (tmp_path / "b/chat_template.json").is_file() and load_tokenizer(
        tmp_path / "b"
    ).chat_template == CHAT["mistral"]
    assert pickle.loads(pickle.dumps(tok)).chat_template == CHAT["mistral"]


GOLDEN_CHAT = {
    "Qwen2.5-Instruct": (f"{QWEN}/*.json", "Qwen--Qwen2.5-0.5B-Instruct/*"),
    "gemma": ("google--gemma-2b/*",),
    "llava-1.5-hf": ("llava-hf--llava-1.5-7b-hf/*",),
}


@shared
@pytest.mark.parametrize("name", GOLDEN_CHAT)
def test_golden_chat(name, tmp_path):
    """Rendered texts and refusals: of the template, and of `render` where it is a conversation."""
    folder = gather(tmp_path / "a", *GOLDEN_CHAT[name])
    if name == "gemma":  # its vocabulary is not here: another with its control tokens
        controls = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        model = tokenizers.Tokenizer(
            tokenizers.models.BPE({c: i for i, c in enumerate(controls)}, [])
        )
        model.add_special_tokens(controls)
        model.save(str(folder / "tokenizer.json"))
    tok = load_tokenizer(folder)
    form = templates.choose_template("chat", tok)
    cases = json.loads((VOCABULARIES / "golden_chat.json").read_text())["cases"][name]
    rows = 0
    for case in cases:
        said, prompt = case["messages"], case["add_generation_prompt"]
        wanted = [(0, len(said), prompt)]
        if isinstance(case["rendered"], dict):
            with pytest.raises(Exception, match=case["rendered"]["error"]):
                form.jinja.render(tok.named, [said], wanted)
        else:
            assert form.jinja.render(tok.named, [said], wanted) == [case["rendered"]]
        if prompt != (said[-1]["role"] == "user"):
            continue
        rows += 1
        row = []
        for message in said:
            parts = (
                message["content"]
                if isinstance(message["content"], list)
                else [{"text": message["content"]}]
            )
            value = "".join(part.get("text", "<image>\n") for part in parts)
            row.append(
                {
                    "from": {"user": "human", "assistant": "gpt"}.get(message["role"], "system"),
                    "value": value,
                }
            )
        if isinstance(case["rendered"], dict):
            with pytest.raises(
                ValueError, match=f"conversations: .*{case['rendered']['error']}; fix: "
            ):
                render(row, form, prompt)
        else:
            assert render(row, form, prompt)[0] == case["rendered"]
    assert rows == {"llava-1.5-hf": 2}.get(name, 4)
    end = {"Qwen2.5-Instruct": "<|im_end|>", "gemma": "<end_of_turn>", "llava-1.5-hf": "</s>"}[name]
    assert tok.token(stop_id(tok, "chat")) == end


@shared
def test_chat_of_llava_hf_is_llava():
    """The ids of LLaVA-1.5: the prompt's ":" then " A", and </s> right behind the last answer."""
    tok = load(VOCABULARIES / "llava-hf--llava-1.5-7b-hf")
    ids, labels = encode(turns("<image>\nWho?", "A cat.", "Colour?", "Red."), tok, "chat")
    before, after = (
        tok.encode(text)[0]
        for text in ("USER: ", "\nWho? ASSISTANT: A cat. USER: Colour? ASSISTANT: Red.")
    )
    assert ids == [1, *before, IMAGE_TOKEN, *after, 2]
    assert [tok.token(i) for i in labels if i != IGNORE] == ["▁A", "▁cat", ".", "▁Red", ".", "</s>"]


# ---------------------------------------------------------------------- the viewer: data.py inspect


def inspect(file, *options, **given):
    return run("data.py", "inspect", "--data", file, "--image-tokens", 1, *options, **given)


@pytest.fixture
def rows(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    data = [
        {
            "id": f"{k}",
            "image": "a.png",
            "conversations": turns("<image>\nWho?", f"Dog {k}\u2028 你.", "Sure?", "Yes."),
        }
        for k in range(7)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(data), encoding="utf-8")
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in data)
    (tmp_path / "rows.jsonl").write_text(lines + "\n", encoding="utf-8")
    return tmp_path / "rows.json"


def test_viewer(tiny, rows):
    """One row by its number, the first rows, and all of them."""
    done = inspect(rows, "--tokenizer", tiny, "--template", "phi", "--row", 3)
    tok = load_tokenizer(tiny)
    ids, labels = encode(turns("<image>\nWho?", "Dog 3\u2028 你.", "Sure?", "Yes."), tok, "phi")
    count = f"{len(ids)} tokens, {len(labels) - labels.count(IGNORE)} supervised"
    (head,) = [line for line in done.stdout.split("\n") if line.startswith("--- ")]
    assert f"{rows}:row 3 (id 3): {count}, views: 1" in head
    shown = "USER: <image>\nWho? ASSISTANT:[[ Dog 3\u2028 你.<|endoftext|>]]"
    shown = f"{SYSTEM}{shown}USER: Sure? ASSISTANT:[[ Yes.<|endoftext|>]]"
    assert done.stdout.endswith(f"{head}\n{shown}\n=== 1 rows: {count}\n") and done.stderr == ""

    done = inspect(rows, "--tokenizer", tiny, "--template", "phi")
    assert done.stdout.count("\n--- ") == 3
    file = rows.with_suffix(".jsonl")
    done = inspect(file, "--tokenizer", tiny, "--template", "pretrain", "--rows", 20)
    assert done.stdout.count("<image>[[Dog") == 7 and "=== 7 rows: " in done.stdout


def test_viewer_of_a_chat(chatty, rows, tmp_path):
    chatty(CHAT["chatml"]).save(tmp_path / "a")
    file = rows.with_suffix(".jsonl")
    done = inspect(file, "--tokenizer", tmp_path / "a", "--template", "chat", "--rows", 20)
    question = "\n<|im_start|>user\n<image>\nWho?<|im_end|>\n"
    answer = "<|im_start|>assistant\n[[Dog 6\u2028 你.<|im_end|>]]\n"
    assert question + answer in done.stdout and done.stderr == ""
    assert "=== 7 rows: " in done.stdout


def test_colours(tiny, rows, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for value, colour in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", value)
        data.main(["inspect", "--data", str(rows), "--tokenizer", str(tiny)])
        out = capsys.readouterr().out
        assert ("ASSISTANT:\033[32m Yes." in out) == colour
        assert ("ASSISTANT:[[ Yes." in out) == (not colour)


def test_command_line_errors(tiny, rows, tmp_path):
    (tmp_path / "bad.json").write_text('[{"conversations": [{"from": "bot", "value": "Hi"}]}, {}]')
    (tmp_path / "bad.jsonl").write_text('{"conversations": []}\n{"conversations"\n')
    (tmp_path / "none.json").write_text("[]")
    cases = [
        (
            ("bad.json", "--row", 0),
            r"bad.json:row 0.*: conversations\[0\]: from 'bot', 'human' was due; fix: ",
        ),
        (("bad.json", "--row", 1), r"bad.json:row 1.*: conversations: empty, or not a list; fix: "),
        (("bad.jsonl", "--row", 1), r"bad.jsonl:line 2: not JSON .*; fix: "),
        (("none.json",), r"none.json:.*; fix: "),
        (("absent.json",), r"absent.json: .*; fix: "),
        (("rows.json", "--row", 7), r"rows.json:.*7.*; fix: .* 0 to 6"),
        (("rows.json", "--template", "fi"), r"'fi' is unknown, did you mean 'phi'\?; fix: "),
        (("rows.json", "--tokenizer", tmp_path / "absent"), r"absent'?: no such folder.*; fix: "),
    ]
    for (file, *options), what in cases:
        command = ["inspect", "--data", tmp_path / file, "--tokenizer", tiny, *options]
        with pytest.raises(ValueError) as error:
            data.main([str(word) for word in command])
        assert re.fullmatch(f"[^\n]*{what}[^\n]*", str(error.value)), str(error.value)

    # On the command line each is one line, and the exit code is not 0.
    done = inspect(tmp_path / "bad.jsonl", "--tokenizer", tiny, "--row", 1, ok=False)
    assert re.fullmatch(f"error: [^\n]*{cases[2][1]}[^\n]*\n", done.stderr), done.stderr
    done = run("data.py", "inspect", ok=False)
    assert re.fullmatch(r"error: command line: [^\n]*rows[^\n]*; fix: [^\n]*\n", done.stderr)
