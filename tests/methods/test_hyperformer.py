"""HyperFormer++ against its equations; one task taken out of it; two real tasks learnt at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import peftfx
from peftfx.rewriter.errors import InputError, PassError

from ..models import batch, build, first, moved, randomise
from .common import LAST, digits, hooked, readout, subject

SMALL = "hyperformer{tasks=3,bottleneck=4,dim=8,hidden=12,projected=6}"


def generated(held: Mapping[str, Tensor], z: Tensor, layer: int, block: int) -> Tensor:
    """[D, b_D, U, b_U, gamma, beta] = G LN(W2 ReLU(W1 [z; e_l; e_b])) + g."""
    x = torch.cat([z, held["layers"][layer], held["blocks"][block]])
    x = (held["inner.weight"] @ x + held["inner.bias"]).clamp(min=0)
    x = held["outer.weight"] @ x + held["outer.bias"]
    x = (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()
    x = x * held["norm.weight"] + held["norm.bias"]
    return held["heads.weight"] @ x + held["heads.bias"]


def adapter(flat: Tensor, d: int, r: int) -> Callable[..., Tensor]:
    """h <- h + gamma norm(U gelu(D h + b_D) + b_U) + beta, as a hook."""
    down, down_bias, up, up_bias, gamma, beta = flat.split([r * d, r, d * r, d, d, d])

    def adapt(_: Any, h: Tensor) -> Tensor:
        inner = h @ down.view(r, d).T + down_bias
        inner = (
            0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
        )
        y = inner @ up.view(d, r).T + up_bias
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return h + y * gamma + beta

    return adapt


def reference(model: nn.Module, program: peftfx.Program, name: str, task: int) -> dict[str, Any]:
    held = {n: p.detach() for n, p in program.named_trainable_parameters().items()}
    own = {n.removeprefix("peftfx.hyperformer."): p for n, p in held.items()}
    z = own["tasks.weight"][task]
    hooks: dict[str, Any] = {}
    for stream, patterns in LAST[name].items():
        (prefix,) = {n.partition(".")[0] for n in own if n.startswith(f"{stream}_")}
        of_stream = {
            n.removeprefix(f"{prefix}."): p for n, p in own.items() if n.startswith(prefix)
        }
        for layer in range(len(of_stream["layers"])):
            for block, pattern in enumerate((patterns["attn"], patterns["ffn"])):
                flat = generated(of_stream, z, layer, block)
                d = model.get_submodule(pattern.format(layer)).out_features
                assert isinstance(d, int)
                hooks[pattern.format(layer)] = adapter(flat, d, 4)
    return hooks


@pytest.mark.parametrize("name", list(LAST))
def test_hyperformer_equals_its_reference(captured: Any, zoo: Any, name: str) -> None:
    model, base, inputs = subject(captured, zoo, name)
    program = randomise(peftfx.run(base, f"{SMALL[:-1]},norms=false}}"), 0.2)
    seen: list[Tensor] = []
    for task in range(3):
        with hooked(model, reference(model, program, name, task)):
            want = first(model(**inputs))
        got = first(program(**inputs, task=torch.tensor(task)))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
        assert all(moved(s, got) > 0.01 for s in [first(base(**inputs)), *seen])
        seen.append(got)
    assert torch.equal(first(program(**inputs)), seen[0])
    with pytest.raises(InputError, match="task"):
        program(**inputs, task=torch.tensor([0, 1]))
    with pytest.raises(InputError, match="'task' holds 3; it takes 0 to 2"):
        program(**inputs, task=torch.tensor(3))


@pytest.mark.parametrize("name", list(LAST))
def test_trainable_count(captured: Any, zoo: Any, name: str) -> None:
    model, base, _ = subject(captured, zoo, name)
    program = peftfx.run(base, "hyperformer{tasks=8,bottleneck=6,norms=false}")
    count = 8 * 64
    for patterns in LAST[name].values():
        d, layers, r = model.get_submodule(patterns["ffn"].format(0)).out_features, 2, 6
        trunk = (192 * 128 + 128) + (128 * 64 + 64) + 2 * 64
        count += (layers + 2) * 64 + trunk + 65 * (2 * d * r + d + r + 2 * d)
    assert sum(p.numel() for p in program.trainable_parameters()) == count
    assert count == len(torch.nn.utils.parameters_to_vector(program.trainable_parameters()))
    with_norms = peftfx.run(base, "hyperformer{tasks=8,bottleneck=6}")
    names = set(with_norms.named_trainable_parameters()) - set(program.named_trainable_parameters())
    norms = {n for s in base.sites.of("norm") for n in (s.weight, s.bias) if n}  # pyright: ignore
    assert names == norms


@pytest.mark.parametrize("name", ["decoder", "t5"])
def test_the_plain_one_has_a_generator_a_place(captured: Any, zoo: Any, name: str) -> None:
    """[D, b_D, U, b_U, gamma, beta] = G_lb W2 ReLU(W1 z_t) + g_lb; its counts; a task baked."""
    model, base, inputs = subject(captured, zoo, name)
    program = randomise(peftfx.run(base, f"{SMALL[:-1]},heads=own,norms=false}}"), 0.2)
    own = {n.removeprefix("peftfx.hyperformer."): p.detach()
           for n, p in program.named_trainable_parameters().items()}  # fmt: skip
    hooks: dict[str, Any] = {}
    z, count = own["tasks.weight"][2], 3 * 8 + (8 * 12 + 12) + (12 * 6 + 6)
    x = own["projector.0.weight"] @ z + own["projector.0.bias"]
    x = own["projector.2.weight"] @ x.clamp(min=0) + own["projector.2.bias"]
    for stream, patterns in LAST[name].items():
        for layer in range(2):
            for role in ("attn", "ffn"):
                module, head = patterns[role].format(layer), f"head_{stream}_layer{layer}_{role}"
                flat = own[f"{head}.weight"] @ x + own[f"{head}.bias"]
                d = model.get_submodule(module).out_features
                hooks[module] = adapter(flat, d, 4)
                count += (6 + 1) * (2 * d * 4 + d + 4 + 2 * d)
    with hooked(model, hooks):
        want = first(model(**inputs))
    task = torch.tensor(2)
    torch.testing.assert_close(first(program(**inputs, task=task)), want, rtol=1e-4, atol=2e-5)
    assert moved(first(base(**inputs)), want) > 0.01
    assert sum(p.numel() for p in program.trainable_parameters()) == count
    baked = peftfx.run(program, "bake{inputs={task=2}}")
    torch.testing.assert_close(first(baked(**inputs)), want, rtol=1e-4, atol=2e-5)
    assert baked.shared == ()


@pytest.mark.parametrize("name", list(LAST))
def test_one_task_is_baked_exactly(captured: Any, zoo: Any, name: str, tmp_path: Path) -> None:
    model, base, inputs = subject(captured, zoo, name)
    program = randomise(peftfx.run(base, SMALL), 0.2)
    want = [first(program(**inputs, task=torch.tensor(t))) for t in range(3)]
    baked = peftfx.run(program, "bake{names=[hyperformer],inputs={task=2}}")
    got = first(baked(**inputs))
    torch.testing.assert_close(got, want[2], rtol=1e-5, atol=1e-6)
    assert moved(want[0], got) > 0.01
    with pytest.raises(InputError, match="fixed to 2"):
        baked(**inputs, task=torch.tensor(2))
    # Nothing of the generator is left: not in the graph, the module, the artifact.
    assert baked.shared == () and "task" not in baked.spec.names
    assert not any(w in baked.text() for w in ("Generator", "Embedding", "task"))
    leaves = {n.rpartition(".")[2] for n, _ in baked.module.named_parameters() if "peftfx" in n}
    assert leaves == {"down", "down_bias", "up", "up_bias", "scale", "shift"}
    peftfx.save(baked, tmp_path / "a")
    assert not any(
        "width" in n or "tasks" in n for n in peftfx.load(base, tmp_path / "a").module.state_dict()
    )
    # It is an ordinary adapter: it trains on, is saved and loaded.
    optimizer = torch.optim.AdamW(baked.trainable_parameters(), lr=1e-3)
    first(baked(**inputs)).pow(2).mean().backward()
    assert all(
        p.grad is not None for n, p in baked.named_trainable_parameters().items() if "peftfx" in n
    )
    optimizer.step()
    trained = first(baked(**inputs))
    assert not torch.equal(trained, got)
    peftfx.save(baked, tmp_path / "b")
    loaded = peftfx.load(model, tmp_path / "b")
    assert torch.equal(first(loaded(**inputs)), trained) and loaded.text() == baked.text()
    assert torch.equal(first(loaded.only(("hyperformer",))(**inputs)), trained)
    assert torch.equal(first(loaded.without("hyperformer")(**inputs)), first(base(**inputs)))
    assert all(c.holds for c in baked.verify())


def test_baking_is_exact_in_double_precision() -> None:
    model = build("encoder").double()
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, SMALL), 0.2)
    baked = peftfx.run(program, "bake{inputs={task=1}}")
    gap = first(program(**batch(), task=torch.tensor(1))) - first(baked(**batch()))
    assert float(gap.detach().abs().max()) <= 1e-12


def test_wrong_tasks_are_errors(captured: Any) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, SMALL)
    with pytest.raises(PassError, match="task 3 is not one of 0 to 2"):
        peftfx.run(program, "bake{inputs={task=3}}")
    with pytest.raises(PassError, match="nothing to settle"):
        peftfx.run(program, "bake{names=[hyperformer]}")
    with pytest.raises(PassError, match="has an input 'task' already"):
        peftfx.run(program, "hyperformer{name=other}")
    both = peftfx.run(program, "hyperformer{name=other,task=language}")
    assert both.spec.names[-2:] == ("task", "language")


def test_switching_tasks_compiles_once(captured: Any) -> None:
    _, base = captured["decoder"]
    program = randomise(peftfx.run(base, SMALL), 0.2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(program.module, fullgraph=True, backend=counter)
    for task in range(3):
        inputs = {**batch(), "task": torch.tensor(task)}
        torch.testing.assert_close(compiled(**inputs), program(**inputs))
    assert counter.frame_count == 1


def test_the_task_is_an_input_of_the_onnx_file(captured: Any, tmp_path: Path) -> None:
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, SMALL), 0.2)
    report = peftfx.export_onnx(program, tmp_path / "m.onnx")
    assert report.inputs == ("input_ids", "attention_mask", "task")
    from peftfx.exporters.onnx.export import session

    running = session(report.path)
    for task in range(3):
        inputs = {**batch(4, 7, pad=2), "task": torch.tensor(task)}
        (got, *_) = running.run(None, {n: t.numpy() for n, t in inputs.items()})
        torch.testing.assert_close(
            torch.from_numpy(got), first(program(**inputs)), rtol=1e-4, atol=1e-5
        )
    baked = peftfx.run(program, "bake{inputs={task=1}}")
    assert peftfx.export_onnx(baked, tmp_path / "one.onnx").error <= 1e-5


def test_two_tasks_are_learnt_at_once(captured: Any) -> None:
    """Scanned digits: 0, is it at least five; 1, is it odd. One batch, one task."""
    _, base = captured["encoder"]
    program = peftfx.run(base, "hyperformer{tasks=2,bottleneck=8}").train()
    inputs, number = digits(400)
    labels = [(number >= 5).long(), number % 2]
    steps = 120
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.AdamW(controllers.param_groups(lr=1e-3))
    controllers.start(optimizer, steps)

    def loss(task: int, label: int) -> Tensor:
        hidden = first(program(**inputs, task=torch.tensor(task)))
        return F.cross_entropy(readout(hidden), labels[label])

    torch.manual_seed(0)
    for step in range(steps):
        loss(step % 2, step % 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    program.eval()
    with torch.no_grad():
        after = [float(loss(t, t)) for t in range(2)]
        swapped = [float(loss(t, 1 - t)) for t in range(2)]
        baked = peftfx.run(program, "bake{inputs={task=1}}")
        found = float(F.cross_entropy(readout(first(baked(**inputs))), labels[1]))
    assert max(after) < 0.55, after  # 0.69 is chance
    assert min(swapped) > 0.65, swapped  # the task's embedding makes the difference
    assert abs(found - after[1]) < 1e-5
