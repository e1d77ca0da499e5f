"""The loss of a linear's outputs computed with its gradient: equal, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.blocks import loss as fused
from peftfx.rewriter.blocks.loss import linear_cross_entropy

REDUCTIONS = {1: "mean", 2: "sum"}


def operands(rows: int = 7) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, rows, 5), (11, 5), (11,))
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [7, 150])
def test_loss_and_gradients(whole: bool, reduction: int, rows: int) -> None:
    x, weight, bias = tensors = operands(rows)
    target = torch.randint(11, (2, rows))
    target[0, :4] = -100
    results: list[list[Tensor]] = []
    for ours in (True, False):
        logits = F.linear(x, weight, bias)
        word = REDUCTIONS[reduction]
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction=word)
        if ours:
            loss, logits = linear_cross_entropy(x, weight, bias, target, whole, reduction)
        more = logits.pow(2).mean() if whole else 0  # logits have a gradient of their own
        results.append([loss, *torch.autograd.grad(3 * loss + more, tensors)])
        if ours and not whole:
            assert not logits.numel()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_that_do_not_count() -> None:
    x, weight, _ = operands()
    nothing = torch.full((2, 7), -100)
    loss, _ = linear_cross_entropy(x, weight, None, nothing, False)
    assert loss.isnan()  # as torch's
    loss.backward()
    assert x.grad is not None and torch.equal(x.grad, torch.zeros_like(x))


def kept(loss: Any) -> int:
    sizes: dict[int, int] = {}

    def seen(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t):
        loss()
    return sum(sizes.values())


def test_no_logits_are_kept() -> None:
    x, weight, _ = operands()
    frozen, target = weight.detach(), torch.randint(11, (2, 7))
    plain = kept(lambda: F.cross_entropy(F.linear(x, frozen).flatten(0, 1), target.flatten()))
    ours = kept(lambda: linear_cross_entropy(x, frozen, None, target, True))
    assert ours == x.nbytes + frozen.nbytes < plain


class Speaker(nn.Module):
    """A language model of one layer with its loss."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head, self.options = nn.Linear(8, 13), options

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.layer(self.embedding(ids)))
        loss = F.cross_entropy(logits.view(-1, 13), labels.view(-1), **self.options)
        return loss, logits


def outlined(**options: Any) -> tuple[peftfx.Program, Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    inputs = {n: torch.randint(13, (2, 5)) for n in ("ids", "labels")}
    program = peftfx.capture(Speaker(**options).eval().requires_grad_(False), kwargs=inputs)
    program = peftfx.run(program, "lora{rank=2,where=ffn}")
    for parameter in program.trainable_parameters():
        nn.init.normal_(parameter, std=0.3)
    return program, peftfx.outline(program, fuse_loss=True), inputs


def calls(module: Any) -> list[Any]:
    return [n.target for n in module.peftfx_outlined.graph.nodes]


def test_an_outlined_program_with_its_loss() -> None:
    program, module, inputs = outlined()
    assert fused.linear_cross_entropy in calls(module)
    assert torch.ops.aten.cross_entropy_loss.default not in calls(module)
    trained = program.trainable_parameters()
    losses = [run(**inputs) for run in (program, module)]
    gradients = [torch.autograd.grad(loss, trained) for loss, _ in losses]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), losses[0])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), losses[0])
    assert peftfx.inline(module).text() == program.text()


def test_another_loss_stays_as_it_is() -> None:
    _, module, _ = outlined(label_smoothing=0.1)
    assert fused.linear_cross_entropy not in calls(module)
