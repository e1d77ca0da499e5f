"""DoRA against its equation and Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.passes.reparameterized.dora import DoRABranch
from peftfx.passes.reparameterized.lora import LoRABranch
from peftfx.rewriter.branches.branch import Expression
from peftfx.rewriter.edits.edit import Editor
from peftfx.rewriter.errors import FoldError, PassError

from ..models import batch, bert, build, first, llama, moved, randomise
from .common import Tensors, check, copied, hooked, tensors

EVERYWHERE = "dora{rank=4,alpha=6,where=linear and not head}"


def direct(weight: Tensor, t: Mapping[str, Tensor], scale: float) -> Tensor:
    """diag(m / ||V||) V with V = W + s B A, all of it formed."""
    moved = weight + scale * t["b"] @ t["a"]
    return t["m"][:, None] * moved / moved.norm(dim=1, keepdim=True)


def reference(
    model: nn.Module, tensors: Tensors, inputs: Mapping[str, Tensor], scale: float
) -> Any:
    """Every adapted linear with the weight of `direct`."""

    def hook(linear: nn.Linear, t: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        return lambda i, o: F.linear(i[0], direct(linear.weight, t, scale), linear.bias)

    found = {n: (model.get_submodule(n), t) for n, t in tensors.items()}
    hooks = {n: hook(m, t) for n, (m, t) in found.items() if isinstance(m, nn.Linear)}
    with hooked(model, hooks):
        return model(**inputs)


def test_dora_equals_its_reference(hand: Any) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, "dora{rank=4,alpha=6,where=linear}"))
    inputs = batch(4, 11, pad=3)
    check(program, base, reference(model, tensors(program), inputs, 1.5), inputs)


@pytest.mark.parametrize("name", ["encoder", "decoder", "fused"])
def test_the_fold_is_exact(captured: Any, name: str) -> None:
    inputs = batch() if name != "fused" else {"input_ids": batch()["input_ids"]}
    base = captured.double(name)
    program = randomise(peftfx.run(base, EVERYWHERE))
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    want = first(program(**inputs))
    torch.testing.assert_close(first(folded(**inputs)), want, rtol=1e-12, atol=1e-12)
    assert moved(first(base(**inputs)), want) > 0.01


@pytest.mark.parametrize("through", [False, True])
def test_gradients_equal_the_direct_formula(through: bool) -> None:
    torch.manual_seed(1)
    w, x, bias = (torch.randn(*s, dtype=torch.float64) for s in ((6, 5), (7, 5), (6,)))
    values = {n: torch.randn(*s, dtype=torch.float64) for n, s in
              (("m", (6,)), ("a", (2, 5)), ("b", (6, 2)))}  # fmt: skip
    direction = LoRABranch(values["a"], values["b"], 0.5, 0.0)
    branch = DoRABranch(values["m"], direction, through)
    got = branch(F.linear(x, w, bias), x, w, bias)
    held = {n: t.clone().requires_grad_() for n, t in values.items()}
    v = w + 0.5 * held["b"] @ held["a"]
    norm = v.norm(dim=1, keepdim=True)
    norm = norm if through else norm.detach()
    want = F.linear(x, held["m"][:, None] * v / norm, bias)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(got)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for name, parameter in branch.named_parameters():
        torch.testing.assert_close(parameter.grad, held[name].grad, rtol=1e-11, atol=1e-11)


def test_a_row_of_zeros_stays_finite(captured: Any) -> None:
    model = build("decoder")
    with torch.no_grad():
        model.layers[0].q_proj.weight[:3] = 0
    base = peftfx.capture(model, kwargs=batch())
    program = peftfx.run(base, "dora{rank=4}").train()
    optimizer = torch.optim.AdamW(program.trainable_parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        first(program(**batch())).pow(2).mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in program.trainable_parameters())
    assert first(program(**batch())).isfinite().all()


def test_dropout_is_on_the_branch_alone(captured: Any) -> None:
    model, base = captured["encoder"]
    program = randomise(peftfx.run(base, "dora{rank=4,dropout=0.5,where=q}"))
    (branch, *_), x, w = map(program.branch, program.attachments), torch.randn(5, 32), model
    assert isinstance(branch, DoRABranch)
    linear = w.layers[0].query
    torch.manual_seed(3)
    got = branch.train()(linear(x), x, linear.weight, linear.bias)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    inner = x @ linear.weight.T + branch.scale * dropped @ branch.a.T @ branch.b.T
    want = branch.rows(linear.weight) * inner + linear.bias
    torch.testing.assert_close(got, want)


def test_rank_stabilised_scale(captured: Any) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, "dora{rank=4,alpha=6,rslora=true,where=q}")
    branch = program.branch(program.attachments[0])
    assert branch.scale == 3.0


@pytest.mark.parametrize("make", [bert, llama])
def test_dora_equals_peft(make: Any) -> None:
    """The outputs, and the parameters after a step; PEFT forms B A, which we never do."""
    import peft

    torch.manual_seed(0)
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, "dora{rank=4,alpha=8,where=q|v}"))
    names = ["query", "value"] if make is bert else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, use_dora=True)
    other = peft.get_peft_model(model, config).eval()
    pairs = {"a": "lora_A.default.weight", "b": "lora_B.default.weight",
             "m": "lora_magnitude_vector.default.weight"}  # fmt: skip
    copied(program, other, pairs)
    inputs = batch(4, 11, pad=2)
    check(program, base, other(**inputs), inputs)
    saved = stored_bytes(lambda: first(program(**inputs)).pow(2).mean().backward())
    theirs = stored_bytes(lambda: first(other(**inputs)).pow(2).mean().backward())
    assert saved < 0.9 * theirs
    for trained in (program.trainable_parameters(), other.parameters()):
        torch.optim.SGD([p for p in trained if p.requires_grad], 0.3).step()
    stepped = {n: p.detach().clone() for n, p in other.named_parameters()}
    copied(program, other, pairs)  # ours over theirs
    changed = {n: p for n, p in other.named_parameters() if p.requires_grad}
    assert len(changed) == 12
    for name, parameter in changed.items():
        torch.testing.assert_close(parameter, stepped[name], rtol=1e-5, atol=1e-6)


def stored_bytes(step: Callable[[], None]) -> int:
    """Bytes of the distinct tensors that a step keeps for its backward."""
    held: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(held.values())


def test_trainable_count(captured: Any) -> None:
    _, base = captured["llama"]
    d, kv, f, layers = 32, 16, 64, 2
    program = peftfx.run(base, "dora{rank=4}")
    count = sum(p.numel() for p in program.trainable_parameters())
    sizes = ((d, d), (d, kv), (d, kv), (d, f), (f, d))  # q, k, v, up, down
    assert count == layers * sum(4 * (k + o) + o for k, o in sizes)
    decayed = {n: g["weight_decay"] for g in peftfx.controllers(program).param_groups(1e-3, 0.1)
               for n in g["names"]}  # fmt: skip
    assert {n.rpartition(".")[2]: decay for n, decay in decayed.items()} == {
        "m": 0.0, "a": 0.1, "b": 0.1,
    }  # fmt: skip


def test_parts_of_a_fused_weight(captured: Any) -> None:
    model, base = captured["fused"]
    inputs = {"input_ids": batch(4, 11)["input_ids"]}
    program = randomise(peftfx.run(base, "dora{rank=4,alpha=6,where=q|v}"))
    by_layer: dict[str, dict[str, Mapping[str, Tensor]]] = {}
    for attachment in program.attachments:
        name, _, role = attachment.site.partition(":")
        held = dict(program.branch(attachment).named_parameters())
        by_layer.setdefault(name.removesuffix(".weight"), {})[role] = held
    merged = build("fused")
    with torch.no_grad():
        for name, parts in by_layer.items():
            weight = merged.get_submodule(name).weight
            for role, rows in (("q", slice(0, 32)), ("v", slice(64, 96))):
                weight[rows] = direct(weight[rows], parts[role], 1.5)
    want = merged(**inputs)
    torch.testing.assert_close(first(program(**inputs)), want, rtol=1e-5, atol=1e-5)
    assert moved(first(model(**inputs)), want) > 0.01


@pytest.mark.parametrize(("name", "where"), [("gpt2", "o|ffn"), ("gpt2", "q|v"), ("t5", "q|v")])
def test_weights_stored_in_out_and_encoder_decoders(zoo: Any, name: str, where: str) -> None:
    base = zoo[name]
    program = peftfx.run(base, f"dora{{rank=4,where={where}}}")
    assert program.history[-1].certificate.measured["max_abs"] == 0
    inputs = base.sample
    before = first(program(**inputs)).detach()
    after = first(randomise(program, 0.3)(**inputs)).detach()
    assert moved(before, after) > 0.01
    folded = peftfx.run(program, "fold")
    assert folded.history[-1].certificate.holds and not folded.attachments
    torch.testing.assert_close(first(folded(**inputs)), after, rtol=1e-4, atol=1e-4)


def test_norms_in_low_precision_are_those_of_float32() -> None:
    """A norm in bfloat16 would be off by 2^-9; c itself is not rounded to bfloat16 either."""
    model = build("encoder").to(torch.bfloat16)
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, EVERYWHERE))
    attachment = program.attachments[0]
    branch = program.branch(attachment)
    weight = program.module.get_parameter(attachment.site)
    assert isinstance(branch, DoRABranch)
    assert branch.m.dtype == branch.a.dtype == torch.float32
    m, a, b, w = (t.detach().double() for t in (branch.m, branch.a, branch.b, weight))
    v = w + branch.scale * b @ a
    want = m / v.norm(dim=1)
    torch.testing.assert_close(branch.rows(weight).double(), want, rtol=1e-6, atol=1e-6)
    x = torch.randn(7, 32).to(torch.bfloat16)
    got = branch(F.linear(x, weight), x, weight)
    assert got.dtype == torch.bfloat16
    exact = x.double() @ (want[:, None] * v).T
    assert float((got.detach().double() - exact).norm() / exact.norm()) < 2**-7
    folded = peftfx.run(program, "fold")
    stored = folded.module.get_parameter(attachment.site)
    torch.testing.assert_close(stored.double(), want[:, None] * v, rtol=2**-8, atol=1e-6)


def test_norms_under_autocast_are_those_of_float32(captured: Any) -> None:
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, "dora{rank=4,where=q}"))
    attachment = program.attachments[0]
    branch, weight = program.branch(attachment), program.module.get_parameter(attachment.site)
    assert isinstance(branch, DoRABranch)
    want = branch.rows(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(branch.rows(weight), want)
        x = torch.randn(5, 32)
        assert branch(F.linear(x, weight), x, weight).dtype == torch.bfloat16
    compiled = torch.compile(program.module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = first(compiled(**batch())), first(program(**batch()))
    torch.testing.assert_close(got, plain, rtol=0.02, atol=0.02)


class Doubled(Expression):
    """w' = (1 + g) w."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(()))

    def forward(self, w: Tensor, **_: Tensor) -> Tensor:
        return (1 + self.g) * w


def expressed(base: peftfx.Program, g: float) -> peftfx.Program:
    """The program with an expression below the query of layer 0."""
    program = base.fork()
    edit = Editor(program, "lora")
    site = program.sites["layers.0.query.weight"]
    edit.express(site, site.id, Doubled())
    edit.finish()
    with torch.no_grad():
        edit.program.branch(edit.program.attachments[0]).g.fill_(g)  # type: ignore[union-attr]
    return program


def test_norms_follow_an_expression_below(captured: Any) -> None:
    """m starts from what the linear multiplies by now, and the norm is that of every forward."""
    _, base = captured["encoder"]
    below = expressed(base, 1.0)
    program = peftfx.run(below, "dora{rank=4,alpha=6,where=q}")
    assert program.history[-1].certificate.measured["max_abs"] == 0
    randomise(program)
    grown = program.fork()
    expression = grown.branch(grown.attachments[0])
    with torch.no_grad():
        expression.g.fill_(3.0)  # type: ignore[union-attr, operator]
    attachment = grown.attachments[1]
    branch = grown.branch(attachment)
    assert isinstance(branch, DoRABranch)
    weight = (4 * grown.module.get_parameter(attachment.site)).detach()
    want = direct(weight, dict(branch.named_parameters()), 1.5)
    got = branch.rows(weight)[:, None] * (weight + branch.full_delta())
    torch.testing.assert_close(got, want)
    outputs = first(grown(**batch()))
    assert moved(first(program(**batch())), outputs) > 0.001


def test_norms_follow_weights_that_come_later(captured: Any, tmp_path: Path) -> None:
    """On the meta device m has no values; it gets them with the weights."""
    from safetensors.torch import save_file

    model = build("encoder")
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    with torch.device("meta"):
        hollow = type(model)().eval()
    buffers = dict(model.named_buffers())
    program = peftfx.run(peftfx.capture(hollow, kwargs=batch()), "dora{rank=4}")
    filled = peftfx.load_weights(program, tmp_path, buffers=buffers)
    assert filled.history[-1].certificate.measured["max_abs"] == 0
    trained = randomise(peftfx.run(captured["encoder"][1], "dora{rank=4}"))
    peftfx.save(trained, tmp_path / "adapter")
    peftfx.fold_checkpoint(
        peftfx.capture(hollow, kwargs=batch()), tmp_path, tmp_path / "out",
        adapter=tmp_path / "adapter",
    )  # fmt: skip
    again = peftfx.load_weights(peftfx.capture(hollow, kwargs=batch()), tmp_path / "out",
                                buffers=buffers)  # fmt: skip
    torch.testing.assert_close(
        first(again(**batch())), first(trained(**batch())), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_bias_is_not_scaled(captured: Any, name: str) -> None:
    """Whether BitFit comes before or after, also where it adds the bias."""
    _, base = captured[name]
    one = randomise(peftfx.run(base, "dora{rank=4};bitfit{where=q|v}"))
    two = peftfx.run(base, "bitfit{where=q|v};dora{rank=4}")
    values = one.named_trainable_parameters()
    with torch.no_grad():
        for n, parameter in two.named_trainable_parameters().items():
            parameter.copy_(values[n])
    want = first(one(**batch()))
    torch.testing.assert_close(first(two(**batch())), want)
    assert one.text() == two.text()
    folded = peftfx.run(one, "fold")
    torch.testing.assert_close(first(folded(**batch())), want, rtol=1e-4, atol=1e-5)


OTHERS = ("lora{rank=4}", "ia3", "serial_adapter{bottleneck=6}", "prefix_tuning{length=5}",
          "prompt_tuning{length=4}", "bitfit", "adalora{rank=4,target=2}")  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_stacked_with_other_methods(captured: Any, other: str) -> None:
    """Both orders are one graph, and it folds exactly."""
    base = captured.double("block")
    one = randomise(peftfx.run(base, f"dora{{rank=4,where=linear and not head}};{other}"), 0.3)
    two = peftfx.run(base, f"{other};dora{{rank=4,where=linear and not head}}")
    assert one.text() == two.text()
    folded = peftfx.run(one, "fold")
    assert folded.history[-1].certificate.measured["max_rel"] < 1e-11
    assert not {a.adapter for a in folded.attachments} & {"dora", "lora", "ia3", "adalora"}


def test_one_magnitude_a_site(captured: Any) -> None:
    _, base = captured["encoder"]
    with pytest.raises(PassError, match="one magnitude"):
        peftfx.run(base, "dora;dora{name=more,where=q}")
    program = randomise(peftfx.run(base, "lora{rank=2,where=q};dora{where=q}"))
    with pytest.raises(FoldError, match="stands between"):
        peftfx.run(program, "fold{names=lora}")
    half = peftfx.run(program, "fold{names=dora}")
    assert {a.adapter for a in half.attachments} == {"lora"}
    again = peftfx.run(half, replace(peftfx.parse("dora").passes[0], name="more"))
    torch.testing.assert_close(first(again(**batch())), first(half(**batch())))
