"""Compiles the Triton kernels ahead of time for sm_80 and sm_90, with no GPU; prints resources.

A program of its own: the interpreter and the compiler cannot share a process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peftfx.kernels.gpu import lora_linear as gpu

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def build(kernel: Any, capability: int, constants: dict[str, Any], options: dict[str, int]) -> Any:
    pointers = {"x", "a", "s", "w", "b", "bias", "y", "left", "out"}
    signature = {
        n: "constexpr" if n in constants else "*bf16" if n in pointers
        else "fp32" if n == "scale" else "i32"
        for n in kernel.arg_names
    }  # fmt: skip
    # Row strides and sizes of real models are multiples of 16; unit strides are constants.
    unit = {n: 1 for n in ("sxk", "sak", "swk", "sbr") if n in kernel.arg_names}
    signature |= {n: "constexpr" for n in unit}
    aligned = [i for i, n in enumerate(kernel.arg_names) if signature[n] in ("*bf16", "i32")
               and n not in ("M", "R")]  # fmt: skip
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={**constants, **unit},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"no resource usage in {usage!r}")
    return {
        "registers": int(found[1]), "spill": int(found[2]), "shared": built.metadata.shared,
    }  # fmt: skip


def main() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for capability in (80, 90):
        tiles = dict(gpu.TILES[capability])
        launch = {k: tiles.pop(k) for k in ("num_warps", "num_stages")}
        common = {"RP": 16, "PRECISION": "tf32"}
        results[f"expand sm_{capability}"] = build(
            gpu.expand, capability, {**common, **tiles, "HAS_BIAS": True, "GROUP": 8}, launch
        )
        results[f"shrink sm_{capability}"] = build(
            gpu.shrink, capability, {**common, "BM": 32, "BK": 64},
            {"num_warps": 4, "num_stages": 3},
        )  # fmt: skip
        results[f"reduce sm_{capability}"] = build(
            gpu.reduce, capability, {**common, "BM": 64, "BK": 64},
            {"num_warps": 4, "num_stages": 2},
        )  # fmt: skip
    return results


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
