"""SMoP against its equations: the router's choice, its noise, and its balance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftfx
from peftfx.passes.additive.smop import Router, balance
from peftfx.rewriter.edits.stream.hidden import Axes
from peftfx.rewriter.errors import OptionError, PassError, VerifyError

from ..models import batch, first, moved, randomise
from .common import check, hooked

SMALL = "smop{prompts=6,length=3}"
DRAWS = True  # noise of the router


def own(program: peftfx.Program) -> tuple[Tensor, Tensor]:
    """(W, prompts)."""
    branch: Any = program.branch(program.attachments[0])
    router: Any = program.module.get_submodule(program.shared[0])
    return router.weight.detach(), branch.prompts.detach()


def test_smop_equals_its_reference(hand: Any) -> None:
    name, model, base = hand
    program = randomise(peftfx.run(base, SMALL), 0.3)
    weight, prompts = own(program)
    inputs = batch(6, 11, pad=3)
    mask, chosen = inputs["attention_mask"].bool(), list[int]()

    def put(_: Any, e: Tensor) -> Tensor:
        real = [row[m] for row, m in zip(e[:, 3:], mask, strict=True)]
        x = torch.stack([r[0] if name == "decoder" else r.mean(0) for r in real])
        p = (x @ weight.T).softmax(-1)
        chosen.extend(p.argmax(-1).tolist())
        rows = torch.stack([p[b, i] * prompts[i] for b, i in enumerate(chosen)])
        return torch.cat([rows, e[:, 3:]], 1)

    longer = {n: torch.cat([torch.ones(6, 3, dtype=t.dtype), t], 1) for n, t in inputs.items()}
    with hooked(model, {"words" if name == "encoder" else "embed": put}):
        want = first(model(**longer))[:, 3:]
    assert len(set(chosen)) > 1  # or a wrong choice would not show
    check(program, base, want, inputs)
    first(program(**inputs)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in program.trainable_parameters())


def test_trainable_count_and_start(captured: Any) -> None:
    """N l d of the prompts and N d of the router, which starts orthogonal."""
    _, base = captured["bert"]
    program = peftfx.run(base, SMALL)
    assert sum(p.numel() for p in program.trainable_parameters()) == 6 * 3 * 32 + 6 * 32
    weight, prompts = own(program)
    torch.testing.assert_close(weight @ weight.T, torch.eye(6), rtol=0, atol=1e-5)
    (table,) = (p for n, p in base.module.named_parameters() if "word_embeddings" in n)
    distances = (prompts.view(-1, 1, 32) - table[None]).abs().amax(-1)
    assert float(distances.amin(-1).max().detach()) == 0.0  # rows of the table


@pytest.mark.parametrize("noise", ["normal", "dropout", None])
def test_noise_is_for_training(noise: str | None) -> None:
    router = Router(torch.randn(4, 8), Axes(0, (1,)), "all", noise)
    seen = torch.randn(3, 5, 8)
    scores = seen.mean(1) @ router.weight.T
    for training in (False, True):
        router.train(training)
        torch.manual_seed(1)
        got = router(seen)
        torch.manual_seed(1)
        noisy = scores
        if training and noise == "normal":
            noisy = scores * (1 + torch.randn(3, 4))
        elif training and noise == "dropout":
            noisy = F.dropout(scores, 0.2)
        p = noisy.softmax(-1)
        want = torch.zeros_like(p).scatter(1, p.argmax(1)[:, None], p.amax(1)[:, None])
        torch.testing.assert_close(got, want)


def test_the_balance_in_closed_form() -> None:
    """1 where all prompts get their share, N where one gets all."""
    assert float(balance(torch.eye(4))) == pytest.approx(1.0)
    assert float(balance(torch.eye(4)[:1].expand(5, -1))) == pytest.approx(4.0)
    p = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    assert float(balance(p)) == pytest.approx(2 * (2 / 3 * 0.5 + 1 / 3 * 0.5))


def test_the_balance_is_that_of_the_last_forward(captured: Any) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, f"{SMALL[:-1]},balance=0.5,noise=none}}").train()
    controllers = peftfx.controllers(program)
    with pytest.raises(PassError, match="none was seen"):
        controllers.loss(None)
    controllers.start(torch.optim.SGD(program.trainable_parameters(), lr=0.1), 2)
    inputs = batch(6, 11, pad=3)
    program(**inputs)
    controllers.begin_forward(inputs)
    outputs = program(**inputs)
    loss = controllers.loss(outputs, inputs)
    weight, _ = own(program)
    (table,) = (p for n, p in base.module.named_parameters() if n == "words.weight")
    mask = inputs["attention_mask"][..., None]
    x = (table[inputs["input_ids"]] * mask).sum(1) / mask.sum(1)
    want = 0.5 * float(balance((x @ weight.T).softmax(-1)).detach())
    assert float(loss.detach()) == pytest.approx(want, rel=1e-5)
    loss.backward()
    router: Any = program.module.get_submodule(program.shared[0])
    assert router.weight.grad.any()
    off = peftfx.controllers(peftfx.run(base, SMALL))
    assert off.loss(None) == 0.0


def test_it_stays_causal(captured: Any) -> None:
    base = captured["decoder"][1]
    program = randomise(peftfx.run(base, SMALL), 0.3)
    inputs = batch(3, 9)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, -1] = (changed["input_ids"][:, -1] + 1) % 64
    before, after = first(program(**inputs)), first(program(**changed))
    assert torch.equal(before[:, :-1], after[:, :-1]) and not torch.equal(before, after)


def test_what_comes_behind_a_read_prompt(captured: Any) -> None:
    """Later passes find padding and tokens as they are behind the prompt."""
    base = captured["encoder"][1]
    one = peftfx.run(base, f"{SMALL};unipelt")
    other = peftfx.run(base, "prompt_tuning{length=3};unipelt")
    gates = [n for n in one.shared if n.endswith("gate")]
    assert gates == [n for n in other.shared if n.endswith("gate")]
    for name in gates:
        call = next(m for m in one.module.graph.nodes if m.target == name)
        sizes = [str(v.meta["val"].shape[1]) for v in call.all_input_nodes]
        assert len(set(sizes)) == 1, call.format_node()


def test_a_router_over_later_tokens_is_found(
    captured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where attention is causal, the mean over all tokens tells each of later ones."""

    def everywhere(self: Router, seen: Tensor, valid: Tensor | None = None) -> Tensor:
        self.reach = "all"
        return forward(self, seen, valid)

    forward = Router.forward
    monkeypatch.setattr(Router, "forward", everywhere)
    with pytest.raises(VerifyError, match="departures"):
        peftfx.run(captured["decoder"][1], SMALL)


def test_a_prompt_in_the_encoder_of_two(zoo: Any) -> None:
    program = peftfx.run(zoo["t5"], SMALL)
    assert len(program.history[-1].edited) == 1
    inputs = {**batch(3, 7), "decoder_input_ids": batch(3, 9)["input_ids"] % 60}
    assert moved(first(zoo["t5"](**inputs)), first(program(**inputs))) > 1e-3


def test_bad_options() -> None:
    for options in ("prompts=0", "length=0", "balance=-1", "noise=uniform", "common=0"):
        with pytest.raises(OptionError, match="smop"):
            peftfx.parse(f"smop{{{options}}}")
