"""Compile every BUILD of one kernel file for a GPU that need not be there; fail where registers spill to memory, a
block needs more shared memory than the chip has, or Hopper's matrix products cannot run beside other instructions.

python tests/compile_kernels.py kernels.norms 90
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SHARED = {"80": 163, "89": 99, "90": 227, "100": 227}  # KiB that a block may have (CUDA programming guide)
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def said(*command) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def main(module: str, target: str) -> int:
    failed = 0
    for build in importlib.import_module(module).BUILDS:
        if int(target) not in build.targets:
            continue
        signature = build.types | dict.fromkeys(build.constants, "constexpr")
        # At run time Triton sees that pointers are aligned to 16 bytes, and compiles for that.
        names = build.kernel.arg_names
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
        source = ASTSource(build.kernel, {n: signature[n] for n in names}, build.constants, aligned)
        options = {"num_warps": build.warps, "num_stages": build.stages}
        made = triton.compile(source, target=GPUTarget("cuda", int(target), 32), options=options)
        with tempfile.TemporaryDirectory() as folder:
            cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
            cubin.write_bytes(made.asm["cubin"])
            ptx.write_text(made.asm["ptx"])
            usage = said(BIN / "cuobjdump", "--dump-resource-usage", cubin)
            # ptxas waits for each product at once, and says so, where it finds no registers to do otherwise.
            told = said(BIN / "ptxas", "-v", "-arch=sm_90a", ptx, "-o", cubin) if "wgmma" in made.asm["ptx"] else ""
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        local = int(re.search(r"LOCAL:(\d+)", usage).group(1))
        bad = "SPILLS" * (stack + local > 0) + "WAITS" * ("serialized" in told)
        bad += "TOO LARGE" * (made.metadata.shared > SHARED[target] * 1024)
        failed += bool(bad)
        print(f"{bad or 'ok'} {build.kernel.__name__} {build.constants} sm_{target}:", end=" ")
        print(f"{registers} registers, {stack} bytes of stack, {made.metadata.shared} bytes of shared memory")
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
