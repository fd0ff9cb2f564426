"""evals/ on clips: the five benchmarks' files as published, a few rows each, and their scores."""

import sys
from pathlib import Path

import pytest

from config import UserError
from evals import longvideobench, mlvu, mmvu, mvbench, video_choices, videomme
from tests.tools.benchmark_files import LETTER, fake_pyarrow, put
from tests.tools.generated_answers import digests, long_answers
from tests.tools.video_benchmark_files import CLIPS, TASKS, write

DIRECT = "\nAnswer the question directly without explanation."


@pytest.fixture(autouse=True)
def parquet_can_be_read(monkeypatch):
    fake_pyarrow(monkeypatch)


# ------------------------------------------------------------------------------- files as published


def read(task, folder):
    """The examples that the task makes of its files, by id."""
    write(task, folder)
    found = TASKS[task][0].examples(folder)
    assert len({e["id"] for e in found}) == len(found)
    for e in found:
        assert (
            e["image"] is None
            and (folder / e["video"]).exists()
            and Path(e["where"].rsplit(":", 1)[0]).is_file()
        )
    return {e["id"]: e for e in found}


# ----------------------------------------------------------------------------------------- examples


def test_videomme_examples(tmp_path):
    found = read("videomme", tmp_path)
    assert list(found) == ["001-1", "001-2", "601-1"]
    e = found["001-1"]
    question = "Which kind of decoration is the most?"
    question += "\nA. Apples.\nB. Candles.\nC. Berries.\nD. St. Nicholas."
    assert (e["video"], e["prompt"]) == ("data/fFjv93ACGo8.mp4", question + LETTER)
    assert (
        e["choices"] == {"A": "Apples", "B": "Candles", "C": "Berries", "D": "St. Nicholas"}
        and e["label"] == "C"
    )
    assert e["where"] == f"{tmp_path}/videomme/test-00000-of-00001.parquet:0"
    assert found["601-1"]["choices"] == {"A": "Yes", "B": "3.5 m", "C": "No", "D": "None"}
    assert [e["groups"] for e in found.values()] == [("all", "short, to 2 min")] * 2 + [
        ("all", "long, 30 to 60 min")
    ]


def test_mvbench_examples(tmp_path):
    found = read("mvbench", tmp_path)
    assert len(found) == 22 and list({e["groups"]: 0 for e in found.values()}) == [
        (task,) for task in mvbench.TASKS
    ]
    e = found["fine_grained_pose-0"]
    assert (
        (e["video"], e["label"]) == ("video/nturgbd/v.mp4", "B")
        and "span" not in e
        and "rate" not in e
    )
    assert e["prompt"] == "What happened?\n(A) one\n(B) two\n(C) three" + LETTER
    assert found["action_antonym-0"]["prompt"] == "Is it so?\n\n(A) no\n(B) yes" + LETTER
    twins = found[
        "action_antonym-1"
    ]  # the official script takes the last of two; what ends the list is stripped
    assert (
        twins["label"] == "C"
        and twins["prompt"] == "What happened?\n(A) two\n(B) one\n(C) two\n(D)" + LETTER
    )
    assert found["action_sequence-0"]["video"] == "video/star/Charades_v1_480/v.mp4"
    assert (
        found["action_sequence-1"]["video"]
        == "video/data0613/star/Charades_v1_480/only_in_0613.mp4"
    )
    spans = {name: e["span"] for name, e in found.items() if "span" in e}
    timed = (
        "action_sequence-0",
        "action_prediction-0",
        "object_interaction-0",
        "action_localization-0",
    )
    assert spans == dict.fromkeys(timed, (1.5, 9)) | {
        "action_sequence-1": (0, 7),
        "episodic_reasoning-0": (12.5, 40),
    }
    (folder,) = (e for e in found.values() if "rate" in e)
    assert (
        folder["rate"] == 3
        and folder["video"] == "video/tvqa/frames_fps3_hq/castle_s01e02_seg02_clip_00"
    )
    rest = mvbench.examples(tmp_path, without=("Fine-grained Pose",))
    assert [e["id"] for e in rest] == [name for name in found if name != "fine_grained_pose-0"]


def test_mlvu_examples(tmp_path):
    found = read("mlvu", tmp_path)
    assert list(found) == ["1_plotQA-0", "1_plotQA-1", *(f"{task}-0" for task in mlvu.FILES[1:])]
    e = found["5_order-0"]
    assert (e["video"], e["label"], e["groups"]) == (
        "video/5_order/movie101_66.mp4",
        "A",
        ("order",),
    )
    assert e["prompt"] == "What colour is it?\n(A) Yellow\n(B) Red\n(C) Green\n(D) Blue" + LETTER
    assert found["1_plotQA-1"]["label"] == "C" and found["2_needle-0"]["label"] is None


def test_longvideobench_examples(tmp_path):
    found = read("longvideobench", tmp_path)
    e, short = found["86CxyhFV9MI_0"], found["x_1"]
    seen = (
        "[image]" * 2 + "at 10, " + "[image]" * 3 + "brief at 40, " + "[image]" * 8 + "to the end, "
    )
    seen += "[image]" * 2 + "at 150[image]"
    options = "\nA. one\nB. two\nC. three\nD. four\nE. five"
    assert e["prompt"] == f"subtitles:{seen}\nquestion: \nWhich subtitles appear?{options}" + LETTER
    assert (e["video"], e["label"], e["groups"]) == (
        "videos/86CxyhFV9MI.mp4",
        "E",
        ("all", "3 to 10 min"),
    )
    seen = "[image]at 1 " + "[image]" * 3 + "at 3.375"  # four frames: one for each whole second
    assert (
        short["prompt"] == f"subtitles:{seen}\nquestion: \nWhat is he doing?\nA. a\nB. b" + LETTER
    )
    assert short["groups"] == ("all", "8 to 15 s")
    for file in (tmp_path / "subtitles").iterdir():
        file.unlink()
    plain = longvideobench.examples(tmp_path, subtitles=False)
    assert [e["prompt"] for e in plain] == [
        f"Which subtitles appear?{options}" + LETTER,
        "What is he doing?\nA. a\nB. b" + LETTER,
    ]
    assert [e["label"] for e in plain] == ["E", "A"]


def test_mmvu_examples(tmp_path):
    art, choice, nerve = read("mmvu", tmp_path).values()
    assert (art["id"], art["video"], art["label"]) == (
        "validation_0",
        "videos/Art/0.mp4",
        "Dolly Zoom",
    )
    assert art["choices"] == {} and art["prompt"] == "Which technique?" + DIRECT
    assert (
        choice["prompt"] == "Which sort?\nA. heap\nB. quick\nC. merge\nD. bubble\nE. radix" + LETTER
    )
    assert choice["label"] == "E" and nerve["label"] == "cranial nerve III"
    assert [e["groups"] for e in (art, choice, nerve)] == [
        ("all", "open", "Humanities and Social Science"),
        ("all", "multiple choice", "Engineering"),
        ("all", "open", "Healthcare"),
    ]
    assert len(mmvu.DISCIPLINE_OF) == 27


# ----------------------------------------------------------------------------------- what is broken


def spoiled(task, file, change):
    files = TASKS[task][1]()
    rows = files[file]
    rows[-1] = rows[-1] | change
    for name in [name for name, value in change.items() if value is ...]:
        del rows[-1][name]
    return files


PARQUET, SEQUENCE = "videomme/test-00000-of-00001.parquet", "json/action_sequence.json"


@pytest.mark.parametrize(
    "task, file, change, message",
    [
        ("videomme", PARQUET, {"answer": "E"}, "the answer 'E' is none of its choices"),
        ("videomme", PARQUET, {"answer": None}, "the answer None is none of its choices"),
        ("videomme", PARQUET, {"duration": "brief"}, "it has no 'brief'"),
        ("videomme", PARQUET, {"options": ["Apples", "Candles"]}, ""),
        ("videomme", PARQUET, {"options": None}, ""),
        ("mvbench", SEQUENCE, {"answer": "four"}, "the answer 'four' is none of its choices"),
        ("mvbench", SEQUENCE, {"candidates": ...}, "it has no 'candidates'"),
        ("mvbench", SEQUENCE, {"end": ...}, "it has no 'end'"),
        ("mvbench", SEQUENCE, {"end": "soon"}, "its end, 'soon', is not a number"),
        ("mlvu", "json/3_ego.json", {"answer": "four"}, "the answer 'four' is none of its choices"),
        ("mlvu", "json/3_ego.json", {"question": None}, ""),
        (
            "longvideobench",
            "lvb_val.json",
            {"correct_choice": 2},
            "its correct_choice, 2, is not a whole",
        ),
        ("longvideobench", "lvb_val.json", {"correct_choice": ...}, "it has no 'correct_choice'"),
        ("longvideobench", "lvb_val.json", {"duration_group": 30}, "it has no 30"),
        ("mmvu", "validation.json", {"answer": 3}, "its answer, 3, is not a text"),
        (
            "mmvu",
            "validation.json",
            {"question_type": "multiple-choice"},
            "the answer 'cranial nerve III' is none",
        ),
        ("mmvu", "validation.json", {"question_type": "yes-no"}, "it has no 'yes-no'"),
    ],
)
def test_a_row_that_is_not_as_published_is_named(task, file, change, message, tmp_path):
    write(task, tmp_path, files := spoiled(task, file, change))
    with pytest.raises(UserError) as failure:
        TASKS[task][0].examples(tmp_path)
    said, row = str(failure.value), len(files[file]) - 1
    assert (
        said.startswith(f"{tmp_path}/{file}:{row}: not as published: {message}")
        and "\n" not in said
    )


@pytest.mark.parametrize("task, i", [(task, i) for task in CLIPS for i in (0, -1)])
def test_a_clip_that_is_not_there_is_named(task, i, tmp_path):
    write(task, tmp_path)
    clip = tmp_path / CLIPS[task][i]
    clip.unlink()
    if clip.suffix == ".jpg":  # of a folder of frames
        (clip := clip.parent).rmdir()
    with pytest.raises(UserError) as failure:
        TASKS[task][0].examples(tmp_path)
    said = str(failure.value)
    assert (
        clip.name in said
        and "no such file or folder; fix: --data: a folder with " in said
        and "\n" not in said
    )


@pytest.mark.parametrize("task", TASKS)
def test_a_file_of_questions_that_is_missing_or_cut_off_is_named(task, tmp_path):
    file = list(TASKS[task][1]())[0]
    with pytest.raises(
        UserError, match=rf"{file}: no such file or folder; fix: --data: a folder with {file}"
    ):
        TASKS[task][0].examples(tmp_path)
    put(tmp_path / file, '[{"id": 1')
    with pytest.raises(
        UserError, match=rf"{file}: cannot be read: .+; fix: mend it, or fetch it again"
    ):
        TASKS[task][0].examples(tmp_path)


def test_the_subtitles_that_are_missing_are_named(tmp_path):
    write("longvideobench", tmp_path)
    (tmp_path / "subtitles/x_en.json").unlink()
    with pytest.raises(
        UserError, match="subtitles/x_en.json: no such file or folder; fix: --data: a folder with"
    ):
        longvideobench.examples(tmp_path)


def test_parquet_without_pyarrow_is_said(tmp_path, monkeypatch):
    write("videomme", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r"pyarrow: reads .+\.parquet, not installed; fix: pip install pyarrow"
    ):
        videomme.examples(tmp_path)


# ------------------------------------------------------------------------------------------- scores

FRUIT = {"A": "red apples", "B": "candles", "C": "berries", "D": "three kinds"}


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("C", "C"),
        ("C.", "C"),
        ("C. berries", "C"),
        ("(C)", "C"),
        (" 'B' ", "B"),
        ("B: candles", "B"),
        ("Apples, surely", "A"),
        ("\n Clearly so", "C"),  # their first letter is a choice
        ("The answer is (B), not (D", "B"),
        ("it is (B) or (D)", "D"),
        ("I say B or C .", "C"),
        ("I say B.", "B"),
        ("it shows candles on a large tree", "B"),
        ("it shows berries and CANDLES on trees", "B"),
        ("candles", None),  # fewer than six words are not searched
        ("E", None),
        ("c", None),
        ("", None),
        (".", None),
        ("no idea", None),
        ("the nice", None),
    ],
)
def test_which_letter_an_answer_is_read_as(answer, letter):
    assert video_choices.parse(answer, FRUIT) == letter


def test_what_generated_answers_are_read_as_is_what_the_official_code_reads():
    asked = list(long_answers())
    read = [
        video_choices.parse(text, options) for options, text in asked
    ]  # None where eval_lvbench.py draws lots
    assert len(set(read)) == 9 and digests(read) == OFFICIAL.split()


OFFICIAL = (
    "f97860d1 a3092de6 9d6ed6bb 26d8bf71 831e6592 4bc87615 fa8cf65e 12e1619a 4273d5b5 d120ac7c"
)


def close(score, percent, chance, n):
    return score == {"score": pytest.approx(percent), "chance": pytest.approx(chance), "n": n}


def test_scores_over_all_and_by_length(tmp_path):
    found = list(read("videomme", tmp_path).values())
    scores = videomme.score(found, ["C", "I cannot tell", "B. 3.5 m."])  # 1, a guess, 0
    assert list(scores) == ["all", "short, to 2 min", "long, 30 to 60 min"]
    assert close(scores["all"], 125 / 3, 25, 3) and close(scores["short, to 2 min"], 62.5, 25, 2)
    assert close(scores["long, 30 to 60 min"], 0, 25, 1)

    found = list(read("longvideobench", tmp_path).values())
    scores = longvideobench.score(found, ["E", "I cannot tell"])
    assert list(scores) == [
        "all",
        "8 to 15 s",
        "3 to 10 min",
    ]  # in this order, not that of the file
    assert close(scores["all"], 75, 35, 2) and close(scores["8 to 15 s"], 50, 50, 1)
    assert close(scores["3 to 10 min"], 100, 20, 1)


def test_scores_that_are_a_mean_over_tasks(tmp_path):
    found = read("mvbench", tmp_path)
    right = dict.fromkeys(found, "(B) two") | {"action_antonym-0": "B", "action_antonym-1": "Z"}
    scores = mvbench.score(list(found.values()), list(right.values()))
    assert list(scores) == ["mean", *mvbench.TASKS]
    assert close(scores["Action Antonym"], 12.5, 37.5, 2) and close(
        scores["Action Sequence"], 100, 100 / 3, 2
    )
    assert close(scores["mean"], (19 * 100 + 12.5) / 20, (19 * 100 / 3 + 37.5) / 20, 22)

    found = read("mlvu", tmp_path)
    said = dict.fromkeys(found, "A") | {"1_plotQA-1": "B", "2_needle-0": "no idea"}
    scores = mlvu.score(list(found.values()), list(said.values()))
    assert list(scores) == [
        "M-Avg",
        "plotQA",
        "needle",
        "ego",
        "count",
        "order",
        "anomaly_reco",
        "topic_reasoning",
    ]
    assert close(scores["plotQA"], 50, 25, 2) and close(scores["ego"], 100, 25, 1)
    assert close(scores["needle"], 0, 25, 1)  # no answer is right, so no guess is
    assert close(scores["M-Avg"], 550 / 7, 25, 8)


def test_mmvu_scores(tmp_path):
    found = list(read("mmvu", tmp_path).values())
    scores = mmvu.score(found, ["The dolly zoom.", "E. radix", "cranial nerve IV"])
    assert list(scores) == [
        "all",
        "multiple choice",
        "open",
        *list(mmvu.DISCIPLINES)[1:],
    ]  # none of Science is there
    assert close(scores["all"], 200 / 3, 20 / 3, 3) and close(scores["multiple choice"], 100, 20, 1)
    assert close(scores["open"], 50, 0, 2) and close(scores["Healthcare"], 0, 0, 1)
    assert close(scores["Engineering"], 100, 20, 1) and close(
        scores["Humanities and Social Science"], 100, 0, 1
    )


@pytest.mark.parametrize(
    "answer, right",
    [
        ("dolly zoom", 1),
        ("It is the DOLLY ZOOM.", 1),
        ("zoom", 1),
        ("zooming", 0),
        ("dolly, zoom", 0),
        ("", 0),
    ],
)
def test_an_open_answer_is_right_if_it_holds_the_true_one_or_is_part_of_it(answer, right):
    result = mmvu.grade(answer, {"choices": {}, "label": "Dolly Zoom", "groups": ("all",)})
    assert (result.credit, result.chance) == (right, 0)


@pytest.mark.parametrize("task", TASKS)
def test_each_offers_what_evaluate_asks_for(task, tmp_path):
    module, found = TASKS[task][0], list(read(task, tmp_path).values())
    scores = module.score(found, ["A"] * len(found))
    assert module.PUBLISHED[0] == next(iter(scores)) and module.MAX_NEW_TOKENS == 1024
    assert all(0 < s["n"] <= len(found) and 0 <= s["chance"] <= 50 for s in scores.values())
