"""Several prompts on one program: each stands in front of those that are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import PassError

from ..models import Encoder, batch, first, moved, randomise
from .common import check, hooked

TWO = "prompt_tuning{name=a,length=3};prompt_tuning{name=b,length=2}"
EMBEDDING = {"encoder": "words", "decoder": "embed"}


def prompts(program: peftfx.Program) -> dict[str, Tensor]:
    """What each adapter's branch gives of itself, by its name."""
    found: dict[str, Tensor] = {}
    for attachment in program.attachments:
        branch: Any = program.branch(attachment)
        if attachment.slot == "tokens":
            found[attachment.adapter] = branch.rows().detach()
    return found


def behind(
    model: nn.Module, name: str, rows: Callable[[Tensor], Tensor], length: int, inputs: Any
) -> Tensor:
    """The model's hidden states or logits for `[rows(e); e]`, without the rows' own."""
    longer = {n: torch.cat([torch.ones(len(t), length, dtype=t.dtype), t], 1)
              for n, t in inputs.items()}  # fmt: skip

    def put(_: Any, e: Tensor) -> Tensor:
        return torch.cat([rows(e[:, length:]), e[:, length:]], 1)

    with hooked(model, {EMBEDDING[name]: put}):
        return first(model(**longer))[:, length:]


def test_two_prompts_equal_their_reference(hand: Any) -> None:
    """X <- [P_b; P_a; E(x)], positions from 0, padding behind, and a pooler's first token."""
    name, model, base = hand
    program = randomise(peftfx.run(base, TWO), 0.5)
    own = prompts(program)
    rows = torch.cat([own["b"], own["a"]])
    inputs = batch(4, 11, pad=3)
    want = behind(model, name, lambda e: rows.expand(len(e), -1, -1), 5, inputs)
    check(program, base, want, inputs)
    if name == "encoder":
        hidden, pooled = program(**inputs)
        torch.testing.assert_close(pooled, torch.tanh(model.pooler(hidden[:, 0])))
    turned = randomise(peftfx.run(base, ";".join(reversed(TWO.split(";")))), 0.5)
    assert moved(first(turned(**inputs)), first(program(**inputs))) > 1e-3  # their order matters
    shorter = peftfx.run(base, "prompt_tuning{length=5}").spec
    assert str(program.spec) == str(shorter)


def test_of_three_each_can_be_left_out(captured: Any) -> None:
    name = "decoder"
    model, base = captured[name]
    program = randomise(peftfx.run(base, f"{TWO};p_tuning{{name=c,length=1}}"), 0.4)
    inputs, own = batch(3, 7, pad=2), prompts(program)
    for out in own:
        left = program.without(out)
        rest = {n: rows for n, rows in own.items() if n != out}
        assert prompts(left).keys() == rest.keys()
        rows = torch.cat(list(reversed(rest.values())))
        want = behind(model, name, lambda e, r=rows: r.expand(len(e), -1, -1), len(rows), inputs)
        torch.testing.assert_close(first(left(**inputs)), first(want), rtol=1e-5, atol=1e-5)
    none = program.without("a").without("b").without("c")
    assert torch.equal(first(none(**inputs)), first(base(**inputs)))
    assert str(none.spec) == str(base.spec)


@pytest.mark.parametrize(("name", "turned"), [("encoder", False), ("decoder", True)])
def test_a_router_sees_the_users_tokens_alone(captured: Any, name: str, turned: bool) -> None:
    model, base = captured[name]
    steps = ["smop{prompts=6,length=2}", "prompt_tuning{length=3}"]
    program = randomise(peftfx.run(base, ";".join(reversed(steps) if turned else steps)), 0.3)
    (routed,) = program.attached_by("smop")
    several: Any = program.branch(routed)
    router: Any = program.module.get_submodule(program.shared[0])
    fixed = prompts(program.without("smop"))["prompt_tuning"]
    inputs = batch(6, 11, pad=3)
    mask = inputs["attention_mask"].bool()
    routes: set[int] = set()

    def rows(e: Tensor) -> Tensor:
        real = [row[m] for row, m in zip(e, mask, strict=True)]
        x = torch.stack([r[0] if name == "decoder" else r.mean(0) for r in real])
        share, route = (x @ router.weight.detach().T).softmax(-1).max(-1)
        routes.update(route.tolist())
        own = several.prompts.detach()[route] * share[:, None, None]
        parts = [fixed.expand(len(e), -1, -1), own]
        return torch.cat(parts[::-1] if turned else parts, 1)

    want = behind(model, name, rows, 5, inputs)
    assert len(routes) > 1
    check(program, base, want, inputs)


def test_beside_a_prefix_and_baked(captured: Any) -> None:
    base = captured["encoder"][1]
    text = "p_tuning{length=2};prompt_tuning{length=3};prefix_tuning{length=2}"
    program = randomise(peftfx.run(base, text), 0.3)
    inputs = batch(3, 7, pad=2)
    baked = peftfx.run(program, "bake{names=[p_tuning]}")
    assert moved(first(baked(**inputs)), first(program(**inputs))) < 1e-6
    for order in (["prefix_tuning", "p_tuning", "prompt_tuning"],
                  ["p_tuning", "prefix_tuning", "prompt_tuning"]):  # fmt: skip
        steps = {t.partition("{")[0]: t for t in text.split(";")}
        other = peftfx.run(base, ";".join(steps[n] for n in order))
        values = dict(program.named_trainable_parameters())
        with torch.no_grad():
            for n, p in other.named_trainable_parameters().items():
                p.copy_(values[n])
        torch.testing.assert_close(first(other(**inputs)), first(program(**inputs)))


class Positioned(nn.Module):
    """Takes positions, labels and types of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Encoder()
        self.types = nn.Embedding(2, 32)

    def forward(self, ids: Tensor, mask: Tensor, places: Tensor, labels: Tensor) -> Any:
        e = self.inner
        x = e.norm(e.words(ids) + e.places(places))
        for layer in e.layers:
            x = layer(x, mask.bool()[:, None, None, :])
        loss = nn.functional.cross_entropy(x.transpose(1, 2), labels)
        return loss, x, x.argmax(-1)


def test_positions_and_labels_are_padded_once_for_all(captured: Any) -> None:
    torch.manual_seed(0)
    model = Positioned().eval()
    given = batch(2, 8)
    inputs = {
        "ids": given["input_ids"], "mask": given["attention_mask"],
        "places": torch.arange(8).flip(0).repeat(2, 1), "labels": given["input_ids"] % 30,
    }  # fmt: skip
    base = peftfx.capture(model, kwargs=inputs)
    program = randomise(peftfx.run(base, TWO), 0.5)
    own = prompts(program)
    rows = torch.cat([own["b"], own["a"]])

    def longer(name: str, front: Any) -> Tensor:
        return torch.cat([torch.as_tensor(front).expand(2, 5), inputs[name]], 1)

    put = {"inner.words": lambda _, e: torch.cat([rows.expand(2, -1, -1), e[:, 5:]], 1)}
    with hooked(model, put):
        loss, x, best = model(
            longer("ids", 0), longer("mask", 1),
            torch.cat([torch.arange(5).expand(2, 5), inputs["places"] + 5], 1),
            longer("labels", -100),
        )  # fmt: skip
    got = program(**inputs)
    for one, other in zip(got, (loss, x[:, 5:], best[:, 5:]), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(PassError, match=r"leaves no position for the input.*Make it shorter"):
        peftfx.run(
            captured["encoder"][1], "prompt_tuning{length=30};prompt_tuning{length=12,name=b}"
        )


def test_saved_each_and_both(captured: Any, tmp_path: Path) -> None:
    model, base = captured["encoder"]
    program = randomise(peftfx.run(base, TWO), 0.4)
    inputs = batch(4, 9, pad=2)
    want = first(program(**inputs))
    peftfx.save(program, tmp_path / "both")
    assert torch.equal(first(peftfx.load(model, tmp_path / "both")(**inputs)), want)
    alone = {n: program.without(other) for n, other in (("a", "b"), ("b", "a"))}
    for name, one in alone.items():
        peftfx.save(one, tmp_path / name)
        got = first(peftfx.load(base, tmp_path / name)(**inputs))
        assert torch.equal(got, first(one(**inputs)))
    again = peftfx.load(peftfx.load(base, tmp_path / "a"), tmp_path / "b")
    assert torch.equal(first(again(**inputs)), want)
    peftfx.save_program(program, tmp_path / "program")
    torch.testing.assert_close(first(peftfx.load_program(tmp_path / "program")(**inputs)), want)
    tiny = randomise(peftfx.run(captured["tiny"][1], TWO), 0.4)
    assert peftfx.export_onnx(tiny, tmp_path / "two.onnx").error < 1e-5


def test_a_bank_of_two_behind_a_third(captured: Any, tmp_path: Path) -> None:
    """Saved together or apart, rows choose one; a prompt that is no member stands in all."""
    model, base = captured["decoder"]
    equal = TWO.replace("length=2", "length=3")
    program = randomise(peftfx.run(base, equal), 0.4)
    peftfx.save(program, tmp_path / "both")
    inputs = batch(4, 9, pad=2)
    third = randomise(peftfx.run(base, "prompt_tuning{name=c,length=2}"), 0.4)
    bank = peftfx.run(third, "bank{others=keep}", sources=[tmp_path / "both"])
    own, ids = {**prompts(program), **prompts(third)}, torch.tensor([0, 1, 1, 0])
    chosen = torch.stack([own["a"], own["b"]])[ids]
    rows = torch.cat([chosen, own["c"].expand(4, -1, -1)], 1)
    want = behind(model, "decoder", lambda _: rows, 5, inputs)
    torch.testing.assert_close(first(bank(**inputs, adapter=ids)), want, rtol=1e-5, atol=1e-5)


def test_tokens_first_prompts_stand_side_by_side() -> None:
    """`[tokens, batch]` gives what `[batch, tokens]` gives."""

    class Turned(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            e: Any = self.inner
            x = e.norm(e.words(ids).mT.mT)
            x = x.transpose(0, 1)
            for layer in e.layers:
                x = layer(x, mask.mT.bool()[:, None, None, :])
            return x.transpose(0, 1)

    torch.manual_seed(0)
    model = Turned(Encoder()).eval()
    given: Mapping[str, Tensor] = batch(3, 8, pad=2)
    ids, mask = (given[n].mT.contiguous() for n in ("input_ids", "attention_mask"))
    program = randomise(peftfx.run(peftfx.capture(model, (ids, mask)), TWO), 0.5)
    own = prompts(program)
    rows = torch.cat([own["b"], own["a"]])[:, None].expand(-1, 3, -1)
    put = {"inner.words": lambda _, e: torch.cat([rows, e[5:]])}
    with hooked(model, put):
        front = torch.ones(5, 3, dtype=torch.long)
        want = model(torch.cat([front, ids]), torch.cat([front, mask]))[5:]
    torch.testing.assert_close(program(ids, mask), want)
