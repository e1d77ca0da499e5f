"""AutoPEFT's configurations against their equations; the search for them is in `test_search.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import OptionError

from ..models import batch, randomise
from .common import attention_with_rows, check, hooked

SETTLES = False


def test_autopeft_equals_its_reference(captured: Any) -> None:
    """One tuned layer: rows, LoRA, and both adapters, whose updates add up."""
    model, base = captured["encoder"]
    recipe = "autopeft{layers=[1],serial=4,parallel=3,prefix=2,lora=2,scale=2}"
    program = randomise(peftfx.run(base, recipe), 0.3)
    t: dict[str, Any] = {}
    for attachment in program.attachments:
        branch: Any = program.branch(attachment)
        _, _, member, site = attachment.path.split(".", 3)
        t[f"{member} {site.rpartition('.')[2] if member != 'lora' else site.split('.')[2]}"] = dict(
            branch.named_parameters()
        )
    hooks: dict[str, Callable[..., Any]] = {}
    for name in ("query", "value"):
        low = t[f"lora {name}"]
        hooks[f"layers.1.{name}"] = lambda i, o, low=low: o + 8 * (i[0] @ low["a"].T @ low["b"].T)
    read: list[Tensor] = []
    hooks["layers.1.fc1"] = lambda i, o: read.append(i[0]) or o

    def update(own: Any, z: Tensor) -> Tensor:
        return (z @ own["down"].T + own["down_bias"]).clamp(min=0) @ own["up"].T + own["up_bias"]

    def behind(_: Any, o: Tensor) -> Tensor:
        stream = model.layers[1].norm2(read[-1] + o)
        return o + update(t["serial serial"], stream) + 2 * update(t["parallel serial"], read[-1])

    hooks["layers.1.fc2"] = behind
    key, value = t["prefix key_value"]["key"], t["prefix key_value"]["value"]
    nothing = torch.zeros(0, *key.shape[1:])
    inputs = batch(4, 11, pad=3)
    with hooked(model, hooks), attention_with_rows([(nothing, nothing), (key, value)]):
        want = model(**inputs)
    check(program, base, want, inputs)


def test_counts(captured: Any) -> None:
    _, base = captured["encoder"]
    d, layers, s, p, length, low = 32, 2, 4, 3, 2, 2
    program = peftfx.run(base, "autopeft{serial=4,parallel=3,prefix=2,lora=2}")
    each = (2 * d * s + s + d) + (2 * d * p + p + d) + 2 * length * d + 2 * 2 * low * d
    assert sum(x.numel() for x in program.trainable_parameters()) == layers * each
    one = peftfx.run(base, "autopeft{layers=[0],serial=0,parallel=3,prefix=0}")
    assert sum(x.numel() for x in one.trainable_parameters()) == 2 * d * p + p + d


def test_bad_options(captured: Any) -> None:
    _, base = captured["encoder"]
    with pytest.raises(OptionError, match=r"all sizes are 0.*Choose"):
        peftfx.parse("autopeft{serial=0,parallel=0,prefix=0}")
    for options in ("serial=-1", "layers=[]"):
        with pytest.raises(OptionError, match=r"autopeft.*Choose"):
            peftfx.parse(f"autopeft{{{options}}}")
    with pytest.raises(OptionError, match=r"no layer 7; the model has 2, from 0 to 1.*Choose"):
        peftfx.run(base, "autopeft{layers=[0,7]}")
