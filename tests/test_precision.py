"""Mixed precision: autocast around programs, float32 adapters on bfloat16 bases, and scaled
gradients."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftfx
from peftfx.rewriter.pipeline.method import Method
from peftfx.rewriter.pipeline.passes import REGISTRY

from .cpu import shared
from .methods.common import copied, hooked, tensors
from .models import batch, bert, build, first, moved, randomise
from .recipes import METHODS, RECIPES, start

BF16 = torch.bfloat16


def autocast() -> torch.autocast:
    return torch.autocast("cpu", BF16)


@pytest.fixture(scope="module")
def narrow() -> tuple[Any, peftfx.Program]:
    """The encoder in bfloat16, and its program."""
    model = build("encoder").to(BF16)
    with shared():
        return model, peftfx.capture(model, kwargs=batch())


# Autocast.


@pytest.mark.parametrize("name", ["decoder", "fused", "t5"])
def test_autocast_around_a_program_is_autocast_around_the_model(
    captured: Any, zoo: Any, name: str
) -> None:
    model, base = (zoo.model("t5"), zoo["t5"]) if name == "t5" else captured[name]
    inputs = {n: t % 60 for n, t in batch(3, 8).items()}
    if name == "fused":
        del inputs["attention_mask"]
    if name == "t5":
        inputs["decoder_input_ids"] = batch(3, 5)["input_ids"] % 60
    model.eval()
    with autocast():
        want, got = first(model(**inputs)), first(base(**inputs))
    assert want.dtype == got.dtype and torch.equal(want, got)
    with torch.no_grad():
        assert moved(first(model(**inputs)), got.float()) > 0


SCALED = r".*(attention\.self\.(key|value)|layer\.\d\.output\.dense)"
PEERS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "lora{rank=2,alpha=4.0}": (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]},
        {"a": "lora_A.default.weight", "b": "lora_B.default.weight"},
    ),
    "ia3": (
        {"peft_type": "IA3", "target_modules": SCALED,
         "feedforward_modules": r".*layer\.\d\.output\.dense"},
        {"l": "ia3_l.default"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", sorted(PEERS))
def test_autocast_with_adapters_is_pefts(captured: Any, text: str) -> None:
    import peft

    options, names = PEERS[text]
    model, base = captured["bert"]
    program = randomise(peftfx.run(base, text), 0.8 if text == "ia3" else 0.1)
    theirs: Any = peft.get_peft_model(bert().eval(), peft.get_peft_config(options))
    state = {f"model.{_inside(theirs, n)}": t for n, t in model.state_dict().items()}
    theirs.base_model.load_state_dict(state, strict=False)
    copied(program, theirs, names)
    inputs = batch(3, 8, pad=3)
    with autocast():
        want, got = first(theirs(**inputs)), first(program(**inputs))
    assert want.dtype == got.dtype and torch.equal(want, got)
    assert moved(first(base(**inputs)), got.float()) > 0.01


def _inside(theirs: Any, name: str) -> str:
    """Where PEFT keeps a tensor of the base."""
    wrapped = {n for n, _ in theirs.base_model.model.named_parameters()}
    path, _, leaf = name.rpartition(".")
    held = f"{path}.base_layer.{leaf}"
    return held if held in wrapped else name


def _adapter(t: dict[str, Tensor], h: Tensor) -> Tensor:
    inner = F.gelu(F.linear(h, t["down"], t["down_bias"]))
    return h + F.linear(inner, t["up"], t["up_bias"])


def _dora(t: dict[str, Tensor], linear: Any, x: Tensor, y: Tensor) -> Tensor:
    """With the weight itself in full precision; `y` is what the frozen linear gave."""
    weight, scale = linear.weight, 8.0
    norms = (weight + scale * t["b"] @ t["a"]).norm(dim=1)
    moved = y.float() + scale * F.linear(F.linear(x, t["a"]), t["b"]).float()
    c = t["m"] / norms
    return (c * (moved - linear.bias) + linear.bias).to(y.dtype)


@pytest.mark.parametrize("text", ["serial_adapter{bottleneck=4,norms=false}", "dora{rank=2}"])
def test_autocast_with_adapters_is_the_equation(captured: Any, text: str) -> None:
    model, base = captured["encoder"]
    program = randomise(peftfx.run(base, text))
    inputs, values = batch(3, 8, pad=3), tensors(program)
    hooks: dict[str, Any] = {}
    if text.startswith("dora"):
        for site, t in values.items():
            linear = model.get_submodule(site)
            hooks[site] = lambda i, o, t=t, m=linear: _dora(t, m, i[0], o)
    else:
        for site, t in values.items():
            layer, kind = site.split(".")[1].removeprefix("layer"), site.split(".")[2]
            last = {"attn": "dense", "ffn": "fc2"}[kind]
            hooks[f"layers.{layer}.{last}"] = lambda i, o, t=t: _adapter(t, o)
    with autocast(), hooked(model, hooks), torch.no_grad():
        want = first(model(**inputs))
    with autocast(), torch.no_grad():
        got = first(program(**inputs))
    assert want.dtype == got.dtype and moved(first(base(**inputs)), got.float()) > 0.01
    if text.startswith("dora"):  # another order of sums
        assert moved(want.float(), got.float()) < 0.05
    else:
        assert torch.equal(want, got)


def test_autocast_compiled_and_lowered(captured: Any) -> None:
    program = randomise(peftfx.run(captured["decoder"][1], "lora{rank=2};ia3{where=k}"))
    lowered = peftfx.run(program, "lower")
    inputs = program.spec.bind((), batch())
    compiled = torch.compile(program.module, fullgraph=True, backend="aot_eager")
    with autocast():
        want = first(program.module(**inputs))
        got, fused = first(compiled(**inputs)), first(lowered.module(**inputs))
        fused.float().pow(2).mean().backward()
    assert want.dtype == got.dtype == fused.dtype == BF16
    assert moved(want.float(), got.float()) < 0.02 and moved(want.float(), fused.float()) < 0.02
    grads = [p.grad for p in lowered.trainable_parameters()]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in grads)


# A base in bfloat16.


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_float32_on_a_bfloat16_base(narrow: Any, method: str, tmp_path: Path) -> None:
    model, base = narrow
    before, last = start(base, method)
    program = peftfx.run(before, last)
    assert {p.dtype for p in program.trainable_parameters()} == {torch.float32}
    assert program.history[-1].certificate.kind != "identity" or torch.equal(
        first(before(**batch())), first(program(**batch()))
    )
    assert {p.dtype for p in base.module.parameters()} == {BF16}
    initial = {n: p.detach().clone() for n, p in program.named_trainable_parameters().items()}
    optimizer = torch.optim.AdamW(program.train().trainable_parameters(), lr=1e-5)
    for step in range(5):
        output = first(program(**batch(seed=step)))
        assert output.dtype == BF16
        optimizer.zero_grad()
        output.float().pow(2).mean().backward()
        optimizer.step()
    grads = [p.grad for p in program.trainable_parameters() if p.grad is not None]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
    changed = {n for n, p in program.named_trainable_parameters().items()
               if not torch.equal(p, initial[n])}  # fmt: skip
    assert len(changed) >= 0.6 * len(initial)
    assert program.memory(3, 9).gradients == sum(t.nbytes for t in initial.values())

    randomise(program.eval())
    want = first(program(**batch()))
    peftfx.save(program, tmp_path / "a")
    loaded = peftfx.load(base, tmp_path / "a")
    assert torch.equal(first(loaded(**batch())), want)
    assert {p.dtype for p in loaded.trainable_parameters()} == {torch.float32}
    assert torch.equal(first(program.only(())(**batch())), first(base(**batch())))
    cls = REGISTRY[method]
    if issubclass(cls, Method) and cls.folds == "exactly" and ";" not in RECIPES[method]:
        folded = peftfx.run(program, "fold")
        assert 0 < folded.history[-1].certificate.measured["delta_lost"] < 0.2
        assert moved(want.float(), first(folded(**batch())).float()) < 0.1
        state = folded.export_state_dict()
        assert {t.dtype for t in state.values()} == {BF16}
        again = copy.deepcopy(model)
        again.load_state_dict(state)
        assert torch.equal(first(again(**batch())), first(folded(**batch())))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_small_steps_would_round_away(dtype: torch.dtype) -> None:
    """Trained tensors of the base are float32, too, under their names, and cast where read."""
    base = peftfx.capture(build("encoder"), kwargs=batch(), dtype=dtype)
    program = peftfx.run(base, "serial_adapter{bottleneck=4}").train()
    norms = [p for n, p in program.named_trainable_parameters().items() if "norm" in n]
    assert len(norms) == 10 and {p.dtype for p in norms} == {torch.float32}
    optimizer = torch.optim.AdamW(norms, lr=1e-5, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        first(program(**batch())).float().pow(2).mean().backward()
        optimizer.step()
    weights = [p.detach() for n, p in program.named_trainable_parameters().items()
               if "norm" in n and n.endswith("weight")]  # fmt: skip
    assert all((p != 1).float().mean() > 0.9 for p in weights)
    assert all((p.to(dtype) == 1).all() for p in weights)
    state = program.export_state_dict(strict=False)
    assert {t.dtype for n, t in state.items() if not n.startswith("peftfx.")} == {dtype}
    assert set(base.export_state_dict()) <= set(state)


def test_lowered_on_a_bfloat16_base(narrow: Any) -> None:
    program = randomise(peftfx.run(narrow[1], "lora{rank=2}"))
    lowered = peftfx.run(program, "lower")
    assert len(lowered.history[-1].edited) == 4
    target = torch.randn(27, 32, generator=torch.Generator().manual_seed(0)).view(3, 9, 32)
    for each in (program, lowered):
        (first(each(**batch())).float() - target).pow(2).mean().backward()
    for ours, fused in zip(
        program.trainable_parameters(), lowered.trainable_parameters(), strict=True
    ):
        assert ours.grad is not None and fused.grad is not None
        assert fused.grad.dtype == torch.float32
        assert 0 < moved(ours.grad, fused.grad) < 0.1


# Scaled gradients.


def test_controllers_see_unscaled_gradients(captured: Any) -> None:
    """`scaler.unscale_` comes before `before_step`, and a skipped step before no `after_step`."""
    program = peftfx.run(captured["encoder"][1], "lora{rank=2};bitfit{where=norm}")
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.SGD(controllers.param_groups(lr=0.1))
    controllers.start(optimizer, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen: list[list[Tensor]] = []
    after: list[int] = []
    for controller in controllers.each.values():
        controller.before_step = lambda step: seen.append(  # pyright: ignore[reportAttributeAccessIssue]
            [p.grad.clone() for p in program.trainable_parameters() if p.grad is not None]
        )
        controller.after_step = after.append  # pyright: ignore[reportAttributeAccessIssue]
    plain: Any = torch.autograd.grad(
        first(program(**batch())).pow(2).mean(), program.trainable_parameters(), allow_unused=True
    )
    used = [g for g in plain if g is not None]
    values = [[p.detach().clone() for p in program.trainable_parameters()]]
    for step, factor in ((0, 1.0), (1, float("inf"))):
        loss = first(program(**batch())).pow(2).mean() * factor
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        controllers.before_step(step)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:  # not skipped
            controllers.after_step(step)
        values.append([p.detach().clone() for p in program.trainable_parameters()])
        optimizer.zero_grad()
    for grads in seen[:2]:
        for got, want in zip(grads, used, strict=True):
            torch.testing.assert_close(got, want)
    assert len(seen) == 4 and after == [0, 0]  # both controllers, the first step alone
    assert [sum(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) > 0
            for pair in itertools.pairwise(values)] == [True, False]  # fmt: skip
