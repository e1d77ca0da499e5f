"""Which form of `lora_linear` costs least for given sizes: by FLOPs, then measured once.

RunLoRA (Cherniuk et al. 2023, arXiv:2312.03415) chooses among orders of the products; which of them
is fastest depends on how well a machine multiplies thin matrices, so the few with the fewest FLOPs
are timed. Only what stands beside the frozen product is: that is the same in all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lora_linear import Form, thin

_ROUNDS = 5
_LEEWAY = 0.03
"""Forms that are slower by less than this share are as fast."""

FORMS = tuple(
    Form(kept, rank_first, merged)
    for merged in (False, True)
    for kept in ((False,) if merged else (False, True))
    for rank_first in (True, False)
)


class Sizes(NamedTuple):
    """Of one product: x `[tokens, inputs]`, A `[rank, inputs]`, B `[outputs, rank]`."""

    tokens: int
    inputs: int
    outputs: int
    rank: int


def flops(form: Form, sizes: Sizes) -> int:
    """Of a step beside the frozen products: forward, and gradients of x, A and B."""
    tokens, inputs, outputs, rank = sizes
    narrow, widen = 2 * tokens * inputs * rank, 2 * tokens * outputs * rank
    gradients = widen + narrow + widen  # dS, dA, dB
    if form.merged:
        return 2 * (2 * inputs * outputs * rank) + gradients + narrow
    return narrow + widen + gradients + narrow + (0 if form.kept else narrow)


def kept(form: Form, sizes: Sizes, itemsize: int) -> int:
    """Bytes for the backward pass, beside x."""
    return sizes.tokens * sizes.rank * itemsize if form.kept else 0


def candidates(sizes: Sizes, dtype: torch.dtype) -> list[Form]:
    """The forms worth timing: merged ones where that takes fewer FLOPs, and is precise."""
    precise = dtype.itemsize >= 4
    least = min(flops(f, sizes) for f in FORMS if not f.merged)
    return [f for f in FORMS if not f.merged or (precise and flops(f, sizes) < least)]


def chosen(sizes: Sizes, weight: Tensor) -> tuple[Form, str]:
    """The form that costs least beside a weight, and why.

    A weight without storage cannot be timed: there the first of those with the fewest FLOPs is
    taken.
    """
    forms = candidates(sizes, weight.dtype)
    fewest = min(flops(f, sizes) for f in forms)
    counts = f"{fewest / 1e6:.3g} MFLOPs at least"
    if weight.is_meta:
        form = next(f for f in forms if flops(f, sizes) == fewest)
        return form, f"{form} ({flops(form, sizes) / 1e6:.3g} MFLOPs, {counts}; not timed on meta)"
    seconds = _measured(forms, sizes, weight)
    itemsize = weight.itemsize
    fast = [f for f in forms if seconds[f] <= min(seconds.values()) * (1 + _LEEWAY)]
    form = min(fast, key=lambda f: (kept(f, sizes, itemsize), seconds[f]))
    least, plain, size = flops(form, sizes) / 1e6, seconds[forms[0]], kept(form, sizes, itemsize)
    share = f"{seconds[form] / plain:.2f} of the plain form's {plain * 1e6:.0f} us"
    return form, f"{form} ({least:.3g} MFLOPs, {counts}; {share}, keeps {size:,} bytes)"


def _measured(forms: list[Form], sizes: Sizes, weight: Tensor) -> Mapping[Form, float]:
    """Least seconds of each form's products, in turns."""
    tokens, inputs, outputs, rank = sizes
    new: Any = weight.detach().new_zeros
    x, y, dx = new(tokens, inputs), new(tokens, outputs), new(tokens, inputs)
    a, b = new(rank, inputs), new(outputs, rank)
    runs = {f: _beside(f, x, y, dx, a, b, weight.detach()) for f in forms}
    seconds = dict.fromkeys(forms, float("inf"))
    with torch.no_grad():
        for _ in range(_ROUNDS):
            for form, run in runs.items():
                begun = _clock(weight)
                run()
                seconds[form] = min(seconds[form], _clock(weight) - begun)
    return seconds


def _beside(
    form: Form, x: Tensor, y: Tensor, dx: Tensor, a: Tensor, b: Tensor, weight: Tensor
) -> Callable[[], None]:
    """A step without the frozen products; y and dy have the same shape."""

    def run() -> None:
        s = None
        if form.merged:
            torch.addmm(weight, b, a), torch.addmm(weight, b, a)
        else:
            s = thin(x, a, form)
            y.addmm_(s, b.t())
        ds = thin(y, b.t(), form)
        ds.t() @ x
        if not form.merged:
            dx.addmm_(ds, a)
        s = s if form.kept and s is not None else thin(x, a, form)
        s.t() @ y

    return run


def _clock(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
