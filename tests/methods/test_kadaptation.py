"""KAdaptation against dense sums of torch.kron; its counts; the start of the authors' code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import ArtifactError, OptionError

from ..models import batch, first, moved, randomise
from .common import check, hooked

RULES = ["rule=rank_one", "rule=whole,rank=2"]


def updates(program: peftfx.Program, scale: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> (s H [in, out], the layer's bias), by loops over kron."""
    held = {n: p.detach() for n, p in program.named_trainable_parameters().items()}
    own = {n.removeprefix("peftfx.kadaptation."): p for n, p in held.items()}
    biases = {n.split(".")[1]: p for n, p in own.items() if n.endswith(".expression.bias")}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for attachment in program.attachments:
        if attachment.slot != "delta":
            continue
        site: Any = program.sites[attachment.site]
        name = attachment.path.removeprefix("peftfx.kadaptation.")
        u, v = own[f"{name}.u"], own[f"{name}.v"]
        rule = [own.get(f"rule_{site.role}.{k}") for k in ("a", "left", "right")]
        h = torch.zeros(site.in_features, site.out_features)
        for i in range(len(u)):
            a = rule[0][i] if rule[0] is not None else torch.outer(rule[1][i], rule[2][i])  # pyright: ignore
            h += torch.kron(a, u[i] @ v[i])
        bias = next((b for n, b in biases.items() if n == str(site.layer) and len(b) == h.shape[1]),
                    torch.zeros(h.shape[1]))  # fmt: skip
        found[site.id.removesuffix(".weight")] = (scale * h, bias)
    return found


@pytest.mark.parametrize("rule", RULES)
def test_kadaptation_equals_its_reference(hand: Any, rule: str) -> None:
    """y = x (W^T + s H) + b + c."""
    name, model, base = hand
    program = randomise(peftfx.run(base, f"kadaptation{{n=4,scale=2,{rule}}}"), 0.3)
    biases = sum(n.endswith("bias") for n in program.named_trainable_parameters())
    assert biases == {"encoder": 2, "decoder": 0}[name]
    hooks: dict[str, Callable[..., Tensor]] = {
        n: lambda i, o, h=h, c=c: o + i[0] @ h + c for n, (h, c) in updates(program, 2).items()
    }
    assert len(hooks) == 4
    inputs = batch(4, 11, pad=3)
    with hooked(model, hooks):
        want = model(**inputs)
    check(program, base, want, inputs)


@pytest.mark.parametrize("name", ["encoder", "decoder", "fused"])
def test_it_folds_exactly_in_double_precision(captured: Any, name: str) -> None:
    """With biases, without, and of parts of one weight."""
    base = captured.double(name)
    for rule in RULES:
        program = randomise(peftfx.run(base, f"kadaptation{{n=4,scale=2,{rule}}}"), 0.3)
        inputs = {n: t for n, t in batch().items() if n in base.spec.names}
        folded = peftfx.run(program, "fold")
        assert not folded.attachments and folded.shared == ()
        gap = first(folded(**inputs)) - first(program(**inputs))
        assert float(gap.detach().abs().max()) <= 1e-12
        assert moved(first(base(**inputs)), first(folded(**inputs))) > 0.01


def test_one_bias_of_a_fused_weight(captured: Any) -> None:
    """It is added to queries and values, and not to keys."""
    _, base = captured["fused"]
    program = peftfx.run(base, "kadaptation{n=4}")
    (name,) = [
        n for n in program.named_trainable_parameters() if "layers.0" in n and n.endswith("bias")
    ]
    with torch.no_grad():
        program.named_trainable_parameters()[name].fill_(3.0)
    folded = peftfx.run(program, "fold").export_state_dict()
    was = base.export_state_dict()
    changed = {
        n: folded[n] - was[n] for n in was if n in folded and not torch.equal(folded[n], was[n])
    }
    (added,) = [t for t in changed.values() if t.dim() == 1]
    assert added.view(3, -1).mean(1).tolist() == pytest.approx([3, 0, 3], abs=1e-6)


def test_trainable_count(captured: Any) -> None:
    """CLIP's ViT-B of the authors: 12 (4 768) + 4 32^2 + 12 768 = 50,176 at n=32."""

    def count(d: int, n: int, layers: int) -> int:
        return layers * 4 * d + 4 * n**2 + layers * d

    assert count(768, 32, 12) == 50_176
    _, base = captured["bert"]
    program = peftfx.run(base, "kadaptation{n=8}")
    assert sum(p.numel() for p in program.trainable_parameters()) == count(32, 8, 2)
    program = peftfx.run(base, "kadaptation{n=8,rank=3,rule=whole,bias=false}")
    assert sum(p.numel() for p in program.trainable_parameters()) == 2 * 4 * 32 * 3 + 2 * 8**3


def test_the_start_of_the_authors_code_stays_there(captured: Any) -> None:
    """With u and v at zero no Kronecker product gets a gradient; ours does from the first step."""
    _, base = captured["encoder"]
    for compat in ("true", "false"):
        program = peftfx.run(base, f"kadaptation{{n=4,compat={compat}}}").train()
        assert program.history[-1].certificate.kind == "identity"
        first(program(**batch())).pow(2).mean().backward()
        held = program.named_trainable_parameters()
        moving = {n for n, p in held.items() if p.grad is not None and bool(p.grad.abs().max() > 0)}
        fast = {n for n in moving if not n.endswith("bias")}
        assert bool(fast) == (compat == "false") and all(n.endswith(".u") for n in fast)
        assert any(n.endswith("bias") for n in moving)


def test_dropped_entries(captured: Any) -> None:
    """In training, entries of H are dropped; never in evaluation."""
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, "kadaptation{n=4,dropout=0.5,bias=false}"), 0.3)
    branch: Any = program.branch(program.attachments[0]).train()
    reads = program.module.get_submodule("peftfx.kadaptation.rule_q")()
    torch.manual_seed(0)
    seen = branch.branch(torch.eye(32), left=reads[0], right=reads[1])
    torch.manual_seed(0)
    want = torch.nn.functional.dropout(branch.delta(left=reads[0], right=reads[1]), 0.5)
    torch.testing.assert_close(seen, want.T)
    assert 0.4 < float((seen == 0).float().mean()) < 0.6
    whole = branch.eval().branch(torch.eye(32), left=reads[0], right=reads[1])
    assert float((whole == 0).float().mean()) == 0


def test_peft_reads_it_as_lora(captured: Any, tmp_path: Path) -> None:
    """Where rules are of rank one, H has rank n; else it has none of PEFT's forms."""
    _, base = captured["bert"]
    program = randomise(peftfx.run(base, "kadaptation{n=4,scale=2,bias=false}"), 0.3)
    peftfx.save_peft(program, tmp_path / "a")
    read = peftfx.load_peft(base, tmp_path / "a")
    ranks = [len(dict(read.branch(a).named_parameters())["a"]) for a in read.attachments]
    assert ranks == [4] * 4
    gap = first(read(**batch())) - first(program(**batch()))
    assert float(gap.detach().abs().max()) < 1e-5
    with pytest.raises(ArtifactError, match="SharedBias"):
        peftfx.save_peft(peftfx.run(base, "kadaptation{n=4}"), tmp_path / "b")


def test_bad_options(captured: Any) -> None:
    _, base = captured["encoder"]
    with pytest.raises(OptionError, match="n=5 does not divide its 32 outputs and 32 inputs"):
        peftfx.run(base, "kadaptation{n=5}")
    for options in ("n=0", "rank=0", "scale=0", "dropout=1", "rule=half"):
        with pytest.raises(OptionError, match="kadaptation"):
            peftfx.parse(f"kadaptation{{{options}}}")
