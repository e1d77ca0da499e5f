"""What each format of weights costs and keeps, on one normal matrix of 1024 x 1024.

    python benchmarks/formats.py

Bits a weight, the relative error, and for changes of rank 16 of some sizes what a lossy fold leaves
of them along their direction, with its error relative to the change.
"""

from __future__ import annotations

import torch

from peftfx.rewriter.weights.certificate import check_packed
from peftfx.rewriter.weights.codebook import Codebook
from peftfx.rewriter.weights.format import Format
from peftfx.rewriter.weights.integers import Quantised
from peftfx.rewriter.weights.onebit import OneBit
from peftfx.rewriter.weights.sparse24 import Sparse24

SIZES = (0.01, 0.05, 0.2, 1.0)


def formats(weight: torch.Tensor) -> dict[str, Format]:
    """The matrix in each format, as `quantise` has it."""
    return {
        "int8": Quantised.packed(weight, bits=8, group=32),
        "int4": Quantised.packed(weight, bits=4, group=32),
        "int2": Quantised.packed(weight, bits=2, group=32),
        "codebook": Codebook.packed(weight, group=64),
        "sparse24": Sparse24.packed(weight),
        "onebit": OneBit.packed(weight, group=None),
    }


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    weight = torch.randn(1024, 1024)
    change = torch.randn(1024, 16) @ torch.randn(16, 1024)
    change *= weight.norm() / change.norm()
    heads = " | ".join(f"change of {size:g}" for size in SIZES)
    print(f"| format | bits | error | {heads} |\n|{'---|' * (3 + len(SIZES))}")
    for name, form in formats(weight).items():
        bits = sum(8 * t.numel() * t.element_size() for t in form.tensors.values())
        dense = form.dense()
        cells = [
            f"{bits / weight.numel():.2f}",
            f"{float((dense - weight).norm() / weight.norm()):.4f}",
        ]
        for size in SIZES:
            exact = dense + size * change
            verdict = check_packed(name, dense, exact, form.replaced(exact).dense())
            cells.append(f"{verdict.left:.1%}, {verdict.lost:.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
