"""The guide: each chapter's blocks do what it says, and what it points to exists.

`make test` runs the blocks without a tag. `make test-guide` runs all of them: python -m guide.run.
"""

import re
import subprocess
import sys

import pytest

from guide import blocks, build, check, figures, run
from guide.blocks import GUIDE
from tests.tools.environment import ROOT

CHAPTERS = blocks.chapters()
DRAWINGS = figures.drawings()


def in_chapter(tmp_path, monkeypatch, text: str):
    """Return a chapter with that text, in a guide of its own."""
    monkeypatch.setattr(blocks, "ROOT", tmp_path)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "guide").mkdir(exist_ok=True)
    (tmp_path / "some.py").write_text(SOME)
    chapter = tmp_path / "guide" / "00-some.md"
    chapter.write_text(text)
    return chapter


SOME = '''
LIMIT = 3


class Counter:
    """It counts."""

    def add(self, n: int):
        # Not below zero.
        if n > 0:
            self.total += n

        return self.total
'''


# --------------------------------------------------------------------------------------- chapters


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_prints_what_it_shows(chapter):
    problems = run.run_chapter(chapter, set())
    assert not problems, "\n".join(map(str, problems))


@pytest.mark.parametrize("chapter", [*CHAPTERS, GUIDE / "glossary.md"], ids=lambda path: path.stem)
def test_quotes_names_pictures_and_links_of_a_chapter_hold(chapter):
    problems = check.check_chapter(chapter)
    assert not problems, "\n".join(map(str, problems))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_half_of_a_chapter_runs_in_the_quick_tests(chapter):
    runnable = [block for block in blocks.read_blocks(chapter) if not block.source]
    quick = [block for block in runnable if not block.tags]
    assert runnable and len(quick) * 2 >= len(runnable)


@pytest.mark.parametrize("chapter", DRAWINGS)
def test_figures_are_what_the_drawings_draw(chapter):
    for name, draw in figures.figures_of(chapter).items():
        committed = (figures.IMAGES / name).read_text()
        trained = figures.of_trained_model(chapter, name)
        assert figures.same_figure(committed, draw(), trained), f"{name}: python -m guide.figures"


def test_every_figure_is_drawn_and_shown():
    drawn = {name for chapter in DRAWINGS for name in figures.figures_of(chapter)}
    there = {path.name for path in figures.IMAGES.iterdir()}
    text = "".join(chapter.read_text() for chapter in CHAPTERS)
    shown = set(re.findall(r"\(images/([\w.-]+)\)", text))
    assert drawn == there == shown


def outcomes(solutions: str) -> dict[str, str]:
    """Return what became of each test of the exercises."""
    command = [sys.executable, "-m", "pytest", "guide/exercises", "-o", "addopts=", "-rA"]
    done = subprocess.run(
        [*command, "--tb=no", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**run.environment(), "GUIDE_SOLUTIONS": solutions},
    )
    found = re.findall(r"^(PASSED|FAILED|ERROR) (guide/\S+)", done.stdout, re.M)
    assert found, done.stdout + done.stderr
    return {name: outcome for outcome, name in found}


def test_exercises_are_red_until_they_are_solved():
    empty = outcomes("0")
    solved = outcomes("1")
    assert {name for name, outcome in empty.items() if outcome != "FAILED"} == set()
    assert {name for name, outcome in solved.items() if outcome != "PASSED"} == set()
    assert empty.keys() == solved.keys()

    # Two functions to fill in for each chapter that has exercises, and a solution of each.
    for file in sorted((GUIDE / "exercises").glob("ch[0-9][0-9].py")):
        stubs = re.findall(r"^def (\w+)", file.read_text(), re.M)
        answers = (GUIDE / "solutions" / file.name).read_text()
        assert stubs and all(f"def {name}(" in answers for name in stubs), file.name
        assert "NotImplementedError" not in answers


def test_the_page_holds_every_chapter_and_needs_nothing_else():
    page = build.build()
    for chapter in CHAPTERS:
        assert f'id="{chapter.stem}"' in page
    anchors = set(re.findall(r'id="([^"]+)"', page))
    links = set(re.findall(r'href="#([^"]+)"', page))
    assert links - anchors == set()
    assert "<script" not in page
    assert re.findall(r'src="(?!data:)[^"]*"', page) == []
    assert re.findall(r"url\((?!data:)|@import", page) == []


# ----------------------------------------------------------------------------- what the tests see


def test_a_renamed_function_is_seen(tmp_path, monkeypatch):
    text = "# 0. Some\n\n```python source=some.py:Counter.add\nif n > 0:\n```\n\n`some.py:LIMIT`\n"
    chapter = in_chapter(tmp_path, monkeypatch, text)
    assert check.check_chapter(chapter) == []

    (tmp_path / "some.py").write_text(SOME.replace("def add", "def increase"))
    [problem] = check.check_chapter(chapter)
    assert str(problem) == "guide/00-some.md:3: some.py: nothing in it is called Counter.add"

    (tmp_path / "some.py").write_text(SOME.replace("LIMIT", "MOST"))
    [problem] = check.check_chapter(chapter)
    assert str(problem) == "guide/00-some.md:7: some.py: nothing in it is called LIMIT"


@pytest.mark.parametrize(
    "quote",
    [
        "# Not below zero.\nif n > 0:\n    self.total += n",
        "if n > 0:\n    self.total += n\nreturn self.total",  # an empty line may be left out
        "def add(self, n: int):\n    ...\n    return self.total",
        "...\nself.total += n",
    ],
)
def test_lines_that_stand_there_may_be_quoted(quote):
    source = blocks.find_source(SOME, "Counter.add")
    assert blocks.quote_problem(quote, source) is None


@pytest.mark.parametrize(
    ("quote", "problem"),
    [
        ("if n > 1:", "if n > 1:"),
        ("if n > 0:\nself.total += n", "self.total += n"),  # its indentation
        ("if n > 0:\nreturn self.total", "return self.total"),  # a line is left out
        ("return self.total\n...\nif n > 0:", "if n > 0:"),  # the order
        ("LIMIT = 3", "LIMIT = 3"),  # it stands outside
    ],
)
def test_lines_that_do_not_are_seen(quote, problem):
    source = blocks.find_source(SOME, "Counter.add")
    assert blocks.quote_problem(quote, source) == problem


def test_wrong_pictures_and_links_are_seen(tmp_path, monkeypatch):
    text = "# 0. Some\n\n[a](01-no.md) [b](#no) [c](../some.py) [d](#0-some)\n\n![x](no.svg)\n"
    chapter = in_chapter(tmp_path, monkeypatch, text)
    (tmp_path / "guide" / "a.svg").write_text("<svg/>")
    chapter.write_text(text + "\n![short](a.svg) ![three circles and an arrow](a.svg)\n")
    found = [problem.what for problem in check.check_chapter(chapter)]
    assert found == [
        "01-no.md: no such file",
        "#no: no such heading",
        "no.svg: no such picture",
        "a.svg: its text alternative does not say what is seen",
    ]


@pytest.mark.parametrize(
    ("shown", "printed", "tolerance"),
    [
        ("loss 0.1234", "loss 0.12341", None),
        ("loss   1\n", "\nloss 1", None),
        ("a\n...\nd", "a\nb\nc\nd", None),
        ("...\nd", "d", None),
        ("9.9 s", "10.2 s", 0.05),
        ("100 rows", "102 rows", 0.05),
        ("0.0", "-1e-7", None),
    ],
)
def test_outputs_that_are_the_same(shown, printed, tolerance):
    assert blocks.same_output(shown, printed, tolerance)


@pytest.mark.parametrize(
    ("shown", "printed", "tolerance"),
    [
        ("loss 0.1234", "loss 0.1244", None),
        ("id 1000", "id 1001", None),
        ("a\n...\nd", "a\nb\nc", None),
        ("9.9 s", "12 s", 0.05),
        ("a 1", "b 1", None),
        ("a", "a\nb", None),
        ("", "a", None),
        ("a", "", None),
    ],
)
def test_outputs_that_are_not(shown, printed, tolerance):
    assert not blocks.same_output(shown, printed, tolerance)


CHAPTER = """# 0. Some

```python
x = 1 / 3
print(x)
```

```output
0.5
```

```sh
echo hello
echo trouble >&2
```

```python raises=ValueError
print("so far")
raise ValueError(f"x is {x:.1f}")
```

```python demo
raise SystemError("not without the tag")
```
"""


def test_outputs_are_compared_and_written(tmp_path, monkeypatch):
    chapter = in_chapter(tmp_path, monkeypatch, CHAPTER)
    problems = run.run_chapter(chapter, set())
    assert [problem.where for problem in problems] == [
        "guide/00-some.md:3",
        "guide/00-some.md:12",
        "guide/00-some.md:17",
    ]
    assert "-0.5" in problems[0].what and "+0.333" in problems[0].what

    assert run.run_chapter(chapter, set(), write=True) == []
    assert run.run_chapter(chapter, set()) == []
    text = chapter.read_text()
    assert "```output\n0.3333333333333333\n```\n" in text and "0.5" not in text
    assert "```\n\n```output\nhello\ntrouble\n```\n" in text
    assert "```output\nso far\nValueError: x is 0.3\n```\n" in text


@pytest.mark.parametrize(
    ("block", "what"),
    [
        ("```python\nprint(y)\n```", "NameError"),
        ("```python raises=ValueError\nprint(y)\n```", "it should raise ValueError"),
        ("```python raises=ValueError\n```", "it raised nothing"),
        ("```sh\nfalse | cat\n```", "it ended with 1"),
        ("```sh fails\ntrue\n```", "it ended well"),
        ("```python\nimport os; os._exit(3)\n```", "its Python ended with 3"),
    ],
)
def test_a_block_that_fails_is_a_problem(block, what, tmp_path, monkeypatch):
    chapter = in_chapter(tmp_path, monkeypatch, f"# 0. Some\n\n{block}\n")
    [problem] = run.run_chapter(chapter, set())
    assert problem.what.find(what) >= 0


@pytest.mark.parametrize(
    "text",
    [
        "```output\n1\n```",
        "```python\n```\n\nText.\n\n```output\n1\n```",
        "```python later\n```",
        "```sh limit=3\n```",
    ],
)
def test_a_wrong_fence_is_one_line(text, tmp_path, monkeypatch):
    chapter = in_chapter(tmp_path, monkeypatch, f"# 0. Some\n\n{text}\n")
    with pytest.raises(blocks.UserError, match=r"00-some.md:\d+: .*; fix: "):
        blocks.read_blocks(chapter)


def test_figures_may_differ_by_roundings_only():
    here = '<rect x="10.02" fill="#0b68a8"/><text>loss 0.500</text>'
    assert figures.same_figure(here, here.replace("10.02", "10.04").replace("#0b68a8", "#0c68a8"))
    assert not figures.same_figure(here, here.replace("10.02", "11.5"))
    assert not figures.same_figure(here, here.replace("#0b68a8", "#0b78a8"))
    assert not figures.same_figure(here, here.replace("loss", "Loss"))
    assert not figures.same_figure("<text>id 294</text>", "<text>id 295</text>")


def test_figures_of_a_trained_model_have_the_same_shapes_and_words():
    here = '<rect x="10.02" fill="#0b68a8"/><text>loss 0.500</text>'
    other = here.replace("0.500", "0.300").replace("#0b68a8", "#ff0000")
    assert figures.same_figure(here, other, trained=True)
    assert not figures.same_figure(here, other)
    assert not figures.same_figure(here, other.replace("loss", "Loss"), trained=True)
    assert not figures.same_figure(here, other.replace("rect", "line"), trained=True)
