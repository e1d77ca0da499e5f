"""`peftfx::lora_linear`: the formula, its gradients, what it saves, and its Triton kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, library

import peftfx
from peftfx.kernels import lora_linear as kernel
from peftfx.kernels.lora_linear import has_triton, require_triton

from ..models import batch, first, randomise

HERE = Path(__file__).parent
Op = Callable[..., Tensor]
lora_linear: Op = kernel.lora_linear
triton_lora_linear: Op = kernel.triton_lora_linear
reference: Op = kernel.reference


def operands(*rows: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((*rows, 5), (7, 5), (7,), (3, 5), (7, 3))
    return [torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes]


@pytest.mark.parametrize("rows", [(4,), (2, 3), (2, 1, 3), ()])
def test_gradients(rows: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(lambda *t: lora_linear(*t, 0.5), operands(*rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_equal_the_plain_chain(dtype: torch.dtype) -> None:
    results: list[list[Tensor]] = []
    for operator in (lora_linear, reference):
        tensors = operands(2, 6, dtype=dtype)
        y = operator(*tensors, 0.5)
        y.sum().backward()
        results.append([y.detach(), *(t.grad for t in tensors if t.grad is not None)])
    limit = {torch.float32: 1e-5}.get(dtype, 0.05)
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=limit, atol=limit)


def test_only_what_is_needed_gets_a_gradient() -> None:
    x, w, c, a, b = operands(4, 6, grad=False)
    a.requires_grad_(), b.requires_grad_()
    lora_linear(x, w, c, a, b, 1.0).sum().backward()
    assert x.grad is None and w.grad is None and c.grad is None
    assert a.grad is not None and b.grad is not None
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    y = lora_linear(strided, w, None, a, b, 1.0)
    torch.testing.assert_close(y, reference(x, w, None, a, b, 1.0))


def saved_bytes(operator: Op, tensors: list[Tensor]) -> int:
    """Bytes kept for backward, parameters aside."""
    seen: dict[int, int] = {}
    owned = {t.untyped_storage().data_ptr() for t in tensors}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in owned:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x, w, c, a, b = tensors
        operator(x, w, c, a, b, 0.5).sum()
    return sum(seen.values())


def test_backward_keeps_less() -> None:
    tensors = operands(4, 6)
    assert saved_bytes(lora_linear, tensors) == 0  # x and parameters only
    assert saved_bytes(reference, tensors) == 4 * 6 * 3 * 8  # and x A^T


def test_without_a_gpu_tritons_form_is_torchs() -> None:
    tensors = operands(4, 6, dtype=torch.bfloat16)
    assert torch.equal(triton_lora_linear(*tensors, 0.5), lora_linear(*tensors, 0.5))


def test_without_storage() -> None:
    tensors = [t.detach().to("meta").requires_grad_() for t in operands(4, 6)]
    lora_linear(*tensors, 0.5).sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in tensors)


def test_the_operator_is_well_registered() -> None:
    library.opcheck(torch.ops.peftfx.lora_linear, (*operands(2, 3), 0.5, False))


def test_autocast_is_respected() -> None:
    x, w, c, a, b = operands(4, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, w, c, a, b, 0.5)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference(x, w, c, a, b, 0.5), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "text",
    ["lora{where=linear}", "lora{where=linear};ia3", "lora;lora{name=b}", "dora{where=linear};ia3",
     "dora;lora"],
)  # fmt: skip
def test_lowering_is_exact_reversible_and_compiles(captured: Any, text: str) -> None:
    _, base = captured["bert"]
    plain = randomise(peftfx.run(base, text))
    lowered = peftfx.run(plain, "lower{target=cpu}")
    assert lowered.history[-1].edited and "lora_linear" not in plain.text()
    results: list[dict[str, Tensor]] = []
    for program in (plain, lowered):
        first(program(**batch(4, 11, pad=3))).pow(2).mean().backward()
        trained = program.named_trainable_parameters()
        results.append({n: p.grad for n, p in trained.items() if p.grad is not None})
        for parameter in trained.values():
            parameter.grad = None
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad)
    assert peftfx.run(lowered, "lower{target=off}").text() == plain.text()
    assert peftfx.run(lowered, "fold").text() == peftfx.run(plain, "fold").text()
    compiled = torch.compile(lowered.module, fullgraph=True, backend="aot_eager")
    got = first(compiled(**batch()))
    torch.testing.assert_close(got, first(plain(**batch())))
    got.sum().backward()
    assert set(lowered.module.state_dict()) == set(plain.module.state_dict())


def test_what_is_not_lowered_is_reported(captured: Any) -> None:
    _, base = captured["bert"]
    program = peftfx.run(base, "lora{dropout=0.1};lower")
    assert "dropout" in program.history[-1].skipped[0][1]
    stacked = peftfx.run(base, "dora{dropout=0.1};lora{name=b};lower").history[-1]
    assert not stacked.edited
    assert all("dropout" in reason for _, reason in stacked.skipped)
    with pytest.raises(peftfx.RewriteError, match="no low-rank branch"):
        peftfx.run(base, "lower")
    if not torch.cuda.is_available():
        with pytest.raises(peftfx.RewriteError, match="CUDA device"):
            peftfx.run(peftfx.run(base, "lora"), "lower{target=triton}")
        with pytest.raises(RuntimeError):
            require_triton()


def run_script(name: str, **environment: str) -> Any:
    root = str(HERE.parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "TRITON_DEFAULT_FP_FUSION": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / name)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


needs_triton = pytest.mark.skipif(not has_triton(), reason="the package triton is not installed")


@needs_triton
def test_triton_kernels_in_the_interpreter() -> None:
    errors = run_script("interpreted.py")
    if not errors:
        pytest.skip("this triton's interpreter cannot loop with numpy 2.4 or newer")
    assert len(errors) == 6
    for case, found in errors.items():
        limit = 1e-6 if case.startswith("float32") else 1e-3
        assert set(found) == {"y", "dx", "da", "db"}
        assert all(error < limit for error in found.values()), (case, found)


@needs_triton
def test_triton_kernels_compile_without_spills(tmp_path: Path) -> None:
    usage = run_script("compiled.py", TRITON_CACHE_DIR=str(tmp_path))
    assert len(usage) == 6
    for name, found in usage.items():
        limit = 163 * 1024 if name.endswith("80") else 227 * 1024
        assert found["spill"] == 0 and found["registers"] <= 255, (name, found)
        assert found["shared"] <= limit, (name, found)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="needs a CUDA device and triton",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits the kernels run, in float32 torch's operators."""
    from peftfx.kernels.gpu import lora_linear as gpu

    ran: list[str] = []
    for name in ("forward", "backward"):
        kernels = getattr(gpu, name)
        monkeypatch.setattr(
            gpu,
            name,
            lambda *args, name=name, kernels=kernels: [ran.append(name), kernels(*args)][1],
        )
    tensors = [t.detach().cuda().to(dtype).requires_grad_() for t in operands(2, 70)]
    triton_lora_linear(*tensors, 0.5).sum().backward()
    assert ran == ([] if dtype == torch.float32 else ["forward", "backward"])
    wide = [t.detach().double().requires_grad_() for t in tensors]
    reference(*wide, 0.5).sum().backward()
    limit = 1e-4 if dtype == torch.float32 else 0.05
    for ours, exact in zip(tensors, wide, strict=True):
        assert ours.grad is not None and exact.grad is not None
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=limit, atol=limit)
