"""On a CUDA device: what was captured on the CPU computes, trains, compiles, offloads and saves as
there, and so does what was captured on the device.

Two devices sum in another order. `close` allows 1e-3 of the largest value in float32: moving every
weight by 3e-7 (about what sums of 64 terms round) moves the least stable recipe's gradients, those
of PEQA's scales, by 2.5e-4. TF32 is off, as it is in torch by default.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor

import peftfx
from peftfx.kernels import quantised_linear as quantised
from peftfx.kernels.lora_linear import has_triton

from .kernels.test_stored_linears import KERNELS as STORED
from .kernels.test_stored_linears import operands
from .methods.test_bank import IDS, MEMBERS
from .models import batch, build, first, moved, randomise
from .recipes import RECIPES, method_class, start
from .test_compile import compiled, train

DEVICE = "cuda"
EXACT, BF16, FP16 = 1e-3, 0.05, 0.01
"""Shares of the largest value: see above; about 12 roundings to 8 bits, 10 to 11 bits."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # libraries' hints for one kind of device
]
needs_triton = pytest.mark.skipif(not has_triton(), reason="the package triton is not installed")


@pytest.fixture(autouse=True)
def precise() -> None:
    assert torch.get_float32_matmul_precision() == "highest"


def there(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.to(DEVICE) for n, t in tensors.items()}


def close(got: Any, want: Any, share: float = EXACT) -> None:
    """Tensors, or dictionaries of some, relative to the largest value of each group."""
    if isinstance(want, Tensor):
        got, want = {"": got}, {"": want}
    assert set(got) == set(want)
    pairs = [
        (n, got[n].detach().double().cpu(), t.detach().double().cpu()) for n, t in want.items()
    ]
    largest = max((float(t.abs().max()) for _, _, t in pairs if t.numel()), default=0.0)
    for name, one, other in pairs:
        gap = float((one - other).abs().max()) if one.numel() else 0.0
        assert gap <= share * largest, (name, gap, largest)


def loss_of(output: Tensor) -> Tensor:
    """Of weighted outputs: the plain mean of squares behind a norm is constant."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return (output.float() * weights.to(output.device)).square().mean()


def given(program: peftfx.Program, seed: int = 0) -> dict[str, Tensor]:
    """A batch with every input of a program, on its device."""
    taken = {n: t for n, t in batch(4, 11, seed, pad=3).items() if n in program.spec.names}
    device = program.module.device
    return {n: t.to(device) for n, t in program.spec.bind((), taken).items()}


def made(base: peftfx.Program, name: str) -> peftfx.Program:
    before, last = start(base, name)
    return randomise(peftfx.run(before if before is base else randomise(before), last))


def steps(program: peftfx.Program) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Losses of three steps of SGD with the controllers, first gradients, what was trained."""
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.SGD(controllers.param_groups(lr=0.1))
    controllers.start(optimizer, 3)
    losses: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    named = program.named_trainable_parameters()
    for step in range(3):
        inputs = given(program, step)
        controllers.begin_forward(inputs)
        outputs = program(**inputs)
        loss = loss_of(first(outputs)) + controllers.loss(outputs, inputs, program)
        loss.backward()
        losses.append(loss.detach())
        gradients = gradients or {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        controllers.before_step(step)
        optimizer.step()
        controllers.after_step(step)
        optimizer.zero_grad()
    return torch.stack(losses), gradients, {n: p.detach() for n, p in named.items()}


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random gates are drawn on the CPU, whose generator the device does not have."""
    module = sys.modules[method_class("diff_pruning").__module__]

    def drawn(alpha: Tensor) -> Tensor:
        return (torch.rand(alpha.shape) * 0.98 + 0.01).to(alpha)

    monkeypatch.setattr(module, "gate_noise", drawn)


# Programs that were captured on the CPU, and on the device.


@pytest.fixture(scope="module")
def direct() -> peftfx.Program:
    """The decoder, captured on the device."""
    return peftfx.capture(build("decoder").to(DEVICE), kwargs=there(batch()))


def train_on_both(program: peftfx.Program) -> None:
    moved_there = program.to(DEVICE)
    held = (*moved_there.module.parameters(), *moved_there.module.buffers())
    assert {t.device.type for t in held} == {DEVICE}
    results: list[Any] = []
    for one in (program, moved_there):
        torch.manual_seed(0)
        output = first(one(**given(one))).detach()
        results.append((output, *(steps(one) if one.named_trainable_parameters() else ())))
    for want, got in zip(*results, strict=True):
        close(got, want)


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("name", RECIPES)
def test_moved(captured: Any, name: str) -> None:
    """Every recipe trains as on the CPU, in training mode (this model has no dropout)."""
    train_on_both(made(captured["decoder"][1], name).train())


@pytest.mark.parametrize("name", ["coda", "prompt_tuning", "unipelt", "bitfit"])
def test_moved_encoder(captured: Any, name: str) -> None:
    train_on_both(made(captured["encoder"][1], name).eval())


@pytest.mark.parametrize("name", RECIPES)
def test_rewritten_there(captured: Any, direct: peftfx.Program, name: str) -> None:
    """Passes on the device decide and insert what they do on the CPU."""
    here, on_device = (made(base, name).eval() for base in (captured["decoder"][1], direct))
    assert here.history[-1].edited == on_device.history[-1].edited
    close(first(on_device(**given(on_device))), first(here(**given(here))))


def test_devices_in_the_graph(captured: Any) -> None:
    """`arange` without a device, on the CPU when it was captured, follows the tensors."""
    _, program = captured["fused"]
    want = first(program(**given(program)))
    close(first(program.to(DEVICE)(**given(program.to(DEVICE)))), want)
    in_place = program.fork()
    in_place.module.to(DEVICE)
    close(first(in_place(**given(in_place))), want)
    in_place.module.cpu()
    assert torch.equal(first(in_place(**given(in_place))), want)


def test_bank(captured: Any) -> None:
    """Each row has its own adapter."""
    program = randomise(peftfx.run(captured["decoder"][1], MEMBERS))
    here = peftfx.run(program, "bank")
    on_device = peftfx.run(program.to(DEVICE), "bank")
    want = first(here(**batch(5, 11), adapter=IDS))
    close(first(on_device(**there(batch(5, 11)), adapter=IDS.to(DEVICE))), want)
    assert moved(first(here(**batch(5, 11))), want) > 0.01


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_linear(bits: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (6, 2, 16 * bits // 8), dtype=torch.uint8)
    x, scale, zero = torch.randn(5, 32), torch.rand(6, 2), torch.rand(6, 2)
    results: list[list[Tensor]] = []
    operators: Any = (("cpu", quantised.reference), (DEVICE, quantised.quantised_linear))
    for device, operator in operators:
        tensors = [t.detach().to(device).requires_grad_() for t in (x, scale, zero)]
        y = operator(tensors[0], codes.to(device), tensors[1], tensors[2], None, bits, 16)
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for got, want in zip(results[1], results[0], strict=True):
        close(got, want)


@pytest.mark.parametrize("kind", list(STORED))
def test_stored_linears(kind: str) -> None:
    given = operands(kind, torch.float32)
    results: list[list[Tensor]] = []
    for device in ("cpu", DEVICE):
        moved_there = [g.detach().to(device) if isinstance(g, Tensor) else g for g in given]
        tensors = [t for t in moved_there if isinstance(t, Tensor) and t.is_floating_point()]
        trained = [t.requires_grad_() for t in tensors]
        y = STORED[kind].OPERATOR(*moved_there)
        results.append([y, *torch.autograd.grad(y.square().sum(), trained)])
    for got, want in zip(results[1], results[0], strict=True):
        close(got, want)


# Kernels and compilation.


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ["lora{rank=2}", "dora{rank=2}"])
def test_triton(text: str, dtype: torch.dtype) -> None:
    base = peftfx.capture(build("encoder"), kwargs=batch(), dtype=dtype)
    plain = randomise(peftfx.run(base, text)).to(DEVICE)
    lowered = peftfx.run(plain, "lower{target=triton}")
    assert lowered.history[-1].edited and lowered.text() != plain.text()
    share = EXACT if dtype == torch.float32 else BF16
    results: list[Any] = []
    for program in (plain, lowered):
        output = first(program(**given(program)))
        held = program.named_trainable_parameters()
        gradients = torch.autograd.grad(loss_of(output), list(held.values()))
        results.append((output, dict(zip(held, gradients, strict=True))))
    for got, want in zip(results[1], results[0], strict=True):
        close(got, want, share)
    folded = [peftfx.run(program, "fold") for program in (plain, lowered)]
    assert folded[0].text() == folded[1].text()
    close(first(folded[1](**given(folded[1]))), results[0][0], share)


@pytest.fixture
def one_compilation() -> Iterator[None]:
    torch._dynamo.reset()
    with dynamo.patch(error_on_recompile=True), inductor.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


@needs_triton
@pytest.mark.usefixtures("one_compilation")
@pytest.mark.parametrize(
    "text", ["lora{rank=2}", "dora{rank=2}", "ia3", "lora{rank=2};lower{target=triton}"]
)
def test_compiled(captured: Any, text: str) -> None:
    """Three training steps at three sizes through inductor, compiled once."""
    program = randomise(peftfx.run(captured["decoder"][1].to(DEVICE), text))
    plain = program.fork()
    want, gradients = train(plain, plain.module)
    got, same = train(program, compiled(program, "inductor"))
    close(torch.stack(got), torch.stack(want), 1e-3)  # AdamW divides differences by small numbers
    close(same, gradients)


# Mixed precision.


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, BF16), (torch.float16, FP16)])
def test_autocast(captured: Any, dtype: torch.dtype, share: float) -> None:
    """The same kernels in the same order: equal outputs. Gradients of embeddings and repeated
    heads are summed in any order."""
    model, program = captured["decoder"]
    results: list[Any] = []
    for module in (copy.deepcopy(model).to(DEVICE), program.to(DEVICE).module):
        scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
        with torch.autocast(DEVICE, dtype):
            output = first(module(**there(batch(4, 11, pad=3))))
        scaler.scale(loss_of(output)).backward()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler.unscale_(optimizer) if scaler.is_enabled() else None
        grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        results.append((output.detach(), grads))
    (want, theirs), (got, ours) = results
    assert got.dtype == want.dtype == dtype and torch.equal(got, want)
    close(ours, theirs, share)


@pytest.mark.parametrize(
    ("text", "rate"), [("lora{rank=2}", 0.1), ("dora{rank=2}", 0.1), ("peqa{group=16}", 0.01)]
)
def test_scaled_gradients(captured: Any, text: str, rate: float) -> None:
    """Three steps in float16 with a scaler are three steps in float32, but for rounding."""
    losses: list[Tensor] = []
    for half in (False, True):
        program = randomise(peftfx.run(captured["decoder"][1], text)).to(DEVICE)
        optimizer = torch.optim.SGD(program.trainable_parameters(), lr=rate)
        scaler, curve = torch.amp.GradScaler(DEVICE, enabled=half), []
        for step in range(3):
            with torch.autocast(DEVICE, torch.float16, enabled=half):
                loss = loss_of(first(program(**given(program, step))))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            curve.append(loss.detach())
        assert not half or scaler.get_scale() == 65536.0  # no step was skipped
        losses.append(torch.stack(curve))
    close(losses[1], losses[0], FP16)
    assert moved(losses[0][0], losses[0][1]) > 0.001
