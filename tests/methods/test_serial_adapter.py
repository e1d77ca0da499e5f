"""Serial adapters against their equation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import peftfx
from peftfx.exporters.formats import load_adapter, save_adapter

from ..formats.adapterhub_models import output
from ..formats.write_with_peftfx import program as of_hub
from ..models import batch, randomise
from .common import LAST, Tensors, check, hooked, tensors

HUB = Path(__file__).parents[1] / "formats" / "adapterhub"


def reference(model: nn.Module, tensors: Tensors, inputs: Mapping[str, Tensor]) -> Any:
    """h <- h + U gelu(D h + b_D) + b_U on the output of a sublayer's last linear (no dropout)."""

    def hook(t: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        def adapt(_: Any, h: Tensor) -> Tensor:
            return h + F.gelu(h @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]

        return adapt

    with hooked(model, {n: hook(t) for n, t in tensors.items()}):
        return model(**inputs)


def test_serial_adapter_equals_its_reference(hand: Any) -> None:
    name, model, base = hand
    program = randomise(peftfx.run(base, "serial_adapter{bottleneck=6,norms=false}"))
    last = {"encoder": ("dense", "fc2"), "decoder": ("o_proj", "down")}[name]
    by_module = {
        f"layers.{site[8]}.{last[site.endswith('ffn')]}": t for site, t in tensors(program).items()
    }
    inputs = batch(4, 11, pad=3)
    check(program, base, reference(model, by_module, inputs), inputs)


def test_trainable_count(captured: Any) -> None:
    _, base = captured["llama"]
    d, layers = 32, 2
    program = peftfx.run(base, "serial_adapter{bottleneck=6,norms=false}")
    count = sum(p.numel() for p in program.trainable_parameters())
    assert count == layers * 2 * (2 * d * 6 + 6 + d)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_pfeiffers_placement(captured: Any, name: str) -> None:
    """h <- h + U relu(D z + b_D) + b_U behind the feed-forward, z the stream behind it, normed in a
    post-norm model (with the block's own norm)."""
    model, base = captured[name]
    options = "bottleneck=6,norms=false,activation=relu,std=0.02,placement=pfeiffer"
    program = randomise(peftfx.run(base, f"serial_adapter{{{options}}}"), 0.3)
    own, hooks, inputs = tensors(program), dict[str, Any](), batch(4, 11, pad=3)
    assert sorted(own) == ["s0.layer0.ffn", "s0.layer1.ffn"]
    before, entry = {"encoder": ("norm1", 1), "decoder": ("norm2", 0)}[name]
    for layer in range(2):
        seen: list[Tensor] = []
        t, block = own[f"s0.layer{layer}.ffn"], f"layers.{layer}"
        norm = model.get_submodule(f"{block}.norm2") if name == "encoder" else lambda x: x
        hooks[f"{block}.{before}"] = lambda i, o, seen=seen, k=entry: (
            seen.append(o if k else i[0]) or o
        )

        def adapt(_: Any, h: Tensor, t: Any = t, seen: Any = seen, norm: Any = norm) -> Tensor:
            z = norm.forward(seen[-1] + h) if name == "encoder" else seen[-1] + h
            return h + F.relu(z @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]

        hooks[f"{block}.{LAST[name]['s0']['ffn'].rpartition('.')[2]}"] = adapt
    with hooked(model, hooks):
        want = model(**inputs)
    check(program, base, want, inputs)
    d, r, layers = 32, 6, 2
    assert sum(p.numel() for p in program.trainable_parameters()) == layers * (2 * d * r + r + d)


def test_the_stream_is_read_where_outputs_are_written_to(zoo: Any) -> None:
    """Falcon adds attention to the feed-forward's output in place: what the adapter reads is a
    copy, which must not do that to the original once more."""
    base = zoo["falcon"]
    text = "serial_adapter{bottleneck=4,norms=false,std=0.02,where=sublayer,name=%s}"
    second = text.replace("where", "placement=pfeiffer,where")
    program = peftfx.run(base, f"{text % 'a'};{second % 'b'}")
    assert len(program.attachments) == 8 and all(c.holds for c in randomise(program).verify())


def test_pfeiffers_placement_is_adapterhubs(tmp_path: Path) -> None:
    """Its file's tensors in our adapter compute what the library computed, and are written so."""
    base, hub = of_hub("bert"), HUB / "bert-seq_bn"
    read = load_adapter(base, hub)
    rank = len(tensors(read)["s0.layer0.ffn"]["down"])
    options = f"bottleneck={rank},norms=false,activation=relu,placement=pfeiffer"
    program = peftfx.run(base, f"serial_adapter{{{options}}}")
    with torch.no_grad():
        for site, own in tensors(program).items():
            for leaf, tensor in own.items():
                tensor.copy_(tensors(read)[site][leaf])
    want = load_file(hub / "output.safetensors")["output"]
    torch.testing.assert_close(output(program, "bert"), want, rtol=1e-5, atol=1e-5)
    save_adapter(program, tmp_path / "a", "adapterhub")
    again = load_adapter(base, tmp_path / "a")
    assert torch.equal(output(again, "bert"), output(program, "bert"))
