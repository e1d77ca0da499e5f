"""AdaLoRA against its equations and Hugging Face PEFT."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.passes.reparameterized.adalora import AdaLoRABranch, RankController
from peftfx.rewriter.errors import OptionError, PassError

from ..models import batch, bert, first, llama, moved, randomise
from .common import Tensors, check, copied, hooked, tensors

TEXT = "adalora{rank=4,target=2,alpha=6,where=q|v}"


def reference(
    model: nn.Module, tensors: Tensors, inputs: Mapping[str, Tensor], scale: float
) -> Any:
    """y = W x + b + c P diag(e) Q x."""

    def hook(t: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        return lambda i, o: o + scale * i[0] @ (t["p"] @ torch.diag(t["e"]) @ t["q"]).T

    with hooked(model, {n: hook(t) for n, t in tensors.items()}):
        return model(**inputs)


def controller(program: peftfx.Program, steps: int = 100) -> RankController:
    """The controller of the only adapter, started for `steps` steps."""
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.AdamW(controllers.param_groups(1e-2))
    controllers.start(optimizer, steps)
    (found,) = controllers.each.values()
    assert isinstance(found, RankController)
    return found


def train(
    program: peftfx.Program, controllers: Any, optimizer: Any, steps: range, parts: int = 1
) -> None:
    """The loop of the controllers' documentation; each step's batch in `parts` of gradients."""
    for step in steps:
        for rows in range(parts):
            size = 4 // parts
            inputs = {n: t[rows * size : (rows + 1) * size] for n, t in batch(4, 9, step).items()}
            controllers.begin_forward(inputs)
            outputs = program(**inputs)
            loss = first(outputs).pow(2).mean() + controllers.loss(outputs, inputs, program)
            (loss / parts).backward()
        controllers.before_step(step)
        optimizer.step()
        controllers.after_step(step)
        optimizer.zero_grad()


def set_up(
    base: peftfx.Program, text: str, steps: int, parts: int = 1
) -> tuple[peftfx.Program, Any, Any]:
    program = peftfx.run(base, text).train()
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.AdamW(controllers.param_groups(lr=0.02, weight_decay=0.01))
    controllers.start(optimizer, steps)
    return program, controllers, optimizer


def ranks(program: peftfx.Program) -> int:
    """Ranks that are not zero."""
    return sum(len(b.kept()) for b in map(program.branch, program.attachments)
               if isinstance(b, AdaLoRABranch))  # fmt: skip


def test_adalora_equals_its_reference(hand: Any) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, "adalora{rank=4,alpha=6,where=linear}"), 0.3)
    inputs = batch(4, 11, pad=3)
    check(program, base, reference(model, tensors(program), inputs, 1.5), inputs)


def test_the_fold_is_exact(captured: Any) -> None:
    for name in ("encoder", "fused"):
        inputs = batch() if name == "encoder" else {"input_ids": batch()["input_ids"]}
        base = captured.double(name)
        program = randomise(peftfx.run(base, TEXT), 0.3)
        folded = peftfx.run(program, "fold")
        want = first(program(**inputs))
        torch.testing.assert_close(first(folded(**inputs)), want, rtol=1e-12, atol=1e-12)
        assert moved(first(base(**inputs)), want) > 0.01


def test_lowered_and_plain_agree(captured: Any) -> None:
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, TEXT), 0.3)
    lowered = peftfx.run(program, "lower")
    assert lowered.history[-1].edited
    torch.testing.assert_close(first(lowered(**batch())), first(program(**batch())))
    for each in (program, lowered):
        first(each(**batch())).pow(2).mean().backward()
    theirs = lowered.named_trainable_parameters()
    for name, parameter in program.named_trainable_parameters().items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad)


@pytest.mark.parametrize("make", [bert, llama])
def test_adalora_equals_peft(make: Any) -> None:
    import peft

    torch.manual_seed(0)
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, TEXT), 0.3)
    other = adalora_of_peft(model, make).eval()
    copied(program, other, {"p": "lora_B.default", "e": "lora_E.default", "q": "lora_A.default"})
    inputs = batch(4, 11, pad=2)
    check(program, base, other(**inputs), inputs)
    assert isinstance(other, peft.PeftModel)


def adalora_of_peft(model: Any, make: Any, **options: Any) -> Any:
    import peft

    names = ["query", "value"] if make is bert else ["q_proj", "v_proj"]
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, target_modules=names, total_step=20, tinit=3, tfinal=6,
        deltaT=2, **options,
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def test_schedule_and_masks_equal_peft() -> None:
    """On the same gradients, step by step: scores, budgets, and which ranks are zero. PEFT also
    prunes at the first of the last steps whatever the interval; then the scores rest, and ours is
    the same from the next step on."""
    torch.manual_seed(0)
    model = llama().eval()
    base = peftfx.capture(model, kwargs=batch())
    program = randomise(peftfx.run(base, TEXT.replace("}", ",warmup=3,final=6,interval=2}")), 0.3)
    other = adalora_of_peft(model, llama)
    pairs = {"p": "lora_B.default", "e": "lora_E.default", "q": "lora_A.default"}
    copied(program, other, pairs)
    mine = controller(program, 20)
    allocator = other.base_model.rankallocator
    theirs = dict(other.named_parameters())
    targets = {n: f"base_model.model.{name_of(n)}.{pairs[n.rpartition('.')[2]]}"
               for n in program.named_trainable_parameters()}  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    counts: list[int] = []
    for step in range(20):
        with torch.no_grad():  # as an optimizer's step would, on pruned ranks, too
            for name, parameter in program.named_trainable_parameters().items():
                grad = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.grad = grad
                parameter.add_(grad, alpha=-0.1)
                twin = theirs[targets[name]]
                twin.copy_(parameter.view(twin.shape))
                twin.grad = grad.view(twin.shape)
        assert mine.budget(step) == allocator.budget_schedule(step)[0]
        mine.after_step(step)
        other.base_model.update_and_allocate(step)
        counts.append(ranks(program))
        if step == 14:
            continue
        for name, parameter in program.named_trainable_parameters().items():
            twin = theirs[targets[name]]
            assert torch.equal(parameter, twin.view(parameter.shape)), (step, name)
    assert counts[3] == 16 and counts[4] < 16 and counts[-1] == 8
    assert any(b > a for a, b in itertools.pairwise(counts)), "no rank ever came back"


def name_of(parameter: str) -> str:
    """The module of a branch's parameter: peftfx.adalora.NAME.delta.e."""
    return parameter.split(".", 2)[2].rpartition(".")[0].rpartition(".")[0]


def test_the_orthogonality_loss_equals_peft(captured: Any) -> None:
    """Which PEFT adds in the tuner's forward: a PeftModel without a task type never calls it."""
    torch.manual_seed(0)
    model = llama().eval()
    program = randomise(peftfx.run(peftfx.capture(model, kwargs=batch()), TEXT), 0.3)
    other = adalora_of_peft(model, llama, orth_reg_weight=0.1)
    copied(program, other, {"p": "lora_B.default", "e": "lora_E.default", "q": "lora_A.default"})
    labels = batch()["input_ids"]
    with_term = other.base_model(**batch(), labels=labels).loss
    without = other.base_model.model(**batch(), labels=labels).loss
    got = peftfx.controllers(program).loss(None, batch())
    torch.testing.assert_close(got, with_term - without, rtol=1e-4, atol=1e-6)


def test_the_papers_regulariser_is_an_option(captured: Any) -> None:
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, TEXT.replace("}", ",orth=squared_sum,gamma=0.3}")), 0.3)
    want = torch.zeros(())
    for t in tensors(program).values():
        eye = torch.eye(4)
        want += (t["p"].T @ t["p"] - eye).square().sum() + (t["q"] @ t["q"].T - eye).square().sum()
    got = peftfx.controllers(program).loss(None)
    torch.testing.assert_close(got, 0.3 * want)
    assert got.requires_grad
    silent = peftfx.run(base, TEXT.replace("}", ",gamma=0}"))
    assert peftfx.controllers(silent).loss(None) == 0.0


def test_the_budget_falls_with_the_cube(captured: Any) -> None:
    """Four sites; then the values of 72 sites of rank 12 with a target of 8."""
    _, base = captured["encoder"]
    program = peftfx.run(base, "adalora{rank=12,target=8,warmup=10,final=20,where=q|v}")
    mine = controller(program, 100).budget
    assert (mine.first, mine.last, mine.warmup, mine.ends) == (48, 32, 10, 80)
    budget = replace(mine, first=864, last=576)
    steps = (0, 10, 11, 20, 30, 45, 60, 80, 81)
    assert [budget(t) for t in steps] == [864, 864, 851, 757, 680, 612, 582, 576, 576]


def test_importance_follows_its_formula(captured: Any) -> None:
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, TEXT.replace("}", ",beta1=0.7,beta2=0.9}")), 0.3)
    mine = controller(program)
    (path, branch), *_ = mine.branches()
    history: dict[str, list[Tensor]] = {"p": [], "e": [], "q": []}
    for step in range(3):
        for name, parameter in program.named_trainable_parameters().items():
            torch.manual_seed(step)
            parameter.grad = torch.randn(parameter.shape)
            if name.startswith(f"{path}."):
                history[name[-1]].append((parameter * parameter.grad).abs().detach())
        mine.after_step(step)
    smooth: dict[str, Tensor] = {}
    for name, seen in history.items():
        mean, spread = torch.zeros_like(seen[0]), torch.zeros_like(seen[0])
        for now in seen:
            mean = 0.7 * mean + 0.3 * now
            spread = 0.9 * spread + 0.1 * (now - mean).abs()
        smooth[name] = mean * spread
    want = torch.stack([smooth["e"][i] + smooth["p"][:, i].mean() + smooth["q"][i].mean()
                        for i in range(4)])  # fmt: skip
    torch.testing.assert_close(mine.importance(path), want)
    assert branch.e.numel() == 4


def test_ties_keep_exactly_the_budget(captured: Any) -> None:
    """All scores are equal; the released rule (score <= threshold) would prune every rank."""
    _, base = captured["encoder"]
    program = peftfx.run(base, TEXT.replace("}", ",warmup=0,final=4}"))
    mine = controller(program, 10)
    for parameter in program.trainable_parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.ones_like(parameter)
    for step in range(10):
        mine.after_step(step)
        assert ranks(program) <= mine.budget(step)
    assert ranks(program) == 8


@pytest.mark.parametrize(("parts", "lower"), [(1, ""), (2, ""), (1, ";lower{target=cpu}")])
def test_training_prunes_and_finish_removes(
    captured: Any, parts: int, lower: str, tmp_path: Path
) -> None:
    model, base = captured["encoder"]
    text = "adalora{rank=4,target=1,warmup=2,final=4,where=q|v}" + lower
    program, controllers, optimizer = set_up(base, text, 12, parts)
    before = {n: p.detach().clone() for n, p in program.named_trainable_parameters().items()}
    train(program, controllers, optimizer, range(12), parts)
    assert ranks(program) == 4
    trained = program.named_trainable_parameters().items()
    assert not any(torch.equal(p, before[n]) for n, p in trained if not n.endswith(".e"))
    program.eval()
    branches = [program.branch(a) for a in program.attachments]
    with torch.no_grad():  # one site without any rank, whatever training chose
        branches[0].e.zero_()  # type: ignore[union-attr, operator]
    left = ranks(program)
    want = first(program(**batch()))
    smaller = peftfx.run(program, controllers.finish())
    torch.testing.assert_close(first(smaller(**batch())), want, rtol=1e-5, atol=1e-6)
    assert len(smaller.attachments) < len(program.attachments)
    held = [b for b in map(smaller.branch, smaller.attachments) if isinstance(b, AdaLoRABranch)]
    assert sum(b.e.numel() for b in held) == left == ranks(smaller)
    assert {b.scale for b in held} == {4.0}  # alpha over the first rank
    count = sum(p.numel() for p in smaller.trainable_parameters())
    assert count == left * (32 + 32 + 1)
    assert not peftfx.controllers(smaller).finish().passes
    peftfx.save(smaller, tmp_path / "a")
    loaded = peftfx.load(model, tmp_path / "a")
    near = 1e-6 if lower else 0.0  # a lowering is not saved
    torch.testing.assert_close(
        first(loaded(**batch())), first(smaller(**batch())), rtol=near, atol=near
    )
    folded = peftfx.run(smaller, "fold")
    torch.testing.assert_close(first(folded(**batch())), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(first(smaller.without("adalora")(**batch())), first(base(**batch())))
    again, optimizer = peftfx.controllers(smaller), None
    optimizer = torch.optim.AdamW(again.param_groups(1e-3))
    again.start(optimizer, 10)
    train(smaller.train(), again, optimizer, range(10))
    assert ranks(smaller) == left  # the budget is of all sites, also of those that are gone


def test_pruned_ranks_may_come_back(captured: Any) -> None:
    _, base = captured["encoder"]
    text = TEXT.replace("}", ",warmup=0,final=0,interval=3}")
    program, controllers, optimizer = set_up(base, text, 20)
    train(program, controllers, optimizer, range(1))
    train(program, controllers, optimizer, range(1, 13))  # prunes at 3, 6, 9 and 12
    assert ranks(program) == controllers.each["adalora"].budget(12) < 16
    train(program, controllers, optimizer, range(13, 14))
    assert ranks(program) == 16
    train(program, controllers, optimizer, range(14, 20))
    assert ranks(program) == 8  # the last step is always pruned


def test_accumulated_gradients_count_once(captured: Any) -> None:
    _, base = captured["encoder"]
    states: list[Any] = []
    for parts in (1, 2):
        program, controllers, optimizer = set_up(base, TEXT, 10)
        program.eval()
        train(program, controllers, optimizer, range(3), parts)
        states.append(controllers.state_dict()["adalora"]["sensitivity"])
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-9)


def test_training_goes_on_where_it_stopped(captured: Any, tmp_path: Path) -> None:
    """4 steps, everything saved and loaded, and 6 more, are 10 steps bit for bit."""
    model, base = captured["decoder"]
    text = TEXT.replace("}", ",warmup=1,final=3}")
    straight, controllers, optimizer = set_up(base, text, 10)
    train(straight, controllers, optimizer, range(10))
    program, controllers, optimizer = set_up(base, text, 10)
    train(program, controllers, optimizer, range(4))
    peftfx.save(program, tmp_path / "a")
    torch.save([controllers.state_dict(), optimizer.state_dict()], tmp_path / "s.pt")
    del program, controllers, optimizer
    program = peftfx.load(model, tmp_path / "a").train()
    held = torch.load(tmp_path / "s.pt", weights_only=True)
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.AdamW(controllers.param_groups(lr=0.02, weight_decay=0.01))
    optimizer.load_state_dict(held[1])
    controllers.start(optimizer, 10)
    controllers.load_state_dict(held[0])
    train(program, controllers, optimizer, range(4, 10))
    want = straight.named_trainable_parameters()
    for name, parameter in program.named_trainable_parameters().items():
        assert torch.equal(parameter, want[name]), name
    assert ranks(program) == 8


def test_misuse_is_named(captured: Any) -> None:
    _, base = captured["encoder"]
    with pytest.raises(OptionError, match=r"target=9, but it must be in \[0, 4\]"):
        peftfx.run(base, "adalora{rank=4,target=9}")
    with pytest.raises(OptionError, match="whole number, or a share"):
        peftfx.run(base, "adalora{rank=4,target=2,warmup=2.5}")
    assert peftfx.AdaLoRA().left == 8
    program = peftfx.run(base, "adalora{rank=4,target=2,warmup=30,final=80,where=q}")
    with pytest.raises(PassError, match="leave none of 100 steps"):
        controller(program, 100)
    mine = controller(peftfx.run(base, TEXT), 10)
    with pytest.raises(PassError, match=r"before|between optimizer.step\(\) and"):
        mine.after_step(0)
    for parameter in mine.program.trainable_parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(PassError, match="load what"):
        mine.after_step(9)
    state = mine.state_dict()
    other = controller(peftfx.run(base, TEXT.replace("rank=4", "rank=5")), 10)
    mine.after_step(0)
    with pytest.raises(PassError, match="other branches or ranks"):
        other.load_state_dict(mine.state_dict())
    other.load_state_dict(state)
    with pytest.raises(PassError, match="nothing to settle"):
        peftfx.run(randomise(peftfx.run(base, TEXT)), "bake{names=adalora}")


def test_trainable_count(captured: Any) -> None:
    _, base = captured["llama"]
    d, kv, f, layers = 32, 16, 64, 2
    program = peftfx.run(base, "adalora{rank=4,target=2}")
    count = sum(p.numel() for p in program.trainable_parameters())
    sizes = ((d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d))  # q, k, v, o, ffn
    assert count == layers * sum(4 * (k + o + 1) for k, o in sizes)


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.two(x)


def test_planted_ranks_get_the_budget() -> None:
    """The targets are those of weights that differ by a rank of 1 and of 5: of a budget of 6 each
    gets its own, although both begin with 6."""
    torch.manual_seed(3)
    model = Linears().eval().requires_grad_(False)
    planted = {"one": 1, "two": 5}
    deltas = {n: torch.randn(24, r) @ torch.randn(r, 24) / 8 for n, r in planted.items()}
    base = peftfx.capture(model, (torch.randn(4, 24),))
    program = peftfx.run(base, "adalora{rank=6,target=3,where=linear}").train()
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.Adam(controllers.param_groups(0.02))
    controllers.start(optimizer, 500)
    for step in range(500):
        x = torch.randn(64, 24)
        outputs = program(x)
        loss = torch.stack([
            (y - (model.get_submodule(n)(x) + x @ deltas[n].T)).square().mean()
            for n, y in zip(planted, outputs, strict=True)
        ]).sum()  # fmt: skip
        (loss + controllers.loss(outputs)).backward()
        controllers.before_step(step)
        optimizer.step()
        controllers.after_step(step)
        optimizer.zero_grad()
    found: dict[str, int] = {}
    for attachment in program.attachments:
        branch = program.branch(attachment)
        assert isinstance(branch, AdaLoRABranch)
        name = attachment.site.removesuffix(".weight")
        found[name] = len(branch.kept())
        left = (branch.delta().detach() - deltas[name]).norm() / deltas[name].norm()
        assert left < 0.15, (name, left)
    assert found == planted


OTHERS = ("lora{rank=4}", "ia3", "serial_adapter{bottleneck=6}", "prefix_tuning{length=5}",
          "prompt_tuning{length=4}", "bitfit", "adalora{rank=2,target=1,name=more}")  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_stacked_with_other_methods(captured: Any, other: str) -> None:
    """Both orders are one graph, and it folds exactly."""
    base = captured.double("block")
    one = randomise(peftfx.run(base, f"{TEXT};{other}"), 0.3)
    two = peftfx.run(base, f"{other};{TEXT}")
    assert one.text() == two.text()
    folded = peftfx.run(one, "fold")
    assert folded.history[-1].certificate.measured["max_rel"] < 1e-11
    assert not {a.adapter for a in folded.attachments} & {"more", "lora", "ia3", "adalora"}
