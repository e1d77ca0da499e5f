"""Every registered method in every architecture of the zoo.

`pytest --zoo` runs all cells; without, every method runs in one of three architectures of different
kinds, and in two of the others, drawn by its name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.graph.output_class import shortened
from peftfx.rewriter.measure.compare import floats
from peftfx.rewriter.program.sites import SublayerSite

from .conftest import Zoo
from .models import randomise
from .placements import PAGE, known, missing, place, render
from .recipes import METHODS, least_change, method_class, turn
from .zoo import ZOO

ROWS, TOKENS, PADDED = 3, 7, 3
REMEDY = r"[Cc]hoose|Say where|Select|Capture|Give|Leave|[Uu]se "
REFRESH = "Run `python -m tests.placements {}`, and read what it wrote into {}."


def outputs(program: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return own(program, inputs)


def own(program: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The model's outputs, without what a method adds."""
    return floats(shortened(program(**inputs), len(getattr(program, "outputs_added", ()))))


def moved(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest change of any output, relative to that output."""
    assert [t.shape for t in before] == [t.shape for t in after]
    return max(
        float((a.detach() - b).abs().max() / b.abs().max().clamp(min=1e-9))
        for a, b in zip(after, before, strict=True)
    )


def randomised(
    program: Any, inputs: dict[str, Tensor], before: list[Tensor], floor: float
) -> list[Tensor]:
    """Outputs of the program after random steps that move them by the share `floor` at least."""
    after = before
    for scale in (0.3, 1.0, 3.0, 3e5):
        randomise(program, scale)
        after = own(program, inputs)
        if moved(before, after) > floor:
            break
    assert moved(before, after) > floor
    return after


def close(got: list[Tensor], want: list[Tensor], limit: float = 1e-4) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=limit, atol=limit * max(1.0, float(b.abs().max())))


CORE = ("bert", "llama", "t5")
OTHERS = 2


def drawn(method: str) -> tuple[str, ...]:
    """The architectures that a method runs in; they stay when architectures or methods are added."""
    order = sorted(ZOO, key=lambda name: turn(method, name))
    others = [name for name in order if name not in CORE]
    return min(CORE, key=order.index), *others[:OTHERS]


def refresh(names: Iterable[str]) -> str:
    return REFRESH.format(" ".join(sorted(names)), PAGE.name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cells: those that are drawn, or with `--zoo` all."""
    if metafunc.function is test_method_in_architecture:
        every = metafunc.config.getoption("--zoo")
        cells = [(n, m) for n in ZOO for m in METHODS if every or n in drawn(m)]
        metafunc.parametrize(("name", "method"), cells)


def test_method_in_architecture(zoo: Zoo, name: str, method: str, tmp_path: Path) -> None:
    model, base = zoo.model(name), zoo[name]
    versions = {n: p._version for n, p in base.module.named_parameters()}
    placement = place(base, method)
    cell = known().get((name, method), placement.cell)  # what the page lacks: the test of the page
    assert cell == placement.cell, refresh([method])
    for error in placement.errors:
        assert re.search(REMEDY, error), (
            f"{method} in {name} refuses without saying what to do. End the message with what to do, "
            "with the word Choose, Say where, Select, Capture, Give, Leave or Use "
            f"(CONTRIBUTING.md, Messages). It says: {error}"
        )
    program = placement.program
    if program is None:
        return
    record = program.history[-1]
    assert record.edited
    check_effect(record.certificate)
    least = least_change(method, name, "zoo")
    if least == 0:
        return
    inputs = sized(base, name)
    before = outputs(placement.before, inputs)
    after = randomised(program, inputs, before, least)
    check_gradients(base, program, after)
    assert versions == {n: p._version for n, p in base.module.named_parameters()}
    after = outputs(program, inputs)
    check_rows(program, inputs, after)
    if method_class(method).folds == "exactly":
        folded = peftfx.run(program, "fold")
        assert folded.history[-1].certificate.holds and not folded.attachments
        merged = copy.deepcopy(model)
        merged.load_state_dict(folded.export_state_dict(), strict=True)
        close(floats(merged(**inputs)), after, 1e-3)
    peftfx.save(program, tmp_path / "adapter")
    loaded = peftfx.load(base, tmp_path / "adapter")
    assert loaded.text() == program.text()
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, inputs), after, strict=True))


def check_effect(certificate: Any) -> None:
    change = certificate.measured["max_rel"]
    assert certificate.holds
    kind = certificate.kind
    assert {"identity": change == 0, "near": change < 0.1, "trainable": True}[kind]


def check_gradients(base: peftfx.Program, program: peftfx.Program, outs: list[Tensor]) -> None:
    """Gradients reach what trains, nothing else; a step changes no frozen tensor."""
    weights = torch.Generator().manual_seed(2)
    loss = sum((t * torch.randn(t.shape, generator=weights)).sum() for t in outs)
    assert isinstance(loss, Tensor)
    loss.backward()
    held = dict(program.module.named_parameters())
    trained = program.named_trainable_parameters()
    reached = {n for n, p in held.items() if p.grad is not None and bool(p.grad.any())}
    assert reached <= set(trained)
    assert len(reached) >= 0.6 * len(trained)
    with torch.no_grad():
        for parameter in trained.values():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=1e-6)
    for name, own in base.module.named_parameters():
        assert own.grad is None
        assert name not in held or name in trained or torch.equal(held[name], own)
    program.module.zero_grad()


def sized(base: peftfx.Program, name: str) -> dict[str, Tensor]:
    """Inputs of another size than captured; with a mask, row 0 ends in padding."""
    sizes = {s for i in base.spec.inputs for s in i.shape}
    inputs = ZOO[name].inputs(ROWS, TOKENS if "sequence" in sizes else 9)
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, -PADDED:] = 0
    return inputs


def check_rows(program: peftfx.Program, inputs: dict[str, Tensor], together: list[Tensor]) -> None:
    """Each row alone, without its padding, gives what it gives beside longer ones."""
    if any(isinstance(i.shape[0], int) for i in program.spec.inputs if not i.optional):
        return
    mask = inputs.get("attention_mask")
    for row in (0, 1):
        alone = {n: t[row : row + 1] for n, t in inputs.items()}
        length = None
        if mask is not None:
            length = int(mask[row].sum())
            for name in ("input_ids", "attention_mask"):
                alone[name] = alone[name][:, :length]
        got = outputs(program, alone)
        want = [part(t, row, g, mask) for t, g in zip(together, got, strict=True)]
        close(got, want)


def part(t: Tensor, row: int, like: Tensor, mask: Tensor | None) -> Tensor:
    """A row of a batch's output, cut to the tokens that the row has alone."""
    if t.shape[:2] == (ROWS, ROWS) and like.shape[:2] == (1, 1):  # similarity of text and image
        return t[row : row + 1, row : row + 1]
    count = len(like)  # more than one where a row's images or tokens are on the first axis
    t = t[row * count : (row + 1) * count]
    if mask is not None and t.dim() > 2 and t.shape[1] == mask.shape[1]:
        t = t[:, : like.shape[1]]
    return t


def test_the_page_is_fresh() -> None:
    cells = known()
    lacking = missing(cells)
    new = {m for _, m in lacking} - {m for _, m in cells} or {n for n, _ in lacking}
    assert not lacking, refresh(new)
    assert PAGE.read_text(encoding="utf-8") == render(cells), refresh(new)


def test_a_selector_puts_the_prompt_into_the_decoder(zoo: Zoo) -> None:
    """The default is the encoder; the decoder's lookup of the shared table has an id of its own."""
    for name in ("t5", "bart"):
        base = zoo[name]
        encoder, decoder = base.sites.select("embedding.token", ("embedding",))
        assert peftfx.run(base, "prompt_tuning").history[-1].edited == (encoder.id,)
        program = peftfx.run(base, "prompt_tuning{length=4,where=re:'@'}")
        assert program.history[-1].edited == (decoder.id,)
        inputs = sized(base, name)
        after = outputs(program, inputs)
        assert moved(outputs(base, inputs), after) > 0.01
        check_rows(program, inputs, after)


def test_weights_on_the_left_take_branches_and_fold(zoo: Zoo) -> None:
    """`W @ x` has its features on the last axis but one; the model's own bias is found."""
    model, base = zoo.model("mamba"), zoo["mamba"]
    inputs = sized(base, "mamba")
    where = "mixer.inner and name:dt_proj"
    program = peftfx.run(base, f"lora{{rank=2,where={where}}};ia3{{where={where}}}")
    after = [t.detach() for t in randomised(program, inputs, outputs(base, inputs), 0.01)]
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    merged = copy.deepcopy(model)
    merged.load_state_dict(folded.export_state_dict(), strict=True)
    close(floats(merged(**inputs)), after, 1e-3)
    trained = peftfx.run(base, f"bitfit{{where={where}}}")
    assert not trained.added
    assert all(n.endswith("dt_proj.bias") for n in trained.named_trainable_parameters())


def test_serial_adapters_on_channels_in_front(zoo: Zoo) -> None:
    base = zoo["unet"]
    program = peftfx.run(base, "serial_adapter{bottleneck=3,norms=false,where=conv}")
    sublayers = base.sites.select("conv", ("sublayer",))
    widths = {s.width for s in sublayers if isinstance(s, SublayerSite)}
    shapes = {p.shape[0] for n, p in program.named_trainable_parameters().items() if "up" in n}
    assert shapes == widths
    inputs = sized(base, "unet")
    after = [t.detach() for t in randomised(program, inputs, outputs(base, inputs), 0.01)]
    check_rows(program, inputs, after)
