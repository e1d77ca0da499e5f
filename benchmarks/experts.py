"""What a low-rank branch adds to a grouped product, and the ways to multiply rows by expert.

python benchmarks/experts.py [--experts 64] [--rank 8]
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.rewriter.branches.shapes import ExpertsShape

importlib.import_module("transformers.integrations.moe")  # registers the grouped product

PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "ours": torch.ops.peftfx.grouped_product.default,
    "torch's": torch.ops.aten._grouped_mm.default,
    "transformers'": torch.ops.transformers.grouped_mm_fallback.default,
}


def of_all(x: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """The branch as a product without groups."""
    row = torch.arange(len(x))[:, None]
    chosen = (row >= F.pad(ends, (1, 0))[:-1]) & (row < ends)
    h = (x @ a.to(x.dtype).flatten(0, 1).T).unflatten(-1, (len(a), -1)) * chosen[..., None]
    return h.flatten(-2) * 2 @ b.to(x.dtype).mT.flatten(0, 1)


def milliseconds(call: Callable[..., Tensor], *given: Tensor, runs: int = 5) -> str:
    """The least time of a few runs."""
    taken: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        call(*given)
        taken.append(time.perf_counter() - start)
    return f"{min(taken) * 1e3:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"experts": 64, "rank": 8, "rows": 4096, "width": 512, "inner": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    count, rank = options.experts, options.rank
    ends = torch.linspace(0, options.rows, count + 1).int()[1:]
    a, b = torch.randn(count, rank, options.width), torch.randn(count, options.inner, rank)
    shape = ExpertsShape(count, in_out=True, grouped=True)

    def branch(x: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        return shape.low_rank(x, a, b, 2.0, ends=ends)

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(options.rows, options.width, dtype=dtype)
        weight = torch.randn(count, options.width, options.inner, dtype=dtype)
        print(f"{str(dtype)[6:]}:")
        for name, product in PRODUCTS.items():
            print(f"  {name}: {milliseconds(product, x, weight, ends)}")
        print(f"  a branch of rank {rank}: {milliseconds(branch, x, a, b, ends)}")
        masked = milliseconds(of_all, x, a, b, ends)
        print(f"  one of factors of all experts, masked: {masked}")


if __name__ == "__main__":
    main()
