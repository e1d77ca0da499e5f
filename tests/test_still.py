"""Measuring leaves the live program alone: its flags, modes and buffers, in other threads, too."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import VerifyError
from peftfx.rewriter.measure.compare import compare
from peftfx.rewriter.measure.still import Expected, still
from peftfx.rewriter.measure.witness import Witness
from peftfx.rewriter.scores.observe import observe
from peftfx.rewriter.verify.verify import difference

from .models import batch, first, randomise


class Normed(nn.Module):
    """Dropout and batch norm, whose statistics training updates."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return x + self.drop(self.down(torch.relu(self.up(h))))


@pytest.fixture
def normed() -> peftfx.Program:
    torch.manual_seed(0)
    model = Normed().eval().requires_grad_(False)
    base = peftfx.capture(model, (torch.randn(4, 5, 8),))
    return peftfx.run(base, "lora{rank=2,where=linear,dropout=0.2}")


def test_forwards_of_another_thread_keep_their_gradients(normed: peftfx.Program) -> None:
    program = normed.train()
    inputs = {n: torch.randn(4, 5, 8) for n in program.spec.names}
    stop = threading.Event()
    lost: list[str] = []
    count = 0

    def train() -> None:
        nonlocal count
        while not stop.is_set() or count < 20:
            output = program(**inputs)
            if not output.requires_grad or not program.training:
                lost.append("gradient")
            else:
                output.sum().backward()
            count += 1

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(3):
            peftfx.run(program, "fold")
            observe(program, [inputs], {"y": program.sites.of("linear")[0]}, Tensor.mean)
            program.verify()
    finally:
        stop.set()
        thread.join()
    assert count >= 20 and lost == []


def test_nothing_of_the_live_program_moves(normed: peftfx.Program) -> None:
    program = normed.train()
    held = {n: t.clone() for n, t in program.module.state_dict().items()}
    flags = {n: p.requires_grad for n, p in program.module.named_parameters()}
    seed = torch.random.get_rng_state()
    program.verify()
    done = peftfx.run(program, "fold")
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert all(torch.equal(t, held[n]) for n, t in program.module.state_dict().items())
    assert flags == {n: p.requires_grad for n, p in program.module.named_parameters()}
    assert all(m.training for m in program.module.modules()) and done.training


def test_a_still_copy_shares_memory_and_nothing_else(normed: peftfx.Program) -> None:
    copy = still(normed.train())
    for (name, ours), theirs in zip(
        normed.module.named_parameters(), copy.parameters(), strict=True
    ):
        assert ours is not theirs and ours.data_ptr() == theirs.data_ptr(), name
        assert not theirs.requires_grad
    assert not any(m.training for m in copy.modules())
    assert normed.module.get_buffer("norm.running_mean").data_ptr() != (
        copy.get_buffer("norm.running_mean").data_ptr()
    )
    with torch.no_grad():
        normed.trainable_parameters()[0].add_(1.0)
    assert not Witness(normed).moved()


def test_random_operators_at_their_expected_value() -> None:
    x = torch.randn(3, 4, 8)
    seed = torch.random.get_rng_state()
    with Expected() as mode:
        assert torch.equal(nn.functional.dropout(x, 0.3, True), x)
        assert torch.equal(nn.functional.alpha_dropout(x, 0.0, True), x)
        assert torch.equal(torch.rand(3), torch.full((3,), 0.5))
        assert torch.equal(torch.randn_like(x), torch.zeros_like(x))
        assert torch.equal(torch.empty(2).uniform_(2, 4), torch.full((2,), 3.0))
        assert torch.equal(torch.empty(2).normal_(1.5, 2.0), torch.full((2,), 1.5))
        assert torch.equal(torch.bernoulli(torch.full((2,), 0.25)), torch.full((2,), 0.25))
        assert torch.equal(torch.randperm(9), torch.randperm(9))
        attend = nn.functional.scaled_dot_product_attention
        assert torch.allclose(attend(x, x, x, dropout_p=0.5), attend(x, x, x), atol=1e-6)
    assert mode.draws.total() >= 9
    assert torch.equal(torch.random.get_rng_state(), seed)


def test_dropout_of_attention_counts_the_same_in_every_kernel() -> None:
    x = torch.randn(2, 4, 6, 8)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    attend = nn.functional.scaled_dot_product_attention
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), Expected() as none:
        attend(x, x, x, causal)
        attend(x, x, x, is_causal=True)
    assert not none.draws
    with torch.no_grad(), Expected() as formula:
        want = attend(x, x, x, causal, dropout_p=0.25)
    with torch.no_grad(), Expected() as kernel:
        got, _ = fused(x, x, x, 0.25, True)  # which refuses dropout that is not taken out
    torch.testing.assert_close(got, want)
    assert formula.draws == kernel.draws and kernel.draws.total() == 1


def test_run_in_inference_mode_can_train(captured: Any) -> None:
    _, base = captured["encoder"]
    with torch.inference_mode():
        program = peftfx.run(base, "lora{rank=2}")
    first(program(**batch())).sum().backward()
    assert all(p.grad is not None for p in program.trainable_parameters())


# verify() and stored tensors.


@pytest.fixture
def adapted(captured: Any) -> peftfx.Program:
    return randomise(peftfx.run(captured["encoder"][1], "lora{rank=2,where=q};bitfit{where=norm}"))


def test_nan_in_a_parameter_is_an_error(adapted: peftfx.Program) -> None:
    with torch.no_grad():
        adapted.trainable_parameters()[0].view(-1)[0] = float("nan")
    with pytest.raises(VerifyError, match="holds 1 NaN"):
        adapted.verify()


def test_a_flag_that_no_pass_set_is_an_error(adapted: peftfx.Program) -> None:
    adapted.module.get_parameter("layers.0.key.weight").requires_grad_(True)
    with pytest.raises(
        VerifyError, match=r"layers.0.key.weight' requires gradients, but shares storage"
    ):
        adapted.verify()


def test_an_adapter_is_frozen_as_a_whole(adapted: peftfx.Program) -> None:
    own = [p for n, p in adapted.named_trainable_parameters().items() if ".lora." in n]
    own[0].requires_grad_(False)
    with pytest.raises(VerifyError, match="requires no gradients, but the adapter 'lora' trains"):
        adapted.verify()
    for parameter in own:
        parameter.requires_grad_(False)
    assert all(c.holds for c in adapted.verify())


def test_a_small_change_of_a_folded_tensor_is_seen(captured: Any) -> None:
    program = randomise(peftfx.run(captured["encoder"][1], "lora{rank=2,where=q}"))
    folded = peftfx.run(program, "fold")
    with torch.no_grad():
        folded.module.get_parameter("layers.0.query.weight")[0, 0] += 1e-4
    with pytest.raises(
        VerifyError, match=r"layers.0.query.weight' changed since the program was made"
    ):
        folded.verify()


# Outputs one by one.


def test_outputs_are_compared_one_by_one() -> None:
    nan, inf = float("nan"), float("inf")
    want = {"a": torch.tensor([300.0, 1.0]), "b": torch.tensor([1e-3, nan, inf]), "c": 3, "d": "x"}
    (a, b, c, d) = compare(want, {**want, "a": torch.tensor([300.0, 2.0])})
    assert (a.absolute, b.relative, c.reason, d.reason) == (1.0, 0.0, "", "")
    assert a.relative == pytest.approx(1 / 300) and a.name == "['a']"
    other = compare(want, {**want, "b": torch.tensor([2e-3, nan, inf]), "c": 4, "d": "y"})
    assert other[1].relative == pytest.approx(1.0) and other[2].form and other[3].form
    for odd in ([1e-3, inf, nan], [1e-3, nan, -inf], [nan, nan, inf], [1e-3, 0.0, inf]):
        gap = compare(want, {**want, "b": torch.tensor(odd)})[1]
        assert gap.relative == inf and "finite" in gap.values
        assert bool(gap.spoilt) == (odd[0] != odd[0] or odd[2] != odd[2])
    (gap,) = compare([torch.tensor([1, 2])], [torch.tensor([1, 3])])
    assert gap.discrete and gap.relative == inf
    (gap,) = compare([torch.tensor([1 + 1j])], [torch.tensor([1 - 1j])])
    assert gap.relative == 2.0
    assert "2 instead of 1" in compare([torch.ones(1)], [torch.ones(1)] * 2)[0].form
    assert "dtype" in compare([torch.ones(1)], [torch.ones(1).double()])[0].form


def test_difference_on_data_is_of_every_output(captured: Any) -> None:
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, "lora{rank=2}"))
    assert difference(base, base, [batch()]) == (0.0, 0.0)
    assert difference(base, program, [batch(), batch(seed=1)])[1] > 0.01


def test_a_model_that_draws_in_evaluation_is_compared_without_noise() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) + torch.randn_like(x))

    torch.manual_seed(0)
    base = peftfx.capture(Noisy().eval(), (torch.randn(2, 5, 8),))
    program = peftfx.run(base, "lora{rank=2,where=linear}")
    assert program.history[-1].certificate.kind == "identity"
    assert peftfx.run(randomise(program), "fold").history[-1].certificate.holds
