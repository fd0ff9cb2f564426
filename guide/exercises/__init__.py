"""The exercises: two functions a chapter to fill in, and tests that turn green when they are.

python -m pytest guide/exercises/test_ch05.py -o addopts=""                    # yours
GUIDE_SOLUTIONS=1 python -m pytest guide/exercises/test_ch05.py -o addopts=""  # the solutions
"""

import importlib
import os
from types import ModuleType


def chosen(chapter: str) -> ModuleType:
    """Return the reader's file of a chapter, "ch05"; where GUIDE_SOLUTIONS is 1, the solution."""
    folder = "exercises"
    if os.environ.get("GUIDE_SOLUTIONS") == "1":
        folder = "solutions"
    return importlib.import_module(f"guide.{folder}.{chapter}")
