"""Every benchmark from its files to its scores, in both layouts, on a small random model."""

import csv
import dataclasses
import io
import json
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import evaluate
from config import UserError
from evals import published, row_files
from evals.published import nearest
from inputs.image_modes import MODES
from inputs.pictures import load_image
from inputs.templates import encode_prompt
from inputs.tokenizer import load_tokenizer
from model import LLaVA
from packing import ItemShape
from tests.tools.benchmark_files import (
    CASES,
    FILES,
    evaluated,
    fake_pyarrow,
    files,
    mme,
    mmmu,
    parquet,
    png,
    pope,
    put,
    tiny_model,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def parquet_can_be_read(monkeypatch):
    fake_pyarrow(monkeypatch)


@pytest.mark.parametrize("task, llava", CASES)
def test_examples_are_what_the_official_evaluation_asks(task, llava, tmp_path):
    expected = FILES[task][0](tmp_path, llava)
    examples = evaluate.TASKS[task].examples(tmp_path)
    assert [(e["id"], e["prompt"], e["label"]) for e in examples] == expected
    evaluate.check_examples(examples, tmp_path)
    for e in examples:
        assert Path(e["where"].rsplit(":", 1)[0]).is_file()
        for picture in evaluate.load_shown(e, tmp_path, lambda source, _: load_image(source)):
            assert picture.size == (8, 6)


@pytest.mark.parametrize("task", evaluate.TASKS)
def test_a_task_has_what_the_protocol_says(task):
    offered = vars(evaluate.TASKS[task])
    assert offered["MAX_NEW_TOKENS"] > 0 and callable(offered["examples"])
    assert ("score" in offered) != ("judge" in offered)


GROUPS = {
    "gqa": ("type", ["binary", "open"]),
    "scienceqa": ("names", [["all", "IMG", "natural science", "grades 1-6", "biology"],
                            ["all", "text", "natural science", "grades 1-6", "biology"]]),
    "mme": ("group", ["count/0001"] * 2 + ["landmark/x"] * 2),
    "mmmu": ("subject", ["Art", "Math", "Math"]),
    "mmvet": ("capability", [["math", "ocr"], ["ocr"]]),
    "mmbench": ("group", [0, 1, 0]),
    "seedbench": ("kind", ["Scene Understanding"] * 2),
    "chartqa": ("groups", [["all", "human"]] * 2 + [["all", "augmented"]]),
    "docvqa": ("groups", [["all", "handwritten", "form"]] * 3),
    "infovqa": ("groups", [["all", "multi-span"]] * 3),
    "ocrbench": ("groups", [["all", "Text Recognition", "Regular Text Recognition"],
                            ["all", "Handwritten Mathematical Expression Recognition"],
                            ["all", "Doc-oriented VQA"]]),
    "mmstar": ("groups", [["all", "fine-grained perception", "recognition"],
                          ["all", "math", "geometry"],
                          ["all", "logical reasoning", "common reasoning"]]),
}  # fmt: skip


@pytest.mark.parametrize("task, llava", [case for case in CASES if case.values[0] in GROUPS])
def test_examples_know_what_they_count_in(task, llava, tmp_path):
    FILES[task][0](tmp_path, llava)
    key, expected = GROUPS[task]
    assert [e[key] for e in evaluate.TASKS[task].examples(tmp_path)] == expected


def test_mme_takes_an_answer_of_one_line(tmp_path):
    mme(tmp_path, False)
    examples = evaluate.TASKS["mme"].examples(tmp_path)[:1]
    (file,) = evaluate.TASKS["mme"].write(examples, ["No,\nnot\tone"], tmp_path / "mme", tmp_path)
    expected = "0001.jpg\tIs it a cat? Please answer yes or no.\tYes\tNo, not one\n"
    assert file.name == "count.txt" and file.read_text() == expected


@pytest.mark.parametrize("task, llava", CASES)
def test_a_run_from_files_to_scores_killed_and_resumed(
    task, llava, tmp_path, model, monkeypatch, capsys
):
    expected = FILES[task][0](tmp_path, llava)
    rows = evaluated(model, task, tmp_path, tmp_path / "whole")
    assert [row["id"] for row in rows] == [e[0] for e in expected] and all(
        "answer" in row for row in rows
    )
    printed, whole = capsys.readouterr().out, (tmp_path / "whole/a.jsonl").read_bytes()

    answers, calls = LLaVA.generate, []

    def killed(self, prompts, **options):
        calls.append(len(prompts))
        if len(calls) == 2 or len(expected) <= 2:
            raise KeyboardInterrupt
        return answers(self, prompts, **options)

    monkeypatch.setattr(LLaVA, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, task, tmp_path, tmp_path / "killed")
    monkeypatch.setattr(LLaVA, "generate", answers)
    half = (tmp_path / "killed/a.jsonl").read_text()
    assert half.count("\n") == (2 if len(expected) > 2 else 0)
    evaluated(model, task, tmp_path, tmp_path / "killed")
    assert (tmp_path / "killed/a.jsonl").read_bytes() == whole

    if task in ("vqav2", "mmvet", "llava_bench", "docvqa-test", "infovqa-test"):
        assert "no score: that takes" in printed and not (tmp_path / "whole/a.json").exists()
    elif task in row_files.TABLE:
        scores = json.loads((tmp_path / "whole/a.json").read_text())["scores"]
        assert next(iter(scores)) == "all" and scores["all"]["n"] == len(expected)
        assert all(0 <= s["score"] <= 100 and 0 <= s["chance"] <= 100 for s in scores.values())
    else:
        scores = json.loads((tmp_path / "whole/a.json").read_text())["scores"]
        name, _ = evaluate.TASKS[task].PUBLISHED
        assert name in scores and "published" in scores[name] and "published: " in printed
        assert all(s["n"] > 0 and 0 <= s["score"] <= 400 for s in scores.values())
        assert (
            f"{scores[name]['score']:.2f}" in printed
            and f"{scores[name]['published']:.2f}" in printed
        )
    text_of = lambda name: (tmp_path / "whole" / name).read_text()  # noqa: E731
    said = {row["id"]: row["answer"] for row in rows}
    if task == "vqav2":
        made = json.loads(text_of("a-server.json"))
        assert [row["question_id"] for row in made] == (
            [777, 42001, 42000, 5000] if llava else [42000, 42001, 5000, 777]
        )
        assert next(row["answer"] for row in made if row["question_id"] == 777) == ""
    if task == "gqa":
        assert json.loads(text_of("a-testdev_balanced_predictions.json"))[0] == {
            "questionId": "201",
            "prediction": said["201"].rstrip(".").lower(),
        }
    if task == "mme":
        first = text_of("a-results/count.txt").splitlines()[0].split("\t")
        assert first == [
            "0001.jpg",
            "Is it a cat? Please answer yes or no.",
            "Yes",
            " ".join(said["count/0001/0"].split()),
        ]
    if task.startswith(("docvqa", "infovqa")):
        made = [{"questionId": int(row["id"]), "answer": row["answer"]} for row in rows]
        assert json.loads(text_of("a-server.json")) == made
    if task == "mmvet":
        assert json.loads(text_of("a-results.json")) == said
    if task == "llava_bench":
        made = json.loads(text_of("a-answers.jsonl").splitlines()[1])
        assert (made["question_id"], made["prompt"], made["text"]) == (1, "Describe it.", said["1"])
    if task == "seedbench":
        assert json.loads(text_of("a-predictions.jsonl").splitlines()[0]) == {
            "question_id": "101",
            "prediction": said["101"],
        }
    if task == "mmbench":
        made = list(csv.reader(io.StringIO(text_of("a-server.tsv")), delimiter="\t"))
        assert made[0] == "index question A B C D prediction answer split".split()
        assert (
            made[1] == ["0", "Which?", "red", "blue", "", "", said["0"], "A", "dev"]
            and made[2][1] == 'Say "it"'
        )
        assert (tmp_path / "whole/a-server.xlsx").exists() == bool(find_spec("openpyxl"))


def break_row(file):
    """Damages the second row of a file (the only one where there is one), and says which it was."""
    if file.suffix in (".jsonl", ".txt") or "coco_pope" in file.name:
        lines = file.read_text().splitlines()
        lines[1] = lines[1][: len(lines[1]) - 4]
        file.write_text("\n".join(lines) + "\n")
        return 1
    if file.suffix == ".tsv":
        file.write_text(file.read_text().replace("\n1\t", "\nx\t"))
        return 1
    if file.suffix == ".parquet":
        parquet(file, [{"id": "validation_Math_1"}])
        return 0
    value = json.loads(file.read_text())
    rows = next((value[key] for key in ("questions", "data") if key in value), value)
    at = list(rows)[1] if isinstance(rows, dict) else 1
    del rows[at][
        next(
            key
            for key in ("image_id", "question", "prompt", "conversations", "query")
            if key in rows[at]
        )
    ]
    put(file, value)
    return at


@pytest.mark.parametrize("task, llava", CASES)
def test_a_broken_row_is_named_before_any_model_is_loaded(task, llava, tmp_path):
    FILES[task][0](tmp_path, llava)
    file = tmp_path / files(task, llava)
    row = break_row(file)
    with pytest.raises(UserError) as failure:
        evaluated(tmp_path, task, tmp_path, tmp_path)
    assert str(failure.value).startswith(f"{file}:{row}: ") and "; fix: " in str(failure.value)
    assert "\n" not in str(failure.value)


# Their pictures are in the file of questions.
EMBEDDED = ("mmbench", "mmmu-original", "mmstar", *(f"{task}-llava" for task in row_files.TABLE))


@pytest.mark.parametrize(
    "task, llava", [case for case in CASES if not case.id.startswith(EMBEDDED)]
)
def test_a_missing_picture_is_named_with_its_row_before_any_model_is_loaded(task, llava, tmp_path):
    FILES[task][0](tmp_path, llava)
    example = [e for e in evaluate.TASKS[task].examples(tmp_path) if e["image"]][-1]
    (tmp_path / example["image"]).unlink()
    with pytest.raises(UserError) as failure:
        evaluated(tmp_path, task, tmp_path, tmp_path)
    said = str(failure.value)
    assert f"{tmp_path / example['image']}: no such file" in said or "no picture" in said, said
    assert re.match(rf"{tmp_path}/[^:]+:\w+: ", said) and "\n" not in said


@pytest.mark.parametrize("task, llava", [case for case in CASES if case.id.startswith(EMBEDDED)])
def test_a_damaged_picture_in_a_file_of_questions_is_named_with_its_row(
    task, llava, tmp_path, monkeypatch
):
    FILES[task][0](tmp_path, llava)
    examples = evaluate.TASKS[task].examples(tmp_path)
    examples[1]["pictures"] = [b"no picture"]
    monkeypatch.setattr(evaluate.TASKS[task], "examples", lambda data_dir: examples)
    name = re.escape(examples[1]["where"])
    with pytest.raises(UserError, match=rf"{name}: .+: not an image.*; fix: restore it"):
        evaluated(tmp_path, task, tmp_path, tmp_path)  # before a model is loaded: there is none


@pytest.mark.parametrize("task, llava", CASES)
def test_an_empty_folder_is_answered_in_one_line(task, llava, tmp_path):
    with pytest.raises(UserError, match=r"no such file or folder; fix: --data: a folder with .+"):
        evaluated(tmp_path, task, tmp_path, tmp_path)


def test_a_question_that_is_there_twice_is_refused(tmp_path):
    pope(tmp_path, False)
    file = tmp_path / "coco_pope_popular.json"
    file.write_text(file.read_text().replace('"question_id": 2', '"question_id": 1'))
    with pytest.raises(
        UserError, match=r"coco_pope_popular.json:1: question popular-1 is there twice; fix:"
    ):
        evaluated(tmp_path, "pope", tmp_path, tmp_path)


@pytest.mark.parametrize(
    "task, old, new, message",
    [
        (
            "pope",
            "Is there a popular 1?",
            "Is there a unicorn?",
            r"test.jsonl:2: not the question of \S+popular.json:0",
        ),
        (
            "pope",
            '"category": "random"}\n',
            '"category": "x"}\n',
            r"pope_test.jsonl:\d: not as published: it has no 'x'",
        ),
        (
            "gqa",
            '"201"',
            '"209"',
            r"balanced.jsonl:0: question 209 is not in testdev_balanced_questions.json",
        ),
        (
            "textvqa",
            "What is the brand?",
            "What?",
            r"_ocr.jsonl:0: its question is not in TextVQA_0.5.1_val.json",
        ),
        (
            "mme",
            "Is it a dog?",
            "Is it a cow?",
            r"llava_mme.jsonl:1: its question is not in \S+/count",
        ),
        ("llava_bench", '"conv"', '"other"', r"questions.jsonl:0: category 'other' has no rule"),
    ],
)
def test_files_that_do_not_belong_together(task, old, new, message, tmp_path):
    FILES[task][0](tmp_path, True)
    file = tmp_path / files(task, True)
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        evaluate.TASKS[task].examples(tmp_path)


def test_a_limit_keeps_the_two_questions_of_a_picture_together(tmp_path):
    mme(tmp_path, False)
    examples = evaluate.TASKS["mme"].examples(tmp_path)
    assert [e["id"] for e in evaluate.limit_examples(examples, 2)] == [
        "count/0001/0",
        "count/0001/1",
    ]
    assert (
        evaluate.limit_examples(examples, None) == examples == evaluate.limit_examples(examples, 99)
    )
    plain = [{"id": i} for i in range(10)]
    assert [e["id"] for e in evaluate.limit_examples(plain, 4)] == [0, 2, 5, 7]


def test_several_pictures_go_where_the_question_mentions_them(tmp_path, model):
    mmmu(tmp_path, False)
    example = evaluate.TASKS["mmmu"].examples(tmp_path)[2]
    assert example["image"] == [f"validation_Math_2:{i}" for i in (3, 2, 1, 2)]
    llava, tok, seen = LLaVA.from_pretrained(model), load_tokenizer(model), []
    llava.generate = lambda prompts, images, **options: (
        seen.append((prompts, images)) or torch.tensor([[1]])
    )
    evaluate.answerer(llava, tok, tmp_path, 1)([example])
    prompts, images = seen[0]
    assert (prompts[0] == -200).sum() == 4 == len(images)
    assert prompts[0].tolist() == encode_prompt(
        [{"from": "human", "value": example["prompt"]}], tok, "plain"
    )
    wanted = [
        llava.vision_tower.processor.pixels(Image.open(io.BytesIO(png(i)))) for i in (4, 3, 2, 3)
    ]
    assert all(torch.equal(a.pixels[0], b) for a, b in zip(images, wanted, strict=True))


def test_the_published_number_is_of_the_recipe_named_most_alike():
    def of(llm, vision="google/siglip-so400m-patch14-384"):
        return nearest("VQAv2", {"llm": llm, "vision": vision})

    assert of("Qwen/Qwen2-0.5B") == (72.3, "qwen2-siglip-base") and of("/models/phi-2") == (
        79.2,
        "phi2-siglip-base",
    )
    assert of("microsoft/phi-2", "openai/clip-vit-large-patch14-336") == (76.8, "phi2-clip-base")
    assert (
        of("Qwen/Qwen2.5-3B-Instruct")[1] == "qwen2.5-3b-siglip-base"
        and of("gemma", "clip")[1] == "gemma-siglip-base"
    )


def test_a_video_is_seen_in_frames_its_span_only_and_as_one_frame(tmp_path, model):
    """The model's config says how many frames, and the question which part of the clip.

    The control shows one.
    """
    for i in range(12):
        put(tmp_path / "clip" / f"{i}.png", png(i))
    example = {
        "id": 1,
        "image": None,
        "video": "clip",
        "prompt": "What?",
        "label": "A",
        "where": "here",
    }
    llava, tok, shown = LLaVA.from_pretrained(model), load_tokenizer(model), []
    llava.views = dataclasses.replace(llava.views, frames=4)
    llava.generate = lambda prompts, images, **options: (
        shown.append((prompts, images)) or torch.tensor([[1]] * 2)
    )
    part = example | {"id": 2, "span": (1.0, 3.0), "rate": 3}
    for change in ([], [evaluate.middle_frame]):
        evaluate.answerer(llava, tok, tmp_path, 1, *change)([example, part])
    ((prompts, items), (_, ones)) = shown
    frames = [llava.views.processor.pixels(Image.open(io.BytesIO(png(i)))) for i in range(12)]
    for item, taken in zip(items, ([0, 3, 7, 11], [3, 5, 7, 9]), strict=True):
        assert item.shape == ItemShape(4) and torch.equal(
            item.pixels, torch.stack([frames[i] for i in taken])
        )
    assert all((p == -200).sum() == 1 for p in prompts)
    assert all(
        torch.equal(one.pixels, frames[i].expand(4, -1, -1, -1))
        for one, i in zip(ones, (7, 7), strict=True)
    )
    evaluate.check_examples([example], tmp_path)
    with pytest.raises(UserError, match="here: .*none.mp4: no such file.*; fix: restore it"):
        evaluate.check_examples([example | {"video": "none.mp4"}], tmp_path)


# ---------------------------------------------------------------------------- devices and memory


class Stopped(Exception):
    """Raised in the place of loading a model."""


def pretend_gpus(monkeypatch) -> list:
    """Let torch say that there are GPUs; return the list of what is done with them, in order."""
    done = []

    def load(folder, dtype, device):
        done.append(("load", str(device), dtype))
        raise Stopped

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(("set", str(device))))
    monkeypatch.setattr(LLaVA, "from_pretrained", load)
    return done


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_sets_its_gpu_before_anything_is_loaded(rank, model, tmp_path, monkeypatch):
    """Triton launches on the current device, so cuda:1 has to be that and not only be named."""
    pope(tmp_path / "data", False)
    done = pretend_gpus(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with pytest.raises(Stopped):
        evaluated(model, "pope", tmp_path / "data", tmp_path)
    assert done == [("set", f"cuda:{rank}"), ("load", f"cuda:{rank}", torch.bfloat16)]


@pytest.mark.parametrize("free, rows", [(2**40, 64), (20_000_000, 19), (600_000, 1), (0, 1)])
def test_so_many_rows_as_their_keys_and_values_fit(free, rows, model, tmp_path, monkeypatch):
    """Two layers of two heads of eight: 256 bytes a token in float32, and 2,048 slots a row."""
    asked = [{"prompt": "x" * 800, "image": "a.png"}, {"prompt": "x" * 900, "image": "a.png"}]
    llava = LLaVA.from_pretrained(model)
    tokenizer = load_tokenizer(model)
    longest = evaluate.longest_prompt(llava, tokenizer, asked)
    assert 900 < longest < 1000
    assert evaluate.rows_that_fit(llava, tokenizer, asked, 1024, free) == rows

    # Without --batch this is what is asked at once.
    pope(tmp_path / "data", False)
    monkeypatch.setattr(evaluate, "free_memory", lambda device: free)
    monkeypatch.setattr(evaluate, "longest_prompt", lambda *arguments: longest)
    monkeypatch.setattr(evaluate.pope, "MAX_NEW_TOKENS", 1024)
    batches = []
    monkeypatch.setattr(
        evaluate, "answer_examples", lambda *arguments: batches.append(arguments[4]) or ["yes"] * 6
    )
    arguments = ["--model", model, "--task", "pope", "--data", tmp_path / "data"]
    evaluate.main([str(word) for word in (*arguments, "--out", tmp_path / "a.jsonl")])
    assert batches == [rows]


def test_the_longest_prompt_counts_pictures_and_clips(model):
    llava, tokenizer = LLaVA.from_pretrained(model), load_tokenizer(model)
    bare = evaluate.longest_prompt(llava, tokenizer, [{"prompt": "What?", "image": None}])
    views = llava.views
    pair = {"prompt": "What?", "image": ["a", "b"]}
    assert evaluate.longest_prompt(llava, tokenizer, [pair]) == bare + 2 * views.tokens
    clip = {"prompt": "What?", "image": None, "video": "a"}
    assert evaluate.longest_prompt(llava, tokenizer, [clip]) == bare + 16 * views.tokens
    llava.views = MODES["tiles"](**(vars(views) | {"grids": ((1, 2), (2, 2))}))
    assert evaluate.longest_prompt(llava, tokenizer, [pair]) == bare + 10 * views.tokens


def test_free_memory_of_a_gpu_and_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert evaluate.free_memory("cuda:1") == 1200
    assert 2**20 < evaluate.free_memory("cpu") <= 2**60


# ------------------------------------------------------------------------------ unread answers


@pytest.mark.parametrize(
    "task, answers, unread",
    [
        ("pope", ["yes", "No.", "There is not.", "maybe", "", "Nothing. No"], 3),
        ("mme", ["yes", "No", "It's no", "?"], 2),
        ("scienceqa", ["B", "The answer is A"], 1),
        ("mmbench", ["A", "it", "Z"], 2),
        ("ai2d", ["(b)", "D", "a cat"], 2),
        ("mmstar", ["a dog", "Option B", "it"], 1),
        ("mmmu", ["neither", "4", "(B)"], 2),
    ],
)
def test_answers_that_the_rule_cannot_read_are_counted(task, answers, unread, tmp_path):
    """MMMU's last question is about pictures that are missing in this layout: it is guessed."""
    FILES[task][0](tmp_path, True)
    module = evaluate.TASKS[task]
    assert module.unread(module.examples(tmp_path), answers) == unread


def test_an_evaluation_says_how_many_answers_it_could_not_read(tmp_path, model, capsys):
    pope(tmp_path / "data", False)
    evaluated(model, "pope", tmp_path / "data", tmp_path / "out")
    assert "of 6 answers say neither yes nor no, and count as yes" in capsys.readouterr().out


def test_a_recipe_that_cannot_be_read_does_not_stop_the_scores(tmp_path, monkeypatch, capsys):
    put(tmp_path / "broken.toml", "x = [")
    put(tmp_path / "text.toml", '[model]\nllm = "a"\n[published]\nVQAv2 = "many"\n')
    monkeypatch.setattr(published, "RECIPES", tmp_path)
    assert nearest("VQAv2", {"llm": "a", "vision": "b"}) is None
    assert "published numbers without broken.toml: " in capsys.readouterr().out

    class Task:
        PUBLISHED = ("all", "VQAv2")

    scores = {"all": {"score": 1.0}}
    published.add_published(scores, Task, SimpleNamespace(text={}, vision={}, sources={}))
    assert scores == {"all": {"score": 1.0}}


def test_names_of_scores_are_printed_on_one_line():
    scores = {"a\nerror: forged\x1b[2J": {"score": 1.0, "chance": None, "n": 1}}
    table = evaluate.score_table(scores)
    assert len(table.splitlines()) == 2 and "\x1b" not in table
