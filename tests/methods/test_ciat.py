"""CIAT against its equations; one language taken out of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import InputError, OptionError, PassError

from ..models import batch, first, moved, randomise
from .common import LAST, check, hooked, subject, tensors

DRAWS = True
SMALL = "ciat{languages=3,bottleneck=4,dropout=0}"
ENTRIES = {
    "encoder": {"s0": {"attn": "layers.{}.query", "ffn": "layers.{}.fc1"}},
    "decoder": {"s0": {"attn": "layers.{}.q_proj", "ffn": "layers.{}.up"}},
    "t5": {
        "s0": {
            "attn": "encoder.block.{}.layer.0.SelfAttention.q",
            "ffn": "encoder.block.{}.layer.1.DenseReluDense.wi_1",
        },
        "s1": {
            "attn": "decoder.block.{}.layer.0.SelfAttention.q",
            "ffn": "decoder.block.{}.layer.2.DenseReluDense.wi_1",
        },
    },
}
"""The linears that read what a sublayer reads."""
TABLES = {
    "encoder": {"words": "words"},
    "decoder": {"embed": "embed"},
    "t5": {"encoder.embed_tokens": "shared", "decoder.embed_tokens": "shared.weight@embedding_2"},
}
"""Module of a lookup -> its site."""


def update(t: Mapping[str, Tensor], k: int, z: Tensor) -> Tensor:
    """U relu(D LN(z) + b_D) + b_U of language k."""
    own = {n.removeprefix("inner."): p[k] for n, p in t.items()}
    x = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    x = x * own["gamma"] + own["beta"]
    inner = (x @ own["down"].T + own["down_bias"]).clamp(min=0)
    return inner @ own["up"].T + own["up_bias"]


def reference(program: peftfx.Program, name: str, k: int) -> dict[str, Callable[..., Any]]:
    own = tensors(program)
    made: dict[str, Callable[..., Any]] = {}
    for module, site in TABLES[name].items():
        made[module] = lambda _, e, t=own[site]: e + update(t, k, e)
    for stream, roles in ENTRIES[name].items():
        for role, pattern in roles.items():
            for layer in range(2):
                t, seen = own[f"{stream}.layer{layer}.{role}"], list[Tensor]()
                made[pattern.format(layer)] = lambda i, o, seen=seen: seen.append(i[0]) or o
                last = LAST[name][stream][role].format(layer)
                made[last] = lambda _, o, t=t, seen=seen: o + update(t, k, seen[-1])
    return made


@pytest.mark.parametrize("name", list(ENTRIES))
def test_ciat_equals_its_reference(captured: Any, zoo: Any, name: str) -> None:
    model, base, inputs = subject(captured, zoo, name)
    program = randomise(peftfx.run(base, SMALL), 0.3)
    seen: list[Tensor] = []
    for k in (0, 2):
        with hooked(model, reference(program, name, k)):
            want = first(model(**inputs))
        got = first(program(**inputs, language=torch.tensor(k)))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=3e-5)
        assert all(moved(s, got) > 0.01 for s in [first(base(**inputs)), *seen])
        seen.append(got)
    assert torch.equal(first(program(**inputs)), seen[0])
    for wrong in (torch.tensor(3), torch.tensor([0, 1])):
        with pytest.raises(InputError, match="language"):
            program(**inputs, language=wrong)


def test_one_language_needs_no_input_and_drops_in_training(captured: Any) -> None:
    """Its kept activations are divided by 1 - p; its norm and biases start neutral."""
    model, base = captured["decoder"]
    program = peftfx.run(base, "ciat{bottleneck=4}")
    assert program.spec.names == base.spec.names
    own = {n.removeprefix("inner."): p for n, p in tensors(program)["s0.layer0.ffn"].items()}
    assert torch.equal(own["gamma"], torch.ones(1, 32))
    assert not any(own[n].any() for n in ("beta", "down_bias", "up_bias"))
    bound = (6 / 36) ** 0.5
    for name in ("down", "up"):
        assert 0.9 * bound < float(own[name].abs().max()) <= bound
    randomise(program, 0.3)
    inputs = batch(4, 11, pad=3)
    with hooked(model, reference(program, "decoder", 0)):
        want = model(**inputs)
    check(program, base, want, inputs)
    branch: Any = program.branch(program.attachments[-1])
    h, z = torch.zeros(4000, 32), torch.randn(1, 32).expand(4000, -1)
    torch.manual_seed(0)
    mean = branch.train()(h, seen=z).mean(0)
    torch.testing.assert_close(mean, branch.eval()(h, seen=z)[0], rtol=0.1, atol=0.05)


def test_the_count_and_the_identity(captured: Any, zoo: Any) -> None:
    """(2 L_enc + 2 L_dec + lookups) (2 d r + r + d + 2 d), r half of d; two languages: twice."""
    for name, places in (("decoder", 2 * 2 + 1), ("t5", 2 * 2 + 2 * 2 + 2)):
        model, base, inputs = subject(captured, zoo, name)
        d = model.get_submodule(LAST[name]["s0"]["ffn"].format(0)).out_features
        one = places * (2 * d * (d // 2) + d // 2 + d + 2 * d)
        program = peftfx.run(base, "ciat{languages=2,init=zero}")
        assert sum(p.numel() for p in program.trainable_parameters()) == 2 * one
        torch.testing.assert_close(first(program(**inputs)), first(base(**inputs)))
        assert program.history[-1].certificate.kind == "identity"


def test_one_language_is_baked_exactly(captured: Any, tmp_path: Path) -> None:
    base = captured.double("decoder")
    program, inputs = randomise(peftfx.run(base, SMALL), 0.3), batch(4, 11, pad=3)
    want = first(program(**inputs, language=torch.tensor(2)))
    baked = peftfx.run(program, "bake{inputs={language=2}}")
    assert float((first(baked(**inputs)) - want).detach().abs().max()) <= 1e-12
    assert "language" not in baked.spec.names and "language=" not in baked.text()
    count = [sum(p.numel() for p in x.trainable_parameters()) for x in (program, baked)]
    assert count[0] == 3 * count[1]
    peftfx.save(baked, tmp_path / "a")
    assert torch.equal(first(peftfx.load(base, tmp_path / "a")(**inputs)), first(baked(**inputs)))
    assert all(c.holds for c in baked.verify())
    with pytest.raises(PassError, match="language 3 is not one of 0 to 2"):
        peftfx.run(program, "bake{inputs={language=3}}")


def test_beside_other_branches_of_the_table(captured: Any, tmp_path: Path) -> None:
    """The adapter reads the row with all that others add, whichever came first; folding keeps it."""
    _, base = captured["decoder"]
    lora = "lora{rank=2,where=embedding.token}"
    one = randomise(peftfx.run(base, f"{lora};ciat{{bottleneck=4}}"), 0.3)
    other = peftfx.run(base, f"ciat{{bottleneck=4}};{lora}")
    values = one.named_trainable_parameters()
    with torch.no_grad():
        for name, parameter in other.named_trainable_parameters().items():
            parameter.copy_(values[name])
    want = first(one(**batch()))
    torch.testing.assert_close(first(other(**batch())), want)
    folded = peftfx.run(one, "fold{names=[lora]}")
    torch.testing.assert_close(first(folded(**batch())), want, rtol=1e-4, atol=1e-5)


def test_bad_options() -> None:
    for options in ("languages=0", "bottleneck=0", "dropout=1", "init=normal", "language=a b"):
        with pytest.raises(OptionError, match="ciat"):
            peftfx.parse(f"ciat{{{options}}}")
