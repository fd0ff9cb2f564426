"""Compile every BUILD of one kernel file for a GPU that need not be there; fail where registers spill to memory, a
block needs more shared memory than the chip has, or Hopper's matrix products cannot run beside other instructions.

python tests/tools/compile_kernels.py kernels.norms 90
"""

import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
SHARED = {
    "80": 163,
    "89": 99,
    "90": 227,
    "100": 227,
}  # KiB that a block may have (CUDA programming guide)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def said(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def main(module: str, target: str) -> int:
    failed = 0
    for build in importlib.import_module(module).BUILDS:
        if int(target) not in build.targets:
            continue
        signature = build.types | dict.fromkeys(build.constants, "constexpr")
        # At run time Triton sees that pointers are aligned to 16 bytes, and what is a multiple of 16.
        names = build.kernel.arg_names
        even = [
            i
            for i, n in enumerate(names)
            if signature[n].startswith("*") or signature[n].endswith(":16")
        ]
        source = ASTSource(
            build.kernel, {n: signature[n].removesuffix(":16") for n in names}, build.constants,
            {(i,): [["tt.divisibility", 16]] for i in even},
        )  # fmt: skip
        options = {"num_warps": build.warps, "num_stages": build.stages}
        made = triton.compile(source, target=GPUTarget("cuda", int(target), 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            usage, code = (
                said(CUOBJDUMP, flag, file.name)
                for flag in ("--dump-resource-usage", "--dump-sass")
            )
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        local = int(re.search(r"LOCAL:(\d+)", usage).group(1))
        # Where ptxas cannot keep the registers of products under way apart from others, it waits for each at once.
        waits = code.count("WARPGROUP.DEPBAR") > code.count("HGMMA") / 2
        bad = "SPILLS" * (stack + local > 0) + "WAITS" * waits
        bad += "TOO LARGE" * (made.metadata.shared > SHARED[target] * 1024)
        failed += bool(bad)
        print(f"{bad or 'ok'} {build.kernel.__name__} {build.constants} sm_{target}:", end=" ")
        print(
            f"{registers} registers, {stack} bytes of stack, {made.metadata.shared} bytes of shared memory"
        )
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
