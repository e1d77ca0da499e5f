"""APT against its equations: gates of the first token, causality, padding, and their means."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import OptionError, PassError

from ..models import batch, first, moved, randomise
from .common import check, hooked, subject

Rows = tuple[Tensor, Tensor]


@contextlib.contextmanager
def attention_with_rows_of_samples(rows: list[Rows]) -> Generator[None]:
    """Explicit attention with rows [batch, length, heads, dim] that a hook has left."""
    real = F.scaled_dot_product_attention

    def explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float = 0.0) -> Tensor:
        assert not p
        pk, pv = (
            r.transpose(1, 2).repeat_interleave(k.shape[1] // r.shape[2], 1) for r in rows.pop(0)
        )
        scores = q @ torch.cat([pk, k], 2).mT / q.shape[-1] ** 0.5
        seen = torch.ones(*mask.shape[:-1], pk.shape[2], dtype=torch.bool)
        scores = scores.masked_fill(~torch.cat([seen, mask], -1), float("-inf"))
        return scores.softmax(-1) @ torch.cat([pv, v], 2)

    F.scaled_dot_product_attention = explicit  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


def layers(program: peftfx.Program) -> list[dict[str, Tensor]]:
    """The tensors of each layer: key, value, weight (of the gates), layer (lambda)."""
    found: list[dict[str, Tensor]] = []
    for attachment in program.attachments:
        gates = program.module.get_submodule(program.shared_path(attachment, "gates"))
        both = (program.branch(attachment), gates)
        found.append({n: p.detach() for m in both for n, p in m.named_parameters()})
    return found


@pytest.mark.parametrize("gates", ["shared", "own"])
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_apt_equals_its_reference(captured: Any, name: str, gates: str) -> None:
    """P <- lambda (sigmoid(W h) * P), h the first real token of the stream."""
    model, base = captured[name]
    program = randomise(peftfx.run(base, f"apt{{length=3,gates={gates}}}"), 0.5)
    inputs = batch(4, 11, pad=3)
    start = inputs["attention_mask"].argmax(1)  # padding may come first
    rows: list[Rows] = []
    hooks: dict[str, Callable[..., Any]] = {}
    entry = {"encoder": "query", "decoder": "norm1"}[name]
    for layer, t in enumerate(layers(program)):

        def leave(i: Any, o: Tensor, t: Any = t) -> Tensor:
            h = torch.stack([x[s] for x, s in zip(i[0], start, strict=True)])
            a = t["layer"] * torch.sigmoid(h @ t["weight"].T)
            for_key, for_value = a.chunk(2, 1) if gates == "own" else (a, a)
            pairs = ((for_key, t["key"]), (for_value, t["value"]))
            rows.append(tuple(g[..., None, None] * r for g, r in pairs))  # type: ignore[arg-type]
            return o

        hooks[f"layers.{layer}.{entry}"] = leave
    with hooked(model, hooks), attention_with_rows_of_samples(rows):
        want = model(**inputs)
    check(program, base, want, inputs)


def test_trainable_count(captured: Any) -> None:
    """2 L l d of the rows, and L (d l + 1) of the gates."""
    _, base = captured["bert"]
    d, count, length = 32, 2, 3
    program = peftfx.run(base, "apt{length=3}")
    own = count * 2 * length * d + count * (d * length + 1)
    assert sum(p.numel() for p in program.trainable_parameters()) == own


def test_gates_start_half_open(captured: Any) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, "apt{length=8}")
    paths = {p: p for p in program.shared}
    gates = torch.cat(
        [g.detach().flatten() for g in peftfx.tap(program, paths)(**batch())[1].values()]
    )
    assert float(gates.min()) > 0.3 and float(gates.max()) < 0.7


def test_baked_gates_are_their_means(captured: Any, tmp_path: Path) -> None:
    base = captured.double("encoder")
    program = randomise(peftfx.run(base, "apt{length=3}"), 0.5)
    with pytest.raises(PassError, match="needs data to average over"):
        peftfx.run(program, "bake{names=[apt]}")
    data = [batch(4, 9, seed=1, pad=4), batch(2, 6, seed=2)]
    baked = peftfx.run(program, "bake{names=[apt]}", data=data)
    assert not baked.shared and all(not a.reads for a in baked.attachments)
    for attachment, t in zip(program.attachments, layers(program), strict=True):
        path = program.shared_path(attachment, "gates")
        seen = torch.cat([peftfx.tap(program, {"g": path})(**b)[1]["g"].detach() for b in data])
        assert seen.shape == (6, 3)  # all samples count alike, whatever batch they are in
        kept: Any = baked.branch(attachment)
        for name in ("key", "value"):
            want = seen.mean(0)[:, None, None] * t[name]
            torch.testing.assert_close(getattr(kept, name).detach(), want, rtol=1e-12, atol=1e-12)
    assert baked.history[-1].certificate.measured["data_rel"] > 0
    peftfx.save(baked, tmp_path / "a")
    assert torch.equal(first(peftfx.load(base, tmp_path / "a")(**batch())), first(baked(**batch())))
    # One sample alone is served exactly.
    single = peftfx.run(program, "bake{names=[apt]}", data=[batch(1, 9)])
    gap = first(single(**batch(1, 9))) - first(program(**batch(1, 9)))
    assert float(gap.detach().abs().max()) < 1e-12


def test_baked_rows_are_peft_s(captured: Any, tmp_path: Path) -> None:
    _, base = captured["bert"]
    program = randomise(peftfx.run(base, "apt{length=3,shift_positions=true}"), 0.5)
    baked = peftfx.run(program, "bake", data=[batch()])
    peftfx.save_peft(baked, tmp_path / "a", task="FEATURE_EXTRACTION")
    again = peftfx.load_peft(base, tmp_path / "a")
    torch.testing.assert_close(first(again(**batch())), first(baked(**batch())))


def test_encoder_decoders_and_images(captured: Any, zoo: Any) -> None:
    _, base, inputs = subject(captured, zoo, "t5")
    program = randomise(peftfx.run(base, "apt{length=3,where=attention}"), 0.5)
    assert len(program.history[-1].edited) == 6
    assert moved(first(base(**inputs)), first(program(**inputs))) > 0.01
    assert len(peftfx.run(zoo["vit"], "apt").history[-1].edited) == 2


def test_bad_options() -> None:
    for options in ("length=0", "std=-1", "gate_std=-1", "gates=none"):
        with pytest.raises(OptionError, match="apt"):
            peftfx.parse(f"apt{{{options}}}")
