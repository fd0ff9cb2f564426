"""Benchmarks that are rows and a metric: ChartQA, DocVQA, InfoVQA, AI2D, OCRBench, MMStar.

    torchrun evaluate.py --model DIR --task chartqa --data ChartQA
    python evaluate.py --model DIR --task docvqa-test --data DocVQA     # writes the server's file

TABLE below says of each where its rows are, what their columns are called, how a prompt ends and
what an answer earns. A further benchmark of this kind is one more entry of it.

Read are Hugging Face's parquet files, with pyarrow (lmms-lab/ChartQA, lmms-lab/DocVQA,
lmms-lab/ai2d, echo840/OCRBench, Lin-Chen/MMStar), and what the authors publish: ChartQA's
test_human.json, test_augmented.json and png/; val_v1.0.json (or val_v1.0_withQT.json) and
documents/ of DocVQA; infographicsVQA_val_v1.0_withQT.json and infographicsvqa_images/;
OCRBench.json and OCRBench_Images/; MMStar.tsv. `docvqa` and `infovqa` are the validation splits,
`docvqa-test` and `infovqa-test` those that only the server can score.

Prompts are lmms-eval's, with as many tokens for an answer. Each score is the official one:

    chartqa   relaxed accuracy (relaxed_correctness of google-research/pix2struct)
    docvqa, infovqa   ANLS (infographicsvqa_eval.py of docvqa.org)
    ai2d      lmms-eval's letter: AI2D itself was never published with a script for models
    ocrbench  the number of right answers of 1000 (example.py of Yuliang-Liu/MultimodalOCR)
    mmstar    evaluate/mmstar.py of MMStar-Benchmark/MMStar

Chance is 1 / number of options. For open answers it is what the best constant answer gets, among
the ten that are true most often.

The traps: "5%" is 0.05 for ChartQA, so that it is wrong where the truth is 5; and a number with a
comma is a text. ANLS divides by the length before spaces are collapsed. An answer to OCRBench may
be as long as it likes, and only needs to contain a true one. MMStar takes the first letter of an
answer, so that "a dog" means A.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from checkpoints.files import write_file
from checkpoints.identity import digest
from config import UserError
from evals import Example, Task, metrics
from evals.files import Row, errors_at, find_first, read_parquet, read_rows, read_tsv
from evals.options import LETTER, WORD, list_options
from evals.scores import OpenResult, Result, group_scores, in_order, open_scores

# ---------------------------------------------------------- OCRBench: an answer with a true one


FORMULA = "Handwritten Mathematical Expression Recognition"


def has_true_answer(answer: str, truths: Sequence[str]) -> float:
    """Return 1 if an answer contains a true one, in any case, else 0."""
    said = in_lower_case(answer)
    return float(any(in_lower_case(truth) in said for truth in truths))


def has_true_formula(answer: str, truths: Sequence[str]) -> float:
    """Return 1 if an answer contains a true formula, with any spaces in it, else 0."""
    said = without_spaces(answer)
    return float(any(without_spaces(truth) in said for truth in truths))


def in_lower_case(text: str) -> str:
    """Return a text in lower case, on one line."""
    return text.lower().strip().replace("\n", " ")


def without_spaces(text: str) -> str:
    """Return a text without spaces and line breaks; a tab stays, as in the official script."""
    return text.strip().replace("\n", "").replace(" ", "")


# ------------------------------------------------------------- options: the letter of an answer


def bare_letter(answer: str) -> str:
    """Return what AI2D compares with the true letter: "B" of "b", "(B)", "B." and "B. a dog"."""
    begins = re.match(r"\s*([A-Z])\.", answer)
    if begins:
        return begins[1]
    return answer.lower().translate(str.maketrans("", "", string.punctuation)).upper()


def first_letter(answer: str) -> str:
    """Return MMStar's letter of an answer: the first, also of "(B", "Option B", "The answer is B".

    "" of an answer that ends there.
    """
    said = in_lower_case(answer)
    for before in ("the answer is ", "option ", "("):
        if said.startswith(before):
            said = said.removeprefix(before)
            break
    return said[:1].upper()


# -------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Layout:
    """One of the ways in which a benchmark's rows are published: files, and names of columns."""

    # Patterns of names in the data folder: each is of one or several files. The value is the kind
    # of their rows, or "" if the rows say it themselves.
    files: dict[str, str]

    question: str = "question"
    answer: str = "answer"
    picture: str = "image"
    folder: str | None = None  # of the pictures; "" = the rows name it, None = they are in the rows
    id: str | None = None  # None = the number of the row
    kinds: tuple[str, ...] = ()  # of a question: these name the scores that it counts in
    part: str | None = None  # the key of a JSON file under which its rows are


@dataclass(frozen=True)
class Benchmark:
    """What TABLE says of a benchmark. Either `credit` or `letter` is given."""

    layouts: tuple[Layout, ...]  # the first whose files are there is read
    max_new_tokens: int
    ending: str = ""  # of a prompt, after the question and its options

    # What an open answer earns, 0 to 1, given the true ones; and of questions of some kinds.
    credit: Callable[[str, Sequence[str]], float] | None = None
    credit_of: dict[str, Callable] = field(default_factory=dict)

    letter: Callable[[str], str] | None = None  # the letter that an answer gives
    options: str | None = None  # the column with the options; None = the question lists A to D

    # {kind of a question: the scores that it counts in}. Empty = the kinds are the scores' names.
    scores_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    counted: bool = False  # whether a score is the number of right answers, not percent
    server: bool = False  # whether there is a server that takes answers
    public: bool = True  # whether the true answers are in the rows


def docvqa(hub: str, *own: str, public: bool = True) -> Benchmark:
    """Return the entry of a split of DocVQA whose files have these names."""
    columns = {"id": "questionId", "answer": "answers", "kinds": ("question_types",)}
    layouts = [Layout({hub: ""}, **columns)]
    for file in own:
        layouts.append(Layout({file: ""}, folder="", part="data", **columns))
    return Benchmark(tuple(layouts), 32, WORD, credit=metrics.anls, server=True, public=public)


def infovqa(hub: str, *own: str, public: bool = True) -> Benchmark:
    """Return the entry of a split of InfographicVQA, likewise."""
    kinds = ("answer_type", "evidence", "operation/reasoning")
    columns = {"id": "questionId", "answer": "answers", "kinds": kinds}
    layouts = [Layout({hub: ""}, **columns)]
    for file in own:
        of_file = {"picture": "image_local_name", "folder": "infographicsvqa_images"}
        layouts.append(Layout({file: ""}, part="data", **of_file, **columns))
    return Benchmark(tuple(layouts), 32, WORD, credit=metrics.anls, server=True, public=public)


RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
OTHER_THAN_RECOGNITION = (
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    FORMULA,
)
MMSTAR = {
    "coarse perception": ("image scene and topic", "image style & quality", "image emotion"),
    "fine-grained perception": ("object counting", "recognition", "localization"),
    "instance reasoning": (
        "single-instance reasoning",
        "cross-instance attribute reasoning",
        "cross-instance relation reasoning",
    ),
    "logical reasoning": ("code & sequence reasoning", "diagram reasoning", "common reasoning"),
    "science & technology": (
        "biology & chemistry & physics",
        "electronics & energy & mechanical eng.",
        "geography & earth science & agriculture",
    ),
    "math": ("geometry", "numeric commonsense and calculation", "statistical reasoning"),
}

TABLE = {
    "chartqa": Benchmark(
        layouts=(
            Layout({"data/test-*.parquet": ""}, kinds=("type",)),
            Layout(
                {"test_human.json": "human_test", "test_augmented.json": "augmented_test"},
                question="query",
                answer="label",
                picture="imgname",
                folder="png",
            ),
        ),
        max_new_tokens=16,
        ending="\nAnswer the question with a single word.",
        credit=metrics.relaxed,
        scores_of={"human_test": ("human",), "augmented_test": ("augmented",)},
    ),
    "docvqa": docvqa("DocVQA/validation-*.parquet", "val_v1.0_withQT.json", "val_v1.0.json"),
    "docvqa-test": docvqa("DocVQA/test-*.parquet", "test_v1.0.json", public=False),
    "infovqa": infovqa(
        "InfographicVQA/validation-*.parquet",
        "infographicsVQA_val_v1.0_withQT.json",
        "infographicsVQA_val_v1.0.json",
    ),
    "infovqa-test": infovqa(
        "InfographicVQA/test-*.parquet", "infographicsVQA_test_v1.0.json", public=False
    ),
    "ai2d": Benchmark(
        layouts=(Layout({"data/test-*.parquet": ""}),),
        max_new_tokens=16,
        ending=LETTER,
        letter=bare_letter,
        options="options",
    ),
    "ocrbench": Benchmark(
        layouts=(
            Layout({"data/test-*.parquet": ""}, kinds=("question_type",)),
            Layout(
                {"OCRBench.json": ""},
                answer="answers",
                picture="image_path",
                folder="OCRBench_Images",
                kinds=("type",),
            ),
        ),
        max_new_tokens=128,
        credit=has_true_answer,
        credit_of={FORMULA: has_true_formula},
        scores_of={kind: ("Text Recognition", kind) for kind in RECOGNITION}
        | {kind: (kind,) for kind in OTHER_THAN_RECOGNITION},
        counted=True,
    ),
    "mmstar": Benchmark(
        layouts=(
            Layout({"mmstar.parquet": ""}, id="index", kinds=("l2_category",)),
            Layout({"MMStar.tsv": ""}, id="index", kinds=("l2_category",)),
        ),
        max_new_tokens=32,
        ending=LETTER.removesuffix("."),
        letter=first_letter,
        scores_of={
            detail: (core, detail) for core, details in MMSTAR.items() for detail in details
        },
    ),
}


# --------------------------------------------------------------------------------------- examples


def examples(benchmark: Benchmark, data_dir) -> list[Example]:
    """Return the questions in the order of the files.

    "label" is a letter, or a list of true answers, or None where they are not public.
    Own keys: "groups": the scores that a question counts in; "choices": how many options.
    """
    layout, files = find_files(benchmark, data_dir)

    found = []
    shown = {}  # of pictures in rows: {digest: (name, bytes)}. A document has many questions.
    for file, kind in files:
        for where, row in read_file(file, layout, benchmark):
            with errors_at(where):
                example = make_example(benchmark, layout, row, kind)
                example["id"] = str(len(found))
                if layout.id:
                    example["id"] = str(int(row.words(layout.id)))
                if layout.folder is None:
                    content = row.picture(layout.picture)
                    name = f"{file.name}:{where.rpartition(':')[2]}"
                    name, content = shown.setdefault(digest(content), (name, content))
                    example["image"] = name
                    example["pictures"] = [content]
                found.append(example | {"where": where})
    return found


def find_files(benchmark: Benchmark, data_dir) -> tuple[Layout, list[tuple[Path, str]]]:
    """Return the first layout whose files are all there, and (file, kind of its rows) of each."""
    for layout in benchmark.layouts:
        files = []
        complete = True
        for pattern, kind in layout.files.items():
            of_pattern = sorted(Path(data_dir).glob(pattern))
            check_shards(of_pattern)
            files += [(file, kind) for file in of_pattern]
            if not of_pattern:
                complete = False
        if complete:
            return layout, files

    # Say what is missing: this raises.
    names = [name for layout in benchmark.layouts for name in layout.files]
    find_first(data_dir, *names)
    raise UserError(data_dir, f"not all of {', '.join(names)}", "--data: fetch the others, too")


def check_shards(files: list[Path]):
    """Raise UserError if files named test-00000-of-00006.parquet are not as many as they say."""
    for file in files:
        named = re.search(r"-of-(\d{1,9})\b", file.name)
        if named and int(named[1]) != len(files):
            what = f"of {int(named[1])} files like it {len(files)} are there"
            raise UserError(file, what, "fetch the benchmark again")


def read_file(file: Path, layout: Layout, benchmark: Benchmark) -> Iterator[tuple[str, Row]]:
    """Yield ("file:row", Row) of a file; of a parquet file only the columns that are needed."""
    if file.suffix == ".parquet":
        columns = [layout.question, layout.answer, layout.picture, *layout.kinds]
        for name in (layout.id, benchmark.options):
            if name:
                columns.append(name)
        yield from read_parquet(file, columns)
    elif file.suffix == ".tsv":
        for row in read_tsv(file):
            yield row.where, row
    else:
        yield from read_rows(file, part=layout.part)


def make_example(benchmark: Benchmark, layout: Layout, row: Row, kind: str) -> Example:
    """Return the example of a row, without its id and a picture that is in the row."""
    # A table may have the options in columns of their own; mostly the question lists them.
    if benchmark.options:
        options = row.options(benchmark.options)
    else:
        options = [row.text(letter) for letter in "ABCD" if row.values.get(letter)]
    example = {
        "prompt": row.text(layout.question) + list_options(options) + benchmark.ending,
        "label": None,
        "groups": ["all"],
        "choices": len(options) or 4,
    }
    if benchmark.letter:
        example["label"] = true_letter(benchmark, layout, row, options)
    elif benchmark.public:
        example["label"] = true_answers(row, layout.answer)

    if layout.folder is not None:
        example["image"] = row.file(layout.picture)
        if layout.folder:
            example["image"] = f"{layout.folder}/{example['image']}"

    # What the question is, as its file or its columns say; each of them may have several values.
    kinds = []
    if kind:
        kinds.append(kind)
    for column in layout.kinds:
        kinds += read_kinds(row, column, benchmark)
    for name in kinds:
        example["groups"] += benchmark.scores_of.get(name, (name,))
    return example


def true_answers(row: Row, key: str) -> list[str]:
    """Return the answers that are true: a list, or one text."""
    if isinstance(row.values.get(key), list):
        return row.texts(key, least=1)
    return [row.words(key)]


def true_letter(benchmark: Benchmark, layout: Layout, row: Row, options: list[str]) -> str:
    """Return the letter of the true option, which is written as a letter, or as a number from 0."""
    if not benchmark.options:
        return row.text(layout.answer, choices=tuple("ABCD"))
    number = int(row.words(layout.answer))
    if not 0 <= number < len(options):
        raise row.refuse(layout.answer, f"not the number of one of {len(options)} options")
    return string.ascii_uppercase[number]


def read_kinds(row: Row, column: str, benchmark: Benchmark) -> list[str]:
    """Return the kinds of a question that a column names: one that the table knows, or any."""
    if benchmark.scores_of:
        return [row.text(column, choices=tuple(benchmark.scores_of))]
    if row.values.get(column) is None:
        return []
    return row.texts(column)


# ------------------------------------------------------------------------------------------- score

# So many of the true answers are tried as the answer to all questions.
MOST_CONSTANTS = 10


def score(benchmark: Benchmark, examples: list[Example], answers: list[str]) -> dict[str, dict]:
    """Return the scores of all questions and of each kind; {} where only a server has answers."""
    if not benchmark.public:
        return {}

    results = []
    if benchmark.letter:
        for example, answer in zip(examples, answers, strict=True):
            right = benchmark.letter(answer) == example["label"]
            results.append(Result(example["groups"], right, 1 / example["choices"]))
        scores = group_scores(results)
    else:
        constants = frequent_answers(examples)
        for example, answer in zip(examples, answers, strict=True):
            credit = benchmark.credit
            for name in example["groups"]:
                credit = benchmark.credit_of.get(name, credit)
            truths = example["label"]
            credit_of = {text: credit(text, truths) for text in constants}
            results.append(OpenResult(example["groups"], credit(answer, truths), credit_of))
        scores = open_scores(results)

    # The number of right answers in the place of percent.
    if benchmark.counted:
        for of_group in scores.values():
            of_group["score"] *= of_group["n"] / 100
            of_group["chance"] *= of_group["n"] / 100
    return in_order(scores, score_names(benchmark, scores))


def frequent_answers(examples: list[Example]) -> list[str]:
    """Return the answers that are true most often."""
    counts = Counter()
    for example in examples:
        counts.update(set(example["label"]))

    # Of equals the first in the alphabet: the order of a set is another one in every run.
    ordered = sorted(counts, key=lambda text: (-counts[text], text))
    return ordered[:MOST_CONSTANTS]


def score_names(benchmark: Benchmark, scores: dict[str, dict]) -> list[str]:
    """Return the names of the scores in the table's order, or else in that of the rows."""
    if not benchmark.scores_of:
        return list(scores)
    names = ["all"]
    for of_kind in benchmark.scores_of.values():
        names += of_kind
    return list(dict.fromkeys(names))


def unread(benchmark: Benchmark, examples: list[Example], answers: list[str]) -> int:
    """Return how many answers give none of the letters."""
    count = 0
    for example, answer in zip(examples, answers, strict=True):
        letters = string.ascii_uppercase[: example["choices"]]
        count += benchmark.letter(answer) not in list(letters)
    return count


def write(benchmark: Benchmark, examples: list[Example], answers: list[str], stem, data_dir):
    """Write the answers as the server of docvqa.org takes them, and its script; return the file."""
    rows = []
    for example, answer in zip(examples, answers, strict=True):
        rows.append({"questionId": int(example["id"]), "answer": answer})
    file = Path(f"{stem}-server.json")
    write_file(file, json.dumps(rows))
    return [file]


# ------------------------------------------------------------------------------------------- tasks


def task_of(benchmark: Benchmark) -> Task:
    """Return what evaluate.py asks of a task: the functions above, for one entry of TABLE."""
    task = SimpleNamespace(
        MAX_NEW_TOKENS=benchmark.max_new_tokens,
        examples=partial(examples, benchmark),
        score=partial(score, benchmark),
    )
    if benchmark.letter:
        task.UNREAD = "give no letter, and are wrong"
        task.unread = partial(unread, benchmark)
    if benchmark.server:
        task.write = partial(write, benchmark)
    return task


TASKS = {name: task_of(benchmark) for name, benchmark in TABLE.items()}
