"""Capture: bit-equal in both modes, the user's model untouched, clear errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import CaptureError, InputError

from .models import Convolutional, Decoder, batch, build, first

NAMES = ("encoder", "decoder", "fused", "bert", "llama")


def inputs_for(program: peftfx.Program, *size: int, **options: int) -> dict[str, Tensor]:
    made = batch(*size, **options)
    return {n: t for n, t in made.items() if n in program.spec.names}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(3, 9), (5, 14), (1, 7), (2, 1)])
def test_outputs_are_bit_equal(captured: Any, name: str, size: tuple[int, int]) -> None:
    model, program = captured[name]
    inputs = inputs_for(program, *size)
    want, got = model(**inputs), program(**inputs)
    assert torch.equal(first(want), first(got))
    assert type(want) is type(got)


@pytest.mark.parametrize("name", ["encoder", "bert", "llama"])
def test_training_is_bit_equal_with_gradients(name: str) -> None:
    model = build(name).train()
    program = peftfx.capture(model, kwargs=batch())
    inputs = batch(4, 11, pad=3)
    torch.manual_seed(5)
    want = first(model(**inputs))
    want.pow(2).mean().backward()
    torch.manual_seed(5)
    got = first(program(**inputs))
    got.pow(2).mean().backward()
    assert torch.equal(want, got)
    ours = dict(program.module.named_parameters())
    checked = 0
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[parameter_name].grad, parameter.grad)
            checked += 1
    assert checked > 10
    assert program.training and program.module.training


def test_train_and_eval_switch(captured: Any) -> None:
    program = captured["encoder"][1].fork()
    inputs = batch()
    program.train()
    assert not torch.equal(program(**inputs)[0], program(**inputs)[0])
    program.eval()
    assert torch.equal(program(**inputs)[0], program(**inputs)[0])


def test_batch_norm_follows_the_mode() -> None:
    torch.manual_seed(0)
    model = Convolutional()
    program = peftfx.capture(model, (torch.randn(4, 3, 8, 8),))
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(model(x), program(x))
    for name in ("norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(model.get_buffer(name), program.module.get_buffer(name))
    model.eval(), program.eval()
    assert torch.equal(model(x), program(x))


def test_names_and_ties_are_kept() -> None:
    model = build("tied")
    program = peftfx.capture(model, kwargs=batch())
    names = {n for n, _ in model.named_parameters()}
    assert {n for n, _ in program.module.named_parameters()} == names
    assert program.aliases == {"head.weight": "embed.weight"}
    state = program.export_state_dict()
    assert set(state) == set(model.state_dict())
    Decoder(tied=True).load_state_dict(state, strict=True)


def test_the_model_is_untouched() -> None:
    model = build("llama")
    model.config.use_cache = True
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {n: (t.clone(), t.requires_grad, t.dtype) for n, t in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    config = model.config.to_dict()
    program = peftfx.run(peftfx.capture(model, kwargs=batch()), "lora;bitfit")
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=0.1, weight_decay=0.1)
    first(program(**batch())).pow(2).mean().backward()
    optimizer.step()
    assert model.config.to_dict() == config
    assert [m.training for m in model.modules()] == modes
    assert "forward" not in model.__dict__
    for name, parameter in model.named_parameters():
        value, grad, dtype = before[name]
        assert torch.equal(parameter, value) and parameter.grad is None
        assert (parameter.requires_grad, parameter.dtype) == (grad, dtype)


def test_training_a_program_leaves_model_and_earlier_programs_alone() -> None:
    model = build("encoder")
    program = peftfx.capture(model, kwargs=batch())
    later = peftfx.run(program, "bitfit")
    kept = {n: p.detach().clone() for n, p in program.module.named_parameters()}
    for some in (program, later):
        optimizer = torch.optim.SGD(some.trainable_parameters(), lr=0.5)
        first(some(**batch())).pow(2).mean().backward()
        if some is later:
            optimizer.step()
    assert all(torch.equal(p, kept[n]) for n, p in program.module.named_parameters())
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())


def test_positional_and_keyword_inputs(captured: Any) -> None:
    _, program = captured["encoder"]
    inputs = batch()
    a = program(inputs["input_ids"], inputs["attention_mask"])[0]
    b = program(inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
    assert torch.equal(a, b)
    model = build("encoder")
    positional = peftfx.capture(model, tuple(inputs.values()))
    assert torch.equal(positional(**inputs)[0], a)


def test_deepcopy_and_compile(captured: Any) -> None:
    model, program = captured["llama"]
    inputs = batch()
    assert torch.equal(first(copy.deepcopy(program.module)(**inputs)), first(model(**inputs)))
    compiled = torch.compile(program.module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(first(compiled(**inputs)), first(model(**inputs)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_type_ids": torch.zeros(3, 9, dtype=torch.long)}, "peftfx.capture"),
        ({"input_ids": None}, "missing"),
        ({"attention_mask": torch.ones(3, 9)}, "must be i64"),
        ({"attention_mask": torch.ones(2, 9, dtype=torch.long)}, "batch"),
        ({"input_ids": torch.ones(3, 65, dtype=torch.long)}, "range 1..64"),
    ],
)
def test_wrong_inputs_are_named(captured: Any, change: dict[str, Any], message: str) -> None:
    _, program = captured["bert"]
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        program(**{**batch(), **change})


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (Branching(), (torch.ones(3, 4),), "torch.where"),
        (nn.Linear(4, 4), (), "at least one example"),
        (nn.Linear(4, 4), ([1, 2],), "at least one example"),
        (nn.Linear(4, 4), (torch.ones(3, 5),), "cannot be captured"),
    ],
)
def test_what_cannot_be_captured_says_why(model: nn.Module, args: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        peftfx.capture(model, args)


def test_static_and_named_sizes() -> None:
    model = build("encoder")
    fixed = peftfx.capture(model, kwargs=batch(), dynamic=None)
    with pytest.raises(InputError, match="fixed size 3"):
        fixed(**batch(4, 9))
    one = peftfx.capture(model, kwargs=batch(1, 9))
    assert torch.equal(one(**batch(4, 6))[0], model(**batch(4, 6))[0])


class Two(nn.Module):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return 2 * input_ids - labels


def test_one_tensor_given_twice_is_two_inputs() -> None:
    """As in `capture(model, kwargs={"input_ids": ids, "labels": ids})`."""
    ids = torch.arange(12.0).view(3, 4)
    program = peftfx.capture(Two(), kwargs={"input_ids": ids, "labels": ids})
    assert torch.equal(program(ids, ids + 1), ids - 1)
