"""FAR against its equations: priming, the choice of learners, two dense parts, and one again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.passes.selective.far import PrimedDelta
from peftfx.rewriter.edits.linear.sparse import SliceDelta
from peftfx.rewriter.errors import MetaTensorError, OptionError, SelectorError

from ..models import batch, first, moved, randomise
from ..zoo import ZOO

ROWS = {"encoder": ("fc1",), "decoder": ("gate", "up")}
COLUMNS = {"encoder": "fc2", "decoder": "down"}


def tensors(program: peftfx.Program) -> dict[str, dict[str, Tensor]]:
    """What branches hold, by the name of the stored tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for attachment in program.attachments:
        branch = program.branch(attachment)
        name = attachment.path.removeprefix("peftfx.far.").removesuffix(".expression")
        found[name] = {n: p.detach() for n, p in branch.named_parameters()}
        if isinstance(branch, SliceDelta):
            found[name]["indices"] = branch.indices
    return found


def baked(program: peftfx.Program) -> peftfx.Program:
    return peftfx.run(program, peftfx.controllers(program).finish())


def changed(model: nn.Module, found: dict[str, dict[str, Tensor]], columns: str) -> nn.Module:
    """The plain model with the learners' rows and columns in their places."""
    other = copy.deepcopy(model)
    held = dict(other.named_parameters())
    with torch.no_grad():
        for name, t in found.items():
            if "indices" not in t:
                held[name].add_(t["w"])
            elif name.endswith(f"{columns}.weight"):
                held[name][:, t["indices"].long()] += t["values"]
            else:
                held[name][t["indices"].long()] += t["values"]
    return other


def test_both_stages_equal_their_reference(hand: Any) -> None:
    name, model, base = hand
    inputs = batch(4, 11, pad=3)
    primed = randomise(peftfx.run(base, "far{share=0.25}"), 0.3)
    assert primed.history[-1].certificate.kind == "identity"
    far = baked(primed)
    for program in (primed, far, randomise(far.fork(), 0.3), peftfx.run(far, "lower")):
        want = first(changed(model, tensors(program), COLUMNS[name])(**inputs)).detach()
        got = first(program(**inputs)).detach()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert moved(first(base(**inputs)), got) > 0.001
        folded = peftfx.run(program, "fold")
        other = copy.deepcopy(model)
        other.load_state_dict(folded.export_state_dict(), strict=True)
        torch.testing.assert_close(first(other(**inputs)).detach(), want, rtol=1e-4, atol=1e-5)


def test_learners_are_the_neurons_whose_rows_moved_most(hand: Any) -> None:
    name, _, base = hand
    program = randomise(peftfx.run(base, "far{share=0.25}"), 0.3)
    w = {n: t["w"] for n, t in tensors(program).items()}

    def moved_by(layer: int, more: str = "") -> Tensor:
        rows = sum(w[f"layers.{layer}.{m}.weight"].abs().sum(1) for m in ROWS[name])
        last = w[f"layers.{layer}.{COLUMNS[name]}.weight"].abs().sum(0) if more else 0
        return torch.as_tensor(rows + last)

    def chosen(settled: peftfx.Program, layer: int) -> list[int]:
        found = tensors(settled)
        columns = found[f"layers.{layer}.{COLUMNS[name]}.weight"]["indices"].tolist()
        for matrix in ROWS[name]:
            assert found[f"layers.{layer}.{matrix}.weight"]["indices"].tolist() == columns
        return columns

    settled = baked(program)
    count = 16  # of 64
    for layer in (0, 1):
        assert chosen(settled, layer) == sorted(moved_by(layer).topk(count).indices.tolist())
    for text, more in (("far{share=0.25,metric=all}", "all"), ("far{share=0.25,scope=model}", "")):
        other = peftfx.run(base, text)
        with torch.no_grad():
            for attachment in other.attachments:
                target: Any = other.branch(attachment)
                target.w.copy_(w[target.piece.name])
        other = baked(other)
        if more:
            got = chosen(other, 0)
            assert got == sorted(moved_by(0, more).topk(count).indices.tolist())
            continue
        both = torch.cat([moved_by(0), moved_by(1)]).topk(2 * count).indices
        assert chosen(other, 0) == sorted(both[both < 64].tolist())
        assert chosen(other, 1) == sorted((both[both >= 64] - 64).tolist())


def test_what_learners_learnt_stays_or_starts_again(captured: Any) -> None:
    _, base = captured["encoder"]
    for text, kept in (("far{share=0.25}", True), ("far{share=0.25,keep=false}", False)):
        primed = randomise(peftfx.run(base, text), 0.3)
        w, settled = tensors(primed), tensors(baked(primed))
        for name, t in settled.items():
            axis = int(name.endswith("fc2.weight"))
            want = w[name]["w"].index_select(axis, t["indices"])
            assert torch.equal(t["values"], want if kept else torch.zeros_like(want))


def test_counts_and_states_are_those_of_the_learners(captured: Any) -> None:
    _, base = captured["encoder"]
    far = baked(randomise(peftfx.run(base, "far{share=0.25}"))).train()
    neurons, width, layers = 16, 32, 2
    want = layers * neurons * (2 * width + 1)
    assert sum(p.numel() for p in far.trainable_parameters()) == want
    bare = baked(randomise(peftfx.run(base, "far{share=0.25,bias=false}")))
    assert sum(p.numel() for p in bare.trainable_parameters()) == layers * neurons * 2 * width
    stored = {n: p.detach().clone() for n, p in base.module.named_parameters()}
    optimizer = torch.optim.AdamW(far.trainable_parameters(), lr=0.05, weight_decay=0.1)
    for seed in range(3):
        first(far(**batch(seed=seed))).pow(2).mean().backward()
        optimizer.step(), optimizer.zero_grad()
    states = [t for s in optimizer.state.values() for n, t in s.items() if n != "step"]
    assert sum(t.numel() for t in states) == 2 * want
    folded = peftfx.run(far.eval(), "fold").export_state_dict()
    for name, before in stored.items():
        t = tensors(far).get(name)
        rows = torch.zeros(before.shape, dtype=torch.bool)
        if t is not None:
            rows.index_fill_(int(name.endswith("fc2.weight")), t["indices"].long(), True)
        assert torch.equal(folded[name][~rows], before[~rows])


def test_lowered_backward_is_that_of_two_dense_parts(captured: Any) -> None:
    """The paper's own form: permuted, split, and multiplied apart; and less is kept."""
    model, base = captured["encoder"]
    far = baked(randomise(peftfx.run(base, "far{share=0.25}"), 0.3)).eval()
    lowered = peftfx.run(far, "lower").eval()
    for program in (far, lowered):
        first(program(**batch())).square().sum().backward()
    pairs = zip(far.trainable_parameters(), lowered.trainable_parameters(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad)
    assert lowered.memory(4, 32).saved < far.memory(4, 32).saved
    t = tensors(far)
    index = t["layers.0.fc1.weight"]["indices"].long()
    rest = torch.tensor([n for n in range(64) if n not in index.tolist()])
    x = torch.randn(5, 32, dtype=torch.float64)
    with torch.no_grad():
        whole = changed(model, t, "fc2").double()
        one, two = whole.get_submodule("layers.0.fc1"), whole.get_submodule("layers.0.fc2")
        assert isinstance(one, nn.Linear) and isinstance(two, nn.Linear)
        parts = two.bias.clone()
        for rows in (index, rest):
            inner = F.gelu(F.linear(x, one.weight[rows], one.bias[rows]))
            parts = parts + F.linear(inner, two.weight[:, rows])
        torch.testing.assert_close(parts, two(F.gelu(one(x))), rtol=1e-13, atol=1e-13)


def test_fused_and_transposed_matrices(zoo: Any, tmp_path: Path) -> None:
    """phi3 fuses gate and up; GPT-2 stores its matrices the other way round."""
    for name in ("phi3", "gpt2"):
        base, inputs = zoo[name], ZOO[name].inputs(3, 7)
        far = randomise(baked(randomise(peftfx.run(base, "far{share=0.5}"), 0.3)), 0.3)
        want = first(far(**inputs)).detach()
        folded = peftfx.run(far, "fold")
        torch.testing.assert_close(first(folded(**inputs)).detach(), want, rtol=1e-4, atol=1e-4)
        peftfx.save(far, tmp_path / name)
        loaded = peftfx.load(base, tmp_path / name)
        assert torch.equal(first(loaded(**inputs)), want) and loaded.text() == far.text()
        for attachment in far.attachments:
            branch: Any = far.branch(attachment)
            assert branch.slices == int(
                ("c_fc.weight" in attachment.path) or "down_proj" in attachment.path
            )
    fused = next(t for n, t in tensors(peftfx.run(zoo["phi3"], "far")).items() if "gate_up" in n)
    assert fused["w"].shape[0] == 2 * ZOO["phi3"].build().config.intermediate_size


def test_refusals(captured: Any, zoo: Any) -> None:
    _, base = captured["encoder"]
    for share in ("0", "1.5", "-0.1"):
        with pytest.raises(OptionError, match=r"share=.* must be in \(0, 1\]. Choose"):
            peftfx.run(base, f"far{{share={share}}}")
    with pytest.raises(OptionError, match=r"those of experts. Select dense"):
        peftfx.run(zoo["mixtral"], "far")
    with pytest.raises(SelectorError, match=r"the model has none.*Choose"):
        peftfx.run(zoo["mlp"], "far")
    with torch.device("meta"):
        empty = ZOO["gpt2"].make().eval()
    hollow = peftfx.capture(empty, kwargs=ZOO["gpt2"].inputs(3, 9))
    with pytest.raises(MetaTensorError, match=r"load_weights"):
        peftfx.run(hollow, "far;bake")


def test_a_branch_that_trains_already_is_left(captured: Any) -> None:
    _, base = captured["encoder"]
    both = peftfx.run(base, "train{where=layer==0 and ffn.up};far")
    assert both.history[-1].skipped[0][0] == "s0.layer0.ffn.block"
    assert "trains layers.0.fc1.weight already" in str(both.history[-1])
    assert all(isinstance(both.branch(a), PrimedDelta) for a in both.attachments)
