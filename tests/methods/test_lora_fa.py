"""LoRA-FA against its equation and Hugging Face PEFT's optimizer; what it keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import OptionError, SelectorError

from ..models import batch, bert, first, llama, moved, randomise
from .common import check, hooked

EVERYWHERE = "lora_fa{rank=4,alpha=6,where=linear}"


def factors(program: peftfx.Program) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by module."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for attachment in program.attachments:
        branch: Any = program.branch(attachment)
        found[attachment.site.removesuffix(".weight")] = branch.a, branch.b.detach()
    return found


def reference(
    model: nn.Module, pairs: Mapping[str, tuple[Tensor, Tensor]], inputs: Any, scale: float
) -> Any:
    """y = W x + b + s B (A x)."""

    def hook(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
        return lambda i, o: o + scale * (i[0] @ a.T) @ b.T

    with hooked(model, {n: hook(*pair) for n, pair in pairs.items()}):
        return model(**inputs)


def test_lora_fa_equals_its_reference(hand: Any) -> None:
    _, model, base = hand
    program = randomise(peftfx.run(base, EVERYWHERE))
    inputs = batch(4, 11, pad=3)
    check(program, base, reference(model, factors(program), inputs, 1.5), inputs)


def test_b_alone_trains(captured: Any, tmp_path: Path) -> None:
    """`rank out` numbers a site. A is drawn as LoRA's, stays, and is saved."""
    model, base = captured["llama"]
    d, kv, f, layers = 32, 16, 64, 2
    program = peftfx.run(base, "lora_fa{rank=4}")
    sizes = (d, kv, kv, d, f, f, d)  # q, k, v, o, and the feed-forward's three
    assert sum(p.numel() for p in program.trainable_parameters()) == layers * 4 * sum(sizes)
    other = factors(peftfx.run(base, "lora{rank=4,where=q|k|v|o|ffn}"))
    before = {n: a.clone() for n, (a, _) in factors(program).items()}
    assert all(torch.equal(a, other[n][0]) for n, a in before.items())
    program, controllers, optimizer = started(program.train())
    train(program, controllers, optimizer, 5)
    program.eval()
    assert all(torch.equal(a, before[n]) and b.any() for n, (a, b) in factors(program).items())
    peftfx.save(program, tmp_path / "a")
    loaded = peftfx.load(model, tmp_path / "a")
    assert torch.equal(first(loaded(**batch())), first(program(**batch())))
    peftfx.save_peft(program, tmp_path / "theirs")  # a LoRA, as PEFT's is
    again = peftfx.load_peft(base, tmp_path / "theirs")
    torch.testing.assert_close(first(again(**batch())), first(program(**batch())))


def started(program: peftfx.Program, lr: float = 1e-2) -> tuple[peftfx.Program, Any, Any]:
    controllers = peftfx.controllers(program)
    optimizer = torch.optim.AdamW(controllers.param_groups(lr), weight_decay=0.0, eps=1e-6)
    controllers.start(optimizer, 100)
    return program, controllers, optimizer


def loss(outputs: Any) -> Tensor:
    """With gradients far above the optimizers' eps, which they add at different places."""
    hidden = first(outputs)
    return 1e5 * (hidden * torch.linspace(0, 1, hidden.shape[-1])).square().mean()


def train(program: peftfx.Program, controllers: Any, optimizer: Any, steps: int) -> None:
    for step in range(steps):
        inputs = batch(4, 9, step)
        controllers.begin_forward(inputs)
        loss(program(**inputs)).backward()
        controllers.before_step(step)
        optimizer.step()
        controllers.after_step(step)
        optimizer.zero_grad()


def test_the_fold_is_exact(captured: Any) -> None:
    for name in ("encoder", "fused"):
        inputs = batch() if name == "encoder" else {"input_ids": batch()["input_ids"]}
        base = captured.double(name)
        program = randomise(peftfx.run(base, EVERYWHERE.replace("linear", "q|v|ffn")), 0.3)
        folded = peftfx.run(program, "fold")
        want = first(program(**inputs))
        torch.testing.assert_close(first(folded(**inputs)), want, rtol=1e-12, atol=1e-12)
        assert moved(first(base(**inputs)), want) > 0.01


class Kept:
    """Bytes of the storages that forward keeps for backward, parameters and inputs apart."""

    def __init__(self, program: peftfx.Program) -> None:
        stored = program.module.named_parameters(), program.module.named_buffers()
        self.known = {t.untyped_storage().data_ptr() for each in stored for _, t in each}
        self.sizes: dict[int, int] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def kept(program: peftfx.Program, inputs: Any) -> int:
    seen = Kept(program)
    with torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t):
        outputs = program(**inputs)
    del outputs
    return sum(seen.sizes.values())


def test_inputs_are_not_kept_for_backward(captured: Any) -> None:
    """Beside each linear behind a norm or an activation LoRA keeps what it reads; here `x A^T` is
    kept. `program.memory` says as much beforehand."""
    _, base = captured["decoder"]
    inputs = batch(16, 32)
    lora, fa = (
        peftfx.run(base, f"{m}{{rank=2,where=q|k|v|o|ffn}}").train() for m in ("lora", "lora_fa")
    )
    with_inputs, without = kept(lora, inputs), kept(fa, inputs)
    numbers = 16 * 32 * 4
    least = 2 * numbers * (32 + 32)  # of two layers: what q, k and v read, and what the up reads
    assert with_inputs - without >= least, (with_inputs, without)
    told = [p.memory(16, 32).saved for p in (lora, fa)]
    assert abs((told[0] - told[1]) - (with_inputs - without)) <= 0.02 * told[0]


@pytest.mark.parametrize("make", [bert, llama])
def test_corrected_gradients_train_as_pefts_optimizer(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose products are in bfloat16 where the machine has it, whatever the model's dtype."""
    import peft
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    torch.manual_seed(0)
    model = make().eval()
    base = peftfx.capture(model, kwargs=batch())
    names = ["query", "value"] if make is bert else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)
    other: Any = peft.get_peft_model(model, config).eval()
    program = peftfx.run(base, "lora_fa{rank=4,alpha=8,corrected=true,where=q|v}")
    theirs = dict(other.named_parameters())
    pairs = factors(program)
    with torch.no_grad():
        for name, (a, _) in pairs.items():
            theirs[f"base_model.model.{name}.lora_A.default.weight"].copy_(a)
    program, controllers, mine = started(program, 1e-3)
    optimizer = create_lorafa_optimizer(other, r=4, lora_alpha=8, lr=1e-3)
    train(program, controllers, mine, 3)
    for step in range(3):
        loss(other(**batch(4, 9, step))).backward()
        optimizer.step()
        other.zero_grad()
    for name, (a, b) in factors(program).items():
        twin = theirs[f"base_model.model.{name}.lora_B.default.weight"]
        off = (b - twin).abs() > 1e-5 + 0.02 * twin.abs()
        assert off.float().mean() < 0.05, name  # where a gradient is noise, so is Adam's step
        assert torch.equal(a, theirs[f"base_model.model.{name}.lora_A.default.weight"])
        assert b.any()


def test_the_correction_is_the_nearest_to_a_full_step(captured: Any) -> None:
    """Of all changes dB, `s dB A` comes nearest to dL/dW: the least squares solution. One for each
    expert where there are several matrices."""
    torch.manual_seed(0)
    a, full, scale = torch.randn(3, 10), torch.randn(6, 10), 1.5
    want = torch.linalg.lstsq(scale * a.T, full.T).solution.T
    base = peftfx.capture(nn.Sequential(nn.Linear(10, 6)), (torch.randn(2, 10),))
    program = peftfx.run(base, "lora_fa{rank=3,alpha=4.5,corrected=true,where=linear}")
    branch: Any = program.branch(program.attachments[0])
    branch.a.copy_(a)
    controllers = peftfx.controllers(program)
    controllers.start(torch.optim.SGD(controllers.param_groups(1.0)), 1)
    branch.b.grad = scale * full @ a.T  # the gradient of B where that of W is `full`
    controllers.before_step(0)
    torch.testing.assert_close(branch.b.grad, want, rtol=1e-4, atol=1e-5)


def test_misuse_is_named(captured: Any) -> None:
    _, base = captured["decoder"]
    with pytest.raises(OptionError, match=r"lr_ratio=4.0, but it must be 1.*Choose lora"):
        peftfx.run(base, "lora_fa{lr_ratio=4}")
    with pytest.raises(OptionError, match=r"kaiming or gaussian.*Choose lora"):
        peftfx.run(base, "lora_fa{init=pissa}")
    with pytest.raises(OptionError, match=r"alpha=0\.0, but it must be not 0"):
        peftfx.run(base, "lora_fa{alpha=0,corrected=true}")
    with pytest.raises(SelectorError, match="works on linear and conv and experts sites only"):
        peftfx.run(base, "lora_fa{where=embedding}")  # an A of zeros could not learn
