"""What channel pruning can cut: other branches, mixed channels, heads, scales of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.passes.reparameterized.lora import LoRABranch
from peftfx.rewriter.branches.branch import Axes, Delta, InputScale, RowScale
from peftfx.rewriter.edits.edit import Editor
from peftfx.rewriter.edits.folding.fold import fold
from peftfx.rewriter.edits.structure.axes import channels
from peftfx.rewriter.errors import PassError
from peftfx.rewriter.pipeline.method import Method
from peftfx.rewriter.program.sites import AttentionSite, FeedForwardSite, LinearSite
from peftfx.rewriter.tracing.propagate import propagate

from ..models import batch, first, moved, randomise
from ..recipes import METHODS, RECIPES
from ..zoo import ZOO
from .test_channel_pruning import PRUNE, Linear, Pair, inputs_of, kept_of, masked, site_of


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


@pytest.mark.parametrize(
    "recipe",
    ["prefix_tuning{length=3};channel_pruning", "prompt_tuning{length=3};channel_pruning",
     "channel_pruning;prompt_tuning{length=3}", "lora{where=ffn};lower;channel_pruning",
     "lora{where=ffn};channel_pruning;lower", "causal{length=32};channel_pruning",
     "bitfit;channel_pruning", "channel_pruning;bitfit"],
)  # fmt: skip
def test_it_stacks(pair: Pair, recipe: str) -> None:
    """The other passes commute with the cut: channels are the same with and without them."""
    _, base = pair("decoder", torch.float64)
    program = randomise(peftfx.run(base, recipe), 0.0)
    others = [p for p in recipe.split(";") if not p.startswith("channel_pruning")]
    swapped = (
        [*others, "channel_pruning"]
        if recipe.startswith("channel")
        else ["channel_pruning", *others]
    )
    other = peftfx.run(base, ";".join(swapped))
    inputs = batch(2, 12)
    if "causal" in recipe:
        del inputs["attention_mask"]
    want, got = first(other(**inputs)), first(program(**inputs))
    limit = 1e-12 * float(want.detach().abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=limit)


class Normed(nn.Module):
    """A feed-forward block with a norm over its inner channels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(8, 24), nn.Linear(24, 8), nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.norm(F.gelu(self.fc1(x))))


class Both(nn.Module):
    """Inner channels that are an output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.gelu(self.fc1(x))
        return x + self.fc2(h), h


class Interleaved(nn.Module):
    """Gate and up are every other feature of one weight, and the inner axis is viewed as two."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.fc1, self.fc2 = nn.Linear(8, 48), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        h = F.silu(h[..., ::2]) * h[..., 1::2]
        if self.heads:
            h = h.unflatten(-1, (self.heads, -1)).transpose(-1, -2).flatten(-2)
        return x + self.fc2(h)


def small(model: nn.Module) -> Any:
    torch.manual_seed(0)
    return peftfx.capture(model.eval(), (torch.randn(3, 5, 8),))


@pytest.mark.parametrize(
    ("model", "message"),
    [(Normed, "layer_norm.default mixes them"), (Both, "they are an output of the model"),
     (lambda: Interleaved(4), "a view spreads them over several axes")],
)  # fmt: skip
def test_what_mixes_channels_is_refused(model: Any, message: str) -> None:
    program = small(model())
    with pytest.raises(PassError, match=message):
        peftfx.run(program, "channel_pruning")


def test_interleaved_features_stay_interleaved() -> None:
    torch.manual_seed(0)
    model = Interleaved(0).eval()
    program = small(model)
    (site,) = program.sites.of("feedforward")
    pruned = peftfx.run(randomise(peftfx.run(program, "lora{rank=2,where=ffn}")), PRUNE)
    assert pruned.sites[site.up].features == tuple(range(1, 30, 2))  # pyright: ignore
    x = torch.randn(2, 7, 8)
    bare = peftfx.run(program, PRUNE)
    mask = torch.zeros(24)
    mask[kept_of(bare)[site.id]] = 1
    want = masked(model, {"fc2": Linear(mask=mask)}, {"x": x})
    torch.testing.assert_close(bare(x), want, rtol=1e-6, atol=1e-6)


def test_experts_and_shared_weights() -> None:
    mixed = peftfx.capture(ZOO["qwen2_moe"].build(), kwargs=inputs_of("qwen2_moe"))
    pruned = peftfx.run(mixed, PRUNE)
    assert len(pruned.history[-1].edited) == 2
    assert all("experts share one tensor" in reason for _, reason in pruned.history[-1].skipped)
    with pytest.raises(PassError, match=r"no block can be cut\. its 5 experts"):
        peftfx.run(peftfx.capture(ZOO["mixtral"].build(), kwargs=inputs_of("mixtral")), PRUNE)
    albert = peftfx.capture(ZOO["albert"].build(), kwargs=inputs_of("albert"))
    once = peftfx.run(albert, PRUNE)
    assert len(once.history[-1].edited) == 1
    assert "shares its weights with" in once.history[-1].skipped[0][1]


def test_a_branch_without_axes_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base = pair("encoder")
    program = peftfx.run(base, "lora{where=ffn.down and layer in [0]}")
    monkeypatch.setattr(LoRABranch, "axes", {})
    pruned = peftfx.run(program, PRUNE)
    ((site, reason),) = pruned.history[-1].skipped
    assert site == "s0.layer0.ffn.block" and "does not say which axes" in reason
    with pytest.raises(PassError, match=r"peftfx\.lora\.layers\.0\.fc2\.delta"):
        peftfx.run(program, "channel_pruning{where=layer in [0]}")


def test_the_editor_guards_its_cut(pair: Pair) -> None:
    _, base = pair("encoder")
    edit = Editor(base.fork())
    site = base.sites.of("feedforward")[0]
    assert isinstance(site, FeedForwardSite)
    group = edit.channels(site)
    assert group.count == 64 and set(group.stored) == {
        "layers.0.fc1.weight", "layers.0.fc1.bias", "layers.0.fc2.weight",
    }  # fmt: skip
    for wrong in ([], [64], [-1]):
        with pytest.raises(PassError, match="channels to keep"):
            edit.cut(group, wrong)
    assert channels(base, site).count == 64


@pytest.mark.parametrize(("name", "keep"), [("decoder", (2, 3)), ("gpt2", (0, 2))])
def test_heads_are_channels_as_well(pair: Pair, name: str, keep: tuple[int, ...]) -> None:
    """The same analysis: heads with their shared keys and values, rotation, fused projections."""
    _, base = pair(name, torch.float64)
    program = randomise(peftfx.run(base, "lora{rank=2,where=q|k|v|o};ia3"), 0.2)
    site = program.sites.select("attention and self", ("attention",))[0]
    assert isinstance(site, AttentionSite)
    o = site_of(program, site.o)
    gone = [i for i in range(o.in_features) if i // site.head_dim not in keep]
    hidden = program.fork()
    with torch.no_grad():
        weight = hidden.module.get_parameter(o.weight)
        weight[gone if o.in_out else slice(None), slice(None) if o.in_out else gone] = 0
        hidden.module.get_parameter(f"peftfx.lora.{o.id.removesuffix('.weight')}.delta.a")[
            :, gone
        ] = 0
    edit = Editor(program.fork())
    group = edit.channels(site)
    if site.kv_heads < site.heads:
        assert group.roots.tolist() == [0, 0, 2, 2]
        with pytest.raises(PassError, match="goes only together with"):
            edit.cut(group, [1, 2, 3])
    edit.cut(group, keep)
    edit.finish()
    propagate(edit.program)
    after = edit.program.sites[site.id]
    assert isinstance(after, AttentionSite) and after.heads == len(keep)
    inputs = inputs_of(name, 2, 12)
    want, got = first(hidden(**inputs)).detach(), first(edit.program(**inputs)).detach()
    assert float((want - got).abs().max()) < 1e-12 * float(want.abs().max())
    assert moved(first(program(**inputs)), got) > 0.001


def test_what_a_norm_mixes_is_no_channel(pair: Pair) -> None:
    _, base = pair("decoder")
    edit = Editor(base.fork())
    (site,) = (s for s in base.sites.of("feedforward") if s.layer == 0)
    assert isinstance(site, FeedForwardSite)
    wide = replace(site, down=site.up)  # the inputs of up: the residual width
    with pytest.raises(PassError, match=r"mean\.dim mixes them"):
        edit.channels(wide)


class Rows(RowScale):
    """`W' = m (W + B A) / |W + B A|`, row by row."""

    axes: ClassVar[Axes] = {"a": ("rank", "in"), "b": ("out", "rank"), "m": ("out",)}

    def __init__(self, site: LinearSite) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, site.in_features, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(site.out_features, 2, dtype=torch.float64))
        self.m = nn.Parameter(torch.rand(site.out_features, dtype=torch.float64))

    def branch(self, x: Tensor) -> Tensor:
        return (x @ self.a.T) @ self.b.T

    def delta(self) -> Tensor:
        return self.b @ self.a

    def rows(self, weight: Tensor) -> Tensor:
        return self.m / (weight + self.delta()).norm(dim=1)


@pytest.mark.parametrize("name", ["decoder", "phi3", "gpt2"])
def test_row_scales(pair: Pair, name: str) -> None:
    """Rows go with their magnitudes; columns do not go, because every row's norm has them."""
    _, base = pair(name, torch.float64)
    torch.manual_seed(0)

    def with_rows(role: str) -> Any:
        edit = Editor(base.fork(), "rows")
        for site in base.sites.select(role, ("linear",)):
            assert isinstance(site, LinearSite)
            edit.rescale(site, Rows(site))
        edit.finish()
        propagate(edit.program)
        return edit.program

    program = with_rows("ffn.up")
    pruned = peftfx.run(program, PRUNE)
    hidden = program.fork()
    with torch.no_grad():
        for site_id, keep in kept_of(pruned).items():
            block: Any = program.sites[site_id]
            down = site_of(program, block.down)
            gone = sorted(set(range(down.in_features)) - set(keep))
            weight = hidden.module.get_parameter(down.weight)
            weight[gone if down.in_out else slice(None), slice(None) if down.in_out else gone] = 0
    inputs = inputs_of(name, 2, 12)
    want, got = first(hidden(**inputs)).detach(), first(pruned(**inputs)).detach()
    assert float((want - got).abs().max()) < 1e-12 * float(want.abs().max())
    assert moved(first(program(**inputs)), got) > 0.001
    edit = Editor(pruned.fork())
    assert not fold(edit, [a.path for a in pruned.attachments], "refuse").kept
    edit.finish()
    torch.testing.assert_close(first(edit.program(**inputs)).detach(), got, rtol=0, atol=1e-12)
    with pytest.raises(PassError, match="rescales rows by what depends on all of their columns"):
        peftfx.run(with_rows("ffn.down"), PRUNE)


class Mask(InputScale):
    """A fixed mask on what enters a linear and its branches."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.mask: Tensor

    def scale(self) -> Tensor:
        return self.mask


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_cut_in_place_or_refuses(pair: Pair, method: str) -> None:
    """At the feed-forward block where it works on linears, else at its own place."""
    _, base = pair("decoder", torch.float64)
    *before, item = peftfx.parse(RECIPES[method])
    assert isinstance(item, Method)
    if "linear" in item.kinds:
        item = replace(item, where="ffn")
    program = randomise(peftfx.run(base, [*before, item]), 0.2)
    try:
        pruned = peftfx.run(program, PRUNE)
    except PassError as error:
        assert "its channels cannot be cut, because" in str(error)
        return
    record = pruned.history[-1]
    left = [why for _, why in record.skipped if "(Branch.axes)" in why]
    assert record.edited and len(record.edited) + len(left) == 2
    edit = Editor(program.fork(), "hidden")
    for site_id, keep in kept_of(pruned).items():
        block: Any = program.sites[site_id]
        mask = torch.zeros(site_of(program, block.down).in_features, dtype=torch.float64)
        mask[keep] = 1
        edit.scale(site_of(program, block.down), Mask(mask))
    edit.finish()
    propagate(edit.program)
    inputs = batch(2, 12, pad=3)
    want, got = first(edit.program(**inputs)).detach(), first(pruned(**inputs)).detach()
    assert float((want - got).abs().max()) < 1e-12 * float(want.abs().max())
    assert moved(first(program(**inputs)), got) > 0.01


class Flat(Delta):
    """LoRA with B stored as one axis, of features and rank."""

    axes: ClassVar[Axes] = {"a": ("rank", "in"), "b": (("out", "rank"),)}

    def __init__(self, site: LinearSite) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, site.in_features) / 4)
        self.b = nn.Parameter(torch.zeros(2 * site.out_features))

    def branch(self, x: Tensor) -> Tensor:
        return (x @ self.a.T) @ self.b.view(-1, 2).T

    def delta(self) -> Tensor:
        return self.b.view(-1, 2) @ self.a


class Wrong(Flat):
    axes: ClassVar[Axes] = {"a": ("rank", "in"), "b": ("out", "rank")}


class Misspelt(Flat):
    axes: ClassVar[Axes] = {"a": ("rank", "in"), "c": (("out", "rank"),)}


def flat(program: Any, branch: type[Flat]) -> Any:
    """A program with such branches at the linears of feed-forward blocks."""
    edit = Editor(program.fork(), adapter="flat")
    for site in program.sites.select("ffn", ("linear",)):
        torch.manual_seed(len(edit.edited))
        edit.add(site, branch(site))
    edit.finish()
    propagate(edit.program)
    return randomise(edit.program, 0.3)


def test_products_are_cut_along() -> None:
    """Rows of features that are kept, with the rank varying inside."""
    torch.manual_seed(0)
    base = peftfx.capture(nn.Sequential(Plain()).eval(), (torch.randn(3, 5, 8),))
    program = flat(base, Flat)
    (site,) = program.sites.of("feedforward")
    assert isinstance(site, FeedForwardSite)
    edit = Editor(program.fork())
    keep = list(range(0, 24, 2))
    edit.cut(edit.channels(site), keep)
    edit.finish()
    propagate(edit.program)
    shapes = {n: tuple(p.shape) for n, p in edit.program.named_trainable_parameters().items()}
    assert shapes["peftfx.flat.0.fc1.delta.b"] == (24,)
    assert shapes["peftfx.flat.0.fc2.delta.a"] == (2, 12)
    x = torch.randn(2, 7, 8)
    silent = program.fork()
    mask = torch.zeros(24)
    mask[keep] = 1
    with torch.no_grad():
        for name, tensor in silent.module.named_parameters():
            if name == "0.fc2.weight" or name.endswith("fc2.delta.a"):
                tensor.mul_(mask)
    torch.testing.assert_close(edit.program(x), silent(x), rtol=1e-4, atol=1e-5)
    assert moved(program(x), edit.program(x)) > 1e-2


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)))


@pytest.mark.parametrize(
    ("branch", "message"),
    [(Wrong, r"the axes of b are \('out', 'rank'\), but it is \[48\]"),
     (Misspelt, "declares axes of 'c', which is none of its tensors .a, b. and nothing")],
)  # fmt: skip
def test_axes_that_tensors_do_not_have_are_refused(branch: type[Flat], message: str) -> None:
    torch.manual_seed(0)
    base = peftfx.capture(nn.Sequential(Plain()).eval(), (torch.randn(3, 5, 8),))
    with pytest.raises(PassError, match=message):
        flat(base, branch)
