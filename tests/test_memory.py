"""What training keeps: the prediction against hooks on a real forward, autograd's own graph and
real optimizers; and that nothing is kept where nothing trains."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

import peftfx
from peftfx.cli import main
from peftfx.demo.encoder import load_model
from peftfx.kernels.lora_linear import Form
from peftfx.kernels.low_rank_forms import FORMS
from peftfx.rewriter.errors import InputError, OptionError
from peftfx.rewriter.graph.aten import LINEAR
from peftfx.rewriter.training.memory import STATES

from . import models
from .models import batch, first
from .recipes import METHODS

TOKENS, FLOAT = 3 * 9, 4


class Counted:
    """Distinct storages that hooks see; keeps them, so that no address is seen twice."""

    def __init__(self, program: peftfx.Program, inputs: Mapping[str, Tensor]) -> None:
        module = program.module
        self.known = {
            t.untyped_storage().data_ptr()
            for t in (*module.parameters(), *module.buffers(), *inputs.values())
        }
        self.kept: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self.known:
            self.kept[address] = tensor
        return tensor

    @property
    def total(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.kept.values())

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda t: t)


def measured(program: peftfx.Program, inputs: Mapping[str, Tensor]) -> int:
    bound = program.spec.bind((), inputs)
    counted = Counted(program, bound)
    with counted.hooks():
        program.module(**bound)
    return counted.total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("base_name", "training"), [("encoder", True), ("decoder", False)])
def test_prediction_is_what_hooks_count(
    captured: Any, method: str, base_name: str, training: bool
) -> None:
    program = captured.placed(base_name, method).train(training)
    found = program.memory(3, 9)
    seen = measured(program, batch(3, 9, pad=4))  # and what is dropped with values nobody reads
    assert 0.99 * seen < found.saved <= seen
    assert found.saved == sum(s.saved for s in found.by_site.values())
    trained = sum(p.nbytes for p in program.trainable_parameters())
    stored = {t.data_ptr(): t.nbytes for t in (*program.module.parameters(),
                                               *program.module.buffers())}  # fmt: skip
    assert found.gradients == trained and found.optimizer == 2 * trained
    assert found.parameters == sum(stored.values())
    assert {m for m, s in found.by_method.items() if s.gradients} == {program.adapters[-1]}


@pytest.mark.parametrize("text", ["lora;lower", "lora;ia3;serial_adapter", "dora{dropout=0.1}"])
def test_other_sizes_fused_operators_and_stacks(captured: Any, text: str) -> None:
    _, base = captured["llama"]
    program = peftfx.run(base, text).train()
    for rows, tokens in ((2, 5), (5, 17)):
        assert program.memory(rows, tokens).saved == measured(program, batch(rows, tokens))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_a_lowered_product(captured: Any, form: Form, monkeypatch: Any) -> None:
    monkeypatch.setattr("peftfx.passes.lowering.lower.chosen", lambda *_: (form, "as asked"))
    program = peftfx.run(captured["llama"][1], "lora{where=q};lower").train()
    assert program.memory(2, 5).saved == measured(program, batch(2, 5))


def kept_by_autograd(output: Tensor) -> Iterator[Tensor]:
    """Every tensor that the graph behind an output names; numbers are no tensors."""
    stack, seen = [output.grad_fn], set[Any]()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        held = [getattr(node, n) for n in dir(node) if n.startswith("_saved_")]
        held += getattr(node, "saved_tensors", ())
        yield from (t for t in pytree.tree_leaves(held) if isinstance(t, Tensor) and t.dim())
        stack.extend(n for n, _ in node.next_functions)


@pytest.mark.parametrize("text", ["lora{where=linear}", "dora", "lora;lower", "prefix_tuning"])
def test_prediction_is_what_the_graph_of_autograd_holds(captured: Any, text: str) -> None:
    _, base = captured["decoder"]
    program = peftfx.run(base, text)
    inputs = program.spec.bind((), batch())
    counted = Counted(program, inputs)
    for tensor in kept_by_autograd(first(program.module(**inputs))):
        counted.add(tensor)
    assert counted.total == program.memory(3, 9).saved


def test_minilm() -> None:
    base = peftfx.capture(load_model(), kwargs=batch(2, 16))
    for text in ("lora", "dora"):
        program = peftfx.run(base, text).train()
        assert program.memory(8, 64).saved == measured(program, batch(8, 64, pad=20))


OPTIMIZERS: dict[str, Any] = {
    "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam, "radam": torch.optim.RAdam, "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD,
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(STATES) - {"none"}))
def test_states_are_those_of_torchs_optimizers(captured: Any, name: str) -> None:
    program = peftfx.run(captured["encoder"][1], "lora")
    optimizer = OPTIMIZERS[name](program.trainable_parameters())
    first(program(**batch())).sum().backward()
    optimizer.step()
    states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    found = program.memory(3, 9, optimizer=name)
    assert found.optimizer == sum(t.nbytes for t in states if t.dim())  # counters of steps aside
    assert found.gradients == sum(p.grad.nbytes for p in program.trainable_parameters())  # pyright: ignore
    assert found.total == found.parameters + found.gradients + found.optimizer + found.saved


class ByNode(Interpreter):
    """A real run that notes how much each node saves."""

    def __init__(self, program: peftfx.Program, inputs: Mapping[str, Tensor]) -> None:
        super().__init__(program.module)
        self.counted = Counted(program, inputs)
        self.bytes: dict[Node, int] = {}

    def run_node(self, n: Node) -> Any:
        before = self.counted.total
        with self.counted.hooks():
            result = super().run_node(n)
        self.bytes[n] = self.counted.total - before
        return result


def by_node(program: peftfx.Program) -> dict[Node, int]:
    inputs = program.spec.bind((), batch())
    run = ByNode(program, inputs)
    run.run(*inputs.values())
    assert sum(run.bytes.values()) == program.memory(3, 9).saved > 0
    return run.bytes


@pytest.mark.parametrize("text", ["lora", "serial_adapter{norms=false}", "ia3", "dora"])
def test_nothing_is_kept_below_what_trains(text: str) -> None:
    torch.manual_seed(0)
    base = peftfx.capture(models.Encoder(layers=4), kwargs=batch())
    kind = peftfx.parse(text).passes[0]
    where = " and ".join((f"({kind.where})", "layer>=2"))  # pyright: ignore
    program = peftfx.run(base, [replace(kind, where=where)]).train()  # pyright: ignore
    inserted = next(n for n in program.module.graph.nodes if str(n.target).startswith("peftfx."))
    saved = by_node(program)
    order = list(saved)
    below = order[: order.index(inserted)]
    assert len(below) > 30 and not any(saved[n] for n in below)
    found = program.memory(3, 9)
    assert not any(found.by_layer[layer].saved for layer in (0, 1))
    assert found.by_layer[2].saved and found.by_layer[3].saved
    assert not any(found.by_role[role].saved for role in ("token", "position"))


@pytest.mark.parametrize("text", ["bitfit", "lora", "ia3", "prefix_tuning"])
def test_frozen_linears_keep_no_inputs(captured: Any, text: str) -> None:
    saved = by_node(peftfx.run(captured["encoder"][1], text))
    linears = [n for n in saved if n.target is LINEAR]
    assert len(linears) == 13 and not any(saved[n] for n in linears)


def test_branches_keep_what_their_formulas_need(captured: Any) -> None:
    """In bytes: the input of a layer's three projections is kept once, rank columns apart."""
    base = captured["encoder"][1]
    wide, rank, row = TOKENS * 32 * FLOAT, TOKENS * 2 * FLOAT, 32 * FLOAT

    def saved(text: str) -> dict[str, int]:
        found = peftfx.run(base, text).memory(3, 9).shares
        shares = {p.role: s.saved for p, s in found.items() if p.layer == 1 and p.method != "base"}
        return {role: size for role, size in shares.items() if size}

    assert saved("lora{rank=2}") == {"q": wide + rank, "v": rank}
    assert saved("ia3") == {"k": wide, "v": wide, "ffn.down": 2 * wide}
    dora = saved("dora{rank=2,where=q|k|v}")
    assert all(dora[role] < wide + rank + 6 * row for role in ("k", "v"))  # y and the norms
    assert dora["q"] < 2 * wide + rank + 6 * row
    adapter = saved("serial_adapter{bottleneck=4,norms=false}")
    inner = TOKENS * 4 * FLOAT
    assert adapter == {"attn": wide + 2 * inner, "ffn": wide + 2 * inner}


def test_without_storage_and_with_other_inputs(captured: Any, zoo: Any) -> None:
    model, base = captured["llama"]
    with torch.device("meta"):
        hollow = type(model)(model.config)
    text = "lora{where=linear};prefix_tuning"
    program = peftfx.run(peftfx.capture(hollow, kwargs=batch()), text).train()
    assert program.memory(3, 9) == peftfx.run(base, text).train().memory(3, 9)
    assert program.module.device.type == "meta"

    both = peftfx.run(zoo["t5"], "lora")
    decoder = batch(3, 5)["input_ids"] % 60
    inputs = {**{n: t % 60 for n, t in batch(3, 9).items()}, "decoder_input_ids": decoder}
    assert both.memory(3, 9, sequence_2=5).saved == measured(both, inputs)
    assert both.memory(3, 9).saved > both.memory(3, 9, sequence_2=5).saved

    image = peftfx.capture(models.Convolutional(), kwargs={"x": torch.randn(2, 3, 8, 8)})
    image = peftfx.run(image, "bitfit{where=conv|linear}").train()
    state = {n: b.clone() for n, b in image.module.named_buffers()}
    sizes: Any = {n: s for n, s in (("sequence", 8), ("sequence_2", 8)) if n in image.spec.sizes}
    assert image.memory(4, **sizes).saved > 0
    assert all(torch.equal(b, state[n]) for n, b in image.module.named_buffers())
    assert image.memory(4, **sizes).saved == measured(image, {"x": torch.randn(4, 3, 8, 8)})


def test_it_leaves_no_trace_and_sees_autocast(captured: Any) -> None:
    program = peftfx.run(captured["encoder"][1], "lora{dropout=0.1}").train()
    text, state = program.text(), torch.get_rng_state()
    held = {n: (id(p), p.requires_grad) for n, p in program.module.named_parameters()}
    plain = program.memory(3, 9)
    assert torch.equal(torch.get_rng_state(), state) and program.text() == text
    assert {n: (id(p), p.requires_grad) for n, p in program.module.named_parameters()} == held
    assert all(p.grad is None for p in program.trainable_parameters())
    assert "training mode" in str(plain) and "lora" in str(plain)
    assert program.eval().memory(3, 9).saved < plain.saved
    with torch.autocast("cpu", torch.bfloat16):
        assert program.memory(3, 9).saved == measured(program, batch()) != plain.saved


def test_bad_input(captured: Any) -> None:
    program = peftfx.run(captured["encoder"][1], "lora")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch": 3}, "'sequence' is not given.*batch, sequence"),
        ({"batch": 3, "seq": 41}, "41 is outside the model's range"),
        ({"batch": 0, "seq": 9}, "batch must be a positive integer, not 0"),
        ({"batch": 2.0, "seq": 9}, "batch must be a positive integer"),
        ({"batch": 3, "seq": 9, "pixels": 4}, "no dynamic size 'pixels'.*batch, sequence"),
    ]
    for sizes, message in cases:
        with pytest.raises(InputError, match=message):
            program.memory(**sizes)
    with pytest.raises(OptionError, match=r"no optimizer 'adamm'\. Nearest: adam"):
        program.memory(3, 9, optimizer="adamm")


def example() -> tuple[nn.Module, dict[str, Tensor]]:
    """For the command line."""
    return models.build("encoder"), batch()


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    where = f"{__name__}:example"
    assert main(["memory", where, "lora", "--batch", "3", "--seq", "9"]) == 0
    shown = capsys.readouterr().out
    assert "batch 3, sequence 9; adamw; training mode" in shown and "lora" in shown
    assert main(["memory", where, "lora", "--batch", "3", "--seq", "9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["saved"] == sum(share["saved"] for share in found["by_site"].values())
    assert main(["memory", where, "lora", "--batch", "3"]) == 2
    assert "'sequence' is not given" in capsys.readouterr().err
