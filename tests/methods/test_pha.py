"""PHA against its equations; its losses; one task taken out of it, and one chosen for new data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import InputError, OptionError, PassError

from ..models import batch, first, moved, randomise
from .common import LAST, digits, hooked, readout, subject

OPTIONS = "tasks=3,bottleneck=4,dim=8,hidden=12,projected=6"
SMALL = f"pha{{{OPTIONS}}}"
PLACES = {
    "encoder": ("layers.{}.fc1", "layers.{}.fc2"),
    "decoder": ("layers.{}.up", "layers.{}.down"),
    "t5": ("decoder.block.{}.layer.2.DenseReluDense.wi_0", LAST["t5"]["s1"]["ffn"]),
    "t5 encoder": ("encoder.block.{}.layer.1.DenseReluDense.wi_0", LAST["t5"]["s0"]["ffn"]),
}
"""What reads z, and what gives h."""
MODELS = ["encoder", "decoder", "t5"]


def own(program: peftfx.Program) -> dict[str, Tensor]:
    held = program.named_trainable_parameters()
    return {n.removeprefix("peftfx.pha."): p.detach() for n, p in held.items()}


def generated(held: Mapping[str, Tensor], z: Tensor, layer: int) -> Tensor:
    """[U, D, b_U, b_D] = G LN(W2 ReLU(W1 [p_t; e_l])) + g."""
    x = torch.cat([z, held["layers"][layer]])
    x = (held["inner.weight"] @ x + held["inner.bias"]).clamp(min=0)
    x = held["outer.weight"] @ x + held["outer.bias"]
    x = (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()
    x = x * held["norm.weight"] + held["norm.bias"]
    return held["heads.weight"] @ x + held["heads.bias"]


def reference(
    model: nn.Module, program: peftfx.Program, name: str, tasks: Tensor
) -> dict[str, Any]:
    """h <- h + U ReLU(D z + b_D) + b_U: the generated ones for each sample by itself."""
    held, hooks = own(program), dict[str, Any]()
    stream = "s1" if name == "t5" else "s0"
    (prefix,) = {n.partition(".")[0] for n in held if n.startswith(f"{stream}_")}
    mine = {n.removeprefix(f"{prefix}."): p for n, p in held.items() if n.startswith(prefix)}
    places = [(name, 0), (name, 1)] if name == "t5" else [(name, 1)]
    ordinary = [("t5 encoder", 0), ("t5 encoder", 1)] if name == "t5" else [(name, 0)]

    def of_layer(layer: int, d: int) -> list[list[Tensor]]:
        sizes = [d * 4, 4 * d, d, 4]
        rows = [generated(mine, held["prototypes.weight"][t], layer) for t in tasks.tolist()]
        return [[u.view(d, 4), w.view(4, d), c, b] for u, w, c, b in (r.split(sizes) for r in rows)]

    for place, layer in (*places, *ordinary):
        reads, gives = (p.format(layer) for p in PLACES[place])
        d = model.get_submodule(gives).out_features
        assert isinstance(d, int)
        plain = {n.rpartition(".")[2]: p for n, p in held.items()
                 if n.startswith(f"s0.layer{layer}.")}  # fmt: skip
        row = layer if name == "t5" else 0
        every = of_layer(row, d) if (place, layer) in places else [
            [plain[n] for n in ("up", "down", "up_bias", "down_bias")]] * len(tasks)  # fmt: skip
        seen: list[Tensor] = []

        def add(_: Any, h: Tensor, seen: Any = seen, every: Any = every) -> Tensor:
            rows = [(z @ down.T + b).clamp(min=0) @ up.T + c
                    for z, (up, down, c, b) in zip(seen[-1], every, strict=True)]  # fmt: skip
            return h + torch.stack(rows)

        hooks[reads] = lambda i, o, seen=seen: seen.append(i[0]) or o
        hooks[gives] = add
    return hooks


@pytest.mark.parametrize("name", MODELS)
def test_pha_equals_its_reference(captured: Any, zoo: Any, name: str) -> None:
    """Samples of different tasks in one batch."""
    model, base, inputs = subject(captured, zoo, name)
    program = randomise(peftfx.run(base, SMALL), 0.2)
    tasks = torch.tensor([2, 0, 1, 2])
    with hooked(model, reference(model, program, name, tasks)):
        want = first(model(**inputs))
    got = program(**inputs, task=tasks)
    torch.testing.assert_close(first(got), want, rtol=1e-4, atol=2e-5)
    assert moved(first(base(**inputs)), want) > 0.01
    other = first(program(**inputs))
    torch.testing.assert_close(other[1], first(got)[1], rtol=1e-5, atol=1e-5)  # left out: task 0
    assert moved(other[0], first(got)[0]) > 0.01
    with pytest.raises(InputError, match="'task' holds 3; it takes 0 to 2"):
        program(**inputs, task=tasks + 1)


def query(got: Any) -> Tensor:
    return got["query"] if isinstance(got, Mapping) else got[-1]


@pytest.mark.parametrize("name", MODELS)
def test_the_encodings_are_an_output(captured: Any, zoo: Any, name: str) -> None:
    """MLP(mean over real tokens) of the stream in front of what is generated, of any task; padding
    does not count."""
    model, base, inputs = subject(captured, zoo, name)
    program = randomise(peftfx.run(base, SMALL), 0.2)
    held = own(program)
    stream: list[Tensor] = []
    last = {
        "encoder": "layers.1",
        "decoder": "layers.1",
        "t5": "encoder.final_layer_norm",
    }

    def keep(i: Any, o: Any) -> Any:
        stream.append(i[0])
        return o

    tasks = torch.tensor([2, 0, 1, 2])
    hooks = reference(model, program, name, tasks)
    if last[name] in hooks:
        first_hook = hooks[last[name]]
        hooks[last[name]] = lambda i, o: first_hook(i, keep(i, o))
    else:
        hooks[last[name]] = keep
    with hooked(model, hooks):
        model(**inputs)
    real = inputs["attention_mask"].float()
    mean = (stream[0] * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    want = (mean @ held["retriever.inner.weight"].T + held["retriever.inner.bias"]).clamp(min=0)
    want = want @ held["retriever.outer.weight"].T + held["retriever.outer.bias"]
    for task in (tasks, 2 - tasks):
        got = query(program(**inputs, task=task))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_trainable_count(captured: Any) -> None:
    _, base = captured["bert"]
    program = peftfx.run(base, "pha{tasks=5,bottleneck=6}")
    d, r, layers = 32, 6, 2
    trunk = layers // 2 * 64 + (128 * 128 + 128) + (128 * 64 + 64) + 2 * 64
    retriever = (d * 128 + 128) + (128 * 64 + 64)
    adapter = 2 * d * r + d + r
    count = 5 * 64 + trunk + 65 * adapter + retriever + layers // 2 * adapter
    assert sum(p.numel() for p in program.trainable_parameters()) == count


def test_the_losses_are_those_of_the_paper(captured: Any) -> None:
    """By loops over samples; the authors' code leaves the own prototype out of the sum."""
    _, base = captured["encoder"]
    task = torch.tensor([0, 1, 0, 2, 0])
    inputs = {**batch(5, 7), "task": task}
    for compat in (False, True):
        text = f"pha{{{OPTIONS},contrast=0.5,temperature=0.2,compat={str(compat).lower()}}}"
        program = peftfx.run(base, text)
        controllers = peftfx.controllers(program)
        outputs = program(**inputs)
        q = F.normalize(query(outputs).detach(), dim=-1)
        p = F.normalize(own(program)["prototypes.weight"], dim=-1)
        among: list[Tensor] = []
        for i in (0, 2, 4):  # the others are alone in their task
            every = sum((q[i] @ q[k] / 0.2).exp() for k in range(5) if k != i)
            same = [j for j in (0, 2, 4) if j != i]
            among.append(-sum(((q[i] @ q[j] / 0.2).exp() / every).log() for j in same) / len(same))  # pyright: ignore
        near: list[Tensor] = []
        for i, t in enumerate(task.tolist()):
            rivals = [s for s in range(3) if s != t or not compat]
            every = sum((q[i] @ p[s] / 0.2).exp() for s in rivals)
            near.append(-((q[i] @ p[t] / 0.2).exp() / every).log())  # pyright: ignore
        want = 0.5 * (torch.stack(among).mean() + torch.stack(near).mean())
        loss = controllers.loss(outputs, inputs, program)
        torch.testing.assert_close(loss.detach(), want)
        loss.backward()
        moving = {n for n, t in program.named_trainable_parameters().items() if t.grad is not None}
        assert {"peftfx.pha.prototypes.weight", "peftfx.pha.retriever.inner.weight"} <= moving
    with pytest.raises(PassError, match="Give one number a sample, or choose contrast=0"):
        controllers.loss(outputs, batch(5, 7), program)
    alone = peftfx.run(base, f"pha{{{OPTIONS},contrast=0}}")
    assert peftfx.controllers(alone).loss(alone(**batch()), batch(), alone) == 0


@pytest.mark.parametrize("name", MODELS)
def test_one_task_is_baked_exactly(captured: Any, zoo: Any, name: str, tmp_path: Path) -> None:
    """Nothing of the generator, the input and the output is left."""
    model, base, inputs = subject(captured, zoo, name)
    program = randomise(peftfx.run(base, SMALL), 0.2)
    samples = len(inputs["input_ids"])
    baked = peftfx.run(program, "bake{inputs={task=2}}")
    want = first(program(**inputs, task=torch.full((samples,), 2)))
    torch.testing.assert_close(first(baked(**inputs)), want, rtol=1e-5, atol=1e-5)
    assert baked.shared == () and baked.outputs_added == () and "task" not in baked.spec.names
    assert type(baked(**inputs)) is type(base(**inputs))
    leaves = {n.rpartition(".")[2] for n, _ in baked.module.named_parameters() if "peftfx" in n}
    assert leaves == {"down", "down_bias", "up", "up_bias"}
    peftfx.save(baked, tmp_path / "a")
    again = peftfx.load(model, tmp_path / "a")
    assert torch.equal(first(again(**inputs)), first(baked(**inputs)))
    assert type(again(**inputs)) is type(base(**inputs))


def test_baking_is_exact_in_double_precision(captured: Any) -> None:
    base = captured.double("decoder")
    program = randomise(peftfx.run(base, SMALL), 0.2)
    baked = peftfx.run(program, "bake{inputs={task=1}}")
    gap = first(program(**batch(), task=torch.tensor([1, 1, 1]))) - first(baked(**batch()))
    assert float(gap.detach().abs().max()) <= 1e-12


def test_tasks_are_learnt_and_a_new_one_finds_its_like(captured: Any) -> None:
    """Scanned digits: 0, is it at least five; 1, is it odd, of inverted images. New samples of
    each are found again by their encodings, and get the adapters of that task."""
    _, base = captured["encoder"]
    program = peftfx.run(base, "pha{tasks=2,bottleneck=8,dim=16,hidden=32,projected=16}").train()
    plain, number = digits(360)
    ids = torch.cat([plain["input_ids"][:150], 16 - plain["input_ids"][150:300]])
    task = torch.tensor([0, 1]).repeat_interleave(150)
    labels = torch.where(task == 0, number[:300] >= 5, number[:300] % 2 == 1).long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "task": task}
    steps = 60
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.AdamW(controllers.param_groups(lr=3e-3))
    controllers.start(optimizer, steps)
    torch.manual_seed(0)

    def loss(outputs: Any, rows: Any) -> Tensor:
        return F.cross_entropy(readout(first(outputs)), rows)

    for step in range(steps):
        outputs = program(**inputs)
        (loss(outputs, labels) + controllers.loss(outputs, inputs, program)).backward()
        controllers.before_step(step), optimizer.step()
        controllers.after_step(step), optimizer.zero_grad()
    assert controllers.finish().passes == ()
    program.eval()
    fresh = plain["input_ids"][300:]
    for wanted, new in enumerate((fresh, 16 - fresh)):
        data = [{"input_ids": new, "attention_mask": torch.ones_like(new)}]
        baked = peftfx.run(program, "bake", data=data)
        assert f"the data chose task={wanted}" in str(baked.history[-1])
        want = first(program(**data[0], task=torch.full((len(new),), wanted)))
        torch.testing.assert_close(first(baked(**data[0])), want, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        right, wrong = (
            float(loss(program(**{**inputs, "task": t}), labels)) for t in (task, 1 - task)
        )
    assert right < 0.6 < wrong - 0.05, (right, wrong)  # 0.69 is chance


def test_bad_options(captured: Any) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, SMALL)
    with pytest.raises(PassError, match=r"task 3 is not one of 0 to 2\. Choose one"):
        peftfx.run(program, "bake{inputs={task=3}}")
    with pytest.raises(PassError, match="has an input 'task' already"):
        peftfx.run(program, "pha{name=other}")
    for options in ("tasks=0", "temperature=0", "contrast=-1", "tasks=1,compat=true", "task=a b"):
        with pytest.raises(OptionError, match=r"pha.*Choose"):
            peftfx.parse(f"pha{{{options}}}")
