"""The house has floors: a file imports from its own wing and from lower ones, never upwards."""

import ast

import pytest

from tests.tools.environment import ROOT

# Lowest first. A name is a file of the root or a wing; "wing.file" is one file of a wing whose
# files stand on two floors.
FLOORS = [
    {"kernels"},
    {"config", "layers", "packing"},
    {
        "command_line",
        "connectors",
        "checkpoints.fields",
        "checkpoints.files",
        "checkpoints.names",
        "checkpoints.owned",
        "checkpoints.seal",
        "checkpoints.weights",
    },
    {"inputs"},
    {"encoders", "lora"},
    {"checkpoints"},
    {"inference"},
    {"model"},
    {"data"},
    {"training", "evals"},
    {"demo"},
    {"train", "generate", "evaluate", "export", "serve", "visualize"},
    {"laboratory"},
    {"lab"},
    {"guide"},
]

# main() of a file below the scripts that is a script, too: it may import from all floors.
MAIN_OF = {"data"}

FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FILES = [
    path.relative_to(ROOT)
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] not in ("tests", "bench", "out", "build", ".venv")
]


def module_name(path) -> str:
    """Return "wing.file" for wing/file.py, "wing" for wing/__init__.py and "file" for file.py."""
    parts = path.with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def place(module: str) -> str | None:
    """Return the entry of FLOOR_OF that a module belongs to; None unless it is the project's."""
    two = ".".join(module.split(".")[:2])
    if two in FLOOR_OF:
        return two
    wing = module.split(".")[0]
    return wing if wing in FLOOR_OF else None


def imported(source: str, without: str = "") -> set[str]:
    """Return what a source imports anywhere in it, each as "module" or "module.name".

    without: the name of a function at its top whose imports do not count.
    """
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if getattr(node, "name", None) != without]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def climbs(name: str, source: str) -> list[str]:
    """Return a line for each import that neither stays in the wing of `name` nor goes down."""
    own = FLOOR_OF[place(name)]
    wing = name.split(".")[0]
    wrong = []
    for module in sorted(imported(source, "main" if name in MAIN_OF else "")):
        if place(module) is None:
            continue
        there = FLOOR_OF[place(module)]
        in_wing = module.split(".")[0] == wing
        if there > own or (there == own and not in_wing):
            wrong.append(f"{name} (floor {own}) imports {module} (floor {there})")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_stay_on_their_floor_or_go_down(path):
    name = module_name(path)
    assert place(name), f"{path} stands on no floor: add it to FLOORS"
    assert not climbs(name, (ROOT / path).read_text())


def test_an_import_that_runs_upwards_is_found():
    assert climbs("encoders", "from model import LLaVA")
    assert climbs("encoders", "def late():\n    from data import Steps")
    assert climbs("checkpoints.weights", "from checkpoints import layouts")
    assert climbs("kernels.rope", "import config")
    assert climbs("evals.pope", "from training import ranks")
    assert climbs("data", "def late():\n    from training import check")
    assert climbs("model", "def main(argv):\n    import data")
    assert not climbs("data", "def main(argv):\n    from training import check")
    assert not climbs("checkpoints.layouts", "from checkpoints import weights\nimport encoders")
    assert not climbs("evals.pope", "from evals import rows\nimport torch")
