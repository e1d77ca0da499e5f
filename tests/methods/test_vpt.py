"""Visual prompt tuning against its equation, in models with and without token embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import OptionError, PassError

from ..models import batch, first, llama, moved, randomise

LENGTH = 3


class Patches(nn.Module):
    """A plain vision transformer: patches, a class token, positions, torch's own layers."""

    def __init__(self, pool: str = "class") -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.start = nn.Parameter(torch.randn(1, 1, 32))
        self.places = nn.Parameter(torch.randn(1, 17, 32) * 0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
            for _ in range(3)
        )
        self.norm, self.head, self.pool = nn.LayerNorm(32), nn.Linear(32, 5), pool

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.start.expand(x.shape[0], -1, -1), x], 1) + self.places
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.pool == "class" else x.mean(1))


Widen = Callable[[Tensor, tuple[Any, ...]], tuple[Any, ...]]


@contextlib.contextmanager
def inserted(
    layers: Any, prompts: list[Tensor], place: int, widen: Widen = lambda _, rest: rest
) -> Generator[None]:
    """Layers that run with prompts from `place` on; one prompt alone stays until the last."""
    handles = list[Any]()
    for k, layer in enumerate(layers):
        own = prompts[k] if len(prompts) > 1 else prompts[0] if k == 0 else None
        last = len(prompts) > 1 or k == len(layers) - 1

        def enter(_: Any, given: Any, own: Tensor | None = own) -> Any:
            x, *rest = given
            if own is not None:
                x = torch.cat([x[:, :place], own.expand(len(x), -1, -1), x[:, place:]], 1)
            return x, *widen(x, tuple(rest))

        def leave(_: Any, __: Any, y: Tensor, last: bool = last) -> Tensor:
            return torch.cat([y[:, :place], y[:, place + LENGTH :]], 1) if last else y

        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def own(program: peftfx.Program) -> list[Tensor]:
    branches: list[Any] = [program.branch(a) for a in program.attachments]
    return [b.prompt.detach() for b in branches]


def vpt(base: peftfx.Program, depth: str) -> peftfx.Program:
    return randomise(peftfx.run(base, f"vpt{{length={LENGTH},depth={depth}}}"), 0.5)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_plain_vision_transformer(depth: str, place: int) -> None:
    """In front of the class token and behind it are the same; a mean is over patches alone."""
    torch.manual_seed(0)
    model, images = Patches("class" if place else "mean").eval(), torch.randn(4, 3, 16, 16)
    base = peftfx.capture(model, (images[:2],))
    program = vpt(base, depth)
    with inserted(model.layers, own(program), place):
        want = model(images)
    torch.testing.assert_close(program(images), want, rtol=1e-5, atol=1e-5)
    assert moved(base(images), want) > 0.01
    count = sum(p.numel() for p in program.trainable_parameters())
    assert count == LENGTH * 32 * (3 if depth == "deep" else 1)


def test_exact_in_float64_compiled_outlined_and_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Patches().double().eval(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    base = peftfx.capture(model, (images[:2],))
    for depth in ("deep", "shallow"):
        program = vpt(base, depth)
        with inserted(model.layers, own(program), 1):
            want = model(images)
        torch.testing.assert_close(program(images), want, rtol=1e-12, atol=1e-12)
        compiled: Any = torch.compile(program.module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(peftfx.outline(program)(images), want, rtol=1e-12, atol=1e-12)
    peftfx.save(program, tmp_path / "a")
    assert torch.equal(peftfx.load(model, tmp_path / "a")(images), program(images))
    assert torch.equal(program.without("vpt")(images), base(images))


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_vit_of_transformers(zoo: Any, depth: str, tmp_path: Path) -> None:
    model, base = zoo.model("vit"), zoo["vit"]
    program = vpt(base, depth)
    images = torch.randn(3, 3, 16, 16)
    layers: Any = model.vit.layers

    def widen(x: Tensor, rest: tuple[Any, ...]) -> tuple[Any, ...]:
        assert all(r is None for r in rest)
        return rest

    with inserted(layers, own(program), 1, widen):
        want = first(model(pixel_values=images))
    torch.testing.assert_close(first(program(pixel_values=images)), want, rtol=1e-5, atol=1e-6)
    if depth == "deep":
        assert peftfx.export_onnx(program, tmp_path / "vpt.onnx").error < 1e-5
        start = peftfx.run(base, "vpt{length=200}")
        bound = (6 / (3 * 4 * 4 + 32)) ** 0.5  # patches of 4 x 4 pixels of 3 colours
        assert 0.95 * bound < float(torch.cat(own(start)).abs().max()) <= bound


@pytest.mark.parametrize("side", ["right", "left"])
def test_an_encoder_of_text(captured: Any, side: str) -> None:
    """Prompts are seen by all real tokens, wherever the padding is."""
    model, base = captured["encoder"]
    program = vpt(base, "deep")
    inputs = batch(3, 9, pad=4)
    if side == "left":
        inputs = {n: t.flip(1) for n, t in inputs.items()}

    def widen(x: Tensor, rest: tuple[Any, ...]) -> tuple[Any, ...]:
        (mask,) = rest
        return (F.pad(mask, (LENGTH, 0), value=True),)

    with inserted(model.layers, own(program), 0, widen):
        want = first(model(**inputs))
    torch.testing.assert_close(first(program(**inputs)), want, rtol=1e-5, atol=1e-5)


def test_a_decoder_sees_them_where_its_first_token_stands(captured: Any) -> None:
    model, base = captured["decoder"]
    inputs = batch(3, 9, pad=4)
    index = torch.tensor([0] * LENGTH + list(range(9)))

    def widen(x: Tensor, rest: tuple[Any, ...]) -> tuple[Any, ...]:
        cos, sin, mask = rest
        return cos[index], sin[index], mask[:, :, index][..., index]

    for depth in ("deep", "shallow"):
        program = vpt(base, depth)
        with inserted(model.layers, own(program), 0, widen):
            want = model(**inputs)
        torch.testing.assert_close(program(**inputs), want, rtol=1e-5, atol=1e-5)


def test_a_causal_flag_is_the_mask_that_it_stands_for() -> None:
    torch.manual_seed(0)
    model, inputs = llama().eval(), batch(2, 7)
    told = vpt(peftfx.capture(model, kwargs=inputs), "shallow")
    ids = {"input_ids": inputs["input_ids"]}
    plain = vpt(peftfx.capture(model, kwargs=ids), "shallow")
    torch.testing.assert_close(first(plain(**ids)), first(told(**inputs)), rtol=1e-5, atol=1e-6)


def test_an_encoder_decoder_has_them_in_both(zoo: Any) -> None:
    base = zoo["t5"]
    inputs = {**batch(3, 7), "decoder_input_ids": batch(3, 9)["input_ids"] % 60}
    program = peftfx.run(base, "vpt")
    assert len(program.attachments) == 4  # two layers each
    first(program(**inputs)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in program.trainable_parameters())
    with pytest.raises(PassError, match=r"would change nothing\. Select that, too"):
        peftfx.run(base, "vpt{where=cross|ffn}")


def test_what_is_refused(zoo: Any, captured: Any) -> None:
    with pytest.raises(PassError, match="with inserted tokens already"):
        peftfx.run(captured["encoder"][1], "vpt;vpt{name=b}")
    with pytest.raises(PassError, match=r"Leave this block out with where=|Choose"):
        peftfx.run(zoo["swin"], "vpt")
    for options in ("length=0", "dropout=1", "depth=wide"):
        with pytest.raises(OptionError, match="vpt"):
            peftfx.parse(f"vpt{{{options}}}")
