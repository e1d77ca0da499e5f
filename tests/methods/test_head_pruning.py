"""Head pruning: the cut program is the model with those heads' columns of o set to zero."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import peftfx
from peftfx.rewriter.errors import PassError
from peftfx.rewriter.program.sites import AttentionSite, LinearSite

from ..models import batch, first, moved, randomise
from ..test_named_axes import Grouped
from ..zoo import ZOO

PRUNE = "head_pruning{ratio=0.5}"


def made(captured: Any, zoo: Any, name: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    if name in ZOO:
        return zoo.model(name), zoo[name], ZOO[name].inputs(2, 12)
    inputs = batch(2, 12)
    if name == "fused":
        del inputs["attention_mask"]
    return *captured[name], inputs


def kept_of(program: Any) -> dict[str, list[int]]:
    return dict(program.history[-1].plan.decisions["kept"])


def silenced(model: nn.Module, program: Any, kept: dict[str, list[int]]) -> nn.Module:
    """A copy of the model whose o projections read nothing of the heads that are not kept."""
    silent = copy.deepcopy(model)
    for site_id, keep in kept.items():
        core, o = program.sites[site_id], program.sites[program.sites[site_id].o]
        assert isinstance(core, AttentionSite) and isinstance(o, LinearSite)
        weight = silent.get_parameter(o.weight)
        columns = weight.detach() if not o.in_out else weight.detach().T
        for head in set(range(core.heads)) - set(keep):
            size = columns.shape[1] // core.heads
            columns[:, head * size : (head + 1) * size] = 0
    return silent


@pytest.mark.parametrize("name", ["encoder", "decoder", "fused", "gpt2", "llama", "bert_eager"])
def test_it_is_the_model_without_these_heads(captured: Any, zoo: Any, name: str) -> None:
    model, program, inputs = made(captured, zoo, name)
    pruned = peftfx.run(program, PRUNE)
    kept = kept_of(pruned)
    assert len(kept) == 2 and all(len(k) == 2 for k in kept.values())
    silent = silenced(model, program, kept)
    with torch.no_grad():
        want, got, before = (first(m(**inputs)) for m in (silent, pruned, model))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert moved(before, want) > 1e-3, "the heads did nothing"
    for site_id in kept:
        core, old = pruned.sites[site_id], program.sites[site_id]
        assert isinstance(core, AttentionSite) and isinstance(old, AttentionSite)
        assert core.heads == 2 and core.kv_heads * 2 == old.kv_heads
    shapes = {s.id: s.out_features for s in pruned.sites if isinstance(s, LinearSite)}
    q, k = pruned.sites[next(iter(kept))].q, pruned.sites[next(iter(kept))].k  # pyright: ignore
    assert shapes[q] == 16 and shapes[k] == 8 * pruned.sites[next(iter(kept))].kv_heads  # pyright: ignore


@pytest.mark.parametrize("name", ["decoder", "llama"])
def test_a_group_goes_with_its_queries(captured: Any, zoo: Any, name: str) -> None:
    _, program, _ = made(captured, zoo, name)
    for keep in kept_of(peftfx.run(program, PRUNE)).values():
        assert keep in ([0, 1], [2, 3]), "queries of two groups were mixed"


@pytest.mark.parametrize(
    "recipe", ["lora{rank=2,where=attn}", "prefix_tuning{length=3}", "ia3", "bitfit"]
)
def test_adapters_are_cut_along(captured: Any, recipe: str) -> None:
    """The cut adapted program is the adapted program with zeros in o's columns."""
    model, base = captured["decoder"]
    program = randomise(peftfx.run(base, recipe), 0.1)
    pruned = peftfx.run(program, PRUNE)
    kept = kept_of(pruned)
    silent = program.fork()
    for site_id, keep in kept.items():
        core, o = program.sites[site_id], program.sites[program.sites[site_id].o]  # pyright: ignore
        mask = torch.zeros(core.heads)  # pyright: ignore
        mask[keep] = 1
        call = next(
            n for n in silent.module.graph.nodes if n.meta.get("call", n.name) == o.nodes[0]
        )
        # The input of o is what every branch beside it reads, too.
        source = call.args[0]
        with silent.module.graph.inserting_after(source):
            factor = mask.repeat_interleave(8)
            silent.module.register_buffer(f"mask_{call.name}", factor)
            held = silent.module.graph.get_attr(f"mask_{call.name}")
        with silent.module.graph.inserting_after(held):
            times = silent.module.graph.call_function(torch.mul, (source, held))
        source.replace_all_uses_with(times, delete_user_cb=lambda u, t=times: u is not t)
    silent.module.recompile()
    inputs = batch(2, 12)
    with torch.no_grad():
        want, got, whole = (p.module(**inputs) for p in (silent, pruned, program))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert moved(whole, want) > 1e-3
    del model


def test_heads_that_share_biases_of_scores_go_together(zoo: Any) -> None:
    """T5 has one table of relative positions a stack: its heads are those of every layer."""
    model, program = zoo.model("t5"), zoo["t5"]
    pruned = peftfx.run(program, "head_pruning{ratio=0.5,where=attn & self}")
    kept = kept_of(pruned)
    assert len(kept) == 2, "one group for each stack"
    reasons = dict(pruned.history[-1].skipped)
    assert sum("shares its weights" in r for r in reasons.values()) == 2
    cores = {s.id: s for s in pruned.sites if isinstance(s, AttentionSite) and not s.cross}
    assert {c.heads for c in cores.values()} == {2}
    streams = {cores[i].stream: keep for i, keep in kept.items()}
    silent = silenced(model, program, {i: streams[c.stream] for i, c in cores.items()})
    inputs = ZOO["t5"].inputs(2, 12)
    with torch.no_grad():
        want, got, before = (first(m(**inputs)) for m in (silent, pruned, model))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert moved(before, want) > 1e-3


def test_what_shares_an_axis_with_samples_is_refused(zoo: Any) -> None:
    with pytest.raises(PassError, match="no block can be cut"):
        peftfx.run(zoo["bloom"], PRUNE)


@pytest.mark.parametrize("name", ["decoder", "llama", "llama_eager"])
def test_queries_of_a_group_go_one_by_one(captured: Any, zoo: Any, name: str) -> None:
    """Uneven groups, and one group alone; with adapters, and prefixes that come afterwards."""
    model, program, inputs = made(captured, zoo, name)
    pruned = peftfx.run(program, "head_pruning{ratio=0.25,groups=parted}")
    kept = kept_of(pruned)
    assert kept and all(len(k) == 3 for k in kept.values()), pruned.history[-1].skipped
    silent = silenced(model, program, kept)
    with torch.no_grad():
        want, got, before = (first(m(**inputs)) for m in (silent, pruned, model))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert moved(before, want) > 1e-3, "the heads did nothing"
    assert all(c.holds for c in pruned.verify())
    adapted = randomise(peftfx.run(pruned, "lora{rank=2,where=attn};prefix_tuning{length=2}"))
    assert moved(got, first(adapted(**inputs))) > 1e-3
    again = peftfx.run(adapted, "head_pruning{ratio=0.5,groups=parted}")
    assert all(len(k) == 2 for k in kept_of(again).values())


def test_whole_groups_go_first(captured: Any) -> None:
    """A head of keys that no query is left of goes, too."""
    model, _ = captured["decoder"]
    with torch.no_grad():
        quiet = copy.deepcopy(model)
        for name, weight in quiet.named_parameters():
            if "o_proj" in name:
                weight[:, :16] *= 1e-3  # the first group
            if "q_proj" in name:
                weight[:16] *= 1e-3
    base = peftfx.capture(quiet, kwargs=batch())
    pruned = peftfx.run(base, "head_pruning{ratio=0.75,groups=parted}")
    for site_id, keep in kept_of(pruned).items():
        core = pruned.sites[site_id]
        assert len(keep) == 1 and keep[0] > 1 and isinstance(core, AttentionSite)
        assert pruned.sites[core.k].out_features == core.head_dim  # pyright: ignore
    want = first(silenced(quiet, base, kept_of(pruned))(**batch()))
    torch.testing.assert_close(first(pruned(**batch())), want, rtol=1e-4, atol=1e-5)


class OneKey(nn.Module):
    """Multi-query attention, whose operator repeats the one head of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k, self.v = nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("build", [OneKey, lambda: Grouped(1, 4, 8, 32)])
@pytest.mark.parametrize("groups", ["whole", "parted"])
def test_one_head_of_keys_for_all_queries(build: Any, groups: str) -> None:
    """Queries go alone where the one head is expanded, and elsewhere once it is said so."""
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randn(2, 7, 32)
    base = peftfx.capture(model, (x,))
    text = f"head_pruning{{ratio=0.5,groups={groups}}}"
    if build is OneKey and groups == "whole":
        with pytest.raises(PassError, match="Or choose groups=parted: its query heads share keys"):
            peftfx.run(base, text)
        return
    pruned = peftfx.run(base, text)
    (keep,) = kept_of(pruned).values()
    silent = silenced(model, base, kept_of(pruned))
    torch.testing.assert_close(pruned(x), silent(x), rtol=1e-4, atol=1e-5)
    assert len(keep) == 2 and moved(model(x), pruned(x)) > 1e-3
    assert pruned.export_state_dict(strict=False)["k.weight"].shape == (8, 32)
    assert pruned.export_state_dict(strict=False)["q.weight"].shape == (16, 32)


def test_prefixes_in_front_are_refused(captured: Any) -> None:
    program = peftfx.run(captured["decoder"][1], "prefix_tuning{length=2}")
    with pytest.raises(PassError, match=r"rows stand in front of its keys.*groups=whole"):
        peftfx.run(program, "head_pruning{ratio=0.25,groups=parted}")
