"""Answers that are kept: for what they are used again, damage to their file, whose files stay."""

import json
import os
import re
import shutil

import pytest
from PIL import Image

import evaluate
from config import UserError
from evals import kept, origin
from evals.judge import read_replies
from tests.tools.benchmark_files import evaluated, pictures, png, pope, put, tiny_model
from tests.tools.environment import ROOT


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def examples(count=4):
    found = []
    for i in range(count):
        found.append({"id": f"q{i}", "prompt": f"ask {i}", "label": "x", "image": f"{i}.png"})
    return found


def reverse(asked):
    return [example["prompt"][::-1] for example in asked]


# ---------------------------------------------------------------------------- what they are made of

OPTIONS = {"max_new_tokens": 5}


def made(model, data, asked=None, options=OPTIONS):
    return origin.origin(model, asked or examples(), data, options)


@pytest.fixture
def data(tmp_path):
    pictures(tmp_path / "data", *(f"{i}.png" for i in range(4)))
    return tmp_path / "data"


def test_a_copy_with_other_dates_is_the_same(model, data, tmp_path):
    before = made(model, data)
    assert json.loads(json.dumps(before)) == before
    for folder in (model, data):
        shutil.copytree(folder, tmp_path / "copy" / folder.name)
        for file in (tmp_path / "copy" / folder.name).iterdir():
            os.utime(file, (1, 1))
    assert made(tmp_path / "copy" / model.name, tmp_path / "copy" / "data") == before


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"]
)
def test_another_model_is_another_one_also_with_an_older_date(name, model, data, tmp_path):
    before = made(model, data)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    content = bytearray((other / name).read_bytes())
    content[-2] ^= 1
    (other / name).write_bytes(content)
    os.utime(other / name, (1, 1))
    after = made(other, data)
    assert after != before
    assert origin.changed_file(before["model"], after["model"]) == name
    (other / "config.json").unlink()
    assert made(other, data) not in (before, after)


def test_files_that_are_not_the_model_do_not_count(model, data, tmp_path):
    before = made(model, data)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    put(other / "README.md", "new")
    put(other / "log.jsonl", "{}\n")
    put(other / "eval" / "pope.json", "{}")
    assert made(other, data) == before


def test_other_pictures_of_the_same_size_under_the_same_names(model, data, tmp_path):
    before = made(model, data)
    picture = data / "2.png"
    content = bytearray(picture.read_bytes())
    content[50] ^= 1
    picture.write_bytes(content)
    os.utime(picture, (1, 1))
    assert made(model, data)["shown"] != before["shown"]
    picture.unlink()
    assert made(model, data)["shown"] != before["shown"]


def test_pictures_in_the_questions_and_folders_of_frames(model, data):
    inside = [{"id": "a", "prompt": "", "image": "f:0", "pictures": [b"one"]}]
    other = [{"id": "a", "prompt": "", "image": "f:0", "pictures": [b"two"]}]
    assert made(model, data, inside) != made(model, data, other)

    pictures(data / "clip", "1.png", "2.png")
    clip = [{"id": "a", "prompt": "", "image": None, "video": "clip"}]
    before = made(model, data, clip)
    put(data / "clip" / "2.png", png(3))
    assert made(model, data, clip) != before


def test_a_bounded_part_of_many_pictures_is_read(data, monkeypatch):
    asked = examples(300)
    pictures(data, *(f"{i}.png" for i in range(300)))
    monkeypatch.setattr(origin, "MOST_READ", 50)
    read = []
    real = origin.identity
    monkeypatch.setattr(origin, "identity", lambda path: read.append(path) or real(path))
    origin.identity_of_shown(asked, data)
    assert len(read) == 50 and read[0].name == "0.png"
    monkeypatch.setattr(origin, "MOST_BYTES", 1)
    read.clear()
    origin.identity_of_shown(asked, data)
    assert len(read) == origin.LEAST_READ


def test_answers_of_another_model_are_kept_aside_each_time(tmp_path, model, capsys):
    """The whole command: the same again asks nothing, others ask all and lose nothing."""
    pope(tmp_path / "data", False)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2] + b"\x3c\x3c")
    os.utime(weights, (1, 1))
    out = tmp_path / "out"

    first = evaluated(model, "pope", tmp_path / "data", out)
    capsys.readouterr()
    assert evaluated(model, "pope", tmp_path / "data", out) == first
    scores = (out / "a.json").read_text()
    assert "answers, " not in capsys.readouterr().out

    evaluated(other, "pope", tmp_path / "data", out)
    printed = capsys.readouterr().out
    line = "a.jsonl: answers of another model (model.safetensors), kept as a.aside-1.jsonl"
    assert f"{line}; starting afresh" in printed and "6/6 answers" in printed
    assert [json.loads(line) for line in (out / "a.aside-1.jsonl").open()] == first
    assert (out / "a.aside-1.json").read_text() == scores

    for picture in (tmp_path / "data" / "val2014").iterdir():
        Image.new("RGB", (8, 6)).save(picture)
        os.utime(picture, (1, 1))
    evaluated(other, "pope", tmp_path / "data", out)
    printed = capsys.readouterr().out
    assert "answers of other pictures or videos, kept as a.aside-2.jsonl" in printed

    # Without its record nobody knows what the answers are of.
    (out / "a-origin.json").write_bytes(b"\0" * 50)
    evaluated(other, "pope", tmp_path / "data", out)
    printed = capsys.readouterr().out
    assert "answers of an unknown model, kept as a.aside-3.jsonl" in printed


# ------------------------------------------------------------------------------------ damaged files

ROW = b'{"id": "q0", "question": "ask 0", "answer": "0 ksa", "label": "x", "image": "0.png"}\n'
DAMAGE = {
    "zero bytes": ROW + b"\0" * 100,
    "a blank line": ROW + b"\n\n",
    "not UTF-8": ROW + b'{"id": "\xff\xfe"}\n',
    "an empty object": b"{}\n" + ROW,
    "half a last line": ROW + ROW[:30],
    "half a line in the middle": ROW[:30] + b"\n" + ROW,
    "deep": b"[" * 50_000 + b"\n" + ROW,
    "many digits": b'{"id": ' + b"9" * 5000 + b"}\n" + ROW,
    "other values": b'1\nnull\n"x"\n[1]\n[{"id": "q0"}]\n' + ROW,
    "an answer that is no text": ROW.replace(b'"0 ksa"', b"7") + ROW,
    "an id that is a list": ROW.replace(b'"q0"', b'["q0"]') + ROW,
    "half a pair of surrogates": ROW.replace(b"0 ksa", b"\\ud83d") + ROW,
    "a picture left out": ROW.replace(b', "image": "0.png"', b"") + ROW,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.rank1"])
def test_a_damaged_file_of_answers_does_not_stop_anything(damage, name, tmp_path, capsys):
    (tmp_path / name).write_bytes(DAMAGE[damage])
    asked = []

    def answer(part):
        asked.extend(example["id"] for example in part)
        return reverse(part)

    answers = kept.answer_examples(examples(), examples(), answer, tmp_path / "a.jsonl")
    assert answers == reverse(examples()) and asked == ["q1", "q2", "q3"]
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").open()]
    assert [row["id"] for row in rows] == ["q0", "q1", "q2", "q3"]

    # A row of another picture is no damage, and used for nothing.
    if damage != "a picture left out":
        aside = [path for path in tmp_path.iterdir() if "damaged-1" in path.name]
        assert [path.read_bytes() for path in aside] == [DAMAGE[damage]]
        printed = capsys.readouterr().out
        assert f"{name}: " in printed and "left out" in printed


def test_a_file_of_answers_that_is_none(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="a.jsonl: not a file"):
        kept.answer_examples(examples(), examples(), reverse, tmp_path / "a.jsonl")


def test_damaged_replies_of_a_judge_are_asked_again(tmp_path, capsys):
    file = tmp_path / "judge.jsonl"
    rows = [b'{"key": "a", "reply": "1"}', b"\0\0", b"\xff", b"{}", b"7", b"[" * 50_000]
    rows += [b'{"key": "b", "reply": 3}', b'{"key": ["c"], "reply": "x"}', b'{"key": "d", "re']
    file.write_bytes(b"\n".join(rows))
    assert read_replies(file) == {"a": "1"}
    assert "judge.jsonl: 8 damaged lines are not used" in capsys.readouterr().out
    assert read_replies(tmp_path / "absent.jsonl") == {}


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="cannot be written"):
        kept.answer_examples(examples(), examples(), reverse, tmp_path / "file" / "a.jsonl")

    def answer(part):
        raise ValueError("a mistake of ours")  # and none of the disk

    with pytest.raises(ValueError, match="^a mistake of ours$"):
        kept.answer_examples(examples(), examples(), answer, tmp_path / "a.jsonl")


# -------------------------------------------------------------------------------------- whose it is


def evaluate_into(tmp_path, model, *options):
    pope(tmp_path / "data", False)
    arguments = ["--model", model, "--task", "pope", "--data", tmp_path / "data", *options]
    evaluate.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a-judge.jsonl", "a.jsonl.rank3", "a-results/count.txt"]
)
def test_files_of_somebody_else_beside_out_stay(name, tmp_path, model):
    theirs = tmp_path / "there" / name
    put(theirs, "precious")
    with pytest.raises(UserError, match="no earlier start of this wrote it; fix: --out: name"):
        evaluate_into(tmp_path, model, "--out", tmp_path / "there" / "a.jsonl")
    assert theirs.read_text() == "precious"
    files = [path for path in (tmp_path / "there").rglob("*") if path.is_file()]
    assert files == [theirs]


def test_an_eval_folder_of_somebody_else_stays(tmp_path, model):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    put(other / "eval" / "pope.jsonl", "precious")
    with pytest.raises(UserError, match="holds pope.jsonl, which this program did not write"):
        evaluate_into(tmp_path, other)
    assert [path.name for path in (other / "eval").iterdir()] == ["pope.jsonl"]
    assert (other / "eval" / "pope.jsonl").read_text() == "precious"


@pytest.mark.parametrize(
    "out, why",
    [
        ("", "'.' is no file"),
        ("/", "'/' is no file"),
        ("scores.json", "is where the scores go"),
        ("{folder}", "is there, and no earlier start"),
        ("{folder}/file/a.jsonl", "cannot be written"),
        ("{folder}/" + "x" * 300, "cannot be written"),
    ],
)
def test_a_name_that_no_answers_can_have(out, why, tmp_path, model):
    put(tmp_path / "file", "precious")
    with pytest.raises(UserError, match=why):
        evaluate_into(tmp_path, model, "--out", out.format(folder=tmp_path))
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("option", ["--limit", "--batch"])
@pytest.mark.parametrize("value", ["0", "-1", "x", "1e3", "9" * 5000])
def test_numbers_have_ranges(option, value, tmp_path):
    with pytest.raises(SystemExit, match=f"error: command line: argument {option}: .+ whole num"):
        evaluate_into(tmp_path, tmp_path, option, value)


def test_what_is_written_is_known(tmp_path, model):
    """Each file that is written beside the answers is one that a first start looks for."""
    evaluated(model, "pope", _pope(tmp_path), tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert path.name == "a.jsonl" or path.name.removeprefix("a") in origin.WRITTEN


def test_what_the_tasks_write_is_known():
    """Their sources name the files as f"{stem}-server.json"."""
    found = set()
    for path in (ROOT / "evals").glob("*.py"):
        if path.name != "origin.py":
            found.update(re.findall(r"\{stem\}(-[\w.-]+)", path.read_text()))
    assert "-server.json" in found and "-captions.jsonl" in found
    assert found <= set(origin.WRITTEN)


def _pope(tmp_path):
    pope(tmp_path / "data", False)
    return tmp_path / "data"
