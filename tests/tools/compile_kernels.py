"""Compile every BUILD of one operation to machine code, for GPUs that need not be there.

    python tests/tools/compile_kernels.py norms 80 89 90 100

Fails where registers spill to memory, a block needs more shared memory than the chip has, or
Hopper's matrix products cannot run beside other instructions.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.kernels.cases import Build, cases_file  # noqa: E402

# KiB that a block may have, by compute capability (CUDA programming guide).
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_build(build: Build, target: int, **options):
    """Return what Triton makes of a build for sm_<target>, with every stage's text in `asm`."""
    names = build.kernel.arg_names
    signature = build.types | dict.fromkeys(build.constants, "constexpr")
    types = {name: signature[name].removesuffix(":16") for name in names}

    # At run time Triton sees that pointers are aligned to 16 bytes, and what is a multiple of 16.
    attributes = {}
    for i, name in enumerate(names):
        if signature[name].startswith("*") or signature[name].endswith(":16"):
            attributes[(i,)] = [["tt.divisibility", 16]]

    source = ASTSource(build.kernel, types, build.constants, attributes)
    options = {"num_warps": build.warps, "num_stages": build.stages, **options}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


class Usage(NamedTuple):
    """What the machine code of a kernel takes."""

    registers: int
    spilled: int  # bytes of a thread that are in memory, not in registers
    shared: int  # bytes of a block
    waits: bool  # the matrix products of an sm_90 wait for each other


def output_of(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage_of(made, target: int) -> Usage:
    """Return what cuobjdump reads from the machine code for sm_<target>."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        resources = output_of(CUOBJDUMP, "--dump-resource-usage", file.name)
        code = ""
        if target == 90:  # no other target has these products
            code = output_of(CUOBJDUMP, "--dump-sass", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", resources).groups()
    local = re.search(r"LOCAL:(\d+)", resources).group(1)

    # Where ptxas cannot keep the registers of products under way apart from others, it waits for
    # each product at once.
    waits = code.count("WARPGROUP.DEPBAR") > code.count("HGMMA") / 2
    return Usage(int(registers), int(stack) + int(local), made.metadata.shared, waits)


def faults(usage: Usage, target: int, may_spill: int = 0) -> list[str]:
    """Return what is wrong with a kernel on sm_<target>."""
    found = []
    if usage.spilled > may_spill:
        found.append("SPILLS")
    if usage.waits:
        found.append("WAITS")
    if usage.shared > SHARED_MEMORY[target] * 1024:
        found.append("TOO LARGE")
    return found


def main(operation: str, *targets: str) -> int:
    """Print a line per build and target; return how many are at fault."""
    failed = 0
    for build in cases_file(operation).BUILDS:
        for target in map(int, targets):
            if target not in build.targets:
                continue
            usage = usage_of(compile_build(build, target), target)
            found = faults(usage, target, build.spills)
            failed += len(found)
            print(
                f"{' '.join(found) or 'ok'} {build.kernel.__name__} {build.constants} sm_{target}: "
                f"{usage.registers} registers, {usage.spilled} bytes spilled, "
                f"{usage.shared} bytes of shared memory"
            )
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
