"""What makes a line hard to read, and no formatter forbids: `make lint` and `make test` run this.

- arithmetic on truth values: `size * (mode == "pad")`
- `a and b or c` in the place of a conditional expression
- a comprehension, a tuple or an `and` that stands as a statement for its side effects
- a conditional expression inside another one
- `# fmt: skip` on anything but a table of data
"""

import ast

import pytest

from tests.tools.environment import ROOT

FILES = [
    path.relative_to(ROOT)
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] not in ("out", "build", ".venv")
]
ARITHMETIC = (ast.Mult, ast.Add, ast.Sub)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def is_truth_value(node: ast.expr) -> bool:
    """Say whether an expression is plainly True or False."""
    if isinstance(node, ast.BoolOp):
        return all(is_truth_value(value) for value in node.values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in ("any", "all", "bool", "isinstance", "hasattr", "callable")
    is_not = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return is_not or isinstance(node, ast.Compare)


def conditions(tree: ast.AST) -> set[ast.expr]:
    """Return the expressions that only decide something, with all that is inside them."""
    found = set()
    for node in ast.walk(tree):
        tests = []
        if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
            tests = [node.test]
        elif isinstance(node, ast.comprehension):
            tests = node.ifs
        for test in tests:
            found.update(ast.walk(test))
    return found


def complaints(source: str) -> list[str]:
    """Return "line: what is wrong" for each thing in a source that makes it hard to read."""
    tree = ast.parse(source)
    found = []

    def complain(node: ast.AST, what: str):
        found.append(f"{node.lineno}: {what}")

    deciding = conditions(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ARITHMETIC):
            if is_truth_value(node.left) or is_truth_value(node.right):
                complain(node, "arithmetic on a truth value")
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or) and node not in deciding:
            for value in node.values[:-1]:
                is_and = isinstance(value, ast.BoolOp) and isinstance(value.op, ast.And)
                if is_and and not is_truth_value(value.values[-1]):
                    complain(node, "`and ... or` as a conditional")
        if isinstance(node, ast.Expr):
            if isinstance(node.value, COMPREHENSIONS):
                complain(node, "a comprehension for its side effects")
            if isinstance(node.value, (ast.BoolOp, ast.Tuple)):
                complain(node, "several expressions as one statement")
        if isinstance(node, ast.IfExp):
            inside = [part for part in ast.walk(node) if part is not node]
            if any(isinstance(part, ast.IfExp) for part in inside):
                complain(node, "a conditional expression in another one")

    # What keeps its own form must be a table: an assignment of literals.
    skipped = {
        number
        for number, line in enumerate(source.splitlines(), 1)
        if line.rstrip().endswith(("# fmt: skip", "# fmt: off"))
    }
    tables = [node for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.AnnAssign))]
    for number in sorted(skipped):
        if not any(node.end_lineno == number for node in tables):
            found.append(f"{number}: fmt: skip on what is no table of data")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_that_is_hard_to_read(path):
    assert not complaints((ROOT / path).read_text())


@pytest.mark.parametrize(
    "line",
    [
        "side = size * (mode == 'pad')",
        "text = name and name.strip() or 'none'",
        "[print(x) for x in rows]",
        "ready and start()",
        "first(), second()",
        "x = 1 if a else 2 if b else 3",
        "f(1, 2)  # fmt: skip",
    ],
)
def test_each_rule_finds_its_case(line):
    assert complaints(line)


@pytest.mark.parametrize(
    "line",
    [
        "if a and b or c: pass",
        "good = (a > 1 and b > 2) or c",
        "x = [f(y) for y in rows]",
        "x = 1 if a else 2",
        "TABLE = {1: 2}  # fmt: skip",
        "y = x * (1 + z)",
    ],
)
def test_plain_lines_pass(line):
    assert not complaints(line)
