"""Frozen storage is shared with the user's model: what changes it is found, and refused."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import BaseChangedError, BaseMismatchError, PassError, RewriteError
from peftfx.rewriter.program import unchanged as fingerprint
from peftfx.rewriter.program.fingerprint import checksum
from peftfx.rewriter.program.unchanged import changed, require_unchanged, training_shared
from peftfx.rewriter.run.replay import replay

X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Two linears, a norm with batch statistics, and a parameter that the forward ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm, self.unread = nn.LayerNorm(16), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


def net(frozen: bool = True) -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(not frozen)


def noisy(program: peftfx.Program) -> peftfx.Program:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in program.trainable_parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return program


def adapted(model: nn.Module) -> peftfx.Program:
    return noisy(peftfx.run(peftfx.capture(model, (X,)), "lora{rank=2,where=linear}"))


def by_loading(model: Any, program: peftfx.Program) -> None:
    model.load_state_dict(peftfx.run(program, "fold").export_state_dict(), strict=True)


def by_data(model: Any, program: peftfx.Program) -> None:
    model.up.weight.data.mul_(-1)  # has no version to move, and xors to the same


def by_rows(model: Any, program: peftfx.Program) -> None:
    model.up.weight.data.copy_(model.up.weight.data.flip(0))


def by_training(model: Any, program: peftfx.Program) -> None:
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model(X).square().mean().backward()
    optimizer.step()


def in_the_program(model: Any, program: peftfx.Program) -> None:
    with torch.no_grad():
        program.module.get_parameter("up.weight").add_(1)


CHANGES: list[Callable[[Any, peftfx.Program], None]] = [
    by_loading, by_data, by_rows, by_training, in_the_program,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_changed_base_is_refused_everywhere(
    change: Callable[[Any, peftfx.Program], None], tmp_path: Path
) -> None:
    model = net()
    program = adapted(model)
    folded = peftfx.run(program, "fold")
    require_unchanged(program)
    change(model, program)
    uses: list[Callable[[], Any]] = [
        program.verify, lambda: peftfx.run(program, "fold"), lambda: program.without("lora"),
        lambda: peftfx.save(program, tmp_path / "a"), folded.export_state_dict, folded.verify,
        lambda: peftfx.save_program(program, tmp_path / "b"),
        lambda: peftfx.fold_checkpoint(program, tmp_path, tmp_path / "c"),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(BaseChangedError, match=r"weight.*deepcopy"):
            use()
    assert isinstance(BaseChangedError(), RewriteError | RuntimeError)
    assert list(tmp_path.iterdir()) == []


def test_old_values_make_a_program_whole_again(tmp_path: Path) -> None:
    model = net()
    program = adapted(model)
    before = copy.deepcopy(model.state_dict())
    by_loading(model, program)
    assert changed(program) == ["down.bias", "down.weight", "up.bias", "up.weight"][1::2]
    model.load_state_dict(before)
    require_unchanged(program)
    peftfx.save(program, tmp_path / "a")
    assert torch.equal(peftfx.load(model, tmp_path / "a")(X), program(X))


def test_the_readme_flow_on_a_frozen_model() -> None:
    model = net()
    program = adapted(model)
    want = program(X)
    merged = peftfx.run(program, "fold")
    model.load_state_dict(merged.export_state_dict(), strict=True)
    assert torch.allclose(model(X), want, atol=1e-5)


def test_a_model_that_trains_is_independent() -> None:
    model = net(frozen=False)
    program = adapted(model)
    want = program(X)
    by_training(model, program)
    model.unread.data.zero_()
    require_unchanged(program)
    assert torch.equal(program(X), want)


def test_a_base_that_trains_after_programs_were_made_of_it() -> None:
    base = peftfx.capture(net(frozen=False), (X,))
    noisy(base)  # training what was captured is what it is for
    program = noisy(peftfx.run(base, "lora{rank=2,where=linear}"))
    program.verify()
    noisy(base)
    with pytest.raises(BaseChangedError, match=r"weight"):
        program.without("lora")


def test_what_trains_in_shared_memory_is_refused() -> None:
    model = net()
    base = peftfx.capture(model, (X,))
    program = peftfx.run(base, "bitfit{where=up}")  # trains a copy
    require_unchanged(program)
    program.module.get_parameter("up.weight").requires_grad_(True)
    assert training_shared(program) == ["up.weight"]
    with pytest.raises(BaseChangedError, match=r"'up\.weight' requires gradients"):
        require_unchanged(program)
    with pytest.raises(PassError, match=r"up\.weight require gradients, but no pass trains them"):
        peftfx.run(program, "lora{where=up}")
    base.module.get_parameter("up.weight").requires_grad_(True)
    with pytest.raises(BaseChangedError, match=r"'up\.weight' requires gradients"):
        peftfx.run(base, "lora{where=up}")


def test_folded_weights_are_watched_too() -> None:
    folded = peftfx.run(adapted(net()), "fold")
    exported = folded.export_state_dict()
    exported["up.weight"].mul_(2)  # the program's own memory
    assert changed(folded) == ["up.weight"]
    with pytest.raises(BaseChangedError, match=r"up\.weight"):
        folded.export_state_dict()


def test_inference_tensors_meta_tensors_and_moves() -> None:
    model = net()
    with torch.inference_mode():
        model.register_buffer("table", torch.ones(3))  # parameters made so are refused
    program = peftfx.capture(model, (X,))
    require_unchanged(program)
    with torch.inference_mode():
        model.get_buffer("table").mul_(2)
    assert changed(program, values=False) == ["table"]

    program = peftfx.run(peftfx.capture(net(), (X,)), "lora{where=up}")
    require_unchanged(program.to("meta"))
    require_unchanged(copy.deepcopy(program))
    require_unchanged(replay(program, ("lora",)))
    with torch.device("meta"):
        hollow = Net().eval()
    require_unchanged(peftfx.run(peftfx.capture(hollow, (X,)), "lora{where=up}"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.complex64,
                                   torch.bool, torch.float8_e4m3fn])  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0,), (5,), (129, 257), (64, 1021)])
def test_checksums_see_order_sign_and_single_elements(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(9).to(dtype)
    assert checksum(tensor) == checksum(tensor.clone())
    if tensor.numel() < 2 or dtype == torch.bool:
        return
    flipped = tensor.flatten()[torch.arange(tensor.numel() - 1, -1, -1)].view(shape)
    seen = {checksum(tensor), checksum(flipped), checksum(tensor[None])}
    seen |= {checksum(torch.full_like(tensor, n)) for n in (0, 3)}
    assert len(seen) == 5
    one = tensor.clone().view(-1)
    one[-1] = 7
    assert checksum(one.view(shape)) != checksum(tensor)
    assert checksum(torch.cat([one[:1], one])[1:]) == checksum(one)  # odd places in memory


def test_a_base_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    program = adapted(model)
    hashed: list[tuple[int, ...]] = []
    original = fingerprint.tensor_digest

    def counted(tensor: Tensor) -> str:
        hashed.append(tuple(tensor.shape))
        return original(tensor)

    monkeypatch.setattr(fingerprint, "tensor_digest", counted)
    peftfx.save(program, tmp_path / "one")
    count = len(program.base.base_tensors())
    assert len(hashed) == count == 7
    peftfx.save(program, tmp_path / "two")
    peftfx.load(program.base, tmp_path / "one")
    peftfx.load(model, tmp_path / "one")  # a capture of its own, of the same memory
    assert len(hashed) == count
    want = {n: original(t) for n, t in program.base.base_tensors().items()}
    assert fingerprint.base_digests(program) == want
    with torch.no_grad():
        model.up.weight.mul_(2)
    with pytest.raises(BaseChangedError, match=r"up\.weight"):
        peftfx.save(program, tmp_path / "three")
    with pytest.raises(BaseMismatchError, match=r"up\.weight"):
        peftfx.load(peftfx.capture(model, (X,)), tmp_path / "one")
    assert len(hashed) == count + 1


def test_digests_leave_with_the_memory_that_they_are_of() -> None:
    def places() -> set[int]:
        return {printed.view[0] for printed in fingerprint._DIGESTS}  # pyright: ignore[reportPrivateUsage]

    program = adapted(net())
    mine = {t.data_ptr() for t in program.base.base_tensors().values()}
    fingerprint.base_digests(program)
    assert mine <= places()
    del program
    gc.collect()
    other = adapted(net())
    fingerprint.base_digests(other)
    kept = {t.data_ptr() for t in other.base.base_tensors().values()}
    assert kept <= places() and not (mine - kept) & places()


def test_what_has_no_fingerprint_is_hashed_every_time() -> None:
    program = peftfx.capture(net(frozen=False), (X,))
    assert program.prints is not None and set(program.prints.base) == {"unread"}
    before = fingerprint.base_digests(program)
    with torch.no_grad():
        program.module.get_parameter("down.weight").data.mul_(2)
    after = fingerprint.base_digests(program)
    assert [n for n in before if before[n] != after[n]] == ["down.weight"]
