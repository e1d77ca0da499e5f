"""Triton kernels of `peftfx::lora_linear`; imports triton, so import it only where that is wanted.

Three kernels do forward and backward. All accumulate in float32 and are deterministic (no
atomics, no split reductions):

    shrink   S = x A^T                     [M, R], one pass over x
    expand   y = x W^T + bias + s S B^T    low-rank product first, then the K loop
    reduce   O = L^T x                     [R, K], summed over rows in order (dA, dB)

dX = dy W + dS A is `expand` with transposed strides. Tiles come from a small table by compute
capability; nothing is autotuned at run time.
"""

# Kernel parameters are typed by Triton, not by Python.
# pyright: basic

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES: dict[int, dict[str, int]] = {
    # compute capability: rows, columns, depth, warps, stages
    80: {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 3},
    90: {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
}
"""Tiles of `expand` for 16-bit inputs; measured by compiling: no register spills."""

SMALL: dict[str, int] = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
"""Tiles for float32 inputs and unknown devices."""


@triton.jit
def shrink(x, a, s, M, K, R, sxm, sxk, sar, sak, scale,
           RP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """S[m, r] = scale * sum_k x[m, k] a[r, k]."""
    om = tl.program_id(0) * BM + tl.arange(0, BM)
    orr = tl.arange(0, RP)
    ok = tl.arange(0, BK)
    acc = tl.zeros((BM, RP), tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        kk = k * BK + ok
        xt = tl.load(x + om[:, None] * sxm + kk[None, :] * sxk,
                     mask=(om[:, None] < M) & (kk[None, :] < K), other=0.0)  # fmt: skip
        at = tl.load(a + orr[None, :] * sar + kk[:, None] * sak,
                     mask=(orr[None, :] < R) & (kk[:, None] < K), other=0.0)  # fmt: skip
        acc = tl.dot(xt, at, acc, input_precision=PRECISION)
    out = (acc * scale).to(s.dtype.element_ty)
    tl.store(s + om[:, None] * R + orr[None, :], out, mask=(om[:, None] < M) & (orr[None, :] < R))


@triton.jit
def expand(x, w, s, b, bias, y, M, N, K, R, sxm, sxk, swn, swk, sbn, sbr, scale,
           HAS_BIAS: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
           BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """y[m, n] = sum_k x[m, k] w[n, k] + bias[n] + scale * sum_r s[m, r] b[n, r]."""
    pid = tl.program_id(0)
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * columns) * GROUP
    height = min(rows - first, GROUP)
    pm = first + (pid % (GROUP * columns)) % height
    pn = (pid % (GROUP * columns)) // height
    om = pm * BM + tl.arange(0, BM)
    on = pn * BN + tl.arange(0, BN)
    orr = tl.arange(0, RP)
    ok = tl.arange(0, BK)
    st = tl.load(s + om[:, None] * R + orr[None, :],
                 mask=(om[:, None] < M) & (orr[None, :] < R), other=0.0)  # fmt: skip
    bt = tl.load(b + on[None, :] * sbn + orr[:, None] * sbr,
                 mask=(on[None, :] < N) & (orr[:, None] < R), other=0.0)  # fmt: skip
    acc = tl.dot(st, bt, input_precision=PRECISION) * scale
    for k in range(0, tl.cdiv(K, BK)):
        kk = k * BK + ok
        xt = tl.load(x + om[:, None] * sxm + kk[None, :] * sxk,
                     mask=(om[:, None] < M) & (kk[None, :] < K), other=0.0)  # fmt: skip
        wt = tl.load(w + on[None, :] * swn + kk[:, None] * swk,
                     mask=(on[None, :] < N) & (kk[:, None] < K), other=0.0)  # fmt: skip
        acc = tl.dot(xt, wt, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + on, mask=on < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + om[:, None] * N + on[None, :], acc.to(y.dtype.element_ty),
             mask=(om[:, None] < M) & (on[None, :] < N))  # fmt: skip


@triton.jit
def reduce(left, x, out, M, K, R, sxm, sxk, scale,
           RP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """out[r, k] = scale * sum_m left[m, r] x[m, k], rows in order."""
    kk = tl.program_id(0) * BK + tl.arange(0, BK)
    orr = tl.arange(0, RP)
    acc = tl.zeros((RP, BK), tl.float32)
    for m in range(0, tl.cdiv(M, BM)):
        om = m * BM + tl.arange(0, BM)
        lt = tl.load(left + om[None, :] * R + orr[:, None],
                     mask=(om[None, :] < M) & (orr[:, None] < R), other=0.0)  # fmt: skip
        xt = tl.load(x + om[:, None] * sxm + kk[None, :] * sxk,
                     mask=(om[:, None] < M) & (kk[None, :] < K), other=0.0)  # fmt: skip
        acc = tl.dot(lt, xt, acc, input_precision=PRECISION)
    tl.store(out + orr[:, None] * K + kk[None, :], (acc * scale).to(out.dtype.element_ty),
             mask=(orr[:, None] < R) & (kk[None, :] < K))  # fmt: skip


def _rank(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _tiles(x: Tensor) -> dict[str, int]:
    if not x.is_cuda or x.dtype == torch.float32:
        return SMALL
    major, minor = torch.cuda.get_device_capability(x.device)
    known = [c for c in TILES if c <= 10 * major + minor]
    return TILES[max(known)] if known else SMALL


def _shrink(x: Tensor, a: Tensor, scale: float) -> Tensor:
    """`scale * x a^T`, `[M, R]`."""
    (m, k), r = x.shape, a.shape[0]
    out = x.new_empty(m, r)
    launch: Any = shrink[(triton.cdiv(m, 32),)]
    launch(x, a, out, m, k, r, *x.stride(), *a.stride(), scale, RP=_rank(r), BM=32, BK=64,
           PRECISION=_precision(x), num_warps=4, num_stages=3)  # fmt: skip
    return out


def _expand(
    x: Tensor, w: Tensor, s: Tensor, b: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """`x w^T + bias + scale * s b^T`, `[M, N]`."""
    (m, k), n, r = x.shape, w.shape[0], s.shape[1]
    out = x.new_empty(m, n)
    tiles = _tiles(x)
    grid = (triton.cdiv(m, tiles["BM"]) * triton.cdiv(n, tiles["BN"]),)
    launch: Any = expand[grid]
    launch(x, w, s, b, bias if bias is not None else x, out, m, n, k, r, *x.stride(), *w.stride(),
           *b.stride(), scale, HAS_BIAS=bias is not None, RP=_rank(r), GROUP=8,
           PRECISION=_precision(x), **tiles)  # fmt: skip
    return out


def _reduce(left: Tensor, x: Tensor, scale: float) -> Tensor:
    """`scale * left^T x`, `[R, K]`."""
    (m, k), r = x.shape, left.shape[1]
    out = x.new_empty(r, k)
    launch: Any = reduce[(triton.cdiv(k, 64),)]
    launch(left, x, out, m, k, r, *x.stride(), scale, RP=_rank(r), BM=64, BK=64,
           PRECISION=_precision(x), num_warps=4, num_stages=2)  # fmt: skip
    return out


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """`x [M, K]` -> `[M, N]`."""
    return _expand(x, weight, _shrink(x, a, 1.0), b, bias, scale)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float,
    need_x: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx [M, K], da [R, K], db [N, R]); None where not needed."""
    ds = _shrink(dy, b.t(), scale) if need_x or need_a else None
    dx = _expand(dy, weight.t(), ds, a.t(), None, 1.0) if need_x and ds is not None else None
    da = _reduce(ds, x, 1.0) if need_a and ds is not None else None
    db = _reduce(_shrink(x, a, 1.0), dy, scale).t().contiguous() if need_b else None
    return dx, da, db
