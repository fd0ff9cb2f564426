"""--task rows: questions of rows, metrics, controls, intervals, the table, the page, a baseline."""

import json
import random
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import config
import data
import evaluate
from config import UserError
from evals import metrics, own_rows, own_rows_report, world
from evals.intervals import Difference, difference, interval, student
from inputs.rows import open_rows
from tests.tools.benchmark_files import png, put, tiny_model
from tests.tools.sample_rows import make_sample
from tests.tools.training_runs import on_ranks

# --------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    "metric, answer, truths, credit",
    [
        ("exact", " Red.\n", ["red"], 1),
        ("exact", "red  ball", ["Red ball ."], 1),
        ("exact", "cafe\u0301", ["caf\u00e9"], 1),
        ("exact", "reddish", ["red"], 0),
        ("exact", "blue", ["red", "blue"], 1),
        ("contains", "It is a Red ball.", ["red"], 1),
        ("contains", "reddish", ["red"], 0),
        ("contains", "c++ (new)", ["c++"], 1),
        ("contains", "infrared", ["red"], 0),
        ("contains", "a, b", ["."], 0),
        ("f1", "a big red ball", ["the red ball"], 0.8),
        ("f1", "the", ["a"], 1),
        ("f1", "", ["red"], 0),
        ("f1", "red", ["blue", "red rose"], 2 / 3),
        ("anls", "barelava", ["barellava", "x"], 8 / 9),
        ("anls", "BARELLAVA ", ["barellava"], 1),
        ("anls", "ab", ["cd"], 0),
        ("anls", "ab", ["ax"], 0.5),
        ("anls", "", [""], 1),
        ("anls", "ab  cd", ["ab ce"], 1 - 1 / 6),  # by the length with both spaces
        ("number", "There are 3 apples and 4 pears", ["3"], 1),
        ("number", "three", ["3.0"], 1),
        ("number", "1,200.50 m", ["1200.5"], 1),
        ("number", "-5", ["5"], 0),
        ("number", "12", ["2"], 0),
        ("number", "none that I see", ["0"], 0),
        ("number", "about $7", ["7 %"], 1),
        ("yesno", "No, there is none", ["No."], 1),
        ("yesno", "Yes", ["yes"], 1),
        ("yesno", "nothing", ["no"], 0),
    ],
)
def test_what_an_answer_earns(metric, answer, truths, credit):
    assert metrics.METRICS[metric].credit(answer, truths) == pytest.approx(credit)


@pytest.mark.parametrize(
    "answer, truth, credit",
    [
        ("104", "100", 1),
        ("94", "100", 0),
        ("5%", "0.05", 1),
        ("5%", "5", 0),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("Yes", "yes", 1),
        ("1,000", "1000", 0),
    ],
)
def test_relaxed_accuracy(answer, truth, credit):
    assert metrics.relaxed(answer, [truth]) == credit


def test_the_distance_of_levenshtein():
    """Against the definition, on all pairs of short texts."""
    texts = ["", "a", "b", "ab", "ba", "aba", "bab", "abba", "kitten", "sitting"]

    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        changed = slow(a[1:], b[1:]) + 1
        if a[0] == b[0]:
            changed -= 1
        return min(changed, slow(a[1:], b) + 1, slow(a, b[1:]) + 1)

    for a in texts[:-2]:
        for b in texts[:-2]:
            assert metrics.levenshtein(a, b) == slow(a, b)
    assert metrics.levenshtein("kitten", "sitting") == 3


@pytest.mark.parametrize(
    "truths, metric",
    [
        (["yes", "No.", "yes"], "yesno"),
        (["3", "1,200", "50%", "two"], "number"),
        (["red", "blue"] * 3, "exact"),
        (["yes", "3"] * 3, "exact"),
        (["a", "b", "c"], "f1"),
        (["one two three four five six"] * 4, "f1"),
    ],
)
def test_the_metric_follows_the_answers(truths, metric):
    name, reason = metrics.choose([[truth] for truth in truths])
    assert name == metric and reason


# ------------------------------------------------------------------------------------- intervals


def test_an_interval_has_a_width_and_stays_inside():
    for credits in ([1.0] * 50, [0.0] * 50, [1.0], [0.5, 0.5], [1.0, 0.0]):
        for clusters in (list(range(len(credits))), [0] * len(credits)):
            low, high = interval(credits, clusters)
            assert 0 <= low < high <= 1 and high - low > 0.05
            assert low <= np.mean(credits) <= high
            found = difference(credits, credits, clusters)
            assert -1 <= found.low < found.mean == 0 < found.high <= 1

    # Wilson's own, of 7 of 10 (1927), but with Student's t for 10 questions.
    t = student(9)
    low, high = interval([1] * 7 + [0] * 3, range(10))
    for end in (low, high):
        assert abs(0.7 - end) == pytest.approx(t * (end * (1 - end) / 10) ** 0.5)


def test_ten_questions_that_fail_together_are_one():
    """The same credits about 5 pictures each ten times, and about 50 pictures."""
    together = np.repeat([1, 0, 1, 0, 1], 10)
    low, high = interval(together, np.repeat(range(5), 10).tolist())
    assert (low, high) == pytest.approx(interval([1, 0, 1, 0, 1], range(5)), abs=0.03)
    alone = interval(together, range(50))
    assert alone[1] - alone[0] < 0.5 * (high - low)


def test_pictures_that_are_all_alike_are_no_less_than_independent_questions():
    """Of each picture one answer is right and one wrong: between pictures there is no variance."""
    clusters = np.repeat(range(20), 2).tolist()
    low, high = interval([1, 0] * 20, clusters)
    t = student(19)
    for end in (low, high):
        assert abs(0.5 - end) == pytest.approx(t * (end * (1 - end) / 40) ** 0.5)


@pytest.mark.parametrize(
    "freedom, t", [(2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1e9, 1.960)]
)
def test_students_t(freedom, t):
    assert student(freedom) == pytest.approx(t, rel=0.035)
    if freedom > 4:
        assert student(freedom) == pytest.approx(t, abs=0.004)


def test_a_difference_is_the_paired_one():
    """Of 200 questions that both models fail or pass together but for 10, which one wins."""
    shared = [1.0] * 95 + [0.0] * 95
    found = difference(shared + [1.0] * 10, shared + [0.0] * 10, range(200))
    half = student(199) * ((12 / 202 - (10 / 202) ** 2) / 202) ** 0.5
    assert found == pytest.approx((0.05, 10 / 202 - half, 10 / 202 + half))
    back = difference(shared + [0.0] * 10, shared + [1.0] * 10, range(200))
    assert back == pytest.approx((-found.mean, -found.high, -found.low))


def drawn(rng, n, size, chances, likeness):
    """Draw which of several outcomes each of n questions has, `size` about each picture.

    likeness: the correlation of the questions about a picture.
    """
    pictures = n // size
    chances = np.array(chances)
    of_picture = np.tile(chances, (pictures, 1))
    if likeness:
        of_picture = rng.dirichlet(chances * (1 - likeness) / likeness, pictures)
    ends = np.repeat(of_picture, size, 0).cumsum(1)
    outcome = (rng.random((n, 1)) > ends[:, :-1]).sum(1)
    return outcome, np.repeat(range(pictures), size).tolist()


SIZES = [(60, 1, 0), (300, 1, 0), (120, 3, 0.1), (120, 3, 0.5), (300, 5, 0.1), (300, 5, 0.5)]
SIZES += [(1200, 10, 0.3)]


@pytest.mark.full
@pytest.mark.parametrize("n, size, likeness", SIZES)
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.8])
def test_the_true_score_is_inside_as_often_as_is_said(n, size, likeness, p):
    rng = np.random.default_rng(n + size)
    inside = 0
    for _ in range(1000):
        outcome, clusters = drawn(rng, n, size, [1 - p, p], likeness)
        low, high = interval(outcome, clusters)
        inside += int(low <= p <= high)
    assert 930 <= inside <= 975


@pytest.mark.full
@pytest.mark.parametrize("n, size, likeness", SIZES)
@pytest.mark.parametrize("won, lost", [(0.15, 0.15), (0.2, 0.1), (0.4, 0.1), (0.1, 0.3)])
def test_the_true_difference_is_inside_as_often_as_is_said(n, size, likeness, won, lost):
    rng = np.random.default_rng(n + size)
    inside = 0
    for _ in range(1000):
        outcome, clusters = drawn(rng, n, size, [1 - won - lost, won, lost], likeness)
        found = difference(outcome == 1, outcome == 2, clusters)
        inside += int(found.low <= won - lost <= found.high)
    assert 930 <= inside <= 975


# ------------------------------------------------------------------------------------- questions


def row(*turns, **more):
    """A LLaVA row of turns: human, gpt, human ... or (speaker, text)."""
    conversation = []
    for i, turn in enumerate(turns):
        if isinstance(turn, str):
            turn = ("gpt" if i % 2 else "human", turn)
        conversation.append({"from": turn[0], "value": turn[1]})
    return {"conversations": conversation, **more}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def questions(folder, model, rows):
    put(folder / "rows.json", rows)
    return own_rows.read_questions(open_rows(folder / "rows.json"), data.model_spec(model))


def test_every_human_turn_with_an_answer_is_a_question(tmp_path, model):
    put(tmp_path / "a.png", png(0))
    put(tmp_path / "b.png", png(1))
    found = questions(
        tmp_path,
        model,
        [
            row("<image>\nOne?", "1", "Two?", "", "Three?", " 3 ", image="a.png"),
            row(("gpt", "Hi."), ("human", "<image>\nFour?"), ("gpt", "4"), image="b.png"),
            row("<image> Five?", "5", "And <image>?", "6", image=["a.png", "b.png"]),
            row(("system", "Brief."), ("human", "Seven?"), ("gpt", "7")),
            row("Eight?", "8", answers=["8", "eight", {"answer": "VIII"}, "8"]),
        ],
    )
    asked = [(one["conversation"][-1]["value"], one["label"]) for one in found]
    assert asked == [
        ("<image>\nOne?", ["1"]),
        ("Three?", ["3"]),
        ("<image>\nFour?", ["4"]),
        ("<image> Five?", ["5"]),
        ("And <image>?", ["6"]),
        ("Seven?", ["7"]),
        ("Eight?", ["8", "eight", "VIII"]),
    ]
    # The true answers stand in the history; the answer that nobody asked for does not.
    assert [turn["value"] for turn in found[1]["conversation"]] == [
        *("<image>\nOne?", "1", "Two?", "", "Three?")
    ]
    assert len(found[2]["conversation"]) == 1 and len(found[5]["conversation"]) == 2
    assert found[5]["prompt"] == "system: Brief.\nhuman: Seven?"

    # A picture is shown once its mark has come, and pictures make the groups.
    shown = [[path.name for path in one.get("pictures", [])] for one in found]
    assert shown == [["a.png"], ["a.png"], ["b.png"], ["a.png"], ["a.png", "b.png"], [], []]
    groups = [one["group"] for one in found]
    assert groups[0] == groups[1] and groups[3] == groups[4] and len(set(groups)) == 5
    assert len({one["id"] for one in found}) == 7


@pytest.mark.parametrize(
    "wrong, why",
    [
        (row("Which?"), r"rows.json:row 1: conversations\[0\]: wrong last turn"),
        (row("<image>\nWhich?", "1"), "rows.json:row 1: 1 <image> .* but 0 images"),
        (row("Which?", "1", "Who?", "2", answers=["1", "x"]), 'row 1: "answers" beside 2 quest'),
        ({"text": "a"}, "rows.json:row 1: .*conversations"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(wrong, why, tmp_path, model):
    with pytest.raises(UserError, match=why):
        questions(tmp_path, model, [row("A?", "b"), wrong])


def test_pictures_in_the_rows_are_read_when_they_are_asked_for(tmp_path, model, monkeypatch):
    url = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAA"
    url += "AgABSK+kcQAAAABJRU5ErkJggg=="
    found = questions(tmp_path, model, [row("<image>\nA?", "b", image=url) for _ in range(3)])
    assert len({one["group"] for one in found}) == 1
    reads = []
    monkeypatch.setattr(own_rows.RowPictures, "__getitem__", lambda self, k: reads.append(k))
    assert [len(one["pictures"]) for one in found] == [1, 1, 1] and not reads
    assert all(isinstance(one["pictures"], own_rows.RowPictures) for one in found)


# --------------------------------------------------------------------------------------- controls


def asked(*pairs):
    """Examples of (picture, question, answer)."""
    found = []
    for i, (picture, question, answer) in enumerate(pairs):
        turn = {"from": "human", "value": f"<image>\n{question}"}
        example = {"id": str(i), "where": "rows:1", "label": [answer], "group": picture}
        found.append(example | {"prompt": turn["value"], "conversation": [turn]})
    return found


def test_chance_and_text_only():
    """Two questions whose answers are even, one that always has the same, and one of its own."""
    pairs = [(i, "Colour?", "red" if i % 2 else "blue") for i in range(20)]
    pairs += [(i, "Shape?", "round") for i in range(20)]
    pairs += [(0, "Colour now?", "red")]
    scale = own_rows.choose_scale(asked(*pairs))
    assert scale.name == "exact" and scale.constant == "round"
    assert scale.controls["chance"] == pytest.approx(100 * 20 / 41)
    assert scale.controls["text_only"] == pytest.approx(100 * 30 / 41)

    # What is asked of one picture only says nothing, however often.
    scale = own_rows.choose_scale(asked(*[(0, "A?", "x")] * 4, *[(1, "B?", "y")] * 4))
    assert scale.controls["text_only"] == 0 and scale.controls["chance"] == 50
    scale = own_rows.choose_scale(asked(*[(0, "A?", "x")] * 4))
    assert "text_only" not in scale.controls

    # Free text has no such controls.
    assert not own_rows.choose_scale(asked(*[(i, "A?", f"b {i}") for i in range(9)])).controls


def test_a_metric_that_cannot_read_a_true_answer():
    with pytest.raises(UserError, match="rows:1: the true answer 'red' is none for yesno"):
        own_rows.choose_scale(asked((0, "A?", "red")), "yesno")
    with pytest.raises(UserError, match="rows:1: the true answer 'red' is none for number"):
        own_rows.choose_scale(asked((0, "A?", "red")), "number")
    assert own_rows.choose_scale(asked((0, "A?", "0")), "number").name == "number"


def test_differences_in_words():
    found = Difference(0.123, 0.041, 0.202)
    text = own_rows_report.sentence(found, "out/a", 90)
    assert text == "better than out/a by 12.3 points [4.1, 20.2]"
    found = Difference(-0.123, -0.202, -0.041)
    assert (
        own_rows_report.sentence(found, "out/a", 90)
        == "worse than out/a by 12.3 points [4.1, 20.2]"
    )
    found = Difference(0.01, -0.03, 0.05)
    text = "no difference from out/a that 90 questions could show: +1.0 points [-3.0, +5.0]"
    assert own_rows_report.sentence(found, "out/a", 90) == text
    assert "that 1 question could show" in own_rows_report.sentence(found, "out/a", 1)


# ----------------------------------------------------------------------------------- whole command


@pytest.fixture(scope="module")
def trained(whole_run, tmp_path_factory):
    """The model of a short run with validation, and a copy of its log's last validation loss."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    shutil.copytree(whole_run, folder)
    shutil.rmtree(folder / "eval", ignore_errors=True)
    return folder


def evaluated(model, rows, *options):
    """Run evaluate.py on rows, and return the scores and what else it says of them."""
    arguments = ["--model", model, "--task", "rows", "--data", rows, *options]
    evaluate.main([str(argument) for argument in arguments])
    return json.loads((model / "eval" / "rows.json").read_text())


def test_the_loss_is_that_of_the_training_log(trained, tiny_world, monkeypatch):
    """Of held-out rows with several turns, in float32."""
    monkeypatch.setattr(evaluate, "answerer", lambda *_: lambda part: ["yes"] * len(part))
    result = evaluated(trained, tiny_world / "val.json", "--images", tiny_world / "images")
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    last = [line["loss"] for line in log if line["event"] == "validation"][-1]
    assert result["scores"]["exact"]["loss"] == pytest.approx(last, abs=1e-5)
    rows = json.loads((tiny_world / "val.json").read_text())
    turns = [turn for one in rows for turn in one["conversations"] if turn["from"] == "gpt"]
    assert result["scores"]["exact"]["n"] == len(turns) > len(rows)


def test_without_data_it_asks_what_the_run_held_out(trained, tiny_world, tmp_path, monkeypatch):
    """A file, a share of the training rows, or nothing."""
    monkeypatch.setattr(evaluate, "answerer", lambda *_: lambda part: ["yes"] * len(part))
    images = tiny_world / "images"
    of_file = evaluated(trained, tiny_world / "val.json", "--images", images)["scores"]
    evaluate.main(["--model", str(trained), "--task", "rows"])
    assert json.loads((trained / "eval" / "rows.json").read_text())["scores"] == of_file

    folder = shutil.copytree(trained, tmp_path / "model")
    text = (folder / "recipe.toml").read_text()
    share = re.sub("(?m)^validation = .*", "validation = 0.3", text)
    (folder / "recipe.toml").write_text(share)
    held_out = evaluate.held_out_rows(folder)
    recipe, _ = config.load([str(folder / "recipe.toml")], "")
    stage = list(recipe.stage.values())[-1]
    rows = open_rows(stage.data, stage.images)
    assert 0 < len(held_out) < len(rows) / 2

    (folder / "recipe.toml").write_text(re.sub("(?m)^validation = .*", 'validation = ""', text))
    with pytest.raises(UserError, match="no stage held rows out .validation.; fix: give --data"):
        evaluate.held_out_rows(folder)
    options = ["--model", str(folder), "--task", "rows", "--images", str(images)]
    with pytest.raises(UserError, match="--images: without --data; fix: give --data"):
        evaluate.main(options)
    (folder / "recipe.toml").unlink()
    with pytest.raises(UserError, match="recipe.toml: no such file.*; fix: give --data"):
        evaluate.held_out_rows(folder)


def world_rows(folder, splits):
    """The questions of the demo world's benchmark as rows."""
    found = []
    for example in world.examples(folder):
        if example["split"] in splits:
            turns = (f"<image>\n{example['prompt']}", example["label"])
            found.append(row(*turns, image=f"{folder / example['image']}", id=example["id"]))
    return found


def test_rows_of_the_world_score_as_the_world_does(trained, tiny_world, tmp_path, monkeypatch):
    """The same answers, and the same scores by exact and by yesno."""
    options = ["--model", trained, "--task", "world", "--data", tiny_world, "--limit", 120]
    evaluate.main([str(option) for option in options])
    kept = {}
    for line in (trained / "eval" / "world.jsonl").read_text().splitlines():
        line = json.loads(line)
        kept[line["id"]] = line["answer"]
    scores = json.loads((trained / "eval" / "world.json").read_text())["scores"]

    # As many tokens as the world's questions have room for.
    monkeypatch.setattr(own_rows, "room_for_answers", lambda *_: world.MAX_NEW_TOKENS)
    for split, metric in (("attributes", "exact"), ("existence_random", "yesno")):
        rows = [one for one in world_rows(tiny_world, [split]) if one["id"] in kept]
        put(tmp_path / f"{split}.json", rows)
        result = evaluated(trained, tmp_path / f"{split}.json")
        assert result["metric"] == metric
        answers = (trained / "eval" / "rows.jsonl").read_text().splitlines()
        assert [json.loads(line)["answer"] for line in answers] == [kept[one["id"]] for one in rows]
        score = result["scores"][metric]
        assert round(score["score"], 2) == scores[split]["score"] and score["n"] == len(rows)


def test_drawn_answers_score_as_in_the_world(tiny_world, trained, tmp_path):
    rng = random.Random(0)
    spec = data.model_spec(trained)
    for split, metric in (("attributes", "exact"), ("existence_popular", "yesno")):
        there = [one for one in world.examples(tiny_world) if one["split"] == split]
        put(tmp_path / f"{split}.json", world_rows(tiny_world, [split]))
        mine = own_rows.read_questions(open_rows(tmp_path / f"{split}.json"), spec)
        words = ["Yes.", "no", "No, none", "red", "Two", "three.", "circle", "left", ""]
        answers = []
        for one in there:
            answers.append(rng.choice([*words, one["label"], f"it is {one['label']}"]))
        scale = own_rows.choose_scale(mine)
        assert scale.name == metric
        score = scale.score(mine, answers)
        assert round(score["score"], 2) == world.score(there, answers)[split]["score"]


class Page(HTMLParser):
    """The texts and the number of pictures of a page."""

    def __init__(self, page):
        super().__init__()
        self.texts = []
        self.images = 0
        self.feed(page)

    def handle_data(self, text):
        self.texts.append(text)

    def handle_starttag(self, tag, attributes):
        self.images += int(tag == "img")


def test_the_table_the_page_and_another_model(trained, tiny_world, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    shutil.rmtree(other / "eval", ignore_errors=True)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("lm_head.weight"))
    weights[name] = -weights[name]
    save_file(weights, other / "model.safetensors", {"format": "pt"})

    rows = world_rows(tiny_world, ["existence_random"])[:40]
    for one in rows:
        one["conversations"][0]["value"] += " <b>"
    put(tmp_path / "mine.json", rows)
    result = evaluated(trained, tmp_path / "mine.json", "--blank", "--baseline", other)
    printed = capsys.readouterr().out
    names = ["yesno", "yesno, pictures blanked", f"yesno, {other}"]
    assert list(result["scores"]) == names
    for score in result["scores"].values():
        assert score["n"] == 40 and score["chance"] >= 50 and score["loss"] > 0
        assert score["interval"][0] < score["score"] < score["interval"][1]
    assert result["scores"][names[2]]["loss"] > result["scores"]["yesno"]["loss"]
    assert result["scores"][names[1]]["loss"] != result["scores"]["yesno"]["loss"]
    assert "95 % interval" in printed and "text only" in printed
    assert "yesno: yes or no, as POPE reads it" in printed
    assert re.search(r"\d+ of 40 answers say neither yes nor no", printed)
    for than in ("pictures blanked", str(other)):
        line = rf"(better than {than} by|worse than {than} by|no difference from {than} that)"
        assert re.search(line, printed) and len(result["differences"][than]) == 3

    # Each model's answers lie in its own folder, and are not asked for again.
    assert len((other / "eval" / "rows.jsonl").read_text().splitlines()) == 40
    evaluated(trained, tmp_path / "mine.json", "--blank", "--baseline", other)
    assert "40/40" not in capsys.readouterr().out

    # The page has the wrong answers, as text.
    page = Page((trained / "eval" / "rows.html").read_text())
    score = result["scores"]["yesno"]["score"]
    wrong = round(40 - 0.4 * score)
    assert f"{wrong} of 40 answers are wrong." in page.texts and page.images == wrong
    assert page.texts.count("true") == page.texts.count("model") == wrong > 0
    for line in (trained / "eval" / "rows.jsonl").read_text().splitlines():
        one = json.loads(line)
        if world.yes_or_no(one["answer"]) not in one["label"]:
            assert one["question"].removeprefix("<image>\n") in page.texts


def test_a_long_list_of_wrong_answers_is_thinned_evenly(monkeypatch):
    monkeypatch.setattr(own_rows_report, "MOST_SHOWN", 10)
    examples = asked(*[(i, f"Number {i}?", "x" if i % 2 else "y") for i in range(100)])
    scale = own_rows.choose_scale(examples)
    answers = {"model": ["y"] * 100}

    def picture(example):
        return [Image.new("RGB", (9, 9))]

    page = Page(own_rows_report.wrong_page("T", "table", scale, examples, answers, picture))
    shown = [text for text in page.texts if text.startswith("Number")]
    assert shown == [f"Number {i}?" for i in range(1, 100, 10)]
    assert "50 of 100 answers are wrong; 10 of them, spread evenly, are shown." in page.texts


def test_the_page_has_the_turns_before_a_question_and_its_text():
    (example,) = asked((0, "What <i>now</i>?", "x"))
    example["conversation"] = [
        {"from": "human", "value": "<image>\nWho?"},
        {"from": "gpt", "value": "A & B."},
        *example["conversation"],
    ]
    answers = {"model": "true", "out/<b>": "y"}
    image = Image.new("RGB", (9, 9))
    html = own_rows_report.article(example, answers, [image, image])
    page = Page(html)
    texts = ["human: Who?\ngpt: A & B.", "What <i>now</i>?", "true", "x", "model", "true"]
    assert page.texts == [*texts, "out/<b>", "y", "rows:1"] and page.images == 2
    assert html.count('width="36"') == 2


def test_a_baseline_may_have_any_name(trained, tiny_world, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "model")
    put(tmp_path / "mine.json", world_rows(tiny_world, ["attributes"])[:4])
    monkeypatch.chdir(tmp_path)
    result = evaluated(trained, tmp_path / "mine.json", "--baseline", "model")
    assert len(result["scores"]) == 2 and list(result["differences"]) == ["model/"]


@pytest.mark.parametrize(
    "options, why",
    [
        (["--task", "pope", "--metric", "f1"], "--metric: not for pope; fix: leave it out"),
        (["--task", "world", "--baseline", "x"], "--baseline: not for world"),
        (["--task", "rows", "--columns", "colour=c"], "--columns: 'colour=c' maps no column"),
        (["--task", "rows", "--blank"], "--blank: no picture in .*; fix: leave it out"),
        (["--task", "rows", "--one-frame"], "--one-frame: no video in .*; fix: leave it out"),
    ],
)
def test_options_that_do_not_go_together(options, why, tmp_path, model):
    put(tmp_path / "rows.json", [row("A?", "b")])
    arguments = ["--model", model, "--data", tmp_path / "rows.json", *options]
    with pytest.raises(UserError, match=why):
        evaluate.main([str(argument) for argument in arguments])


def test_a_picture_that_is_missing_is_named_before_a_model_is_loaded(tmp_path, model, monkeypatch):
    monkeypatch.delattr(evaluate, "load_model")
    put(tmp_path / "rows.json", [row("<image>\nA?", "b", image="none.png")])
    arguments = ["--model", model, "--task", "rows", "--data", tmp_path / "rows.json"]
    with pytest.raises(UserError, match="row 0: .*none.png: no such file.*; fix: .*--images"):
        evaluate.main([str(argument) for argument in arguments])


@pytest.mark.full
def test_two_ranks_write_what_one_does(trained, tiny_world, tmp_path):
    put(tmp_path / "mine.json", world_rows(tiny_world, ["attributes"])[:20])
    one = evaluated(trained, tmp_path / "mine.json", "--blank")
    kept = (trained / "eval" / "rows.jsonl").read_bytes()
    shutil.rmtree(trained / "eval")
    options = ["--model", trained, "--task", "rows", "--data", tmp_path / "mine.json", "--blank"]
    on_ranks(2, *options, code="import runpy; runpy.run_path('evaluate.py', run_name='__main__')")
    two = json.loads((trained / "eval" / "rows.json").read_text())
    assert (trained / "eval" / "rows.jsonl").read_bytes() == kept
    for name, score in one["scores"].items():
        assert two["scores"][name].pop("loss") == pytest.approx(score.pop("loss"), abs=1e-6)
    assert two["scores"] == one["scores"]


def test_check_sees_rows_as_a_finished_model_does(tmp_path, model, capsys):
    """Its template, its tokenizer and how many tokens a picture takes: none of them is named."""
    put(tmp_path / "a.png", png(0))
    put(tmp_path / "rows.json", [row("<image>\nA?", "b", image="a.png")])
    options = ["--data", tmp_path / "rows.json", "--model", model]
    data.main(["check", *map(str, options)])
    spec = data.model_spec(model)
    assert spec.template == "plain"
    length = len(make_sample(open_rows(tmp_path / "rows.json"), 0, spec).ids)
    assert f"{length} shortest" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--model stands beside --data"):
        data.main(["check", *map(str, options), "--tokenizer", str(model)])
