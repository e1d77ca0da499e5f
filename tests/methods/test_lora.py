"""LoRA against its equation and Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import OptionError

from ..models import batch, bert, first, llama, moved, randomise
from .common import Tensors, check, copied, hooked, tensors


def reference(
    model: nn.Module, tensors: Tensors, inputs: Mapping[str, Tensor], scale: float
) -> Any:
    """y = W x + b + s B (A x)."""

    def hook(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
        return lambda i, o: o + scale * (i[0] @ a.T) @ b.T

    with hooked(model, {n: hook(t["a"], t["b"]) for n, t in tensors.items()}):
        return model(**inputs)


def test_lora_equals_its_reference(hand: Any) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, "lora{rank=4,alpha=6,where=linear}"))
    inputs = batch(4, 11, pad=3)
    check(program, base, reference(model, tensors(program), inputs, 1.5), inputs)


@pytest.mark.parametrize("make", [bert, llama])
def test_lora_equals_peft(make: Any) -> None:
    import peft

    torch.manual_seed(0)
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, "lora{rank=4,alpha=8,where=q|v}"))
    names = ["query", "value"] if make is bert else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)
    other = peft.get_peft_model(model, config).eval()
    copied(program, other, {"a": "lora_A.default.weight", "b": "lora_B.default.weight"})
    inputs = batch(4, 11, pad=2)
    check(program, base, other(**inputs), inputs)


def test_fused_weights_take_lora_and_ia3_by_role(captured: Any) -> None:
    model, base = captured["fused"]
    program = randomise(peftfx.run(base, "lora{rank=4,where=v}"))
    inputs = {"input_ids": batch(4, 11)["input_ids"]}
    full = {}
    for site, t in tensors(program).items():
        b = torch.cat([torch.zeros(64, 4), t["b"]])
        full[site.removesuffix(".weight:v")] = {"a": t["a"], "b": b}
    want = reference(model, full, inputs, 4.0)
    got = first(program(**inputs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    scaled = randomise(peftfx.run(base, "ia3"), 0.3)
    folded = peftfx.run(scaled, "fold")
    torch.testing.assert_close(first(folded(**inputs)), first(scaled(**inputs)))
    prefixed = peftfx.run(base, "prefix_tuning{length=3}")
    assert moved(first(base(**inputs)), first(prefixed(**inputs))) > 0


def test_trainable_count(captured: Any) -> None:
    _, base = captured["llama"]
    d, kv, layers = 32, 16, 2
    program = peftfx.run(base, "lora{rank=4}")
    count = sum(p.numel() for p in program.trainable_parameters())
    assert count == layers * (4 * (d + d) + 4 * (d + kv))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_plus_trains_as_pefts_optimizer(method: str) -> None:
    """Ten steps of AdamW, each parameter at its own rate: B, and DoRA's magnitudes, 16 times as
    fast as A. PEFT lets magnitudes decay, too, so there nothing does."""
    import peft
    from peft.optimizers import create_loraplus_optimizer

    torch.manual_seed(0)
    model = llama().eval()
    base = peftfx.capture(model, kwargs=batch())
    text = f"{method}{{rank=4,alpha=8,lr_ratio=16,where=q|v}}"
    program = peftfx.run(base, text)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_dora=method == "dora"
    )
    other: Any = peft.get_peft_model(model, config).eval()
    pairs = {"a": "lora_A.default.weight", "b": "lora_B.default.weight"}
    pairs["m"] = "lora_magnitude_vector.default.weight"
    copied(program, other, pairs)
    controllers = peftfx.controllers(program)
    decay = 0.1 if method == "lora" else 0.0
    mine = torch.optim.AdamW(controllers.param_groups(1e-3, weight_decay=decay), weight_decay=0)
    theirs = create_loraplus_optimizer(
        other, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=decay
    )
    rates = {g["lr"] for g in mine.param_groups}
    assert rates == {1e-3, 16e-3}
    for step in range(10):
        inputs = batch(4, 9, step)
        for called, optimizer in ((program, mine), (other, theirs)):
            (1e3 * first(called(**inputs)).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    held = dict(other.named_parameters())
    for name, parameter in program.named_trainable_parameters().items():
        path, _, leaf = name.split(".", 2)[2].rpartition(".")
        twin = held[f"base_model.model.{path.rpartition('.')[0]}.{pairs[leaf]}"]
        torch.testing.assert_close(parameter, twin, rtol=2e-3, atol=2e-4)
        assert parameter.any()


def test_rates_follow_what_a_factor_does(captured: Any) -> None:
    """Whatever it is called; beside tables, where A begins at zero, both factors keep theirs."""
    _, base = captured["decoder"]
    text = "lora{lr_ratio=4,where=q|embedding.token,name=b};ia3"
    groups = peftfx.controllers(peftfx.run(base, text)).param_groups(1.0)
    rates = {n: g["lr"] for g in groups for n in g["names"]}
    fast = {n for n, rate in rates.items() if rate == 4.0}
    assert fast == {f"peftfx.b.layers.{i}.q_proj.delta.b" for i in (0, 1)}
    assert {r for n, r in rates.items() if n not in fast} == {1.0}
    started = peftfx.run(base, "lora{lr_ratio=4,init=pissa}")
    rates = {n: g["lr"] for g in peftfx.controllers(started).param_groups(1.0) for n in g["names"]}
    assert all((rate == 4.0) == n.endswith(".b") for n, rate in rates.items())
    for wrong in ("0", "-1", "'inf'"):
        with pytest.raises(OptionError, match="lr_ratio"):
            peftfx.parse(f"lora{{lr_ratio={wrong}}}")
    assert peftfx.LoRA(loraplus_lr_ratio=16) == peftfx.LoRA(lr_ratio=16.0)  # type: ignore
