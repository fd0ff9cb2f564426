"""Whether this machine compiles what a CPU decodes with."""

import pytest

from inference import cpu

needs_compiler = pytest.mark.skipif(cpu.library() is None, reason="needs a C++ compiler and AVX2")
