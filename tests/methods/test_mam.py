"""MAM against its equations, its parts as passes of their own, and AdapterHub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peftfx
from peftfx.exporters.formats import load_adapter, save_adapter
from peftfx.rewriter.errors import OptionError

from ..formats.adapterhub_models import output
from ..formats.write_with_peftfx import program as of_hub
from ..models import batch, first, moved, randomise
from .common import attention_with_rows, check, hooked, tensors

SETTLES = False
HUB = Path(__file__).parents[1] / "formats" / "adapterhub" / "bert-mam"
SMALL = "mam{length=3,projection=5,bottleneck=4,scale=2}"
NAMES = {"encoder": ("fc1", "fc2"), "decoder": ("up", "down")}


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_mam_equals_its_reference(captured: Any, name: str) -> None:
    """Rows from each attention's MLP, and s (U relu(D z + b_D) + b_U) of what the block reads."""
    model, base = captured[name]
    program = randomise(peftfx.run(base, SMALL), 0.3)
    own, rows, hooks = tensors(program), [], {}
    up, down = NAMES[name]
    for layer in range(2):
        t = own[f"s0.layer{layer}.attn.core"]
        inner = torch.tanh(t["embedding"] @ t["inner.weight"].T + t["inner.bias"])
        both = (inner @ t["outer.weight"].T + t["outer.bias"]).view(3, 2, -1, 8)
        rows.append((both[:, 0], both[:, 1]))
        t, seen = own[f"s0.layer{layer}.ffn"], []
        hooks[f"layers.{layer}.{up}"] = lambda i, o, seen=seen: seen.append(i[0]) or o
        hooks[f"layers.{layer}.{down}"] = lambda i, o, t=t, seen=seen: (
            o
            + 2
            * ((seen[-1] @ t["down"].T + t["down_bias"]).clamp(min=0) @ t["up"].T + t["up_bias"])
        )
    inputs = batch(4, 11, pad=3)
    with hooked(model, hooks), attention_with_rows(rows):
        want = model(**inputs)
    check(program, base, want, inputs)


def test_the_defaults_are_the_papers() -> None:
    mam = peftfx.MAM()
    assert (mam.length, mam.projection, mam.bottleneck, mam.scale) == (30, 800, 512, 4.0)


def test_one_name_has_the_counts_of_both(captured: Any, tmp_path: Path) -> None:
    _, base = captured["encoder"]
    d, layers, r, length, m = 32, 2, 4, 3, 5
    program = peftfx.run(base, SMALL)
    prefix = length * d + m * (d + 1) + 2 * d * (m + 1)
    count = sum(p.numel() for p in program.trainable_parameters())
    assert count == layers * (prefix + 2 * d * r + r + d)
    apart = "prefix_tuning{length=3,projection=5};parallel_adapter{bottleneck=4,scale=2}"
    two = peftfx.run(base, apart)
    assert count == sum(p.numel() for p in two.trainable_parameters())
    assert program.adapters == ("mam",) and two.adapters == ("prefix_tuning", "parallel_adapter")
    peftfx.save(randomise(program, 0.2), tmp_path / "mam")
    again = peftfx.load(base, tmp_path / "mam", name="mine")
    assert again.adapters == ("mine",)
    inputs = batch(3, 8)
    assert torch.equal(first(again(**inputs)), first(program(**inputs)))
    assert torch.equal(first(program.without("mam")(**inputs)), first(base(**inputs)))


def test_where_narrows_both(captured: Any) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, "mam{length=2,projection=none,bottleneck=3,where=layer>=1}")
    assert {a.site for a in program.attachments} == {"s0.layer1.attn.core", "s0.layer1.ffn"}
    with pytest.raises(peftfx.RewriteError, match="none of its members has a place"):
        peftfx.run(base, "mam{where=sublayer and attn}")


def test_adapterhub_both_ways(tmp_path: Path) -> None:
    """Their MAM with its numbers is ours with them; ours, written and read, is the same."""
    base, want = of_hub("bert"), load_file(HUB / "output.safetensors")["output"]
    theirs = load_adapter(base, HUB)
    ours = peftfx.run(base, "mam{length=3,projection=none,bottleneck=4,reads=residual}")
    held = dict(ours.named_trainable_parameters())
    with torch.no_grad():
        for attachment in theirs.attachments:
            branch: Any = theirs.branch(attachment)
            member = "prefix" if attachment.slot == "key_value" else "parallel"
            path = f"peftfx.mam.{member}.{attachment.site}.{attachment.slot}"
            for n, p in branch.named_parameters():
                held[f"{path}.{n}"].copy_(p)
    torch.testing.assert_close(output(ours, "bert"), want, rtol=1e-5, atol=1e-6)
    randomise(ours, 0.2)
    save_adapter(ours, tmp_path / "hub", "adapterhub")
    back = load_adapter(base, tmp_path / "hub")
    torch.testing.assert_close(output(back, "bert"), output(ours, "bert"), rtol=1e-5, atol=1e-6)
    assert moved(want, output(ours, "bert")) > 0.01


def test_bad_options() -> None:
    for options in ("bottleneck=0", "length=0", "dropout=1"):
        with pytest.raises(OptionError, match="Choose"):
            peftfx.parse(f"mam{{{options}}}")
