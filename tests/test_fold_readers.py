"""Who reads a stored tensor decides what folding may change: in a program and in files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.api import Program
from peftfx.rewriter.errors import ExportError, FoldError, PassError, VerifyError
from peftfx.rewriter.program.readers import Readers
from peftfx.rewriter.weights.exported import put_back

X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Chain(nn.Module):
    """Blocks one after the other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Normed(nn.Module):
    """A weight whose norm is read, too."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) / (1 + self.up.weight.norm())


class Turned(nn.Module):
    """A square weight used as it is and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.up.weight), self.up.weight.t())


class Flipped(nn.Module):
    """A weight whose rows are used in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.up.weight.flip(0))


class Tied(nn.Module):
    """A table and a head of one tensor, the names of which come in either order."""

    head: nn.Linear
    table: nn.Embedding

    def __init__(self, head_first: bool) -> None:
        super().__init__()
        names = ("head", "table") if head_first else ("table", "head")
        for name in names:
            setattr(self, name, nn.Embedding(32, 16) if name == "table" else
                    nn.Linear(16, 32, bias=False))  # fmt: skip
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def shared_bias() -> nn.Module:
    one, two = Block(), Block()
    two.up.bias = one.up.bias
    return Chain(one, two)


def looped() -> nn.Module:
    block = Block()
    return Chain(block, Block(), block, block)


def frozen(model: nn.Module) -> Any:
    return model.eval().requires_grad_(False)


def adapted(model: nn.Module, text: str, example: Tensor = X) -> Program:
    program = peftfx.run(peftfx.capture(model, (example,)), text)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in program.trainable_parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return program


def files(model: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    return folder


def reloaded(model: nn.Module, state: Any) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict(state, strict=True)
    return other


@pytest.mark.parametrize("text", ["lora{rank=2,where=ffn}", "ia3{where=ffn}",
                                  "lora{rank=2,where=ffn};ia3{where=ffn};dora{name=d,where=ffn.up}"])  # fmt: skip
def test_a_block_under_several_names_folds(text: str, tmp_path: Path) -> None:
    model = frozen(looped())
    program = adapted(model, text)
    want, bare = program(X), model(X)
    folded = peftfx.run(program, "fold")
    assert not folded.attachments and folded.history[-1].certificate.measured["exported"] < 2e-5
    state = folded.export_state_dict()
    torch.testing.assert_close(reloaded(model, state)(X), want, rtol=1e-4, atol=1e-4)
    assert (want - bare).abs().max() > 0.1
    assert torch.equal(state["layers.0.up.weight"], state["layers.3.up.weight"])
    separate = Chain(*(Block() for _ in range(4)))  # a model without the ties
    torch.testing.assert_close(reloaded(separate, state).eval()(X), want, rtol=1e-4, atol=1e-4)

    done = peftfx.fold_checkpoint(program, files(model, tmp_path / "base"), tmp_path / "out")
    written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[n], t) for n, t in state.items())
    source = model.state_dict()
    assert sorted(done.changed) == sorted(n for n in source if not torch.equal(source[n], state[n]))


READ_ELSEWHERE = [
    (Normed, "lora{rank=2,where=linear}", r"up\.weight is also read by linalg_vector_norm"),
    (shared_bias, "ia3{where=ffn}", r"layers\.0\.up\.bias is also read by \w+ \(in layers\.\d\.up"),
    (Turned, "lora{rank=2,where=linear}", r"up\.weight is also read by linear"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "text", "reason"), READ_ELSEWHERE)
def test_what_is_read_elsewhere_is_refused_with_the_reader(
    build: Any, text: str, reason: str, tmp_path: Path
) -> None:
    model = frozen(build())
    program = adapted(model, text)
    with pytest.raises(FoldError, match=rf"{reason}.*tied=untie"):
        peftfx.run(program, "fold")
    with pytest.raises(FoldError, match=reason):
        peftfx.fold_checkpoint(program, files(model, tmp_path / "base"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    kept = peftfx.run(program, "fold{tied=keep}")
    assert kept.attachments and torch.allclose(kept(X), program(X), atol=1e-5)


def test_a_branch_at_a_view_of_a_weight_is_refused_with_the_reason() -> None:
    with pytest.raises(PassError, match=r"up\.weight: .* linear .* multiplies by a view of it"):
        adapted(frozen(Flipped()), "lora{rank=2,where=linear}")


def test_a_bias_that_two_linears_read_does_not_hinder_deltas(tmp_path: Path) -> None:
    model = frozen(shared_bias())
    program = adapted(model, "lora{rank=2,where=ffn}")
    state = peftfx.run(program, "fold").export_state_dict()
    torch.testing.assert_close(reloaded(model, state)(X), program(X), rtol=1e-4, atol=1e-5)
    done = peftfx.fold_checkpoint(program, files(model, tmp_path / "base"), tmp_path / "out")
    assert len(done.changed) == 4 and all(n.endswith(".weight") for n in done.changed)
    assert 0 < done.gap < 1e-6


@pytest.mark.parametrize("head_first", [False, True])
def test_untying_gives_every_name_to_who_reads_by_it(head_first: bool) -> None:
    model = frozen(Tied(head_first))
    ids = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(0))
    program = adapted(model, "lora{rank=2,where=linear}", ids)
    with pytest.raises(FoldError, match=r"is also read by embedding \(in table\)"):
        peftfx.run(program, "fold")
    folded = peftfx.run(program, "fold{tied=untie}")
    state = folded.export_state_dict()
    other = Tied(head_first)
    other.head.weight = nn.Parameter(torch.empty(32, 16))
    torch.testing.assert_close(reloaded(other, state)(ids), program(ids), rtol=1e-4, atol=1e-4)
    assert torch.equal(state["table.weight"], model.table.weight)
    assert not any("tied" in site.describe() for site in folded.sites)
    assert {getattr(site, "weight", "") for site in folded.sites} == {"head.weight", "table.weight"}
    with pytest.raises(VerifyError, match="one tensor in the original model"):
        put_back(folded)


def test_names_that_both_sides_read_cannot_be_untied() -> None:
    program = adapted(frozen(shared_bias()), "ia3{where=ffn.up and layer in [0]}")
    folded = peftfx.run(program, "fold{tied=untie}")
    torch.testing.assert_close(folded(X), program(X), rtol=1e-4, atol=1e-5)
    state = folded.export_state_dict()
    assert not torch.equal(state["layers.0.up.bias"], state["layers.1.up.bias"])

    block = Block()
    mixed = adapted(frozen(Chain(block, block)), "lora{rank=2,where=ffn}")
    found = Readers(mixed).of("layers.0.up.weight")
    assert [r.through for r in found] == [(), ()]
    assert str(found[1].node.target) == "aten.linear.default"


@pytest.mark.parametrize("layers", [12, 24, 48])
def test_a_fold_looks_for_readers_once(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    program = adapted(frozen(Chain(*(Block() for _ in range(layers)))), "lora{rank=2,where=ffn}")
    looks: list[str] = []
    for name in ("refresh", "of"):
        original = getattr(Readers, name)

        def counted(self: Any, *given: Any, name: str = name, original: Any = original) -> Any:
            looks.append(name)
            return original(self, *given)

        monkeypatch.setattr(Readers, name, counted)
    assert not peftfx.run(program, "fold").attachments
    assert looks.count("refresh") == 1 and looks.count("of") == 2 * layers


def test_names_of_the_same_memory_are_one_tensor() -> None:
    one, two = Block(), Block()
    two.up.weight = nn.Parameter(one.up.weight.data)
    model = frozen(Chain(one, two))
    program = adapted(model, "lora{rank=2,where=ffn.up and layer in [0]}")
    with pytest.raises(FoldError, match=r"also read by"):
        peftfx.run(program, "fold")


def test_an_output_scale_waits_for_an_expression_of_the_bias() -> None:
    program = adapted(frozen(Chain(Block())), "diff_pruning{where=ffn.up};ia3{where=ffn.up}")
    program = peftfx.run(program, "bake")
    folded = peftfx.run(program, "fold")
    torch.testing.assert_close(folded(X), program(X), rtol=1e-4, atol=1e-5)


class Measured(nn.Module):
    """A linear whose weight the root module reads itself, too."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x) / (1 + self.l.weight.norm())


def test_untying_says_what_the_original_model_needs() -> None:
    program = peftfx.run(peftfx.capture(Measured().eval(), (X,)), "lora{rank=2,where=linear}")
    with torch.no_grad():
        for tensor in program.trainable_parameters():
            tensor.add_(torch.randn_like(tensor))
    folded = peftfx.run(program, "fold{tied=untie}")
    torch.testing.assert_close(folded(X), program(X), rtol=1e-4, atol=1e-5)
    assert "tensor of its own now" in str(folded.history[-1])
    with pytest.raises(ExportError, match=r"was untied.*tied=both"):
        folded.export_state_dict()


def test_overlapping_memory_is_not_untied() -> None:
    stored = torch.randn(24, 16)

    class Overlapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.a.weight = nn.Parameter(stored[:16], requires_grad=False)
            self.b.weight = nn.Parameter(stored[8:], requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    program = peftfx.run(peftfx.capture(Overlapping().eval(), (X,)), "lora{rank=2,where=linear}")
    with pytest.raises(FoldError, match="overlap in memory"):
        peftfx.run(program, "fold{tied=untie}")
    with pytest.raises(FoldError, match=r"a\.weight and b\.weight are two .*would change only"):
        peftfx.run(program, "fold{tied=both}")
    folded = peftfx.run(program, "fold{tied=keep}")
    assert torch.equal(folded(X), program(X)) and len(folded.attachments) == 2


def test_two_parameters_of_one_memory_are_not_changed_together() -> None:
    """Another parameter with the same values is another tensor; another name is not."""
    one, two = Block(), Block()
    two.up.weight = nn.Parameter(one.up.weight.data)
    where = "lora{rank=2,where=ffn.up and layer in [0]}"
    with pytest.raises(FoldError, match="two parameters in one memory"):
        peftfx.run(adapted(frozen(Chain(one, two)), where), "fold{tied=both}")
    two.up.weight = one.up.weight
    folded = peftfx.run(adapted(frozen(Chain(one, two)), where), "fold{tied=both}")
    state = folded.export_state_dict()
    assert torch.equal(state["layers.0.up.weight"], state["layers.1.up.weight"])
    assert not torch.equal(state["layers.0.up.weight"], one.up.weight)
