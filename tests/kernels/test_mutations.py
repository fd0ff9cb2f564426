"""No mistake in a kernel goes unseen: with one in its source, its cases are no longer exact."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import kernels
from tests.kernels.cases import OPERATIONS, cases_file
from tests.tools.kernel_accuracy import wrong

pytestmark = pytest.mark.gpu
KERNELS = Path(kernels.__file__).parent

MUTATIONS = []
for operation in OPERATIONS:
    for mutation in cases_file(operation).MUTATIONS:
        name = f"{operation}: {mutation.old[:40]}"
        MUTATIONS.append(pytest.param(operation, mutation, id=name))


def test_every_kernel_file_has_cases_and_mistakes():
    files = {file.stem for file in KERNELS.glob("*.py")}
    assert files == {"__init__", "tiles", *OPERATIONS}
    for operation in OPERATIONS:
        cases = cases_file(operation)
        assert cases.CASES and cases.MUTATIONS and cases.BUILDS, operation
        assert "def reference" in (KERNELS / f"{operation}.py").read_text()


def mutant_cases(operation: str, mutation, folder: Path, monkeypatch) -> list:
    """Return the operation's CASES on a copy of kernels/ with the mistake in it.

    The copy is a package of another name, and so are its operations, as torch knows each but once.
    """
    package = re.sub(r"\W", "_", f"mutant_{folder.parent.name}_{folder.name}")

    def renamed(text: str) -> str:
        text = text.replace("barellava::", f"{package}::")
        return re.sub(r"^from kernels\b", f"from {package}", text, flags=re.MULTILINE)

    (folder / package).mkdir()
    for file in KERNELS.glob("*.py"):
        text = file.read_text()
        if file.stem == (mutation.file or operation):
            assert mutation.old in text, "the mutation no longer matches the file"
            text = text.replace(mutation.old, mutation.new)
        (folder / package / file.name).write_text(renamed(text))

    cases = Path(cases_file(operation).__file__).read_text()
    (folder / package / "the_cases.py").write_text(renamed(cases))
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module(f"{package}.the_cases").CASES


@pytest.mark.parametrize("operation, mutation", MUTATIONS)
def test_a_mistake_is_seen(operation, mutation, tmp_path, monkeypatch):
    cases = mutant_cases(operation, mutation, tmp_path, monkeypatch)
    (case,) = [case for case in cases if case.name == mutation.case]
    assert wrong(case, torch.float32)
