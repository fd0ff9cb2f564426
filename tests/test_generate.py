"""generate.py as a user runs it, on a small untrained model that still must obey the rules."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from config import Model, UserError
from demo import world as demo_world
from generate import Chat, arguments, converse, load_chat
from inputs.tokenizer import load_tokenizer
from model import LLaVA
from tests.tools.environment import ROOT, run

TEXT = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 16,
    "image_size": 48,
}
OPTIONS = {"max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0, "num_beams": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("generate")
    demo_world.write(out / "world", scenes=60)
    LLaVA.from_parts(Model(llm_config=TEXT, vision_config=VISION), "plain").save(out)
    load_tokenizer(out / "world" / "tokenizer").save(out)
    Image.new("RGB", (60, 40), (200, 30, 30)).save(out / "red.png")
    Image.new("RGB", (60, 40), (30, 30, 200)).save(out / "blue.png")
    return out


def chat(folder) -> Chat:
    return Chat(LLaVA.from_pretrained(folder), load_tokenizer(folder), OPTIONS)


def test_one_shot_prints_the_answer_and_its_speed(folder):
    picture = folder / "red.png"
    said = run(
        "generate.py",
        "--model",
        folder,
        "--image",
        picture,
        "--prompt",
        "How many?",
        "--max-new-tokens",
        6,
    ).stdout
    talk = chat(folder)
    talk.show(str(picture))
    answer = talk.ask("How many?", show=lambda text: None)
    assert answer and answer in said and "tokens/s]" in said


def test_the_stream_is_the_answer_and_turns_are_kept(folder):
    talk, shown = chat(folder), []
    talk.show(str(folder / "red.png"))
    first = talk.ask("What?", show=shown.append)
    assert "".join(shown[:-1]).strip() == first and len(shown) > 4  # piece by piece
    talk.show(str(folder / "blue.png"))
    talk.ask("And <image> this?", show=shown.append)
    assert [t["value"].count("<image>") for t in talk.turns[::2]] == [1, 1] and len(talk.items) == 2
    assert talk.turns[1]["value"] == first


def test_an_answer_ends_in_front_of_a_stop(folder):
    whole, shown = chat(folder).ask("What?", show=lambda text: None), []
    stop = whole[3:5]
    talk = Chat(
        LLaVA.from_pretrained(folder),
        load_tokenizer(folder),
        OPTIONS,
        [whole[-2:], "never said", stop],
    )
    cut = talk.ask("What?", show=shown.append)
    assert (
        len(stop) == 2
        and cut == whole[: whole.index(stop)].strip()
        and stop not in "".join(shown[:-1])
    )
    assert "".join(shown[:-1]).strip() == cut
    beams = Chat(
        LLaVA.from_pretrained(folder),
        load_tokenizer(folder),
        OPTIONS | {"num_beams": 2},
        [whole[1:]],
    )
    assert beams.ask("What?", show=lambda text: None) != whole


def test_seeds_and_weights_are_options(folder):
    """Each of --weights; the same seed twice, and another, give equal and other answers."""

    def said(*options):
        command = ("generate.py", "--model", folder, "--prompt", "What?", "--max-new-tokens", 12)
        return run(*command, *options).stdout.partition("\n[")[0]

    drawn = [
        said("--temperature", 1.5, "--top-p", 0.95, "--top-k", 400, "--seed", seed)
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    by_weights = {kind: said("--weights", kind) for kind in ("fp32", "bf16", "int8", "nf4")}
    assert (
        by_weights["fp32"] == said()
        and all(by_weights.values())
        and by_weights["nf4"] != by_weights["fp32"]
    )
    wrong = run(
        "generate.py", "--model", folder, "--beams", 2, "--temperature", 1, ok=False
    ).stderr.strip()
    assert wrong == "error: --beams: beam search draws nothing; fix: leave out --temperature"


def test_the_picture_matters(folder):
    model = LLaVA.from_pretrained(folder)
    pixels = [
        model.vision_tower.preprocess(Image.open(folder / f)) for f in ("red.png", "blue.png")
    ]
    ids = torch.tensor([5, -200, 9])
    logits = [model(ids[None], p[None]).logits[0, -1] for p in pixels]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_the_chat_goes_on_after_a_mistake(folder):
    lines = "/image nowhere.png\n/help\nhello\n/reset\n/quit\nnever\n"
    done = subprocess.run(
        [sys.executable, "generate.py", "--model", folder, "--max-new-tokens", "4"],
        cwd=ROOT,
        input=lines,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "error: nowhere.png: no such file" in done.stdout and "commands: /image" in done.stdout
    assert done.stdout.count("tokens/s]") == 1


def test_a_wrong_model_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava_nothing"}')
    wrong = (
        run("generate.py", "--model", tmp_path, "--prompt", "x", ok=False)
        .stderr.strip()
        .splitlines()
    )
    assert len(wrong) == 1 and "'llava_nothing' is no layout known here; fix: " in wrong[0]


# ---------------------------------------------------------------------------- options and mistakes


@pytest.mark.parametrize(
    "option, values",
    [
        ("--temperature", ["-1", "nan", "inf", "x"]),
        ("--top-p", ["-0.1", "1.5", "nan"]),
        ("--top-k", ["-1", "0.5"]),
        ("--max-new-tokens", ["0", "-1", "9" * 5000]),
        ("--seed", ["-1", str(2**64)]),
        ("--beams", ["0", "-3"]),
    ],
)
def test_numbers_have_ranges(option, values):
    for value in values:
        with pytest.raises(SystemExit, match=f"error: command line: argument {option}: .+ is not"):
            arguments(["--model", "x", option, value])


def test_a_system_line_stands_before_the_conversation(folder):
    """It is what the template writes for a system turn, and stays there after /reset."""
    model, tokenizer = LLaVA.from_pretrained(folder), load_tokenizer(folder)
    plain = Chat(model, tokenizer, OPTIONS)
    told = Chat(model, tokenizer, OPTIONS, system="Say yes.")
    asked = []
    generate = model.generate
    model.generate = lambda prompts, *rest, **named: (
        asked.append(prompts[0]) or generate(prompts, *rest, **named)
    )
    plain.ask("What?", show=lambda text: None)
    told.ask("What?", show=lambda text: None)
    told.reset()
    told.ask("What?", show=lambda text: None)
    texts = [tokenizer.decode(ids.tolist()) for ids in asked]
    assert "Say yes." not in texts[0] and texts[1].startswith("Say yes.") and texts[2] == texts[1]


def test_after_a_question_that_cannot_be_asked_the_conversation_is_as_before(folder):
    talk = chat(folder)
    talk.show(str(folder / "red.png"))
    with pytest.raises(UserError, match="the question: not UTF-8"):
        talk.ask("\udcff", show=lambda text: None)
    assert talk.turns == [] and talk.waiting == 1
    talk.ask("What?", show=lambda text: None)
    assert talk.turns[0]["value"].count("<image>") == 1


def test_a_line_that_is_not_utf8_does_not_end_the_chat(folder, monkeypatch, capsys):
    lines = ["not UTF-8", "/help", "/quit"]

    def read(prompt):
        line = lines.pop(0)
        return line if line.startswith("/") else b"\xff".decode()

    monkeypatch.setattr("builtins.input", read)
    converse(chat(folder))
    printed = capsys.readouterr().out
    assert "error: the line: not UTF-8" in printed and "commands: /image" in printed and not lines


def test_nf4_on_a_cpu_says_that_it_is_slow(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for weights in ("nf4", "fp32"):
        load_chat(arguments(["--model", str(folder), "--weights", weights]))
        warned = "on a CPU it is many times slower than fp32" in capsys.readouterr().err
        assert warned == (weights == "nf4")
