"""What a low-rank branch adds to a grouped product: factors of each row's expert, or of all.

python benchmarks/experts.py [--experts 64] [--rank 8]
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable

import torch
from torch import Tensor

from peftfx.rewriter.branches.shapes import ExpertsShape

importlib.import_module("transformers.integrations.moe")  # registers the grouped product


def seconds(call: Callable[[], Tensor], runs: int = 5) -> float:
    """The least time of a few runs."""
    taken: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"experts": 64, "rank": 8, "rows": 4096, "width": 512, "inner": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    product = torch.ops.transformers.grouped_mm_fallback.default
    count, rank = options.experts, options.rank
    x = torch.randn(options.rows, options.width)
    weight = torch.randn(count, options.width, options.inner)
    a, b = torch.randn(count, rank, options.width), torch.randn(count, options.inner, rank)
    ends = torch.linspace(0, options.rows, count + 1).int()[1:]
    base = seconds(lambda: product(x, weight, ends))
    print(f"the call: {base * 1e3:.1f} ms; what a branch of rank {rank} adds to it:")
    for name, operator in (("all experts", None), ("its own", product)):
        shape = ExpertsShape(count, in_out=True, grouped=True, operator=operator)
        added = seconds(lambda s=shape: s.low_rank(x, a, b, 2.0, ends=ends))
        print(f"  factors of {name}: {added * 1e3:.1f} ms ({added / base:.0%})")


if __name__ == "__main__":
    main()
