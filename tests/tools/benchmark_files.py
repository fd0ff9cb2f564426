"""The files of every benchmark, a few rows each, in LLaVA's layout and in the original one.

Of the benchmarks in evals/row_files.py, Hugging Face's layout stands in the place of LLaVA's.
"""

import base64
import contextlib
import csv
import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

import evaluate
from config import Model
from inputs.templates import byte_tokenizer
from model import LLaVA

PYARROW = find_spec("pyarrow")
WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def put(file, value):
    """A JSON file; .jsonl and POPE's .json: a row a line; text and bytes as they are."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, list) and (file.suffix == ".jsonl" or "coco_pope" in file.name):
        value = "".join(json.dumps(row) + "\n" for row in value)
    if not isinstance(value, str | bytes):
        value = json.dumps(value)
    file.write_bytes(value.encode() if isinstance(value, str) else value)


def png(shade=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (shade * 60 % 256, 100, 255 - shade * 60 % 256)).save(file, "PNG")
    return file.getvalue()


def pictures(folder, *names):
    for i, name in enumerate(names):
        put(folder / name, png(i))


def vqav2(d, llava, split="test-dev2015", images="test2015"):
    asked = [(42000, 42, "What is it?"), (42001, 42, "Is it red?"), (5000, 5, "How many?")]
    names = {i: f"COCO_{images}_{i:012d}.jpg" for i in (42, 5)}
    pictures(d / images, *names.values())
    whole = [{"question_id": n, "image_id": i, "question": q} for n, i, q in asked]
    if llava:
        text = [
            {"question_id": n, "image": names[i], "text": q + WORD, "category": "default"}
            for n, i, q in asked
        ]
        put(d / f"llava_vqav2_mscoco_{split}.jsonl", text)
        put(
            d / "llava_vqav2_mscoco_test2015.jsonl",
            [{"question_id": n} for n in (777, 42001, 42000, 5000)],
        )
    else:
        put(d / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": whole})
        rest = [*whole, {"question_id": 777, "image_id": 5, "question": "?"}]
        put(d / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": rest})
    return [(str(n), q + WORD, None) for n, _, q in asked]


def vqav2_val(d, llava):
    expected = vqav2(d, llava, "val2014", "val2014")
    rows = [
        {
            "question_id": int(n),
            "answers": [{"answer": a} for a in ["red"] * 9 + ["Blue"]],
            "answer_type": "other",
        }
        for n, _, _ in expected
    ]
    put(d / "v2_mscoco_val2014_annotations.json", {"annotations": rows})
    return [(n, q, ["red"] * 9 + ["Blue"]) for n, q, _ in expected]


def gqa(d, llava):
    table = {
        f"20{i}": {"imageId": f"n{i}", "question": q, "answer": a, "types": {"structural": kind}}
        for i, q, a, kind in (
            (1, "Is it overcast?", "no", "verify"),
            (2, "Who is it?", "man", "query"),
        )
    }
    pictures(d / ("data/images" if llava else "images"), "n1.jpg", "n2.jpg")
    put(d / ("data" if llava else "questions1.2") / "testdev_balanced_questions.json", table)
    if llava:
        rows = [
            {"question_id": n, "image": f"{row['imageId']}.jpg", "text": row["question"] + WORD}
            for n, row in table.items()
        ]
        put(d / "llava_gqa_testdev_balanced.jsonl", rows)
    return [("201", "Is it overcast?" + WORD, "no"), ("202", "Who is it?" + WORD, "man")]


def scienceqa(d, llava):
    rest = {"subject": "natural science", "topic": "biology", "grade": "grade5"}
    problems = {
        "7": {
            "question": "Which?",
            "choices": ["cat", "dog"],
            "answer": 1,
            "hint": "",
            "image": "image.png",
        }
        | rest,
        "9": {
            "question": "Where?",
            "choices": ["a", "b", "c"],
            "answer": 0,
            "hint": "A map.",
            "image": None,
        }
        | rest,
        "8": {"question": "unused", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None}
        | rest,
    }
    put(d / "problems.json", problems)
    put(d / "pid_splits.json", {"train": ["8"], "test": ["7", "9"]})
    pictures(d / "images/test/7", "image.png")
    if llava:
        first = {"from": "human", "value": "<image>\nWhich?\nA. cat\nB. dog"}
        second = {"from": "human", "value": "Context: A map.\nWhere?\nA. a\nB. b\nC. c"}
        put(
            d / "llava_test_CQM-A.json",
            [
                {"id": "7", "image": "7/image.png", "conversations": [first]},
                {"id": "9", "conversations": [second]},
            ],
        )
    return [
        ("7", "Which?\nA. cat\nB. dog" + LETTER, "B"),
        ("9", "Context: A map.\nWhere?\nA. a\nB. b\nC. c" + LETTER, "A"),
    ]


def textvqa(d, llava, ocr="\nReference OCR token: STOP, 5"):
    rows = [
        {"question_id": 30 + i, "image_id": "ab", "question": q, "answers": ["stop"] * 10}
        for i, q in enumerate(("what is the Brand?", "what does it say?"))
    ]
    put(d / "TextVQA_0.5.1_val.json", {"data": rows})
    pictures(d / "train_images", "ab.jpg")
    expected = [
        (f"3{i}", f"What {q}?{ocr}{WORD}", ["stop"] * 10)
        for i, q in enumerate(("is the brand", "does it say"))
    ]
    if llava:
        full = [
            e[1] if ocr else e[1].replace("?\n", "?\nReference OCR token: STOP, 5\n")
            for e in expected
        ]
        put(
            d / "llava_textvqa_val_v051_ocr.jsonl",
            [{"question_id": "ab", "image": "ab.jpg", "text": text} for text in full],
        )
    elif ocr:
        put(
            d / "TextVQA_Rosetta_OCR_v0.2_val.json",
            {"data": [{"image_id": "ab", "ocr_tokens": ["STOP", "5"]}]},
        )
    return expected


def pope(d, llava):
    expected, asked = [], []
    for i, split in enumerate(("random", "popular", "adversarial")):
        rows = [
            {
                "question_id": n,
                "image": f"p{i}.jpg",
                "text": f"Is there a {split} {n}?",
                "label": label,
            }
            for n, label in ((1, "yes"), (2, "no"))
        ]
        put(d / ("coco" if llava else ".") / f"coco_pope_{split}.json", rows)
        expected += [(f"{split}-{r['question_id']}", r["text"] + WORD, r["label"]) for r in rows]
        asked = [
            {
                "question_id": 10 * i + r["question_id"],
                "image": r["image"],
                "text": r["text"] + WORD,
                "category": split,
            }
            for r in rows
        ] + asked
    pictures(d / "val2014", "p0.jpg", "p1.jpg", "p2.jpg")
    if llava:
        put(d / "llava_pope_test.jsonl", asked)
    return expected


def mme(d, llava):
    release = d / "MME_Benchmark_release_version" if llava else d
    lines = (
        "Is it a cat? Please answer yes or no.\tYes\nIs it a dog?  Please answer yes or no.\tNo\n"
    )
    put(release / "count/0001.txt", lines)
    put(release / "landmark/questions_answers_YN/x.txt", lines)
    pictures(release, "count/0001.jpg", "landmark/images/x.png")
    names = ("count/0001", "landmark/x")
    if llava:
        rows = [
            {"question_id": file, "image": file, "text": f"Is it a {what}?{WORD}", "category": "y"}
            for file in ("count/0001.jpg", "landmark/images/x.png")
            for what in ("cat", "dog")
        ]
        put(d / "llava_mme.jsonl", rows)
    return [
        (f"{name}/{i}", f"Is it a {what}?{WORD}", label)
        for name in names
        for i, (what, label) in enumerate((("cat", "Yes"), ("dog", "No")))
    ]


def mmmu(d, llava):
    ids = [f"validation_{s}_1" for s in ("Art", "Math")] + ["validation_Math_2"]
    prompts = ["Who is <image 1>?\n(A) Ann\n(B) Bob\n" + LETTER, "Add <image 1>." + WORD,
               "Compare <image 2> and <image 1>.\n(A) <image 2>\n(B) two\n" + LETTER]  # fmt: skip
    labels = ["B", ["3", "three"], "A"]
    if llava:
        kinds = ("multiple-choice", "short-answer", "multiple-choice")
        rows = [
            {"id": n, "prompt": p, "question_type": kind, "index2ans": {"A": "Ann", "B": "Bob"}}
            for n, p, kind in zip(ids, prompts, kinds, strict=True)
        ]
        rows[0]["image"], rows[1]["image"] = "art_1.png", "math_1.png"
        put(d / "anns_for_eval.json", rows)
        truth = {
            n: {"question_type": k, "ground_truth": t}
            for n, k, t in zip(ids, kinds, labels, strict=True)
        }
        put(d / "eval/answer_dict_val.json", truth)
        pictures(d / "all_images", "art_1.png", "math_1.png")
        return list(zip(ids, prompts, labels, strict=True))
    rows = [
        {
            "id": ids[0],
            "question": "Who is <image 1>?",
            "options": "['Ann', 'Bob']",
            "answer": "B",
            "image_1": 0,
        },
        {
            "id": ids[1],
            "question": "Add <image 1>.",
            "options": "[]",
            "answer": "['3', 'three']",
            "image_1": 1,
        },
        {
            "id": ids[2],
            "question": "Compare <image 2> and <image 1>.",
            "options": "['<image 2>', 'two']",
            "answer": "A",
            "image_1": 2,
            "image_2": 3,
            "image_3": 4,
        },
    ]
    for row in rows:
        row["question_type"] = "multiple-choice" if row["options"] != "[]" else "open"
        for i in range(1, 8):
            row[f"image_{i}"] = (
                {"bytes": png(row[f"image_{i}"]), "path": None} if f"image_{i}" in row else None
            )
    parquet(d / "Art/validation-00000-of-00001.parquet", rows[:1])
    parquet(d / "Math/validation-00000-of-00001.parquet", rows[1:])
    prompts[2] = "<image>\nCompare <image> and <image>.\n(A) <image>\n(B) two\n" + LETTER
    return list(zip(ids, prompts, labels, strict=True))


def parquet(file, rows):
    """As pyarrow writes it, where it is installed; else what `fake_pyarrow` reads."""
    if PYARROW:
        import pyarrow.parquet

        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:

        def coded(value):
            if isinstance(value, dict) and value:
                return {"bytes": base64.b64encode(value["bytes"]).decode()}
            return value

        put(file, json.dumps([{k: coded(v) for k, v in row.items()} for row in rows]))


def fake_pyarrow(monkeypatch):
    """Let `import pyarrow` give what reads the files of `parquet` where it is not installed."""
    if not PYARROW:
        monkeypatch.setitem(sys.modules, "pyarrow", pyarrow_for_tests())


def pyarrow_for_tests():
    """Return a module that reads the files of `parquet` where pyarrow is not installed."""

    class ParquetFile(contextlib.nullcontext):
        def __init__(self, file):
            super().__init__(self)
            self.rows = json.loads(Path(file).read_text())
            for row in self.rows:
                for value in row.values():
                    if isinstance(value, dict):
                        value["bytes"] = base64.b64decode(value["bytes"])

        def iter_batches(self, size, columns):
            for row in self.rows:
                kept = {key: value for key, value in row.items() if key in (columns or row)}
                yield SimpleNamespace(to_pylist=lambda kept=kept: [kept])

    module = ModuleType("pyarrow")
    module.parquet = SimpleNamespace(ParquetFile=ParquetFile)
    return module


def mmvet_files(d, llava):
    rows = [
        ("v1_0", "What is x?", "-1<AND>-5", ["math", "ocr"]),
        ("v1_1", "Who?", "Ann<OR>Bob", ["ocr"]),
    ]
    table = {
        n: {"imagename": f"{n}.png", "question": q, "answer": a, "capability": c}
        for n, q, a, c in rows
    }
    put(d / ("mm-vet" if llava else ".") / "mm-vet.json", table)
    pictures(d / "images", "v1_0.png", "v1_1.png")
    if llava:
        asked = [
            {"question_id": i, "image": f"{row[0]}.png", "text": row[1]}
            for i, row in enumerate(rows)
        ]
        put(d / "llava-mm-vet.jsonl", asked)
    return [(n, q, a) for n, q, a, _ in rows]


def llava_bench_files(d, llava):
    pictures(d / "images", "001.jpg", "002.jpg")
    put(
        d / "context.jsonl",
        [
            {"id": i, "image": f"00{i}.jpg", "caption": c}
            for i, c in ((1, "A city."), (2, ["a", "b"]))
        ],
    )
    rows = [(0, "001.jpg", "Where?", "conv"), (1, "002.jpg", "Describe it.", "detail")]
    put(
        d / "questions.jsonl",
        [{"question_id": n, "image": i, "text": q, "category": c} for n, i, q, c in rows],
    )
    put(
        d / "answers_gpt4.jsonl",
        [{"question_id": n, "text": f"It is {n}.", "answer_id": f"x{n}"} for n in (0, 1)],
    )
    return [(str(n), q, f"It is {n}.") for n, _, q, _ in rows]


def mmbench(d, llava):
    columns = (
        "index question hint A B C D answer category image source l2-category comment split".split()
    )
    image, end = base64.b64encode(png()).decode(), ["colour", None, "made", "perception", "", "dev"]
    rows = [[0, "Which?", "A hint", "red", "blue", "", "", "A", *end],
            [1, 'Say "it"', "nan", "a", "b", "c", "d", "C", *end],
            [1000000, "Which?", "A hint", "blue", "red", "", "", "B", *end]]  # fmt: skip
    for row, picture in zip(rows, (image, image, "0"), strict=True):
        row[9] = picture
    file = d / ("mmbench_dev_20230712.tsv" if llava else "MMBench_DEV_EN.tsv")
    with open(file, "w", newline="") as lines:
        csv.writer(lines, delimiter="\t").writerows([columns, *rows])
    return [
        ("0", "A hint\nWhich?\nA. red\nB. blue" + LETTER, "A"),
        ("1", 'Say "it"\nA. a\nB. b\nC. c\nD. d' + LETTER, "C"),
        ("1000000", "A hint\nWhich?\nA. blue\nB. red" + LETTER, "B"),
    ]


def seedbench(d, llava):
    rows = [
        {
            "question_id": n,
            "question": f"Q{n}?",
            "answer": "B",
            "data_id": f"pic{n}",
            "data_type": kind,
            "question_type_id": 1,
        }
        | {f"choice_{x}": f"{x}{n}" for x in "abcd"}
        for n, kind in (("101", "image"), ("103", "image"), ("v2", "video"))
    ]
    put(d / "SEED-Bench.json", {"question_type": {"Scene Understanding": 1}, "questions": rows})
    pictures(d / "SEED-Bench-image", "pic101", "pic103")
    prompts = {
        n: f"Q{n}?\nA. a{n}\nB. b{n}\nC. c{n}\nD. d{n}" + LETTER for n in ("101", "v2", "103")
    }
    if llava:
        asked = [
            {
                "question_id": int(n) if n.isdigit() else n,
                "image": f"SEED-Bench-image/pic{n}",
                "text": text,
            }
            for n, text in prompts.items()
        ]
        put(d / "llava-seed-bench.jsonl", asked)
    return [(n, prompts[n], "B") for n in ("101", "103")]


def embedded(shade):
    return {"bytes": png(shade), "path": f"{shade}.png"}


def chartqa(d, hub):
    end = "\nAnswer the question with a single word."
    rows = [("How many bars?", "14", 0), ("Which line?", "No", 1), ("What share?", "0.57", 0)]
    if hub:
        kinds = ("human_test", "human_test", "augmented_test")
        table = [
            {"type": kind, "question": q, "answer": a, "image": embedded(i)}
            for kind, (q, a, i) in zip(kinds, rows, strict=True)
        ]
        parquet(d / "data/test-00000-of-00001-e2cd0b7a0f9eb20d.parquet", table)
    else:
        pictures(d / "png", "0.png", "1.png")
        table = [{"imgname": f"{i}.png", "query": q, "label": a} for q, a, i in rows]
        put(d / "test_human.json", table[:2])
        put(d / "test_augmented.json", table[2:])
    return [(str(n), q + end, [a]) for n, (q, a, _) in enumerate(rows)]


def documents(d, hub, split, folder, picture, file, kinds):
    """DocVQA, or InfographicVQA with other names. The rows of a test split have no answers."""
    rows = [
        {
            "questionId": 49153 + i,
            "question": f"What is {i}?",
            "answers": ["1/8/93", f" The {i} "],
            "data_split": split,
            **kinds,
        }
        for i in range(3)
    ]
    for row in rows:
        if split == "test":
            row["answers"] = None
    expected = [(str(r["questionId"]), r["question"] + WORD, r["answers"]) for r in rows]
    if hub:
        for i, row in enumerate(rows):
            row |= {"questionId": str(row["questionId"]), "image": embedded(i % 2)}
        name = {"val": "validation", "test": "test"}[split]
        parquet(d / f"{folder}/{name}-00000-of-00002.parquet", rows[:1])
        parquet(d / f"{folder}/{name}-00001-of-00002.parquet", rows[1:])
        return expected
    for i, row in enumerate(rows):
        if split == "test":
            del row["answers"]
        row[picture] = f"documents/{i % 2}.png" if folder == "DocVQA" else f"{i % 2}.png"
    pictures(d / picture_folder(folder), "0.png", "1.png")
    put(d / file, {"dataset_name": "x", "dataset_split": split, "data": rows})
    return expected


def picture_folder(folder):
    return {"DocVQA": "documents", "InfographicVQA": "infographicsvqa_images"}[folder]


DOCVQA_KINDS = {"question_types": ["handwritten", "form"]}
INFOVQA_KINDS = {"answer_type": ["multi-span"], "operation/reasoning": []}


def docvqa(d, hub, split="val", file="val_v1.0_withQT.json"):
    return documents(d, hub, split, "DocVQA", "image", file, DOCVQA_KINDS)


def docvqa_test(d, hub):
    return docvqa(d, hub, "test", "test_v1.0.json")


def infovqa(d, hub, split="val", file="infographicsVQA_val_v1.0_withQT.json"):
    return documents(d, hub, split, "InfographicVQA", "image_local_name", file, INFOVQA_KINDS)


def infovqa_test(d, hub):
    return infovqa(d, hub, "test", "infographicsVQA_test_v1.0.json")


def ai2d(d, hub):
    rows = [
        {
            "question": f"Which {i}?",
            "options": ["a cat", "b", "3", "d"][: 4 - i],
            "answer": "011"[i],
        }
        | {"image": embedded(i)}
        for i in range(3)
    ]
    parquet(d / "data/test-00000-of-00001.parquet", rows)
    options = ("A. a cat\nB. b\nC. 3\nD. d", "A. a cat\nB. b\nC. 3", "A. a cat\nB. b")
    return [
        (str(i), f"Which {i}?\n{text}{LETTER}", label)
        for i, (text, label) in enumerate(zip(options, "ABB", strict=True))
    ]


def ocrbench(d, hub):
    formula = "Handwritten Mathematical Expression Recognition"
    rows = [
        ("what is written in the image?", ["CENTRE"], "Regular Text Recognition"),
        ("Write the formula.", ["x _ 1\n", "x_1\n"], formula),
        ("what is the brand?", ["12"], "Doc-oriented VQA"),
    ]
    if hub:
        table = [
            {"dataset": "x", "question": q, "question_type": kind, "answer": a}
            | {"image": embedded(i)}
            for i, (q, a, kind) in enumerate(rows)
        ]
        parquet(d / "data/test-00000-of-00001.parquet", table)
    else:
        pictures(d / "OCRBench_Images/set", "0.png", "1.png", "2.png")
        answers = ["CENTRE", ["x _ 1\n", "x_1\n"], 12]
        table = [
            {
                "dataset_name": "x",
                "id": 7,
                "image_path": f"set/{i}.png",
                "question": q,
                "type": kind,
            }
            | {"answers": answers[i]}
            for i, (q, _, kind) in enumerate(rows)
        ]
        put(d / "OCRBench.json", table)
    return [(str(i), q, a) for i, (q, a, _) in enumerate(rows)]


def mmstar(d, hub):
    details = ("recognition", "geometry", "common reasoning")
    cores = ("fine-grained perception", "math", "logical reasoning")
    rows = [
        {"index": i, "question": f"Which {i}?\nOptions: A: x, B: y, C: z, D: w", "answer": "BCA"[i]}
        | {"category": cores[i], "l2_category": details[i], "image": embedded(i)}
        for i in range(3)
    ]
    if hub:
        parquet(d / "mmstar.parquet", rows)
    else:
        for i, row in enumerate(rows):
            row["image"] = base64.b64encode(png(i)).decode()
        with open(d / "MMStar.tsv", "w", newline="") as lines:
            table = csv.DictWriter(lines, rows[0], delimiter="\t")
            table.writeheader()
            table.writerows(rows)
    end = "\nAnswer with the option's letter from the given choices directly"
    return [(str(row["index"]), row["question"] + end, row["answer"]) for row in rows]


# task: (writes its files, the file of questions in LLaVA's layout and in the original one)
FILES = {
    "vqav2": (
        vqav2,
        "llava_vqav2_mscoco_test-dev2015.jsonl",
        "v2_OpenEnded_mscoco_test-dev2015_questions.json",
    ),
    "vqav2-val": (vqav2_val, None, "v2_OpenEnded_mscoco_val2014_questions.json"),
    "gqa": (
        gqa,
        "llava_gqa_testdev_balanced.jsonl",
        "questions1.2/testdev_balanced_questions.json",
    ),
    "scienceqa": (scienceqa, "llava_test_CQM-A.json", "problems.json"),
    "textvqa": (textvqa, "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"),
    "textvqa-plain": (
        lambda d, llava: textvqa(d, llava, ""),
        "llava_textvqa_val_v051_ocr.jsonl",
        "TextVQA_0.5.1_val.json",
    ),
    "pope": (pope, "llava_pope_test.jsonl", "coco_pope_popular.json"),
    "mme": (mme, "llava_mme.jsonl", "count/0001.txt"),
    "mmmu": (mmmu, "anns_for_eval.json", "Math/validation-00000-of-00001.parquet"),
    "mmvet": (mmvet_files, "llava-mm-vet.jsonl", "mm-vet.json"),
    "llava_bench": (llava_bench_files, "questions.jsonl", None),
    "mmbench": (mmbench, "mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv"),
    "seedbench": (seedbench, "llava-seed-bench.jsonl", "SEED-Bench.json"),
    "chartqa": (chartqa, "data/test-00000-of-00001-e2cd0b7a0f9eb20d.parquet", "test_human.json"),
    "docvqa": (docvqa, "DocVQA/validation-00000-of-00002.parquet", "val_v1.0_withQT.json"),
    "docvqa-test": (docvqa_test, "DocVQA/test-00000-of-00002.parquet", "test_v1.0.json"),
    "infovqa": (
        infovqa,
        "InfographicVQA/validation-00000-of-00002.parquet",
        "infographicsVQA_val_v1.0_withQT.json",
    ),
    "infovqa-test": (
        infovqa_test,
        "InfographicVQA/test-00000-of-00002.parquet",
        "infographicsVQA_test_v1.0.json",
    ),
    "ai2d": (ai2d, "data/test-00000-of-00001.parquet", None),
    "ocrbench": (ocrbench, "data/test-00000-of-00001.parquet", "OCRBench.json"),
    "mmstar": (mmstar, "mmstar.parquet", "MMStar.tsv"),
}
CASES = [
    pytest.param(task, i == 1, id=f"{task}-{'llava' if i == 1 else 'original'}")
    for task, row in FILES.items()
    for i in (1, 2)
    if row[i]
]


def files(task, llava):
    return FILES[task][1 if llava else 2]


def tiny_model(folder):
    """A folder with an untrained model whose tokens are bytes."""
    tok = byte_tokenizer()
    width = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {"model_type": "llama", "vocab_size": tok.vocab_size} | width
    vision = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 16} | width
    LLaVA.from_parts(Model(llm_config=text, vision_config=vision), "plain").save(folder)
    tok.save(folder)
    return folder


def evaluated(model, task, data, out, *options):
    """The rows that evaluate.py writes to out/a.jsonl; four tokens an answer are enough here."""
    arguments = [
        "--model",
        model,
        "--task",
        task,
        "--data",
        data,
        "--batch",
        2,
        "--out",
        out / "a.jsonl",
        *options,
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.TASKS[task], "MAX_NEW_TOKENS", 4)
        evaluate.main([str(argument) for argument in arguments])
    return [json.loads(line) for line in (out / "a.jsonl").read_text().splitlines()]
