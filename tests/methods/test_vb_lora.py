"""VB-LoRA against its equations, baked, and with PEFT's training steps and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftfx
from peftfx.passes.reparameterized.vector_bank import VBLoRABranch
from peftfx.rewriter.errors import ArtifactError, BaseMismatchError, OptionError

from ..formats.peft_cases import base, inputs, output, program, write
from ..models import batch, first, moved, randomise
from .common import check, hooked

SMALL = "vectors=12,length=8"


def bank_of(program: peftfx.Program) -> Tensor:
    (path,) = program.shared
    return program.module.get_parameter(f"{path}.vectors")


def mixed(logits: Tensor, bank: Tensor, k: int) -> Tensor:
    """Piece by piece: the k largest logits, their softmax, and the sum of their vectors."""
    pieces: list[Tensor] = []
    for own in logits.flatten(0, 1):
        order = own.argsort(descending=True)[:k]
        weights = own[order].exp() / own[order].exp().sum()
        pieces.append(sum((w * bank[i] for w, i in zip(weights, order, strict=True)), 0 * bank[0]))
    return torch.stack(pieces).view(*logits.shape[:2], -1)


def factors(branch: Any, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    a = mixed(branch.logits_a.detach(), bank, k)
    b = mixed(branch.logits_b.detach(), bank, k)
    rows = [torch.cat([piece[r] for piece in b]) for r in range(b.shape[1])]
    return torch.stack([torch.cat(list(row)) for row in a]), torch.stack(rows, 1)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_it_is_its_equations(hand: Any, k: int) -> None:
    _, model, bare = hand
    recipe = f"vb_lora{{rank=3,topk={k},{SMALL},where=q|v|ffn.down}}"
    program = randomise(peftfx.run(bare, recipe), 0.5)
    bank, hooks = bank_of(program).detach(), dict[str, Callable[..., Tensor]]()
    for attachment in program.attachments:
        a, b = factors(program.branch(attachment), bank, k)
        hooks[attachment.site.removesuffix(".weight")] = lambda i, o, a=a, b=b: o + i[0] @ a.T @ b.T
    assert len(hooks) == 6
    data = batch(4, 11, pad=3)
    with hooked(model, hooks):
        want = model(**data)
    check(program, bare, want, data)
    folded = peftfx.run(program, "fold")
    assert not folded.attachments and not folded.shared
    torch.testing.assert_close(first(folded(**data)), first(want), rtol=1e-5, atol=1e-5)
    sizes = [program.sites[a.site].matrices for a in program.attachments]
    logits = sum(12 * 3 * (size + out) // 8 for _, out, size in sizes)
    assert sum(p.numel() for p in program.trainable_parameters()) == 12 * 8 + logits


def test_baked_it_keeps_the_largest_alone(captured: Any, tmp_path: Path) -> None:
    model, bare = captured["encoder"]
    program = randomise(peftfx.run(bare, f"vb_lora{{{SMALL}}}"), 0.5)
    want = first(program(**batch()))
    (bake,) = peftfx.controllers(program).finish()
    baked = peftfx.run(program, [bake])
    torch.testing.assert_close(first(baked(**batch())), want, rtol=1e-5, atol=1e-6)
    count = [sum(p.numel() for p in each.trainable_parameters()) for each in (program, baked)]
    assert (count[1] - 96) * 6 == count[0] - 96  # 2 of 12 logits, and all of the bank
    assert not peftfx.controllers(baked).finish().passes
    peftfx.save(baked, tmp_path / "a")
    held = load_file(tmp_path / "a" / "tensors.safetensors")
    assert {t.dtype for t in held.values()} == {torch.float32, torch.uint8}
    again = peftfx.load(model, tmp_path / "a")
    assert torch.equal(first(again(**batch())), first(baked(**batch())))
    torch.testing.assert_close(first(peftfx.run(baked, "fold")(**batch())), want, atol=1e-5, rtol=0)
    baked = baked.train()
    first(baked(**batch())).square().mean().backward()  # trains on
    assert all(p.grad is not None for p in baked.trainable_parameters())


def test_logits_learn_faster_than_the_bank(captured: Any) -> None:
    program = peftfx.run(captured["encoder"][1], f"vb_lora{{{SMALL}}}")
    groups = peftfx.controllers(program).param_groups(lr=0.001)
    rates = {p.dim(): group["lr"] for group in groups for p in group["params"]}
    assert rates == {2: 0.001, 3: pytest.approx(0.01)}


def test_peft_trains_the_same(tmp_path: Path) -> None:
    """From one file, three steps of both."""
    import peft

    write("vblora", tmp_path / "a")
    theirs: Any = peft.PeftModel.from_pretrained(
        base("llama"), str(tmp_path / "a"), is_trainable=True
    )
    ours = peftfx.load_peft(program("llama"), tmp_path / "a")
    start = output(ours(**inputs("llama"))).detach()
    mine = torch.optim.SGD(ours.trainable_parameters(), lr=1.0)
    yours = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        got, want = output(ours(**inputs("llama"))), output(theirs(**inputs("llama")))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for optimizer, value in ((mine, got), (yours, want)):
            value.square().mean().backward()
            optimizer.step(), optimizer.zero_grad()
    assert moved(start, output(ours(**inputs("llama")))) > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["vblora", "vblora, largest"])
def test_files_of_peft_are_its_own_branches(case: str, tmp_path: Path) -> None:
    import peft

    write(case, tmp_path / "a")
    read = peftfx.load_peft(program("llama"), tmp_path / "a", name="theirs")
    branches = [read.branch(a) for a in read.attachments]
    assert len(read.shared) == 1 and all(isinstance(b, VBLoRABranch) for b in branches)
    peftfx.save(read, tmp_path / "b")
    again = peftfx.load(program("llama"), tmp_path / "b")
    assert torch.equal(output(again(**inputs("llama"))), output(read(**inputs("llama"))))
    trained = randomise(read, 0.3)
    peftfx.save_peft(trained, tmp_path / "c")
    theirs: Any = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path / "c")).eval()
    assert theirs.peft_config["default"].peft_type == "VBLORA"
    assert theirs.peft_config["default"].save_only_topk_weights == ("largest" in case)
    with torch.no_grad():
        got = output(theirs(**inputs("llama")))
    want = output(trained(**inputs("llama")))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("baked", [False, True])
def test_what_is_trained_here_is_a_bank_there(baked: bool, tmp_path: Path) -> None:
    import peft

    recipe = f"vb_lora{{rank=3,{SMALL},where=q|ffn.down}}" + (";bake" if baked else "")
    made = randomise(peftfx.run(program("llama"), recipe), 0.5)
    peftfx.save_peft(made, tmp_path / "a", task="CAUSAL_LM")
    theirs: Any = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path / "a")).eval()
    assert theirs.peft_config["default"].peft_type == "VBLORA"
    want = output(made(**inputs("llama")))
    with torch.no_grad():
        torch.testing.assert_close(output(theirs(**inputs("llama"))), want, rtol=1e-4, atol=1e-5)
    read = peftfx.load_peft(program("llama"), tmp_path / "a")
    torch.testing.assert_close(output(read(**inputs("llama"))), want, rtol=1e-4, atol=1e-5)
    assert not peftfx.save_peft(made, tmp_path / "plain", plain=True)  # one LoRA, nothing lost
    again = peftfx.load_peft(program("llama"), tmp_path / "plain")
    torch.testing.assert_close(output(again(**inputs("llama"))), want, rtol=1e-4, atol=1e-5)


def test_configurations_of_peft() -> None:
    import peft

    config = peft.VBLoRAConfig(
        num_vectors=12, vector_length=8, target_modules=["q_proj"], topk=3, init_logits_std=0.2
    )
    (pipeline,) = peftfx.from_peft_config(config).passes
    words = {"vectors": 12, "length": 8, "topk": 3, "std": 0.2, "rank": 4, "bound": 0.02}
    assert {n: getattr(pipeline, n) for n in words} == words


@pytest.mark.filterwarnings("ignore")
def test_wrong_files_are_refused(tmp_path: Path) -> None:
    write("vblora, largest", tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    right = load_file(path)
    places = next(n for n in right if n.endswith("A_topk_indices"))
    bank = "base_model.vblora_vector_bank"
    for changed, says in (
        ({places: right[places] + 200}, "in a bank of 12"),
        ({places: right[places][..., :2].contiguous()}, "2 for topk=3"),
        ({bank: right[bank][:, :4].contiguous()}, "Use the base"),
    ):
        save_file({**right, **changed}, path, {"format": "pt"})
        with pytest.raises((ArtifactError, BaseMismatchError), match=says):
            peftfx.load_peft(program("llama"), tmp_path / "a")
    save_file({n: t for n, t in right.items() if n != bank}, path, {"format": "pt"})
    with pytest.raises(ArtifactError, match="The file is not whole"):
        peftfx.load_peft(program("llama"), tmp_path / "a")


@pytest.mark.filterwarnings("ignore")
def test_weights_that_sum_above_one_are_read(tmp_path: Path) -> None:
    """The last weight is what is left of 1, in float32 sometimes less than nothing; PEFT gets NaN."""
    write("vblora, largest", tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    peaked = torch.tensor([1.0, 1e-7])
    for name in (n for n in tensors if n.endswith("_topk_weights")):
        tensors[name] = peaked.expand_as(tensors[name]).contiguous()
    save_file(tensors, path, {"format": "pt"})
    read = peftfx.load_peft(program("llama"), tmp_path / "a")
    assert output(read(**inputs("llama"))).isfinite().all()
    assert all(p.isfinite().all() for p in read.trainable_parameters())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("topk=20,vectors=12", "at most vectors=12"),
        ("length=0", "at least 1"),
        ("length=7", "length=7 does not divide its 32 outputs"),
        ("bound=0", "nothing would train"),
        ("save_only_topk_weights=true", "bake the adapter"),
    ],
)
def test_bad_options_are_refused(captured: Any, options: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        peftfx.run(captured["encoder"][1], f"vb_lora{{{options}}}")
