"""Controllers: one loop for every method, called in order; going on in the middle is exact."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import peftfx
from peftfx.rewriter.errors import PassError

from .loops import STEPS, TEXT, expected, fresh, loop, record, recorder, same
from .models import batch, first
from .recipes import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_in_the_loop(captured: Any, method: str) -> None:
    program = captured.placed("encoder", method).train()
    controllers = peftfx.controllers(program)
    groups = controllers.param_groups(lr=0.01, weight_decay=0.1)
    grouped = [p for g in groups for p in g["params"]]
    trained = program.named_trainable_parameters()
    assert len(grouped) == len({id(p) for p in grouped}) == len(trained)
    assert {id(p) for p in grouped} == {id(p) for p in trained.values()}
    assert {n: id(p) for g in groups for n, p in zip(g["names"], g["params"], strict=True)} == {
        n: id(p) for n, p in trained.items()
    }
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(groups)
    controllers.start(optimizer, 4)
    loop(program, controllers, optimizer, range(4))
    assert any(not torch.equal(p, before[n]) for n, p in trained.items())
    assert all(p.isfinite().all() for p in trained.values())
    controllers.load_state_dict(controllers.state_dict())
    passes = controllers.finish()
    if passes.passes:
        smaller = peftfx.run(program.eval(), passes)
        torch.testing.assert_close(first(smaller(**batch())), first(program(**batch())))


def test_decay_is_for_matrices_and_groups_have_equal_settings(captured: Any) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, "lora;ia3;bitfit")
    for group in peftfx.controllers(program).param_groups(lr=0.5, weight_decay=0.1):
        assert group["lr"] == 0.5
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] > 0}


def test_the_loop_calls_in_order(captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, f"{record(monkeypatch)};bitfit")
    controllers = peftfx.controllers(program)
    groups = controllers.param_groups(lr=0.01, weight_decay=0.1)
    rates = {n.rpartition(".")[2]: g["lr"] for g in groups for n in g["names"]}
    assert rates["b"] == 0.16 and rates["a"] == 0.01
    controllers.start(torch.optim.SGD(groups), 3)
    loop(program, controllers, torch.optim.SGD(groups), range(3))
    assert recorder(controllers).seen == [("start", 3), *expected(range(3))]


def test_misuse_is_named(captured: Any) -> None:
    _, base = captured["encoder"]
    with pytest.raises(PassError, match="nothing trains"):
        peftfx.controllers(peftfx.run(base, "lora;fold")).param_groups(lr=1e-3)
    controllers = peftfx.controllers(peftfx.run(base, "lora;ia3"))
    for call in (controllers.before_step, controllers.after_step):
        with pytest.raises(PassError, match=r"call controllers.start\(optimizer, total_steps\)"):
            call(0)
    optimizer = torch.optim.SGD(controllers.param_groups(lr=1e-3))
    with pytest.raises(PassError, match="total_steps is 0"):
        controllers.start(optimizer, 0)
    with pytest.raises(PassError, match=r"of the adapters \['lora'\], but the program has"):
        controllers.load_state_dict({"lora": {}})
    assert not controllers.finish().passes and controllers.loss(None) == 0.0
    assert peftfx.run(controllers.program, "fold").history[-1].certificate.holds


def test_resuming_the_loop_is_exact(captured: Any, tmp_path: Path) -> None:
    model, base = captured["encoder"]
    straight, controllers, optimizer = fresh(peftfx.run(base, TEXT).eval())
    loop(straight, controllers, optimizer, range(STEPS))
    program, controllers, optimizer = fresh(peftfx.run(base, TEXT).eval())
    loop(program, controllers, optimizer, range(4))
    peftfx.save(program, tmp_path / "a")
    state, held = controllers.state_dict(), optimizer.state_dict()
    program, controllers, optimizer = fresh(peftfx.load(model, tmp_path / "a"))
    optimizer.load_state_dict(held)
    controllers.load_state_dict(state)
    loop(program, controllers, optimizer, range(4, STEPS))
    same(program, straight)


def test_importing_needs_neither_trainer() -> None:
    code = "import sys, peftfx; print([m for m in ('transformers', 'lightning', 'accelerate') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
