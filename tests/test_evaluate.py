"""evaluate.py, evals/world.py and demo/report.py: scores, resuming, order, the page of them."""

import json
import os
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import evaluate
from config import Model, UserError
from demo import report, results
from demo import world as demo_world
from evals import world
from inputs.tiling import Tiling
from inputs.tokenizer import load_tokenizer
from model import LLaVA
from tests.tools.environment import run


@pytest.mark.parametrize(
    "answer, said",
    [
        ("yes", "yes"),
        ("No", "no"),
        ("no, there is none", "no"),
        ("There is not a circle.", "no"),
        ("Yes. No circle is blue, though.", "yes"),  # only the first sentence counts
        ("NO", "yes"),  # POPE knows these three spellings and no other
        ("nothing to see", "yes"),
        ("", "yes"),
    ],
)
def test_existence_is_read_as_pope_reads_it(answer, said):
    assert world.yes_or_no(answer) == said


def example(i, kind="colour", label="red", choices=("red", "green", "blue", "yellow"), **more):
    split = kind if kind.startswith("existence") else "attributes"
    kind = kind.split("_")[0]
    row = {
        "id": f"q{i}",
        "split": split,
        "kind": kind,
        "label": label,
        "choices": choices,
        "image": f"{i}.png",
    }
    return row | {"prompt": f"question {'x' * (i * 7 % 5)} {i}"} | more


def test_scores():
    examples = [
        example(0, "existence_random", "yes", ("yes", "no")),
        example(1, "existence_random", "no", ("yes", "no")),
        example(2),
        example(3),
        example(4, "count", "two", ("one", "two", "three")),
        example(5, "count", "zero", ("zero", "one", "two", "three")),
        example(6, "existence_random", "no", ("yes", "no")),
        example(7, "existence_random", "yes", ("yes", "no")),
    ]
    scores = world.score(examples, ["yes", "Yes.", " Red.", "reddish", "two", "one", "no", "yes"])
    assert scores["existence_random"] == {"score": 75.0, "chance": 50.0, "n": 4}
    assert scores["colour"] == {"score": 50.0, "chance": 25.0, "n": 2}
    assert scores["count"] == {"score": 50.0, "chance": 29.17, "n": 2}
    assert scores["attributes"] == {"score": 50.0, "chance": 27.08, "n": 4}
    assert set(scores) == {"existence_random", "attributes", "colour", "count"}


class Oracle:
    """Answers from the question; it remembers what it was asked and can be killed after batches."""

    def __init__(self, batches=99):
        self.asked, self.batches = [], batches

    def __call__(self, examples):
        if not self.batches:
            raise KeyboardInterrupt
        self.batches -= 1
        self.asked += [example["id"] for example in examples]
        return [example["prompt"][::-1] for example in examples]


def test_a_killed_run_continues_and_ends_with_the_same_file(tmp_path):
    examples = [example(i) for i in range(23)]
    whole, killed = Oracle(), Oracle(batches=2)
    answers = evaluate.answer_examples(examples, examples, whole, tmp_path / "whole.jsonl", batch=4)
    assert answers == [e["prompt"][::-1] for e in examples]
    lengths = [len(examples[int(name[1:])]["prompt"]) for name in whole.asked]
    assert lengths == sorted(lengths)  # no batch is ragged

    file = tmp_path / "killed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate.answer_examples(examples, examples, killed, file, batch=4)
    assert file.read_text().count("\n") == 8  # written while running
    with open(file, "a") as lines:
        lines.write('{"id": "q22", "answ')  # killed while writing
    again = Oracle()
    assert evaluate.answer_examples(examples, examples, again, file, batch=3) == answers
    assert len(again.asked) == 15 and not set(again.asked) & set(killed.asked)
    assert file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_each_batch_is_on_disk_before_the_next(tmp_path):
    examples, file, seen = [example(i) for i in range(6)], tmp_path / "a.jsonl", []

    def answer(batch):
        seen.append(file.read_text().count("\n"))
        return ["red"] * len(batch)

    evaluate.answer_examples(examples, examples, answer, file, batch=2)
    assert seen == [0, 2, 4]


def test_answers_to_other_questions_are_not_taken_over(tmp_path):
    examples = [example(i) for i in range(6)]
    file = tmp_path / "a.jsonl"
    evaluate.answer_examples(examples, examples, Oracle(), file)
    examples[2]["prompt"], examples[4]["image"] = "another question", "other.png"
    second = Oracle()
    assert evaluate.answer_examples(examples, examples, second, file)[2] == "noitseuq rehtona"
    assert sorted(second.asked) == ["q2", "q4"]


def test_a_limited_run_keeps_the_other_answers(tmp_path):
    examples = [example(i) for i in range(6)]
    file = tmp_path / "a.jsonl"
    evaluate.answer_examples(examples, examples, Oracle(), file)
    assert evaluate.answer_examples(examples, examples[::3], Oracle(0), file) == [
        e["prompt"][::-1] for e in examples[::3]
    ]
    assert len(file.read_text().splitlines()) == 6


def test_ranks_share_the_work_and_rank_0_puts_it_in_order(tmp_path):
    examples = [example(i) for i in range(11)]
    one = evaluate.answer_examples(examples, examples, Oracle(), tmp_path / "one.jsonl")
    file, ranks = tmp_path / "three.jsonl", [Oracle(), Oracle(), Oracle()]
    for rank in (2, 1):
        assert evaluate.answer_examples(examples, examples, ranks[rank], file, 2, rank, 3) is None
    # In a run, rank 0 has read before the others write. Here it finds their files, but asks nothing
    # of theirs either way.
    assert evaluate.answer_examples(examples, examples, ranks[0], file, 2, 0, 3) == one
    assert [{int(name[1:]) % 3 for name in r.asked} for r in ranks] == [{0}, {1}, {2}]
    assert sum(len(r.asked) for r in ranks) == 11
    assert file.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["one.jsonl", "three.jsonl"]


# ---------------------------------------------------------------------------------- with a data set


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "data"
    demo_world.write(out, seed=0, scenes=20)
    return out


def test_the_model_is_given_pictures_and_prompts_in_order(data):
    tok, seen = load_tokenizer(data / "tokenizer"), []

    def generate(rows, images, max_new_tokens, eos_token_id):
        assert len(rows) == len(images) and [(row == -200).sum().item() for row in rows] == [
            1
        ] * len(rows)
        seen.append((rows, images))
        words = [tok.encode(word)[0] + [tok.eos_id] for word in (" yes", " a circle", " no", "")]
        longest = max(map(len, words))
        filler = tok.encode(" red")[0]  # nothing after the end counts, whatever it is
        return torch.tensor([ids + filler * (longest - len(ids)) for ids in words])

    def pixels(image, mode="square"):
        assert mode == "square"
        return torch.tensor(np.array(image)).permute(2, 0, 1)

    transform = SimpleNamespace(pixels=pixels, normalise=Tensor.float)
    model = SimpleNamespace(
        vision_tower=SimpleNamespace(processor=transform),
        config=SimpleNamespace(template="plain"),
        views=Tiling(1, processor=transform),
        generate=generate,
    )
    examples = world.examples(data)[:4]
    assert evaluate.answerer(model, tok, data, 5)(examples) == ["yes", "a circle", "no", ""]
    rows, images = seen[0]
    for i, e in enumerate(examples):
        assert torch.equal(images[i].pixels[0], pixels(Image.open(data / e["image"])))
        text = tok.decode(rows[i].tolist())
        assert text.startswith("USER: ") and e["prompt"] in text and text.endswith(" ASSISTANT:")

    every = [pixels(Image.open(data / e["image"])).float() for e in world.examples(data)]
    every = torch.stack(every[:: len(every) // evaluate.MEAN_OF][: evaluate.MEAN_OF])
    evaluate.answerer(
        model, tok, data, 5, evaluate.blank_with_mean(world.examples(data), data, model)
    )(examples)
    assert all(torch.equal(blank.pixels, every.mean(0, keepdim=True)) for blank in seen[1][1])
    evaluate.answerer(model, tok, data, 5, evaluate.blank_with_mean(examples[:1], data, model))(
        examples
    )
    assert torch.equal(
        seen[2][1][3].pixels[0], pixels(Image.open(data / examples[0]["image"])).float()
    )

    examples[1]["image"] = "images/benchmark/none.png"
    with pytest.raises(UserError, match="none.png: no such file.*; fix:"):
        evaluate.answerer(model, tok, data, 5)(examples)


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    """A folder with an untrained model of the demo's kind."""
    folder = tmp_path_factory.mktemp("model")
    tok = load_tokenizer(data / "tokenizer")
    width = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {"model_type": "llama", "vocab_size": tok.vocab_size} | width
    vision = {"model_type": "siglip_vision_model", "image_size": 48, "patch_size": 16} | width
    LLaVA.from_parts(Model(llm_config=text, vision_config=vision), "plain").save(folder)
    tok.save(folder)
    return folder


def save_again(weights, note):
    """Write a safetensors file with the same tensors and another note, with an old date."""
    save_file(load_file(weights), weights, {"format": "pt", "note": note})
    os.utime(weights, (1, 1))


def test_one_rank_and_two_write_the_same_and_another_model_starts_afresh(model, data, capsys):
    options = ["--model", model, "--task", "world", "--data", data, "--limit", 60, "--batch", 16]
    options = [str(option) for option in options]
    file = model / "eval" / "world.jsonl"
    evaluate.main(options)
    printed, one = capsys.readouterr().out, file.read_bytes()
    result = json.loads((model / "eval" / "world.json").read_text())
    asked = [result["scores"][split]["n"] for split in world.SPLITS]
    assert len(one.splitlines()) == 60 == sum(asked)
    assert result["scores"]["colour"]["text_only"] == 25 and result["data"] == str(data)
    assert "text only" in printed and "existence_popular" in printed and "60/60" in printed
    evaluate.main(options)
    assert "60/60" not in capsys.readouterr().out  # nothing is asked twice

    # The weights of another model that answers the same, older than the answers.
    stale = file.read_text().replace('"answer": "', '"answer": "stale')
    file.write_text(stale)
    saved = next(model.glob("*.safetensors"))
    save_again(saved, "once")
    evaluate.main(options)
    printed = capsys.readouterr().out
    assert f"another model ({saved.name}), kept as world.aside-1.jsonl; starting afresh" in printed
    assert file.read_bytes() == one and file.with_name("world.aside-1.jsonl").read_text() == stale
    aside = json.loads(file.with_name("world.aside-1.json").read_text())
    assert aside["scores"] == result["scores"]

    # All that a killed run of several ranks has left.
    part = file.rename(file.with_name("world.jsonl.rank1"))
    part.write_text(stale)
    save_again(saved, "twice")
    evaluate.main(options)
    assert "starting afresh" in capsys.readouterr().out
    assert file.read_bytes() == one and not part.exists()
    assert file.with_name("world.aside-2-rank1.jsonl").read_text() == stale

    # The same model with a newer date is the same model.
    os.utime(saved, (file.stat().st_mtime + 5,) * 2)
    evaluate.main(options)
    printed = capsys.readouterr().out
    assert "starting afresh" not in printed and "60/60" not in printed

    file.unlink()
    run(
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        2,
        "evaluate.py",
        *options,
        OMP_NUM_THREADS="1",
    )
    assert file.read_bytes() == one and not list((model / "eval").glob("*.rank*"))


def test_a_folder_without_the_benchmark(tmp_path):
    with pytest.raises(
        UserError, match=r"existence_random.jsonl: no such file; fix: write the data set with"
    ):
        evaluate.main(["--model", str(tmp_path), "--task", "world", "--data", str(tmp_path)])


# ------------------------------------------------------------------------------------------- report


@pytest.fixture
def finished(data, tmp_path):
    """The files of a run whose model is wrong in one answer of ten, at random."""
    rng, examples = random.Random(0), world.examples(data)
    (tmp_path / "eval").mkdir()
    for name in ("world", "world-blank"):
        wrong = [rng.random() < 0.1 for _ in examples]
        other = [next(c for c in e["choices"] if c != e["label"]) for e in examples]
        answers = [o if w else e["label"] for e, w, o in zip(examples, wrong, other, strict=True)]
        if name == "world-blank":
            answers = ["no"] * len(examples)
        rows = [{"id": e["id"], "answer": a} for e, a in zip(examples, answers, strict=True)]
        (tmp_path / "eval" / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
        scores = world.score(examples, answers)
        for key, value in world.text_only(data).items():
            scores[key]["text_only"] = value
        result = {"task": "world", "data": str(data), "seconds": 7.0, "scores": scores}
        (tmp_path / "eval" / f"{name}.json").write_text(json.dumps(result))
    sizes = {"llm": 800_000, "vision": 300_000, "connector": 12_345}
    log = []
    for stage, trainable in (
        ("pretrain", {"llm": 0, "vision": 300_000, "connector": 12_345}),
        ("finetune", sizes),
    ):
        log.append({"event": "start", "stage": stage, "parameters": sizes, "trainable": trainable})
        for step in (10, 20, 20, 30):  # 20 twice: a run that was resumed
            speed = {
                "tokens_per_s": 20_000,
                "images_per_s": 200,
                "data_wait": 0.02,
                "memory_gb": 0.5,
            }
            log.append(
                {"event": "step", "stage": stage, "step": step, "steps": 30, "loss": 3 / step}
                | speed
            )
        log.append({"event": "validation", "stage": stage, "step": 30, "loss": 0.1234})
        log.append({"event": "end", "stage": stage, "seconds": 75})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (tmp_path / "recipe.toml").write_text("[train]\nseed = 0 # <b>\n")
    return tmp_path


def test_report(finished, data, capsys):
    report.main([str(finished)])
    html, printed = (finished / "report.html").read_text(), capsys.readouterr().out
    scores = json.loads((finished / "eval" / "world.json").read_text())["scores"]
    for name, s in scores.items():
        assert f"{s['score']:.1f}" in html and name in printed and f"{s['score']:.1f}" in printed
    assert "src=" in html and not re.findall(
        r'(?:src|href)="(?!data:)|https?://|<script|@import|url\(', html
    )
    assert (
        html.count("<polyline") == 4 and html.count("validation loss 0.123") == 4
    )  # a point and a caption per stage
    assert (
        "1,112,345" not in html and "12,345" in html and "frozen" in html and "1 min 15 s" in html
    )
    assert "2 min 30 s" in html and "&lt;b&gt;" in html and "[train]" in html

    cards = html.split("<h2>What it sees</h2>")[1].split("<details>")[0]
    assert cards.count("<img") == 32 == cards.count("✓") + cards.count("✗")
    assert 1 <= cards.count("✗") <= 5  # a tenth of 32
    assert cards.count("truth: ") == cards.count("✗")
    text = re.sub(r"<[^>]+>", "", cards)
    for kind in (
        "existence, random",
        "existence, popular",
        "existence, adversarial",
        "count",
        "relation",
    ):
        assert kind in text


def test_samples_are_wrong_as_often_as_the_model(data):
    examples = world.examples(data)
    for share in (0.0, 0.05, 0.3, 1.0):
        rng = random.Random(1)
        right = {e["id"]: rng.random() >= share for e in examples}
        samples, mistakes = report.choose_samples(examples, right)
        assert len(samples) == 32 == len({e["id"] for e in samples})
        assert abs(sum(not right[e["id"]] for e in samples) - 32 * share) <= 1.5
        assert not any(right[e["id"]] for e in mistakes)
        assert not {e["id"] for e in samples} & {e["id"] for e in mistakes}


def test_a_run_whose_memory_is_unknown_is_drawn():
    """Windows does not say how much memory a process has used."""
    step = {"step": 1, "steps": 1, "loss": 2.0}
    step |= {"images_per_s": 1.0, "tokens_per_s": 9.0, "data_wait": 0.0}
    stage = results.StageResult(start={}, end={"seconds": 5}, steps=[step], validations=[])
    assert "0.0 % of the time waiting for data.</figcaption>" in report.stage_figure("one", stage)


def test_report_names_a_missing_file(finished):
    for name in ("world-blank.jsonl", "world.json", "../log.jsonl", "../recipe.toml"):
        (finished / "eval" / name).unlink()
        with pytest.raises(UserError, match=f"{name.removeprefix('../')}: no such file; fix: "):
            report.main([str(finished)])
    failed = run("-m", "demo.report", finished, ok=False)
    assert re.fullmatch(r"error: \S+/recipe.toml: no such file; fix: .+\n", failed.stderr)
    assert not (finished / "report.html").exists()


def test_report_refuses_an_unfinished_stage(finished):
    lines = (finished / "log.jsonl").read_text().splitlines()
    (finished / "log.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(UserError, match="log.jsonl:finetune: this stage did not finish; fix:"):
        report.main([str(finished)])
