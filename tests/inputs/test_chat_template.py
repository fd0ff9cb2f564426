"""chat_template.py: templates that rewrite earlier turns, as Qwen3's, and so make several samples.

python -m pytest tests/inputs/test_chat_template.py
"""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image

import data
from config import Stage, Train, UserError
from data import Steps, token_counts
from evals.own_rows import read_questions
from inputs import templates
from inputs.holdout import open_stage
from inputs.rows import open_rows
from inputs.sample import make_samples
from inputs.templates import encode, encode_prompt, encode_samples
from inputs.tokenizer import WORDS, load_tokenizer
from packing import IGNORE, IMAGE_TOKEN
from tests.tools.sample_rows import flat, mean_colour_spec, turns
from tests.tools.vocabularies import VOCABULARIES, shared, write
from training.estimate import mean_row

# In the manner of Qwen3's: the answers before the last question lose their reasoning, and those
# behind it get an empty one if they have none.
REASONING = (
    "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.asked = loop.index %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role != 'assistant' %}{{ m.content }}{% else %}"
    "{% set parts = m.content.split('</think>') %}{% set said = parts[-1].lstrip('\n') %}"
    "{% set thought = '' %}{% if parts | length > 1 %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') %}{% endif %}"
    "{% if loop.index > ns.asked %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LATE_SYSTEM = (  # as some of Mistral's: the system text stands in the last question
    "{% for m in messages if m.role != 'system' %}"
    "{% set last = m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{{ messages[0].content if messages[0].role == 'system' and last }}"
    "{{ m.content }}{{ '</s>' if m.role == 'assistant' }}{% endfor %}"
)
TWO_ENDS = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}"
    "{{ '</s>' if loop.last else '<|im_end|>' }}{% endif %}{% endfor %}"
)
KEEPS_LAST = CHATML.replace(  # as QwQ's: the last answer stays as it is
    "m.content",
    "(m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1])",
)
OPENS = REASONING.replace(  # as Qwen3.5's: the prompt begins the reasoning
    "assistant\n' }}", "assistant\n<think>\n' }}"
)
IMAGES_FIRST = (  # in the manner of LLaVA-OneVision's: the space behind "assistant" comes late
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}"
    "{% for part in m.content if part.type == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ '\n' + part.text }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")  # as DeepSeek-R1's

THOUGHT = "<think>\nIt barks.\n</think>\n\nA dog."
SYSTEM = [{"from": "system", "value": "Be terse."}]
CONVERSATIONS = {
    "one turn": turns("Who?", THOUGHT),
    "one turn without reasoning": turns("Who?", "A dog."),
    "three turns": turns("Who?", THOUGHT, "Red?", "<think>Fur.</think>No. ", "Why?", "\nIt is\n"),
    "three turns without reasoning": turns("Who?", "A dog.", "Red?", " No.", "Why?", "It is"),
    "system": SYSTEM + turns("Who?", THOUGHT, "Red?", "No."),
    "no opening": turns("Who?", "It barks.\n</think>\n\nA dog.", "Red?", "</think>No."),
    "empty": turns("Who?", "<think>\n\n</think>\n\nA dog.", "Red?", "<think></think>\nNo."),
    "unfinished": turns("Who?", "<think>\nIt", "Red?", "A <think> no"),
    "an empty answer": turns(
        "Who?", "A", "Red?", "<think>x</think>", "Why?", "", "", "<think></think>"
    ),
    "images": turns("<image>\nWho?", THOUGHT, "<image>\n<image>\nRed?", THOUGHT, "Why?", "<image>"),
}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """chatty(template) -> a tokenizer's folder with that template; <think> is plain, as Qwen3's."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS["Qwen2Tokenizer"]), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, byte_level])
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["</s>", "<|im_start|>", "<|im_end|>", "<image>", "<end_of_turn>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["It barks.\n\nA dog. assistant\n\n\nuser\n"] * 9, trainer)
    model.add_tokens(
        [tokenizers.AddedToken(f"<{name}>", special=False) for name in ("think", "/think")]
    )
    parent = tmp_path_factory.mktemp("chatty")

    def make(template):
        folder = parent / str(len(list(parent.iterdir())))
        return write(folder, model, eos_token="</s>", chat_template=template)

    return make


@pytest.fixture(scope="module")
def qwen(chatty):
    return load_tokenizer(chatty(REASONING))


def messages(conversation):
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in conversation]


def messages_of_parts(conversation):
    """Return the messages with lists as contents. An image is no line of its own there."""
    said = messages(conversation)
    for message in said:
        value = message["content"]
        parts = []
        if message["role"] == "user" and "<image>" in value:
            parts = [{"type": "image"}] * value.count("<image>")
            value = value.replace("<image>", "").strip()
        if value or not parts:
            parts.append({"type": "text", "text": value})
        message["content"] = parts
    return said


def transformers_tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tok.chat_template = config["chat_template"]
    return tok


def transformers_samples(folder, conversation):
    """Return (ids, labels) of each answer as transformers writes it behind the prompt for it."""
    tok = transformers_tokenizer(folder)
    image = tok.convert_tokens_to_ids("<image>")
    said = messages(conversation)
    samples = []
    for i, message in enumerate(said):
        if message["role"] != "assistant":
            continue
        prompt = tok.apply_chat_template(said[:i], add_generation_prompt=True, return_dict=False)

        # A prompt cannot end with half a token, so what is behind it begins with a new one.
        asked = tok.apply_chat_template(said[:i], add_generation_prompt=True, tokenize=False)
        whole = tok.apply_chat_template(said[: i + 1], tokenize=False)
        assert whole.startswith(asked)
        ids = prompt + tok(whole.removeprefix(asked), add_special_tokens=False)["input_ids"]
        end = len(ids) - ids[::-1].index(tok.convert_tokens_to_ids("<|im_end|>"))
        labels = [IGNORE] * len(prompt) + ids[len(prompt) : end] + [IGNORE] * (len(ids) - end)
        samples.append(([IMAGE_TOKEN if j == image else j for j in ids], labels))
    return samples


@pytest.mark.parametrize(
    "template", [REASONING, KEEPS_LAST, OPENS], ids=["qwen3", "qwq", "qwen3.5"]
)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_each_answer_is_what_transformers_writes_behind_its_prompt(chatty, template, name):
    folder = chatty(template)
    tok = load_tokenizer(folder)
    assert templates.choose_template("chat", tok).rewrites
    conversation = CONVERSATIONS[name]
    samples = encode_samples(conversation, tok, "chat")
    answers = [i for i, turn in enumerate(conversation) if turn["from"] == "gpt"]
    assert len(samples) == len(answers)

    # An <image> that a model says is a text, which transformers' tokenizer does not know.
    expected = transformers_samples(folder, conversation)
    if name == "images":
        assert [ids.count(IMAGE_TOKEN) for ids, _ in samples] == [1, 3, 3]
        samples, expected = samples[:2], expected[:2]
    assert samples == expected

    # The prompt is what generate.py and the server feed.
    for i, (ids, labels) in zip(answers, samples, strict=False):
        prompt = encode_prompt(conversation[:i], tok, "chat")
        assert ids[: len(prompt)] == prompt
        assert set(labels[: len(prompt)]) == {IGNORE} and labels[len(prompt)] != IGNORE
    assert encode(conversation[: i + 1], tok, "chat") == (ids, labels)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_an_answer_stands_behind_its_prompt_whatever_its_space_becomes(chatty, name):
    """The history says "assistant \\n" and the prompt "assistant\\n"."""
    folder = chatty(IMAGES_FIRST)
    tok = load_tokenizer(folder)
    reference = transformers_tokenizer(folder)
    image = reference.convert_tokens_to_ids("<image>")
    conversation = CONVERSATIONS[name]
    if name == "images":
        conversation = conversation[:4]  # the last answer says <image>
    said = messages_of_parts(conversation)
    answers = [i for i, message in enumerate(said) if message["role"] == "assistant"]
    samples = encode_samples(conversation, tok, "chat")
    for i, (ids, labels) in zip(answers, samples, strict=True):
        text = reference.apply_chat_template(said[:i], add_generation_prompt=True, tokenize=False)
        assert text.endswith("<|im_start|>assistant\n")
        assert text.count("<|im_start|>assistant \n") == answers.index(i)
        prompt = reference(text, add_special_tokens=False)["input_ids"]
        answer = conversation[i]["value"] + "<|im_end|>"
        learned = reference(answer, add_special_tokens=False)["input_ids"]
        prompt = [IMAGE_TOKEN if j == image else j for j in prompt]
        assert ids == prompt + learned and labels == [IGNORE] * len(prompt) + learned
        assert encode_prompt(conversation[:i], tok, "chat") == prompt


@pytest.mark.parametrize(
    "history, prompt, learned",
    [
        (" \n", "\n", ""),
        ("\n", " \n\n", ""),
        ("\n", "", "\n"),  # the model has to write it
        ("", "\n", ""),
        (" \n", ":\n", None),
        (" \n:", "\n:", None),
    ],
)
def test_a_prompt_may_differ_in_its_last_space_only(chatty, history, prompt, learned):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        f"{{{{ '<|im_start|>{history}' + m.content + '<|im_end|>' }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '<|im_start|>{prompt}' }}}}{{% endif %}}"
    ).replace("\n", "\\n")
    tok = load_tokenizer(chatty(template))
    if learned is None:
        with pytest.raises(UserError, match="before turn 1 differently in its prompt"):
            templates.choose_template("chat", tok)
        return

    form = templates.choose_template("chat", tok)
    assert form.rewrites == (learned == "")
    conversation = turns("a", " b ", "", "<|im_end|>", "c", "")
    made = templates.render_samples(conversation, form)
    asked = f"<|im_start|>{prompt}"
    if learned:
        [rendered] = made
        shown = [rendered.text[start:end] for start, end in rendered.answers]
        assert shown == ["\n b <|im_end|>", "\n<|im_end|><|im_end|>", "\n<|im_end|>"]
        return
    told = ["a", f"<|im_start|>{history} b <|im_end|>"]
    told.append(f"<|im_start|>{history}<|im_end|><|im_end|>c")
    for k, (rendered, answer) in enumerate(zip(made, [" b ", "<|im_end|>", ""], strict=True)):
        text, [(start, end)], marks = rendered
        assert text == "".join(told[: k + 1]) + asked + f"{answer}<|im_end|>"
        assert text[start:end] == f"{answer}<|im_end|>"
        ends = [text[mark.start : mark.end] for mark in marks]
        assert ends == ["<|im_start|>", "<|im_end|>"] * (k + 1)
        assert marks[-1].end == end == len(text)


PUBLISHED = {  # and what of CONVERSATIONS a template refuses
    "OpenGVLab--InternVL2-1B": [],
    "Qwen--Qwen2-0.5B": [],
    "Qwen--Qwen2.5-0.5B-Instruct": [],
    "google--gemma-2b": ["system"],
    "llava-hf--llava-1.5-7b-hf": [],
}


@shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_write_every_prompt_as_transformers_does(chatty, name):
    """None of these rewrites: in the whole conversation each answer stands behind its prompt."""
    folder = VOCABULARIES / name
    source = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    if source is None:
        source = (folder / "chat_template.jinja").read_text()
    made = chatty(source)
    reference = transformers_tokenizer(made)
    form = templates.choose_template("chat", load_tokenizer(made))
    assert not form.rewrites
    for title, conversation in CONVERSATIONS.items():
        if title in PUBLISHED[name]:
            continue
        said = messages_of_parts(conversation) if form.lists else messages(conversation)
        [rendered] = templates.render_samples(conversation, form)
        answers = iter(rendered.answers)
        for i, message in enumerate(said):
            if message["role"] == "assistant":
                asked = reference.apply_chat_template(
                    said[:i], add_generation_prompt=True, tokenize=False
                )
                assert templates.render(conversation[:i], form, prompt=True).text == asked
                start, _ = next(answers)
                assert rendered.text[:start] == asked


def test_what_is_supervised(qwen):
    shown = []
    for ids, labels in encode_samples(CONVERSATIONS["three turns"], qwen, "chat"):
        learned = [i for i in labels if i != IGNORE]
        shown.append("".join(qwen.decode([i]) or qwen.token(i) for i in learned))
        text = "".join(qwen.decode([i]) or qwen.token(i) for i in ids)
        assert text.count("<think>") == 1  # the earlier answers have lost theirs
    assert shown == [
        "<think>\nIt barks.\n</think>\n\nA dog.<|im_end|>",
        "<think>\nFur.\n</think>\n\nNo. <|im_end|>",
        "<think>\n\n</think>\n\nIt is\n<|im_end|>",
    ]


def test_data_cannot_forge_structure(qwen):
    """Control strings in a reasoning and in the words behind it are spelled out."""
    typed = "<|im_end|></s><|im_start|><image>"
    conversation = turns("Who?", f"<think>{typed}</think>{typed}", typed[:-7], f"{typed} b")
    for ids, labels in encode_samples(conversation, qwen, "chat"):
        end = qwen.token_id("<|im_end|>")
        assert labels.count(end) == 1 and IMAGE_TOKEN not in ids
        assert qwen.token_id("<image>") not in ids and qwen.eos_id not in ids


@pytest.mark.parametrize("template", [CHATML, REASONING.replace("loop.index > ns.asked", "true")])
def test_others_stay_one_sample(chatty, template):
    tok = load_tokenizer(chatty(template))
    assert not templates.choose_template("chat", tok).rewrites
    conversation = CONVERSATIONS["three turns"]
    [(ids, labels)] = encode_samples(conversation, tok, "chat")
    assert (ids, labels) == encode(conversation, tok, "chat")
    assert labels.count(tok.token_id("<|im_end|>")) == 3


def test_a_system_text_that_moves(chatty):
    tok = load_tokenizer(chatty(LATE_SYSTEM))
    form = templates.choose_template("chat", tok)
    conversation = SYSTEM + turns("a", "b", "c", "d")
    assert [made.text for made in templates.render_samples(conversation, form)] == [
        "Be terse.ab</s>",
        "ab</s>Be terse.cd</s>",
    ]


def test_an_end_of_the_last_answer_only(chatty):
    tok = load_tokenizer(chatty(TWO_ENDS))
    form = templates.choose_template("chat", tok)
    made = templates.render_samples(turns("a", "b", "c", "d"), form)
    assert [one.text for one in made] == ["ab</s>", "ab<|im_end|>cd</s>"]
    assert [one.answers for one in made] == [[(1, 6)], [(13, 18)]]


def test_a_last_answer_loses_nothing(chatty):
    """A template that leaves the reasoning out of every answer cannot teach it."""
    tok = load_tokenizer(chatty(FORGETS))
    assert encode(turns("Who?", "A dog."), tok, "chat")
    with pytest.raises(UserError, match="leaves a text or an image out"):
        encode_samples(turns("Who?", THOUGHT), tok, "chat")

    # Qwen3's leaves out what stands before the reasoning.
    tok = load_tokenizer(chatty(REASONING))
    with pytest.raises(UserError, match="leaves a text or an image out"):
        encode_samples(turns("Who?", f"Well. {THOUGHT}"), tok, "chat")


@pytest.mark.parametrize(
    "conversation, what",
    [
        (turns("a", "b", "c"), r"conversations\[2\]: wrong last turn"),
        (turns("a", " ", "c", ""), "every answer is empty"),
    ],
)
def test_a_conversation_is_checked_as_a_whole(qwen, conversation, what):
    with pytest.raises(UserError, match=what):
        encode_samples(conversation, qwen, "chat")


# ------------------------------------------------------------------------------------- from rows


@pytest.fixture
def folder(tmp_path):
    """Return a folder with 24 rows of one to three answers: 48 samples."""
    for i, name in enumerate(("a.png", "b.png", "c.png")):
        Image.new("RGB", (8, 8), (10 * i, 20, 30)).save(tmp_path / name)
    rows = []
    for i in range(24):
        said = [f"{i} <image>" if i % 2 else f"{i}?", THOUGHT]
        said += ["Red?", "No." + "." * i, "<image> Why?" if i % 2 else "Why?", THOUGHT]
        row = {"id": i, "conversations": turns(*said[: 2 + 2 * (i % 3)])}
        images = sum(turn["value"].count("<image>") for turn in row["conversations"])
        if images:
            row["image"] = ["a.png", "b.png"][:images]
        rows.append(row)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.fixture
def spec(qwen):
    return dataclasses.replace(mean_colour_spec(), tokenizer=qwen, template="chat")


def test_samples_of_a_row(folder, spec):
    """Each has the pictures that were shown until then, and its own labels."""
    rows = open_rows(folder / "rows.json")
    for i in range(24):
        samples = make_samples(rows, i, spec)
        assert len(samples) == 1 + i % 3 and {sample.row for sample in samples} == {i}
        expected = encode_samples(rows[i]["conversations"], spec.tokenizer, "chat")
        for sample, (ids, labels) in zip(samples, expected, strict=True):
            assert len(sample.items) == ids.count(IMAGE_TOKEN)
            assert int((sample.ids == IMAGE_TOKEN).sum()) == 5 * ids.count(IMAGE_TOKEN)
            assert sample.ids[sample.ids != IMAGE_TOKEN].tolist() == [j for j in ids if j >= 0]
            words = [label for j, label in zip(ids, labels, strict=True) if j != IMAGE_TOKEN]
            assert sample.labels[sample.ids != IMAGE_TOKEN].tolist() == words
    assert [len(sample.items) for sample in make_samples(rows, 5, spec)] == [1, 1, 2]


def test_max_tokens_is_that_of_a_sample(folder, spec):
    rows = open_rows(folder / "rows.json")
    whole = make_samples(rows, 2, spec)
    lengths = [len(sample.ids) for sample in whole]
    assert max(lengths) < sum(lengths)
    same = make_samples(rows, 2, dataclasses.replace(spec, max_tokens=max(lengths)))
    assert [len(sample.ids) for sample in same] == lengths

    # The second answer loses its end, the third one begins beyond the limit.
    start = int((whole[1].labels != IGNORE).nonzero()[0])
    short = dataclasses.replace(spec, max_tokens=start + 1)
    first, second = make_samples(rows, 2, short)
    assert torch.equal(first.ids, whole[0].ids) and first.cut == first.lost == 0
    assert second.cut == lengths[1] - start - 1 and second.lost == lengths[2]
    with pytest.raises(UserError, match="nothing supervised in the first 3 of its"):
        make_samples(rows, 2, dataclasses.replace(spec, max_tokens=3))


def tokens_of(steps):
    """Return the samples of steps, sorted: row, ids, labels and the first pixel of each view."""
    found = []
    for step in steps:
        for batch in step.batches:
            views = 0
            ends = batch.cu_seqlens.tolist()
            for row, begin, end in zip(batch.rows, ends[:-1], ends[1:], strict=True):
                ids = batch.input_ids[begin:end]
                count = int((ids == IMAGE_TOKEN).sum()) // 5
                pixels = []
                if count:
                    pixels = batch.images[views : views + count, 0, 0, 0].tolist()
                views += count
                found.append((row, ids.tolist(), batch.labels[begin:end].tolist(), pixels))
    return sorted(found)


@pytest.mark.parametrize("budget", [0, 100, 10**6])
def test_a_step_has_all_answers_of_its_rows_on_any_ranks(folder, spec, budget):
    rows = open_rows(folder / "rows.json")
    stage = Stage(global_batch=8, epochs=1, micro_batch_tokens=budget)
    one = Steps(rows, spec, stage, Train())
    assert len(one) == 3
    counts = token_counts(rows, spec)
    seen = []
    for i in range(3):
        step = one[i]
        seen += step.readings
        expected = tokens_of([step])
        made = [make_samples(rows, reading.row, spec) for reading in step.readings]
        assert len(expected) == sum(len(samples) for samples in made)
        for length, batch in [(len(batch.input_ids), batch) for batch in step.batches]:
            assert length <= budget or len(batch.rows) == 1
        for known in (None, counts):
            ranks = [Steps(rows, spec, stage, Train(), r, 2, counts=known)[i] for r in (0, 1)]
            assert tokens_of(ranks) == expected
            rows_of_ranks = [{reading.row for reading in step.readings} for step in ranks]
            assert not rows_of_ranks[0] & rows_of_ranks[1]
    assert sorted(reading.row for reading in seen) == list(range(24))
    assert sum(len(reading.samples) for reading in seen) == 48


def test_workers_and_the_place_of_resuming_change_nothing(folder, spec):
    rows = open_rows(folder / "rows.json")
    steps = Steps(rows, spec, Stage(global_batch=8, steps=5), Train())
    whole = flat(step for step, _ in data.loader(steps))
    assert flat(step for step, _ in data.loader(steps, start=2)) == whole[2:]
    assert flat(step for step, _ in data.loader(steps, start=1, workers=2)) == whole[1:]


def test_counts_are_of_all_samples_of_a_row(folder, spec, monkeypatch):
    rows = open_rows(folder / "rows.json")
    counts = token_counts(rows, spec)
    for i in range(24):
        samples = make_samples(rows, i, spec)
        assert counts[i].tolist() == [
            sum(len(sample.ids) for sample in samples),
            sum(len(sample.items) for sample in samples),
            sum(int((sample.labels != IGNORE).sum()) for sample in samples),
        ]

    # Those that were kept when such rows were refused have another name.
    [kept] = folder.glob("rows.json.*.counts")
    kept.unlink()
    monkeypatch.setattr(templates.ChatTemplate, "rewrites", False, raising=False)
    form = templates.choose_template("chat", spec.tokenizer)
    monkeypatch.setattr(form, "rewrites", False)
    token_counts(rows, spec)
    [other] = folder.glob("rows.json.*.counts")
    assert other.name != kept.name


def test_held_out_rows_stay_whole(folder, spec):
    """All answers of a row are on one side."""
    stage = Stage(data=str(folder / "rows.json"), validation=6.0)
    opened = open_stage(stage, "stage.x")
    sides = []
    for rows in (opened.training, opened.held_out):
        steps = Steps(rows, spec, Stage(global_batch=8), Train(), validation=True)
        samples = tokens_of(steps[i] for i in range(len(steps)))
        assert {row for row, *_ in samples} == set(range(len(rows)))
        sides.append([tuple(ids) for _, ids, *_ in samples])
    assert len(sides[0]) + len(sides[1]) == 48 and not set(sides[0]) & set(sides[1])


def test_questions_of_ones_own_rows(folder, spec):
    """Each is asked with the prompt that its sample has."""
    rows = open_rows(folder / "rows.json")
    asked = {}
    for example in read_questions(rows, spec):
        prompt = encode_prompt(example["conversation"], spec.tokenizer, "chat")
        asked.setdefault(example["row"], []).append(prompt)
    for i in range(24):
        expected = encode_samples(rows[i]["conversations"], spec.tokenizer, "chat")
        for prompt, (ids, labels) in zip(asked[i], expected, strict=True):
            assert ids[: len(prompt)] == prompt and labels[len(prompt)] != IGNORE


def test_the_plan_counts_samples(folder, spec):
    rows = open_rows(folder / "rows.json")
    row = mean_row(rows, "chat", spec.views, spec)
    counts = np.array(token_counts(rows, spec)).sum(0)
    assert row.is_exact and row.samples == 2
    assert row.tokens == pytest.approx(counts[0] / 48)
    assert row.supervised == pytest.approx(counts[2] / 48)


# --------------------------------------------------------------------------------- what is said


def lines_of(capsys, *argv):
    data.main([str(word) for word in argv])
    return capsys.readouterr().out.splitlines()


def test_check_says_how_many_samples_the_rows_became(folder, chatty, spec, capsys):
    options = ["--data", folder / "rows.json", "--template", "chat", "--image-tokens", 5]
    lines = lines_of(capsys, "check", *options, "--tokenizer", chatty(REASONING))
    why = "the chat template rewrites earlier turns"
    assert f"  24 rows became 48 samples, one for each answer: {why}" in lines
    kinds = "12 text-only, 8 with one image or video, 4 with several"
    assert f"{folder / 'rows.json'}: 24 rows, 0 bad; the good ones: {kinds}" in lines
    counts = np.array(token_counts(open_rows(folder / "rows.json"), spec)).sum(0)
    share = 100 * counts[2] / counts[0]
    assert f"  supervised: {share:.1f} % of {counts[0]} tokens" in lines

    lines = lines_of(capsys, "check", *options, "--tokenizer", chatty(CHATML))
    assert not any("became" in line for line in lines)


def test_check_counts_what_an_over_long_row_loses(folder, chatty, spec, capsys):
    rows = open_rows(folder / "rows.json")
    samples = [make_samples(rows, i, spec) for i in range(24)]

    # All pictures fit, and the last answers of some rows begin beyond the limit.
    limit = 0
    for sample in sum(samples, []):
        at = (sample.ids == IMAGE_TOKEN).nonzero()
        if len(at):
            limit = max(limit, int(at[-1]) + 1)
    lost = []
    beyond = 0
    for of_row in samples:
        lost.append(0)
        for sample in of_row:
            if int((sample.labels != IGNORE).nonzero()[0]) >= limit:
                lost[-1] += len(sample.ids)
                beyond += 1
            else:
                lost[-1] += max(0, len(sample.ids) - limit)
    assert 0 < beyond < np.count_nonzero(lost) < 24
    options = ["--data", rows.file, "--template", "chat", "--image-tokens", 5]
    options += ["--tokenizer", chatty(REASONING), "--max-tokens", limit]
    lines = lines_of(capsys, "check", *options)
    over_long = np.count_nonzero(lost)
    assert f"  over-long: {over_long} rows lose {sum(lost)} tokens of their tails" in lines
    assert sum("note: over-long, loses" in line for line in lines) == over_long


def test_inspect_shows_each_answer_as_its_sample(folder, chatty, spec, capsys):
    options = ["--data", folder / "rows.json", "--template", "chat", "--image-tokens", 5]
    lines = lines_of(capsys, "inspect", *options, "--tokenizer", chatty(REASONING), "--row", 5)
    heads = [line for line in lines if line.startswith("--- ")]
    samples = make_samples(open_rows(folder / "rows.json"), 5, spec)
    for k, (head, sample) in enumerate(zip(heads, samples, strict=True)):
        supervised = int((sample.labels != IGNORE).sum())
        expected = f"row 5 (id 5), answer {k + 1} of 3: {len(sample.ids)} tokens, {supervised} sup"
        assert expected in head
    text = "\n".join(lines)
    assert text.count("[[<think>\n") == 3 and text.count("A dog.<|im_end|>") == 2 + 2

    # The third answer begins beyond the limit.
    samples = make_samples(open_rows(folder / "rows.json"), 8, spec)
    limit = int((samples[2].labels != IGNORE).nonzero()[0])
    options += ["--tokenizer", chatty(REASONING), "--row", 8, "--max-tokens", limit]
    heads = [line for line in lines_of(capsys, "inspect", *options) if line.startswith("--- ")]
    lost = f"{len(samples[2].ids)} tokens of later answers are beyond max_tokens"
    assert len(heads) == 2 and heads[1].endswith(lost)
