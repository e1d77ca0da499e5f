"""Parallel adapters against their equations, AdapterHub, and MAM."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftfx
from peftfx.exporters.formats import load_adapter, save_adapter
from peftfx.rewriter.errors import ArtifactError, OptionError

from ..formats.adapterhub_models import output
from ..formats.write_with_peftfx import program as of_hub
from ..models import batch, first, moved, randomise
from .common import LAST, check, hooked, subject, tensors

HUB = Path(__file__).parents[1] / "formats" / "adapterhub" / "bert-par_bn"
READS = {
    "encoder": {"attn": "layers.{}.query", "ffn": "layers.{}.fc1"},
    "decoder": {"attn": "layers.{}.q_proj", "ffn": "layers.{}.up"},
}
"""The linears that read what a sublayer reads."""


def update(t: Mapping[str, Tensor], z: Tensor, s: float | Tensor) -> Tensor:
    """s (U relu(D z + b_D) + b_U)."""
    t = {n.removeprefix("inner."): p for n, p in t.items()}
    return s * ((z @ t["down"].T + t["down_bias"]).clamp(min=0) @ t["up"].T + t["up_bias"])


def hooks(name: str, own: Mapping[str, Any], joins: str, s: float) -> dict[str, Callable[..., Any]]:
    """The equations as forward hooks; what a sublayer reads is seen at its first linear."""
    made: dict[str, Callable[..., Any]] = {}
    for layer in range(2):
        for role in ("attn", "ffn"):
            last = LAST[name]["s0"][role].format(layer)
            t = own.get(f"s0.layer{layer}.{role}") or own.get(last)
            if t is None:
                continue
            seen: list[Tensor] = []
            made[READS[name][role].format(layer)] = lambda i, o, seen=seen: seen.append(i[0]) or o
            if role == "attn" and joins == "heads":
                weight = own[f"{last}.weight"]
                made[last] = lambda i, o, t=t, w=weight, seen=seen: o + update(t, seen[-1], s) @ w.T
            else:
                made[last] = lambda i, o, t=t, seen=seen: o + update(t, seen[-1], s)
    return made


@pytest.mark.parametrize("joins", ["heads", "output"])
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_parallel_adapter_equals_its_reference(captured: Any, name: str, joins: str) -> None:
    model, base = captured[name]
    options = f"bottleneck=6,scale=2,joins={joins},where=attn and sublayer|ffn and sublayer"
    program = randomise(peftfx.run(base, f"parallel_adapter{{{options}}}"), 0.3)
    weights = {f"{n}.weight": m.weight for n, m in model.named_modules() if hasattr(m, "weight")}
    own: dict[str, Any] = {**tensors(program), **weights}
    inputs = batch(4, 11, pad=3)
    with hooked(model, hooks(name, own, joins, 2.0)):
        want = model(**inputs)
    check(program, base, want, inputs)


def test_encoder_decoders_and_images(captured: Any, zoo: Any) -> None:
    """T5: norms come first, and the cross-attention's queries read the decoder."""
    model, base, inputs = subject(captured, zoo, "t5")
    program = randomise(peftfx.run(base, "parallel_adapter{bottleneck=3,where=sublayer}"), 0.3)
    assert len(program.history[-1].edited) == 10
    reads = {"attn": "SelfAttention.q", "cross": "EncDecAttention.q", "ffn": "DenseReluDense.wi_1"}
    made: dict[str, Callable[..., Any]] = {}
    own = tensors(program)
    for stream, roles in LAST["t5"].items():
        for role, pattern in roles.items():
            for layer in range(2):
                last = pattern.format(layer)
                block, _, _ = last.rpartition(".")
                entry = f"{block.rpartition('.')[0]}.{reads[role]}"
                seen: list[Tensor] = []
                made[entry] = lambda i, o, seen=seen: seen.append(i[0]) or o
                t = own.get(f"{stream}.layer{layer}.ffn") if role == "ffn" else own[last]
                weight = None if role == "ffn" else model.get_submodule(last).weight

                def add(_: Any, o: Tensor, t: Any = t, w: Any = weight, seen: Any = seen) -> Tensor:
                    new = update(t, seen[-1], 4.0)
                    return o + (new if w is None else new @ w.T)

                made[last] = add
    with hooked(model, made):
        want = first(model(**inputs))
    torch.testing.assert_close(first(program(**inputs)), want, rtol=1e-4, atol=2e-5)
    assert moved(first(base(**inputs)), want) > 0.01
    images = peftfx.run(zoo["vit"], "parallel_adapter{bottleneck=3,where=sublayer}")
    assert len(images.history[-1].edited) == 4


def test_a_learnt_scale_and_the_residual(captured: Any) -> None:
    model, base = captured["decoder"]
    program = peftfx.run(base, "parallel_adapter{bottleneck=6,scale=none,reads=residual}")
    assert [float(t["factor"]) for t in tensors(program).values()] == [1.0, 1.0]
    randomise(program, 0.3)
    own, made, inputs = tensors(program), {}, batch(4, 11, pad=3)
    for layer in range(2):
        seen: list[Tensor] = []
        t = own[f"s0.layer{layer}.ffn"]
        made[f"layers.{layer}.norm2"] = lambda i, o, seen=seen: seen.append(i[0]) or o
        made[f"layers.{layer}.down"] = lambda i, o, t=t, seen=seen: (
            o + update(t, seen[-1], t["factor"])
        )
    with hooked(model, made):
        want = model(**inputs)
    check(program, base, want, inputs)


def test_trainable_count(captured: Any) -> None:
    _, base = captured["bert"]
    d, layers, r = 32, 2, 6
    program = peftfx.run(base, "parallel_adapter{bottleneck=6}")
    assert sum(p.numel() for p in program.trainable_parameters()) == layers * (2 * d * r + r + d)
    learnt = peftfx.run(base, "parallel_adapter{bottleneck=6,scale=none}")
    assert len(learnt.trainable_parameters()) == len(program.trainable_parameters()) + layers


def test_initialisation_is_the_identity_or_says_that_it_is_not(captured: Any) -> None:
    _, base = captured["encoder"]
    assert peftfx.run(base, "parallel_adapter").history[-1].certificate.kind == "identity"
    bert = peftfx.run(base, "parallel_adapter{init=bert}")
    assert bert.history[-1].certificate.kind == "trainable"
    assert moved(first(base(**batch())), first(bert(**batch()))) > 1e-4


def test_dropout_is_on_the_activations(captured: Any) -> None:
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, "parallel_adapter{bottleneck=6,dropout=0.5}"), 0.3)
    branch: Any = program.branch(program.attachments[0]).train()
    z = torch.randn(2, 3, 32)
    torch.manual_seed(1)
    got = branch.update(z, seen=z)
    torch.manual_seed(1)
    inner = torch.nn.functional.dropout((z @ branch.down.T + branch.down_bias).clamp(min=0), 0.5)
    torch.testing.assert_close(got, 4 * (inner @ branch.up.T + branch.up_bias))
    with pytest.raises(ArtifactError, match="no other library"):
        save_adapter(program, Path("never"), "adapterhub")


def test_adapterhub_both_ways(tmp_path: Path) -> None:
    """Its file's tensors in our adapter compute what the library computed, and are its file."""
    base = of_hub("bert")
    theirs = load_file(HUB / "adapter.safetensors") if (HUB / "adapter.safetensors").exists() else (
        torch.load(HUB / "pytorch_adapter.bin", weights_only=True)
    )  # fmt: skip
    read = load_adapter(base, HUB)
    rank, scale = len(tensors(read)["s0.layer0.ffn"]["down"]), 4.0
    program = peftfx.run(base, f"parallel_adapter{{bottleneck={rank},scale={scale}}}")
    with torch.no_grad():
        for site, own in tensors(program).items():
            for leaf, tensor in own.items():
                tensor.copy_(tensors(read)[site][leaf])
    want = load_file(HUB / "output.safetensors")["output"]
    torch.testing.assert_close(output(program, "bert"), want, rtol=1e-5, atol=1e-5)
    save_adapter(program, tmp_path / "a", "adapterhub")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["config"]
    assert config["is_parallel"] and config["scaling"] == 4.0
    again = load_adapter(base, tmp_path / "a")
    assert torch.equal(output(again, "bert"), output(program, "bert")) and theirs
    assert len(theirs) == 4 * len(tensors(program))


def test_what_adapterhub_has_no_form_for(captured: Any, tmp_path: Path) -> None:
    """In a pre-norm model, the norm of the residual is read, which is not what its file would say."""
    _, base = captured["decoder"]
    normed = peftfx.run(base, "parallel_adapter{bottleneck=4}")
    with pytest.raises(ArtifactError, match="reads the input of a sublayer"):
        save_adapter(normed, tmp_path / "a", "adapterhub")
    heads = peftfx.run(base, "parallel_adapter{bottleneck=4,where=attn and sublayer}")
    with pytest.raises(ArtifactError, match="HeadsBranch"):
        save_adapter(heads, tmp_path / "b", "adapterhub")


def test_mam(captured: Any) -> None:
    """The mix of He et al.: prefixes, and parallel adapters at feed-forward blocks."""
    _, base = captured["encoder"]
    d, layers, r, length = 32, 2, 5, 3
    program = peftfx.run(
        base, f"prefix_tuning{{length={length}}};parallel_adapter{{bottleneck={r}}}"
    )
    count = sum(p.numel() for p in program.trainable_parameters())
    assert count == layers * (2 * length * d) + layers * (2 * d * r + r + d)


def test_wider_streams_lose_channels_with_it(captured: Any) -> None:
    """Width pruning cuts D beside the norm that it reads, and U where its update goes."""
    _, base = captured["decoder"]
    where = "attn and sublayer|ffn and sublayer"
    program = randomise(peftfx.run(base, f"parallel_adapter{{bottleneck=4,where={where}}}"), 0.3)
    pruned = peftfx.run(program, "width_pruning{ratio=0.25}")
    shapes = {
        n: tuple(t["inner.down"].shape) for n, t in tensors(pruned).items() if "inner.down" in t
    }
    assert shapes == {f"layers.{k}.o_proj": (4, 24) for k in range(2)}
    assert tensors(pruned)["s0.layer0.ffn"]["up"].shape == (24, 4)


def test_bad_options() -> None:
    for options in ("bottleneck=0", "dropout=1", "joins=queries"):
        with pytest.raises(OptionError, match="parallel_adapter"):
            peftfx.parse(f"parallel_adapter{{{options}}}")
