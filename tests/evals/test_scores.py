"""evals/: each scorer against the official one, on its published answers and on generated ones."""

import json
import random

import pytest

from evals import (
    gqa,
    llava_bench,
    mmbench,
    mme,
    mmmu,
    mmvet,
    pope,
    scienceqa,
    seedbench,
    textvqa,
    vqa,
    vqav2,
)
from evals.options import parse_choice
from evals.scores import OpenResult, best_constant, open_scores
from tests.tools.environment import shared
from tests.tools.generated_answers import digests, long_answers, short_answers

EVAL = "assets/eval"


def read(path):
    return json.loads(shared(f"{EVAL}/{path}").read_text())


def read_lines(path):
    return [json.loads(line) for line in shared(f"{EVAL}/{path}").read_text().splitlines()]


def scores_of(scores, digits=2):
    return {name: round(s["score"], digits) for name, s in scores.items()}


# -------------------------------------------------------------------------------- generated answers

# Of the outputs of vqaEval.py, m4c_evaluator.py, MMMU's eval_utils.py and VLMEvalKit's
# matching_util.py.
OFFICIAL = {
    "vqa": "97a15dd0 2e7f4a4e e1c9154a 65db8526 ad677440 "
    "c3491b49 18b8f4e1 e17fa601 86b532df e33a33bb",
    "m4c": "5bf2b30d 733bf686 3bca329a f7062b66 209a93f2 "
    "bf2a6df7 0149e8cb 4e90e9ed fbd6be2f ca5179e2",
    "choice": "28a8a610 f95dbe94 69da68ab f59afbf7 76629419 "
    "b346780c fa0be97b 842377c8 1ae4bb96 0bbc417b",
    "open": "de1b608a 76e78a53 b488b4b1 06a3473c 216d2baa "
    "6de83afe 45207cb5 233d3a8d 6bd55756 fb38c95c",
    "mmbench": "2f96fe4d 79584488 147124ab 31eed5e6 a00a398e "
    "9a143dd6 11770c41 6ce2b723 fa5d88cf e9a3f98e",
}


@pytest.mark.parametrize("normalise, name", [(vqa.official, "vqa"), (vqa.m4c, "m4c")])
def test_normalisation_of_generated_answers_is_the_official_one(normalise, name):
    outputs = [normalise(text) for text in short_answers()]
    assert len(set(outputs)) > 4000
    assert digests(outputs) == OFFICIAL[name].split()


def test_what_generated_answers_are_read_as_is_what_the_official_code_reads():
    asked = list(long_answers())
    letters = [parse_choice(text, choices) for choices, text in asked]
    assert len(set(letters)) == 9 and digests(letters) == OFFICIAL["choice"].split()
    meanings = [sorted(map(repr, mmmu.parse_open(text))) for _, text in asked]
    assert digests(meanings) == OFFICIAL["open"].split()
    letters = [mmbench.parse(text, choices) for choices, text in asked]
    assert len(set(letters)) == 10 and digests(letters) == OFFICIAL["mmbench"].split()


# ---------------------------------------------------------------- VQAv2, TextVQA: ten human answers


@pytest.mark.parametrize(
    "text, official, m4c",
    [
        ("The cat", "cat", "cat"),
        ("Two dogs, 1,000", "2 dogs 1000", "2 dogs 1000"),
        ("dont stop-sign", "don't stop sign", "don't stop sign"),
        ("5. 3.5 a.m.", "5 3.5 am", "5 3.5 am"),
        ("what?", "what", "what"),
        ("the man's", "man's", "man 's"),
        ("\nlet's lets\t", "let's lets", "let 's lets"),
        ("x" + "." * 40, "x" + "." * 8, "x" + "." * 8),
    ],
)
def test_normalisation(text, official, m4c):
    assert (vqa.official(text), vqa.m4c(text)) == (official, m4c)


def vqa_accuracy(answer, humans):
    normalise, humans = vqa.prepare(humans)
    return vqa.soft_accuracy(normalise(answer), humans)


def textvqa_accuracy(answer, humans):
    return vqa.soft_accuracy(vqa.m4c(answer), [vqa.m4c(text) for text in humans])


def test_accuracy_of_ten_answers():
    humans = ["red"] * 2 + ["Blue."] * 4 + ["a green one"] * 4
    assert vqa_accuracy("red", humans) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("blue", humans) == 1 == textvqa_accuracy("The blue", humans)
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0 and vqa_accuracy("yes\n", ["yes"] * 10) == 1
    assert textvqa_accuracy("Yes", ["yes"] * 10) == 1
    assert vqa.credit_of(["a", "a", "b"]) == {
        "a": pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3),
        "b": pytest.approx(2 / 9),
    }


def test_vqa_and_textvqa_are_the_official_ones():
    golden = read("vqa/golden_vqa.json")
    for row in golden["normalisation"]:
        assert vqa.official(row["text"]) == row["vqa_official"], row
        assert vqa.m4c(row["text"]) == row["m4c_evalai"], row
    assert len(golden["normalisation"]) == 80 and len(golden["accuracy"]) == 20
    for row in golden["accuracy"]:
        assert (
            round(100 * vqa_accuracy(row["prediction"], row["gt_answers"]), 2)
            == row["vqa_official_accuracy_pct"]
        )
        assert textvqa_accuracy(row["prediction"], row["gt_answers"]) == row["textvqa_m4c_accuracy"]


def test_scores_of_short_answers():
    """Scored is what the official pipeline scores: server files, predictions, letters."""
    one, two = (
        {"label": ["yes"] * 10, "type": "yes/no"},
        {"label": ["2"] * 4 + ["two"] * 6, "type": "number"},
    )
    scores = vqav2.score([one, two, {"label": None}], ["Yes.", "Two", "x"])
    assert {name: (s["score"], s["chance"], s["n"]) for name, s in scores.items()} == {
        "all": (100, 50, 2),
        "yes/no": (100, 100, 1),
        "number": (100, 100, 1),
    }
    assert (
        vqav2.score([one], ["no"])["all"]["score"] == 0
        and vqav2.score([{"label": None}], ["x"]) == {}
    )
    scores = textvqa.score(
        [{"label": ["Stop!"] * 10}, {"label": ["a", "the", "b"] * 3 + ["stop"]}], ["stop", "x"]
    )
    assert scores["all"] == {"score": 50, "chance": pytest.approx(65), "n": 2}  # "" or "stop"
    examples = [
        {"label": "no", "type": "binary"},
        {"label": "man", "type": "open"},
        {"label": "no", "type": "binary"},
    ]
    scores = gqa.score(examples, ["No.", "a man", "no"])
    assert scores["all"] == {
        "score": pytest.approx(200 / 3),
        "chance": pytest.approx(200 / 3),
        "n": 3,
    }
    assert scores["binary"]["score"] == 100 and scores["open"]["score"] == 0
    examples = [
        {"label": "B", "kind": "Scene Understanding"},
        {"label": "A", "kind": "Text Recognition"},
    ]
    assert seedbench.score(examples, ["B", "A."])["all"] == {"score": 50, "chance": 25, "n": 2}


def test_chance_of_open_answers_is_the_best_constant_answer():
    credits = [{"yes": 1, "no": 0.5}, {"no": 0.75}, {"red": 1}]
    assert best_constant(credits) == ("no", 1.25 / 3) and best_constant([{}]) == ("", 0)
    names = [("all", "a"), ("all", "b"), ("all", "b")]
    results = []
    for groups, credit, credit_of in zip(names, (1, 0, 0.5), credits, strict=True):
        results.append(OpenResult(groups, credit, credit_of))
    scores = open_scores(results)
    assert scores["all"] == {"score": 50, "chance": pytest.approx(125 / 3), "n": 3}
    assert scores["a"] == {"score": 100, "chance": 100, "n": 1} and scores["b"]["chance"] == 50


# ---------------------------------------------------------------------------------------- POPE, MME


def test_pope():
    labels, said = ["yes", "yes", "yes", "no", "no"], ["yes", "yes", "no", "yes", "no"]
    got = pope.counts(said, labels)
    assert (got["TP"], got["FP"], got["TN"], got["FN"]) == (2, 1, 1, 1) and got[
        "yes_ratio"
    ] == 3 / 5 == got["acc"]
    assert got["precision"] == 2 / 3 == got["recall"] and got["f1"] == pytest.approx(2 / 3)
    assert pope.counts(["no"], ["yes"])["f1"] == 0
    examples = [{"label": x, "split": s} for s in ("random", "popular") for x in labels]
    scores = pope.score(examples, said + ["Yes."] * 5)
    assert scores["F1"] == {
        "score": pytest.approx(100 * (2 / 3 + 0.75) / 2),
        "chance": pytest.approx(75),
        "n": 10,
    }
    assert (
        scores["popular F1"]["score"] == pytest.approx(75)
        and scores["popular says yes"]["score"] == 100
    )
    assert (
        scores["random accuracy"] == {"score": 60, "chance": 60, "n": 5}
        and "adversarial F1" not in scores
    )


def test_pope_is_the_official_one():
    expected = read("pope/expected_synthetic_first600.json")["results"]
    examples, answers = [], []
    for split in pope.SPLITS:
        rows = read_lines(f"pope/coco_pope_{split}.json")[:600]
        mine = [row["text"] for row in read_lines(f"pope/synthetic_answers_{split}_first600.jsonl")]
        got = pope.counts([pope.yes_or_no(text) for text in mine], [row["label"] for row in rows])
        assert got == expected[split]
        examples += [{"label": row["label"], "split": split} for row in rows]
        answers += mine
    scores = pope.score(examples, answers)
    mean = sum(e["f1"] for e in expected.values()) / 3
    assert (
        scores["F1"]["score"] == pytest.approx(100 * mean, abs=1e-12) and scores["F1"]["n"] == 1800
    )
    assert scores["popular recall"]["score"] == 100 * expected["popular"]["recall"]


@pytest.mark.parametrize(
    "answer, said",
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("It's no", "other"),
        ("eyes", "yes"),
        ("I know", "other"),
        ("", "other"),
    ],
)
def test_mme_reads_the_first_four_letters(answer, said):
    assert mme.parse(answer) == said


def test_mme():
    def example(task, picture, label):
        return {"task": task, "group": f"{task}/{picture}", "label": label}

    examples = [
        example("count", 1, "Yes"),
        example("count", 1, "No"),
        example("count", 2, "Yes"),
        example("count", 2, "No"),
        example("OCR", 1, "Yes"),
        example("OCR", 1, "No"),
        example("code_reasoning", 1, "Yes"),
        example("code_reasoning", 1, "No"),
    ]
    scores = mme.score(examples, ["yes", "no", "no", "No", "no", "yes", "Yes", "NO"])
    assert (
        scores["count"] == {"score": 75 + 50, "chance": 75, "n": 4} and scores["OCR"]["score"] == 0
    )
    assert scores["Perception"] == {"score": 125, "chance": 150, "n": 6}
    assert scores["Cognition"] == {"score": 200, "chance": 75, "n": 2} and "color" not in scores


def test_mme_is_the_official_one():
    expected, examples, answers = read("mme/expected_LaVIN.json"), [], []
    for task in mme.TASKS:
        for line in shared(f"{EVAL}/mme/LaVIN/{task}.txt").read_text().splitlines():
            picture, _, label, answer = line.split("\t")
            examples.append({"task": task, "group": f"{task}/{picture}", "label": label})
            answers.append(answer)
    scores = mme.score(examples, answers)
    for name, row in expected["tasks"].items():
        assert scores[name]["score"] == row["score"] and scores[name]["n"] == row["n_questions"]
    assert {name: scores[name]["score"] for name in mme.GROUPS} == expected["totals"]
    assert (
        scores_of(scores, 4)["Perception"] == 963.6114
        and scores_of(scores, 4)["Cognition"] == 249.6429
    )
    assert set(scores) == {*mme.TASKS, *mme.GROUPS} and scores["Perception"]["chance"] == 750


# ------------------------------------------------------------------------- ScienceQA, MMMU, MMBench


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("B. because", "B"),
        ("B.", None),
        ("B because", None),
        ("b", None),
        ("F", None),
        ("", None),
        ("So. The answer is C. Good.", "C"),
        ("The answer is C", None),
        ("The answer is C. The answer is D.", None),
    ],
)
def test_scienceqa_reads_letters_as_llava_does(answer, letter):
    assert scienceqa.parse(answer) == letter


def science(ids, answers):
    problems = read("scienceqa/problems.json")
    examples = [
        {
            "names": scienceqa.group_names(problems[i]),
            "label": "ABCDE"[problems[i]["answer"]],
            "choices": problems[i]["choices"],
        }
        for i in ids
    ]
    return scienceqa.score(examples, answers)


def test_scienceqa_is_the_official_one():
    expected, ids = (
        read("scienceqa/expected_subset.json"),
        read("scienceqa/pid_splits.json")["test"],
    )
    names = {
        "acc_natural": "natural science",
        "acc_social": "social science",
        "acc_language": "language science",
        "acc_has_text": "text",
        "acc_has_image": "IMG",
        "acc_no_context": "no context",
        "acc_average": "all",
        "acc_grade_1_6": "grades 1-6",
        "acc_grade_7_12": "grades 7-12",
    }
    llava = {
        row["question_id"]: row["text"]
        for row in read_lines("scienceqa/answers_llava_lcs_subset.jsonl")
    }
    gpt3 = read("scienceqa/results_gpt3_QCM-ALE_2_seed_3_subset.json")["results"]
    for model, answers in (
        ("llava_lcs_558k_sqa_12e_vicuna_v1_3_13b", [llava[i] for i in ids]),
        ("gpt3_QCM-ALE_2_seed_3", ["ABCDE"[gpt3[i]] for i in ids]),
    ):
        scores = science(ids, answers)
        official = expected[model]["official_evaluate_acc_on_subset"]
        for key, value in official.items():
            name = names.get(key, key.removeprefix("acc_"))
            assert f"{scores[name]['score']:.2f}" == value, (model, key)
        assert {"acc_average", "acc_geography"} <= official.keys() and scores["all"]["n"] == 361
    llava = science(ids, [llava[i] for i in ids])
    assert (scores_of(llava)["all"], scores_of(llava)["IMG"], scores_of(scores)["all"]) == (
        91.14,
        89.22,
        74.52,
    )
    assert llava["IMG"]["n"] == 167 and 25 < llava["all"]["chance"] < 50


def test_mmmu_scores():
    def example(number, label, choices=None, image="1.png"):
        subject = {"subject": "Art" if number < 3 else "Math"}
        return subject | {"image": image, "label": label, "choices": choices or {}}

    two = {"A": "one", "B": "two"}
    examples = [
        example(1, "B", two),
        example(2, "A", two),
        example(3, ["24/7", "3.429"]),
        example(4, "A", two, None),
        example(5, "right", image=None),
    ]
    scores = mmmu.score(examples, ["(B)", "B", "x = 3.4286", "B", "right"])
    guess = (
        random.Random(42).choice(["A", "B"]) == "A"
    )  # what it says of a picture that it has not seen is not read
    assert guess and scores["Math"] == {"score": 100 * (1 + guess) / 3, "chance": 50 / 3, "n": 3}
    assert scores["Art and Design"] == {"score": 50, "chance": 50, "n": 2} == scores["Art"]
    assert scores["pictures missing"] == {"score": 50 * guess, "chance": 25, "n": 2}
    assert scores["Overall"]["n"] == 5 and list(scores)[:3] == [
        "Overall",
        "pictures missing",
        "Art and Design",
    ]


def test_mmmu_is_the_official_one():
    labels, expected = read("mmmu/answer_dict_val.json"), read("mmmu/expected.json")
    for file in ("llava1.5_13b/total_val_output.json", "llava1.5_13b_val.json"):
        said, examples = read(f"mmmu/example_outputs/{file}"), []
        for name in said:
            label = labels[name]["ground_truth"]
            choices = (
                dict.fromkeys("ABCDEFGHI", "\0")
                if labels[name]["question_type"] == "multiple-choice"
                else {}
            )
            examples.append(
                {"subject": mmmu.subject(name), "image": "x", "label": label, "choices": choices}
            )
        scores = mmmu.score(examples, list(said.values()))
        for name, row in expected[f"main_eval_only[{file}]"].items():
            mine = scores[name.removeprefix("Overall-")]
            assert (round(mine["score"] / 100, 3), mine["n"]) == (row["acc"], row["num"]), name
        assert len(scores) == 1 + 6 + 30
    assert round(scores["Overall"]["score"], 1) == 36.0


def test_mmmu_reads_every_answer_as_the_official_code_does():
    right = rows = 0
    for model, subjects in read("mmmu/expected.json")["parse"].items():
        for subject, official in subjects.items():
            for row in read(f"mmmu/example_outputs/{model}/{subject}/output.json"):
                want, rows = official["rows"][row["id"]], rows + 1
                if row["question_type"] == "multiple-choice":
                    said = parse_choice(row["response"], row["index2ans"])
                    assert (said is None) == want["random_fallback"]
                    assert said is None or said == want["parsed"]
                    good = said == row["answer"]
                else:
                    assert mmmu.parse_open(row["response"]) == set(want["parsed"])
                    good = mmmu.open_right(row["response"], row["answer"])
                if not want["random_fallback"]:
                    assert good == (want["judge"] == "Correct"), row["id"]
                right += good and model == "llava1.5_13b"
    assert (rows, right) == (990, 329)


def test_mmbench_scores_all_rotations_of_a_question():
    def example(index, label, choices=2):
        choices = {letter: f"option {letter}{index}" for letter in "ABCD"[:choices]}
        return {
            "label": label,
            "choices": choices,
            "group": index % 10**6,
            "cells": {"category": "colour"},
        }

    examples = [
        example(1, "A"),
        example(2, "B", 4),
        example(1000001, "B"),
        example(1000002, "A", 4),
        example(2000002, "A", 4),
        example(3, None),
    ]
    scores = mmbench.score(examples, ["A", "B.", "B", "B", "A", "A"])
    assert scores["circular"] == {
        "score": 50,
        "chance": pytest.approx(100 * (1 / 4 + 1 / 64) / 2),
        "n": 2,
    }
    assert scores["vanilla"] == {"score": 100, "chance": 37.5, "n": 2} and list(scores)[2:] == [
        "colour"
    ]
    assert mmbench.score(examples[-1:], ["A"]) == {}


# ------------------------------------------------------------------------------ LLaVA-Bench, MM-Vet


@pytest.mark.parametrize(
    "review, pair",
    [
        ("9 8\nGood.", [9, 8]),
        ("9,8.5\nx", [9, 8.5]),
        ("9, 8", [-1, -1]),
        ("Nine 8", [-1, -1]),
        ("", [-1, -1]),
    ],
)
def test_llava_bench_reads_reviews_as_llava_does(review, pair):
    assert llava_bench.parse(review) == pair


def test_llava_bench_is_the_official_one():
    rows = read_lines("llava-bench/review_llama-13b_vicuna-13b.jsonl")
    expected = read("llava-bench/expected_review.json")
    unread = [row for row in rows if llava_bench.parse(row["text"]) != row["score"]]
    assert [row["text"][:40] for row in unread] == [
        "First, I will solve the problem independ"
    ] * 3  # scored by hand
    s = llava_bench.summary([("all of them", row["score"]) for row in rows])["all of them"]
    assert [s["score"], s["gpt4"], s["model"]] == expected["relative_pct,first_x10,second_x10"]
    assert s["n"] == expected["n"] == 80
    rules = read("llava-bench/rule.json")
    for category in llava_bench.CATEGORIES:
        assert rules[f"llava_bench_{category}"] == {"role": "Assistant", "prompt": llava_bench.RULE}


def test_llava_bench_sums_up_by_category():
    scores = llava_bench.summary([("conv", [8, 6]), ("detail", [10, 5]), ("conv", [8, 9])])
    assert scores["all"] == {"score": 76.9, "chance": None, "n": 3, "gpt4": 86.7, "model": 66.7}
    assert scores["conv"]["score"] == 93.8 and scores["detail"]["score"] == 50


def test_mmvet_writes_the_official_format(tmp_path):
    answers = read("mm-vet/llava_llama2_13b_chat.json")
    (file,) = mmvet.write(
        [{"id": name} for name in answers], list(answers.values()), tmp_path / "mmvet", tmp_path
    )
    assert file.read_text() == shared(f"{EVAL}/mm-vet/llava_llama2_13b_chat.json").read_text()
    assert len(answers) == 218
