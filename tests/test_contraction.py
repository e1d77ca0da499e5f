"""Products written as `einsum`: sites like any others, against their equations and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import ArtifactError
from peftfx.rewriter.program.sites import ExpertsSite, LinearSite

from .models import moved, randomise
from .test_weight_shapes import FORMULAS, branches


class Contracted(nn.Module):
    """A norm, an einsum of what it gives and a weight, and one back, maybe by expert."""

    def __init__(self, up: str, down: str, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.equations, self.norm = (up, down), nn.LayerNorm(8)
        self.up, self.down = (nn.Parameter(torch.randn(s) / 3) for s in shapes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(torch.einsum(self.equations[0], self.norm(x), self.up))
        y = torch.einsum(self.equations[1], h, self.down)
        return x + (y.mean(2) if y.dim() > 3 else y)


KINDS: dict[str, tuple[Any, ...]] = {
    "in out": ("bti,io->bto", "bto,oi->bti", (8, 12), (12, 8)),
    "out in": ("bti,oi->tbo", "tbo,io->bti", (12, 8), (8, 12)),
    "experts in out": ("bti,eio->bteo", "bteo,eoi->btei", (3, 8, 12), (3, 12, 8)),
    "experts out in": ("bti, eoi -> ebot", "ebot, eio -> btei", (3, 12, 8), (3, 8, 12)),
}
STACKS = {"in out": lambda w: w.mT, "out in": lambda w: w}


def contracted(kind: str) -> Contracted:
    torch.manual_seed(0)
    return Contracted(*KINDS[kind]).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_methods_stand_beside_contractions(kind: str) -> None:
    model, x = contracted(kind), torch.randn(3, 7, 8)
    base = peftfx.capture(model, (torch.randn(2, 5, 8),))
    torch.testing.assert_close(base(x), model(x))
    experts = kind.startswith("experts")
    sites = [s for s in base.sites if isinstance(s, LinearSite | ExpertsSite)]
    assert [(s.id, s.role, s.kind) for s in sites] == [
        (n, f"ffn.{n}", "experts" if experts else "linear") for n in ("up", "down")
    ]
    turn, where = STACKS[kind.removeprefix("experts ")], "experts" if experts else "ffn"
    for method in ("lora", "dora", "ia3", *(() if experts else ("adalora",))):
        options = "" if method == "ia3" else "rank=2,alpha=3,"
        program = randomise(peftfx.run(base, f"{method}{{{options}where={where}}}"), 0.2)
        other = contracted(kind)
        for name, own in branches(program).items():
            weight = model.get_parameter(name).detach()
            stack = turn(weight if experts else weight[None])
            if method == "ia3":  # scales what up gives, and what down reads
                scale = own["l"].view(len(stack), -1)
                made = stack * (scale[:, :, None] if name == "up" else scale[:, None])
            else:
                made = FORMULAS[method](stack, own, 1.5)
            made = turn(made)
            other.get_parameter(name).data = made if experts else made[0]
        torch.testing.assert_close(program(x), other(x), rtol=1e-4, atol=1e-5)
        assert moved(model(x), program(x)) > 0.001
        folded = peftfx.run(program, "fold")
        assert not folded.attachments
        torch.testing.assert_close(folded(x), other(x), rtol=1e-4, atol=1e-5)


def test_peft_computes_the_same_beside_experts(tmp_path: Path) -> None:
    from peft import PeftModel

    model, other = (nn.Sequential(contracted("experts out in")) for _ in range(2))
    base, x = peftfx.capture(model, (torch.randn(2, 5, 8),)), torch.randn(3, 7, 8)
    program = randomise(peftfx.run(base, "lora{rank=2,alpha=6,where=experts}"), 0.2)
    peftfx.save_peft(program, tmp_path / "a")
    theirs: Any = PeftModel.from_pretrained(other, str(tmp_path / "a"))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(program(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert moved(model(x), program(x)) > 0.01


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("bti,io->bt", (8, 5)),  # sums over outputs
        ("bti,ti->bt", (5, 8)),  # no product of a matrix
        ("bti,io->bto", (1, 5)),  # the one row is repeated
        ("bti,b...->bt...", (2, 5)),
    ],
)
def test_other_equations_stay_as_they_are(equation: str, shape: tuple[int, ...]) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x, self.w)

    torch.manual_seed(0)
    model, x = One().eval(), torch.randn(2, 5, 8)
    base = peftfx.capture(model, (x,))
    assert "einsum" in base.text()
    assert torch.equal(base(x), model(x))
    assert all(not isinstance(s, LinearSite) or s.obstacle for s in base.sites)


class Stacks(nn.Module):
    """Experts along the second or the last axis of their tensors, in an einsum or a view."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.table, self.norm, self.route = nn.Embedding(30, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        sizes = ((8, 16, 3), (16, 8, 3)) if way == "last" else ((8, 3, 16), (16, 3, 8))
        self.up, self.down = (nn.Parameter(0.3 * torch.randn(s)) for s in sizes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        h = self.norm(x)
        gate = self.route(h).softmax(-1)
        if self.way == "einsum":
            inner = F.gelu(torch.einsum("bti,ieo->bteo", h, self.up))
            y = torch.einsum("bteo,oei->btei", inner, self.down)
            return x + (y * gate[..., None]).sum(2)
        order = (2, 0, 1) if self.way == "last" else (1, 0, 2)
        rows = h.reshape(1, -1, 8).expand(3, -1, -1)
        y = F.gelu(rows @ self.up.permute(order)) @ self.down.permute(order)
        return x + (y * gate.reshape(-1, 3).mT[..., None]).sum(0).view(x.shape)


@pytest.mark.parametrize("way", ["einsum", "middle", "last"])
def test_experts_along_another_axis(way: str, tmp_path: Path) -> None:
    """They are experts as others are: low-rank beside each, folded, in few bits; not for PEFT."""
    ids = torch.randint(30, (3, 7))
    model = Stacks(way).eval().requires_grad_(False)
    base = peftfx.capture(model, (ids,))
    place = 2 if way == "last" else 1
    sites: dict[str, Any] = {s.id: s for s in base.sites.of("experts")}
    assert {n: (s.role, s.place, s.matrices) for n, s in sites.items()} == {
        "up": ("ffn.up", place, (3, 16, 8)), "down": ("ffn.down", place, (3, 8, 16)),
    }  # fmt: skip
    program = randomise(peftfx.run(base, "lora{rank=2,where=experts}"), 0.3)
    values = program.named_trainable_parameters()
    want = Stacks(way).eval()
    with torch.no_grad():
        for name in ("up", "down"):
            a, b = (values[f"peftfx.lora.{name}.delta.{n}"] for n in "ab")
            getattr(want, name).add_((8.0 * b @ a).mT.movedim(0, place))  # [experts, in, out]
    torch.testing.assert_close(program(ids), want(ids), rtol=1e-4, atol=1e-5)
    folded = peftfx.run(program, "fold").export_state_dict()
    for name, tensor in want.state_dict().items():
        torch.testing.assert_close(folded[name], tensor)
    stored = peftfx.run(base, "quantise{format=int8,group=4,where=experts}")
    assert 0 < (stored(ids) - base(ids)).abs().max() < 0.02
    with pytest.raises(ArtifactError, match="has its experts along axis"):
        peftfx.save_peft(program, tmp_path / "peft")


class Heads(nn.Module):
    """Projections `[in, heads, width]`, as where a dense layer may have several output axes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(30, 16), nn.LayerNorm(16)
        self.q, self.k, self.v = (nn.Parameter(0.2 * torch.randn(16, 2, 8)) for _ in range(3))
        self.o = nn.Parameter(0.2 * torch.randn(2, 8, 16))

    def forward(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        x = self.table(ids)
        q, k, v = (torch.einsum("btd,dhk->bhtk", self.norm(x), w) for w in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        y = y if seen is None else y * seen[:, None, None]
        return x + torch.einsum("bhtk,hkd->btd", y, self.o)


def test_projections_by_head() -> None:
    ids, model = torch.randint(30, (2, 7)), Heads().eval().requires_grad_(False)
    base = peftfx.capture(model, (ids,))
    attention: Any = base.sites.of("attention")[0]
    assert (attention.q, attention.heads, attention.kv_heads) == ("q", 2, 2)
    pruned = peftfx.run(base, "head_pruning{ratio=0.5}")
    ((kept,),) = pruned.history[-1].plan.decisions["kept"].values()
    torch.testing.assert_close(pruned(ids), model(ids, F.one_hot(torch.tensor(kept), 2)))
    assert moved(pruned(ids), base(ids)) > 0.01
