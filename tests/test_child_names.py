"""Children whose names our modules, or torch's graph modules, use themselves."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.blocks.module import Outlined
from peftfx.rewriter.errors import BlockError, CaptureError

from .models import randomise

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Inner(nn.Module):
    """A residual block whose last linear has a given name."""

    def __init__(self, name: str = "down") -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 8)
        self.last = name
        self.add_module(name, nn.Linear(8, 8)) if name == "down" else setattr(
            self, name, nn.Linear(8, 8)
        )

    def forward(self, x: Tensor) -> Any:
        down: Any = self._modules[self.last]
        return x + down(torch.relu(self.up(self.norm(x))))


class Named(nn.Module):
    """Blocks below one name, and linears below others."""

    def __init__(self, blocks: str, *names: str, inner: str = "down") -> None:
        super().__init__()
        self._modules[blocks] = nn.ModuleList([Inner(inner), Inner(inner)])
        self.order = names
        for name in names:
            self._modules[name] = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        parts: Any = self._modules
        blocks = next(m for m in parts.values() if isinstance(m, nn.ModuleList))
        for block in blocks:
            x = block(x)
        for name in self.order:
            x = torch.tanh(parts[name](x))
        return x


class Wraps(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def own(module: nn.Module) -> set[str]:
    """What a module has that plain modules have not."""
    names = set(dir(module)) - set(dir(nn.Module())) - set(module._modules)
    return {n for n in names if not n.startswith("__")}


@pytest.fixture(scope="module")
def plain() -> peftfx.Program:
    return peftfx.capture(Named("layers"), (X,))


def test_every_name_of_graph_modules_is_refused_or_free(plain: peftfx.Program) -> None:
    refused: set[str] = set()
    for name in sorted(own(plain.module) - {"device"}):
        with pytest.raises(CaptureError, match=f"called '{name}'.*Rename it, or put the model"):
            peftfx.capture(Named("layers", name), (X,))
        refused.add(name)
    assert {"graph", "code", "meta", "recompile", "_graph", "_in_spec"} <= refused
    model = Named("layers")
    model.register_parameter("code", nn.Parameter(torch.ones(8)))
    with pytest.raises(CaptureError, match="called 'code'"):
        peftfx.capture(model, (X,))
    wrapped = Wraps(Named("layers", "graph", "code").eval())
    torch.testing.assert_close(peftfx.capture(wrapped, (X,))(X), wrapped(X))


def test_every_name_of_outlined_modules_is_the_models(plain: peftfx.Program) -> None:
    taken = own(plain.module) - {"device"}
    names = sorted((own(peftfx.outline(plain)) | {"device"}) - taken - {"blocks"})
    names.remove("peftfx_outlined")  # ours, as `peftfx` is
    assert {"regions", "report", "units", "saved", "checkpoint", "fixed", "flat", "run"} < set(
        names
    )
    model = Named("blocks", *names)
    program = peftfx.run(peftfx.capture(model, (X,)), "lora{rank=2,where='name:up'}")
    want = model(X)
    outlined = peftfx.outline(program, checkpoint=[0])
    torch.testing.assert_close(outlined(x=X), want)
    outlined(x=X).sum().backward()
    assert all(p.grad is not None for p in program.trainable_parameters())
    for name in ("blocks", *names):
        assert outlined.get_submodule(name) is getattr(outlined, name)
    api: Any = outlined.peftfx_outlined
    assert [b.path for b in api.blocks] == ["blocks.0", "blocks.1"] and api.regions == ()
    assert api.blocks[0].checkpointed and not api.blocks[1].checkpointed
    assert "blocks.0" in str(api.report()) and len(api.units(2)) == 2
    api.checkpoint(False)
    api.gradient_checkpointing_enable()
    assert all(b.checkpointed for b in api.blocks)
    copied = copy.deepcopy(outlined)
    torch.testing.assert_close(copied(x=X), want)
    assert copied.peftfx_outlined.blocks[0] is copied.get_submodule("blocks.0")
    assert list(outlined.state_dict()) == list(program.module.state_dict())
    with pytest.raises(CaptureError, match="keeps its dtype"):
        outlined.half()
    torch.testing.assert_close(peftfx.inline(outlined)(X), want)
    offloaded = peftfx.outline(program, offload=True, recompute=True)
    torch.testing.assert_close(offloaded(x=X), want)


def test_public_names_stay_where_no_child_has_them(plain: peftfx.Program) -> None:
    outlined = peftfx.outline(plain)
    assert outlined.peftfx_outlined is outlined
    assert [b.path for b in outlined.blocks] == ["layers.0", "layers.1"]
    assert plain.module.device == torch.device("cpu") and isinstance(outlined, Outlined)


def test_a_child_called_device() -> None:
    model = Named("layers", "device")
    program = peftfx.run(peftfx.capture(model, (X,)), "lora{rank=2,where='name:up'}")
    for module in (program.module, copy.deepcopy(program.module), program.to("cpu").module):
        assert isinstance(module.device, nn.Module)
        torch.testing.assert_close(module(x=X), model(X))
        with pytest.raises(CaptureError, match="keeps its dtype"):
            module.bfloat16()
    program.verify()


def test_a_block_says_which_name_it_cannot_share(plain: peftfx.Program) -> None:
    names = own(peftfx.outline(plain).blocks[0])
    assert {"graph", "run", "kept", "root", "path", "regions"} < names
    program = peftfx.capture(Named("layers", inner="kept"), (X,))
    with pytest.raises(BlockError, match=r"layers.0 has a child .* called 'kept'.*Rename it"):
        peftfx.outline(program)
    torch.testing.assert_close(program(X), program(X))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_copies_and_pickles_keep_their_guard(plain: peftfx.Program) -> None:
    program = peftfx.run(plain, "lora{rank=2,where='name:up'}")
    buffer = io.BytesIO()
    torch.save(program.module, buffer)
    buffer.seek(0)
    for module in (copy.deepcopy(program.module), torch.load(buffer, weights_only=False)):
        assert type(module).__name__ == type(program.module).__name__
        torch.testing.assert_close(module(x=X), program(X))
        for change in (module.bfloat16, module.half, module.double):
            with pytest.raises(CaptureError, match="keeps its dtype"):
                change()
        assert module.to("cpu") is module


class Keyed(nn.Module):
    """Linears in a dict, as graph networks have for the kinds of their edges."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleDict({n: nn.Linear(8, 8) for n in names})
        self.scales = nn.ParameterDict({n: nn.Parameter(torch.ones(8)) for n in names})

    def forward(self, x: Tensor) -> Tensor:
        for name, part in self.parts.items():
            x = x + torch.tanh(part(x) * self.scales[name])
        return x


def test_keywords_are_names(tmp_path: Path) -> None:
    model = Keyed("in", "class", "None", "a-b", "ﬁrst", "x").eval().requires_grad_(False)
    base = peftfx.capture(model, (X,), cache=tmp_path / "cache")
    assert base.cached == "stored" and torch.equal(base(X), model(X))
    assert len(base.sites.of("linear")) == 6
    program = randomise(peftfx.run(base, "lora{rank=2,where='name:in|name:class'}"))
    program(X).sum().backward()
    assert all(p.grad is not None for p in program.trainable_parameters())
    folded = peftfx.run(program, "fold")
    torch.testing.assert_close(folded(X), program(X))
    again = copy.deepcopy(model)
    again.load_state_dict(folded.export_state_dict(), strict=True)
    torch.testing.assert_close(again(X), program(X))
    peftfx.save_program(program, tmp_path / "program")
    torch.testing.assert_close(peftfx.load_program(tmp_path / "program")(X), program(X))
    peftfx.export_onnx(program, tmp_path / "model.onnx")
    assert torch.equal(copy.deepcopy(program.module)(x=X), program(X))
    assert peftfx.capture(model, (X,), cache=tmp_path / "cache").cached == "recalled"


def test_names_of_digits_are_saved_and_cached(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    program = peftfx.capture(model, (X,), cache=tmp_path / "cache")
    assert program.cached == "stored"
    assert peftfx.capture(model, (X,), cache=tmp_path / "cache").cached == "recalled"
    peftfx.save_program(program, tmp_path / "program")
    assert torch.equal(peftfx.load_program(tmp_path / "program")(X), program(X))
