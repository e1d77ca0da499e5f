"""Combine: several adapters as one, equal to the true sum of what each changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.passes.merging.merge_formulas import RECIPES, Trim, merged
from peftfx.rewriter.errors import BaseMismatchError, MetaTensorError, OptionError, PassError

from ..models import Convolutional, batch, build, first, moved, randomise
from ..test_selecting import Experts

MEMBERS = (
    "lora{rank=2,name=a};lora{rank=3,alpha=5,rslora=true,name=b,seed=1,where=q|o};"
    "dora{rank=2,name=c,where=q|k}"
)


def changes(program: peftfx.Program) -> dict[str, np.ndarray[Any, Any]]:
    """What folding adds to each weight of a program with exact numbers."""
    before = program.base.export_state_dict()
    after = peftfx.run(program, "fold").export_state_dict()
    moves = {n: (after[n] - before[n]).numpy() for n in before}
    return {n: m for n, m in moves.items() if m.any()}


def equations(program: peftfx.Program) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """Adapter -> weight -> its change, by the papers' formulas."""
    stored = program.base.export_state_dict()
    scales = {"a": 16 / 2, "b": 5 / 3**0.5, "c": 16 / 2}
    found: dict[str, dict[str, np.ndarray[Any, Any]]] = {n: {} for n in scales}
    for attachment in program.attachments:
        own = {n: p.detach().numpy() for n, p in program.branch(attachment).named_parameters()}
        w = stored[attachment.site].numpy()
        change = scales[attachment.adapter] * own["b"] @ own["a"]
        if "m" in own:
            moved_ = w + change
            change = (own["m"] / np.linalg.norm(moved_, axis=1))[:, None] * moved_ - w
        found[attachment.adapter][attachment.site] = change
    return found


@pytest.fixture(scope="module")
def three(captured: Any) -> peftfx.Program:
    return randomise(peftfx.run(captured.double("block"), MEMBERS))


@pytest.mark.parametrize("method", ["linear", "cat", "arithmetic"])
def test_the_sum_is_the_true_one(three: peftfx.Program, method: str) -> None:
    """Of other ranks, scales, places and signs, and of LoRA with DoRA."""
    weights = {"a": 0.7, "b": -1.5, "c": 2.0}
    text = f"combine{{names=[a,b,c],weights=[0.7,-1.5,2],method={method}}}"
    combined = peftfx.run(three, text)
    got, each = changes(combined), equations(three)
    assert got.keys() == {w for own in each.values() for w in own}
    for name, change in got.items():
        want = sum(weights[n] * own.get(name, 0.0) for n, own in each.items())
        np.testing.assert_allclose(change, want, rtol=0, atol=1e-13 * np.abs(want).max())
    branches: list[Any] = [combined.branch(a) for a in combined.attachments]
    ranks = [len(b.a) for b in branches if hasattr(b, "a")]
    assert sorted(set(ranks)) == [2, 3]  # v: a's own; o: b's own; q and k, with DoRA, are dense
    assert combined.adapters == ("a", "b", "c", "combined")
    assert {a.adapter for a in combined.attachments} == {"combined"}


def test_a_sum_of_ones_is_the_program_with_all(three: peftfx.Program) -> None:
    want = first(three(**batch()))
    got = first(peftfx.run(three, "combine")(**batch()))
    assert moved(want, got) < 1e-12
    assert moved(want, first(three.base(**batch()))) > 0.1


def test_low_rank_changes_lie_side_by_side(captured: Any) -> None:
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, "lora{rank=2,name=a};lora{rank=3,name=b,seed=1};"
                                         "adalora{rank=2,target=1,name=c}"))  # fmt: skip
    combined = peftfx.run(program, "combine{weights=[1,-2,0.5]}")
    branch: Any = combined.branch(combined.attachments[0])
    assert branch.a.shape[0] == 7 and branch.scale == 1.0
    figures = combined.history[-1].certificate.measured
    assert 0 < figures["error"] < 1e-6


@pytest.mark.parametrize(
    ("name", "where"),
    [("fused", "q|v|ffn.up"), ("experts", "experts"), ("conv", "conv"),
     ("tied", "embedding|head|q")],
)  # fmt: skip
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_places(captured: Any, name: str, where: str, method: str) -> None:
    """Parts of fused weights, tables, convolutions, experts; each against two folds."""
    torch.manual_seed(0)
    if name == "conv":
        base = peftfx.capture(Convolutional().eval(), (torch.randn(2, 3, 8, 8),))
    elif name == "experts":
        base = peftfx.capture(Experts().eval(), (torch.randn(2, 5, 16),))
    else:
        base = captured[name][1]
    text = f"lora{{rank=1,name=a,where={where}}};lora{{rank=2,name=b,seed=1,where={where}}}"
    program = randomise(peftfx.run(base, text), 0.3)
    fold = "fold{tied=untie}" if name == "tied" else "fold"
    one, two = (peftfx.run(program.only((n,)), fold).base_tensors() for n in "ab")
    start = base.base_tensors()
    got = peftfx.run(peftfx.run(program, f"combine{{method={method}}}"), fold).base_tensors()
    assert got.keys() == one.keys() and any(not torch.equal(got[n], one[n]) for n in got)
    for weight, tensor in got.items():
        if weight not in start:  # untied: a name of its own
            continue
        old = start[weight]
        a, b = one[weight] - old, two[weight] - old
        want = a + b
        if method == "ties":  # both entries where they agree, else the larger one, over the number
            agree = (a * b > 0) | (a == 0) | (b == 0)
            count = 1.0 + ((a * b) > 0)
            want = torch.where(agree, want / count, torch.where(a.abs() > b.abs(), a, b))
        scale = float(want.abs().max()) or 1.0
        close = (tensor - old - want).abs() < 2e-5 * max(scale, float(old.abs().max()))
        assert close.float().mean() > (0.995 if method == "ties" else 0.9999), weight


def test_scales_count_with_their_bias(captured: Any) -> None:
    """(IA)3 beside LoRA: `(s - 1) (W, b)`."""
    _, base = captured["encoder"]
    program = randomise(peftfx.run(base, "ia3{name=i};lora{rank=2,name=a}"), 0.2)
    combined = peftfx.run(program, "combine{weights=[0.5,2]}")
    start, got = base.base_tensors(), peftfx.run(combined, "fold").base_tensors()
    one, two = (peftfx.run(program.only((n,)), "fold").base_tensors() for n in "ia")
    moved_names = [n for n in start if not torch.equal(got[n], start[n])]
    assert any(n.endswith("key.bias") for n in moved_names)
    for name in moved_names:
        want = start[name] + 0.5 * (one[name] - start[name]) + 2 * (two[name] - start[name])
        torch.testing.assert_close(got[name], want, rtol=0, atol=1e-6)
    inputs = batch()
    taken = combined.without("combined")
    assert torch.equal(first(taken(**inputs)), first(program(**inputs)))


def _dense(program: peftfx.Program, name: str = "layers.0.q_proj.weight") -> Tensor:
    at = next(a for a in program.attachments if (a.adapter, a.site) == ("combined", name))
    branch: Any = program.branch(at)
    return branch.delta().detach()


def test_sparse_sums_by_their_papers(three: peftfx.Program) -> None:
    """TIES, breadcrumbs and magnitude pruning, in numpy; what is random keeps the right sizes."""
    a, b, c = (own["layers.0.q_proj.weight"] for own in equations(three).values())
    w = np.array([1.0, 0.5, 2.0])

    def top(x: Any, share: float) -> Any:
        cut = np.sort(np.abs(x).ravel())[-int(share * x.size)]
        return np.where(np.abs(x) >= cut, x, 0.0)

    kept = np.stack([top(x, 0.3) * v for x, v in zip((a, b, c), w, strict=True)])
    sign = np.sign(kept.sum(0))
    agree = (np.sign(kept) == sign) & (kept != 0)
    weight = (agree * w[:, None, None]).sum(0)
    ties = (kept * agree).sum(0) / np.where(weight == 0, 1, weight)
    options = "weights=[1,0.5,2],density=0.3"

    def got(text: str) -> Any:
        return _dense(peftfx.run(three, f"combine{{{options},{text}}}")).numpy()

    np.testing.assert_allclose(got("method=ties"), ties, atol=1e-14)
    np.testing.assert_allclose(got("method=ties,normalize=false,scale=2"), 2 * ties * np.where(
        weight == 0, 1, weight), atol=1e-13)  # fmt: skip
    np.testing.assert_allclose(got("method=magnitude_prune"), kept.sum(0), atol=1e-14)
    small = [top(x, 0.3 + 0.1) - top(x, 0.1) for x in (a, b, c)]
    want = sum(x * v for x, v in zip(small, w, strict=True))
    np.testing.assert_allclose(got("method=breadcrumbs,gamma=0.1"), want, atol=1e-14)


@pytest.mark.parametrize("method", ["dare", "della"])
def test_random_ones_are_unbiased_and_repeat(three: peftfx.Program, method: str) -> None:
    def run(seed: int) -> Tensor:
        text = f"combine{{names=[a],method={method},density=0.5,epsilon=0.4,seed={seed}}}"
        return _dense(peftfx.run(three, text))

    change = torch.from_numpy(equations(three)["a"]["layers.0.q_proj.weight"])
    got = run(1)
    assert torch.equal(got, run(1)) and not torch.equal(got, run(2))
    drawn = torch.Generator().manual_seed(0)
    recipe, trim = RECIPES[method], Trim(0.5, epsilon=0.4)
    mean = sum(merged([change], [1.0], recipe, [trim], generator=drawn) for _ in range(400)) / 400
    if method == "dare":
        ratio = float((mean * change).sum() / change.square().sum())
        assert 0.95 < ratio < 1.05
        left = got != 0
        torch.testing.assert_close(got[left], 2 * change[left], rtol=1e-6, atol=0)
        return
    left = got != 0  # larger ones stay more often, and are divided by less
    factor = (got / change)[left]
    assert factor.min() > 1 / 0.95 and factor.max() < 1 / 0.05
    large = change.abs() > change.abs().median()
    assert left[large].float().mean() > left[~large].float().mean() + 0.2


def test_slerp_goes_along_the_sphere(three: peftfx.Program) -> None:
    a, b, _ = (own.get("layers.0.q_proj.weight") for own in equations(three).values())
    assert a is not None and b is not None
    angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    want = (np.sin(0.75 * angle) * a + np.sin(0.25 * angle) * b) / np.sin(angle)
    got = _dense(peftfx.run(three, "combine{names=[a,b],method=slerp,weights=[3,1]}"))
    np.testing.assert_allclose(got.numpy(), want, atol=1e-12)
    with pytest.raises(PassError, match=r"here are 3 adapters.*Choose two"):
        peftfx.run(three, "combine{method=slerp}")


@pytest.mark.parametrize("text", ["rank=3", "energy=0.8", "method=svd", "method=ties,rank=2"])
def test_what_compressing_loses_is_told(three: peftfx.Program, text: str) -> None:
    names = "names=[a,b]" if "svd" in text else "names=[a,b,c]"
    combined = peftfx.run(three, f"combine{{{names},{text}}}")
    exact_text = "method=ties" if "ties" in text else "method=linear"
    whole = peftfx.run(three, f"combine{{{names},{exact_text}}}")
    worst = 0.0
    for attachment in combined.attached_by("combined"):
        branch: Any = combined.branch(attachment)
        exact = _dense(whole, attachment.site).numpy()
        size = np.linalg.svd(exact)[1]
        rank = branch.a.shape[0]
        off = np.linalg.norm(branch.delta().detach().numpy() - exact) / np.linalg.norm(exact)
        best = np.sqrt((size[rank:] ** 2).sum() / (size**2).sum())
        np.testing.assert_allclose(off, best, atol=1e-7)
        worst = max(worst, off)
        if text.startswith("energy"):
            held = (size**2).cumsum() / (size**2).sum()
            assert rank == int((held < 0.8 - 1e-12).sum()) + 1
    assert abs(combined.history[-1].certificate.measured["error"] - worst) < 1e-7
    assert worst > 0.1 and "is lost at its rank" in str(combined.history[-1])


def test_saved_replayed_and_written_for_peft(captured: Any, tmp_path: Path) -> None:
    model, base = captured["block"]
    program = randomise(peftfx.run(base, MEMBERS))
    inputs = batch(5, 11)
    combined = peftfx.run(program, "combine{weights=[1,-1,0.5],method=dare,density=0.5,rank=4}")
    want = first(combined(**inputs))
    assert all(c.holds for c in combined.verify())
    peftfx.save(combined, tmp_path / "all")
    loaded = peftfx.load(model, tmp_path / "all")
    assert torch.equal(first(loaded(**inputs)), want)
    assert torch.equal(first(loaded.without("combined")(**inputs)), first(program(**inputs)))
    peftfx.save(combined, tmp_path / "alone", adapters=["combined"])
    alone = peftfx.load(base, tmp_path / "alone")
    assert alone.adapters == ("combined",) and torch.equal(first(alone(**inputs)), want)
    assert torch.equal(first(combined.without("a")(**inputs)), want)  # it needs no member
    peftfx.save_peft(combined, tmp_path / "peft", "combined")
    read = peftfx.load_peft(base, tmp_path / "peft")
    torch.testing.assert_close(first(read(**inputs)), want)
    assert len(combined.trainable_parameters()) == 2 * len(combined.attachments)


def test_sources_are_saved_adapters_or_programs(captured: Any, tmp_path: Path) -> None:
    """Two DoRAs at one weight fit into no program."""
    _, base = captured["block"]
    one = randomise(peftfx.run(base, "dora{where=q}"), seed=1)
    two = randomise(peftfx.run(base, "dora{where=q|k}"), seed=2)
    peftfx.save(one, tmp_path / "one")
    combined = peftfx.run(
        base, "combine{names=[x,y],weights=[0.5,0.5]}", sources=[tmp_path / "one", two]
    )
    start = base.base_tensors()
    folds = [peftfx.run(p, "fold").base_tensors() for p in (one, two, combined)]
    for name, old in start.items():
        mean = (folds[0][name] + folds[1][name]) / 2
        torch.testing.assert_close(folds[2][name], mean, rtol=0, atol=1e-6)
        assert torch.equal(old, start[name])
    assert combined.adapters == ("combined",) and len(combined.attachments) == 2
    other = peftfx.capture(build("tied"), kwargs=batch())
    with pytest.raises(BaseMismatchError, match="other base weights"):
        peftfx.run(other, "combine", sources=[one])
    with pytest.raises(PassError, match="Say names="):
        peftfx.run(base, "combine", sources=[one, two])
    with pytest.raises(PassError, match="a source is a directory"):
        peftfx.run(base, "combine", sources=[{}])


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("combine{names=[a,nope]}", PassError, r"no adapter 'nope'.*nearest"),
        ("combine{names=[a,a]}", OptionError, "different adapters"),
        ("combine{names=[a,b],weights=[1]}", OptionError, "1 weights for 2 adapters"),
        ("combine{weights=[1,2]}", OptionError, "2 weights for 3 adapters"),
        ("combine{method=ties,density=1.5}", OptionError, "Choose one from 0 to 1"),
        ("combine{method=breadcrumbs,gamma=-0.1}", OptionError, "Choose one from 0 to 1"),
        ("combine{method=della,density=0.9}", OptionError, "Choose an epsilon"),
        ("combine{rank=64}", PassError, r"no change has a rank above 32.*Choose"),
        ("combine{names=[a,b],rank=6}", PassError, "no change has a rank above 5"),
        ("combine{rank=0}", OptionError, "at least 1"),
        ("combine{energy=1.5}", OptionError, r"in \(0, 1\]"),
        ("combine{method=nuslerp}", OptionError, "method"),
        ("combine{names=[a,b],method=slerp,weights=[1,-1]}", PassError, "at least 0"),
        ("serial_adapter{bottleneck=2,norms=false};combine", PassError, "no change of a weight"),
        ("bitfit;combine{names=[bitfit]}", PassError, "no adapter 'bitfit' with branches"),
        ("combine{name='no name'}", OptionError, "letters"),
        ("combine{name=a}", PassError, "a"),
    ],
)  # fmt: skip
def test_refusals(three: peftfx.Program, text: str, error: type[Exception], match: str) -> None:
    before = three.text()
    with pytest.raises(error, match=match):
        peftfx.run(three, text)
    assert three.text() == before


def test_no_program_without_adapters_or_values(captured: Any) -> None:
    with pytest.raises(PassError, match="Insert some first"):
        peftfx.run(captured["block"][1], "combine")
    with torch.device("meta"):
        hollow = peftfx.capture(Net().eval(), (torch.randn(5, 24),))
    with pytest.raises(MetaTensorError, match="load_weights"):
        peftfx.run(peftfx.run(hollow, "lora{where=other,rank=2}"), "combine")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(24, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


@pytest.mark.filterwarnings("ignore")
def test_pefts_sum_is_none(tmp_path: Path) -> None:
    """PEFT's `linear` multiplies sums of factors; with its adapters, ours is the sum."""
    import peft

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(5, 24)
    base = peftfx.capture(net, (x,))
    model: Any = peft.get_peft_model(
        net, peft.LoraConfig(r=4, target_modules=["one", "two"]), adapter_name="a"
    )
    model.add_adapter("b", peft.LoraConfig(r=4, target_modules=["one", "two"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(str(tmp_path))
    layer = model.base_model.model.one
    true = 0.6 * layer.get_delta_weight("a") - 0.4 * layer.get_delta_weight("b")
    model.add_weighted_adapter(["a", "b"], [0.6, -0.4], "sum", combination_type="linear")
    program = base
    for name in "ab":
        program = peftfx.load_peft(program, tmp_path / name, name)
    ours = _dense(peftfx.run(program, "combine{weights=[0.6,-0.4]}"), "one.weight")
    theirs = layer.get_delta_weight("sum")
    assert (theirs - true).norm() > 0.5 * true.norm()
    assert (ours - true).norm() < 1e-6 * true.norm()
