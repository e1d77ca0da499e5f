"""Ranks and scales by selector: the first entry that matches a site counts, on every kind of site,
in every spelling, and in every file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.exporters.adapter_changes import describe
from peftfx.rewriter.errors import FoldError, OptionError, SelectorError
from peftfx.rewriter.pipeline.options import write_value
from peftfx.rewriter.pipeline.syntax import parse, parse_value, parse_yaml, to_yaml

from .models import batch, first, llama, moved, randomise
from .test_weight_shapes import (
    FORMULAS,
    IDS,
    Mixed,
    branches,
    close,
    matrices,
    put_back,
)

RANKS = {"q": 4, "layer>=1 and ffn": 3, "ffn.up|ffn.down": 5, "default": 2}
ALPHAS = {"v|o": 3.0, "default": 8.0}
TEXT = (
    "lora{rank={q=4,'layer>=1 and ffn'=3,ffn.up|ffn.down=5,default=2},"
    "alpha={v|o=3.0,default=8.0},where=linear and not head}"
)
YAML = """
- lora:
    rank: {q: 4, "layer>=1 and ffn": 3, ffn.up|ffn.down: 5, default: 2}
    alpha: {v|o: 3, default: 8}
    where: linear and not head
"""


def options(**given: Any) -> Any:
    """A LoRA with options of any type."""
    return peftfx.LoRA(**given)


def made(program: peftfx.Program) -> dict[str, tuple[int, float]]:
    """(rank, scale) by site."""
    found: dict[str, tuple[int, float]] = {}
    for attachment in program.attachments:
        branch: Any = program.branch(attachment)
        found[attachment.site] = branch.a.shape[-2], branch.scale
    return found


def test_text_yaml_and_python_are_one_recipe(captured: Any) -> None:
    own = options(rank=RANKS, alpha=ALPHAS, where="linear and not head")
    for pipeline in (parse(TEXT), parse_yaml(YAML), parse_yaml(to_yaml(parse(TEXT)))):
        assert list(pipeline) == [own]
    assert str(own) == TEXT and list(own.rank) == list(RANKS)
    (item,) = parse_yaml(YAML)
    assert all(type(v) is float for v in item.alpha.values())  # type: ignore[attr-defined]
    program = peftfx.run(captured["decoder"][1], own)
    want: dict[str, tuple[int, float]] = {}
    for layer in (0, 1):
        path, ffn = f"layers.{layer}", 3 if layer else 5
        want |= {f"{path}.q_proj.weight": (4, 2.0), f"{path}.k_proj.weight": (2, 4.0)}
        want |= {f"{path}.v_proj.weight": (2, 1.5), f"{path}.o_proj.weight": (2, 1.5)}
        gate = 3 if layer else 2  # of the entries, the gate has that of layers alone
        want |= {f"{path}.gate.weight": (gate, 8 / gate), f"{path}.up.weight": (ffn, 8 / ffn)}
        want |= {f"{path}.down.weight": (ffn, 8 / ffn)}
    assert made(program) == want


@pytest.mark.parametrize(
    "key", ["q", "a b", "a=b", "layer>=6", "it's", r"re:'^\w+$'", "{", ",", ""]
)
def test_every_key_survives_text(key: str) -> None:
    assert parse_value(write_value({key: 3, "x": 4})) == {key: 3, "x": 4}


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("lora{rank={q=4}}", OptionError, "says nothing of .*v_proj.*all others a value: default="),
        ("lora{rank={q=4,ffn=2,default=1}}", OptionError, "'ffn' matches none of the selected"),
        ("lora{rank={zz=4,default=1}}", SelectorError, "the entry 'zz': 'zz' matches none of"),
        ("lora{rank={q|v=4,q=2}}", OptionError, "'q' matches only what entries before it match"),
        ("lora{rank={'q and'=4,default=1}}", SelectorError, "the entry 'q and': .*missing"),
        ("lora{rank={q=0,default=1}}", OptionError, "rank=0, but it must be at least 1"),
        (
            "lora{rank={q=4.5,default=1}}",
            OptionError,
            "must be int.* or a map from selectors to it",
        ),
        ("lora{rank={}}", OptionError, "must be int.* or a map from selectors"),
        ("lora{rank={q=0,v=1},alpha={q=1,v=2}}", OptionError, "rank=0, but it must be at least 1"),
        ("lora{dropout={q=0.5,v=0}}", OptionError, "dropout must be float, not"),
        ("lora{rank={q=1,q=2}}", OptionError, "given twice"),
        ("adalora{rank={q=2,default=9},target=3,where=q|v}", OptionError, r"in \[0, 2\], the rank"),
    ],
)
def test_bad_entries_are_named(captured: Any, text: str, error: Any, said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        peftfx.run(captured["decoder"][1], text)
    remedy = r"Choose|Say|Select|Give|Leave|must be|given twice"
    assert re.search(remedy, str(caught.value)) or "missing" in said


def test_a_rank_that_does_not_fit_skips_its_sites_alone(captured: Any) -> None:
    program = peftfx.run(captured["decoder"][1], "lora{rank={v=17,default=2}}")
    assert {s: r for s, (r, _) in made(program).items()} == {
        "layers.0.q_proj.weight": 2, "layers.1.q_proj.weight": 2,
    }  # fmt: skip
    assert [s for s, why in program.history[-1].skipped if "at most 16" in why] == [
        "layers.0.v_proj.weight", "layers.1.v_proj.weight",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def mixed() -> tuple[Mixed, peftfx.Program]:
    torch.manual_seed(0)
    model = Mixed().eval()
    return model, peftfx.capture(model, (torch.randint(1, 20, (2, 5)),))


EACH = "rank={name:grouped=1,conv=3,name:up=4,embedding=5,default=2}"
EXPECTED = {
    "token.weight": 5, "block.up": 4, "block.down": 2, "wide.weight": 3, "grouped.weight": 1,
    "image.weight": 3, "back.weight": 3, "head.weight": 2,
}  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "dora", "dylora", "sora", "lora_fa"])
def test_convolutions_embeddings_and_experts(mixed: Any, method: str) -> None:
    """Each with its own rank, grouped ones and experts with factors a matrix: the plain model whose
    weights are formed from the equation."""
    model, base = mixed
    text = f"{method}{{{EACH},alpha={{conv=3,default=6}},where=conv|embedding.token|experts|head}}"
    ranks = dict(EXPECTED)
    if method == "lora_fa":  # not beside tables
        text = text.replace("|embedding.token", "").replace("embedding=5,", "")
        ranks.pop("token.weight")
    program = randomise(peftfx.run(base, text), 0.2)
    assert {s: r for s, (r, _) in made(program).items()} == ranks
    other, state = Mixed().eval(), dict(model.state_dict())
    for site, tensors in branches(program).items():
        branch: Any = program.branch(next(a for a in program.attachments if a.site == site))
        own = {**tensors, "a": branch.a.detach()}
        if method == "sora":
            own["a"] = own["a"] * own["g"][:, None]
        conv = site.split(".")[0] in ("wide", "grouped", "image", "back")
        scale = (3 if conv else 6) / ranks[site]
        formula = FORMULAS["dora" if method == "dora" else "lora"]
        state[site] = put_back(site, formula(matrices(site, state[site]), own, scale), state[site])
    other.load_state_dict(state)
    close(program(IDS), other(IDS))
    assert moved(model(IDS)[0], other(IDS)[0]) > 0.01
    folded = peftfx.run(program, "fold")
    assert not folded.attachments
    close(folded(IDS), other(IDS))


def test_a_fused_projection_by_its_features(captured: Any) -> None:
    """q, k and v of one weight: the queries alone, and each with a rank of its own."""
    model, base = captured["fused"]
    ids = batch(3, 7)["input_ids"]
    alone = randomise(peftfx.run(base, "lora{rank={q=3},where=q}"))
    each = randomise(peftfx.run(base, "lora{rank={q=3,v=2,k=1},alpha=6,where=q|k|v}"))
    for program, roles in ((alone, "q"), (each, "qkv")):
        state = dict(model.state_dict())
        for attachment in program.attachments:
            weight, _, role = attachment.site.partition(":")
            branch: Any = program.branch(attachment)
            assert len(branch.a) == {"q": 3, "v": 2, "k": 1}[role]
            rows = slice(*(32 * ("qkv".index(role) + i) for i in (0, 1)))
            state[weight] = state[weight].clone()
            state[weight][rows] += (branch.scale * branch.b @ branch.a).detach()
            untouched = (program.sites[attachment.site], role)
            assert role in roles, untouched
        want = torch.func.functional_call(model, state, (ids,))
        torch.testing.assert_close(program(ids), want, rtol=1e-5, atol=1e-5)
        assert moved(model(ids), want) > 0.01
        folded = peftfx.run(program, "fold")
        torch.testing.assert_close(folded(ids), want, rtol=1e-5, atol=1e-5)
        assert not folded.attachments


def test_what_is_tied_has_a_rank_for_each_reader(captured: Any) -> None:
    """The table and the head that share a tensor are two sites: either may have a branch, or both,
    of their own ranks. Folding one refuses, since the other reads the tensor, too, or unties."""
    model, base = captured["tied"]
    inputs = batch(3, 7)
    text = "lora{rank={embedding=3,head=2},alpha=6,where=embedding.token|head}"
    program = randomise(peftfx.run(base, text), 0.2)
    assert sorted(made(program).values()) == [(2, 3.0), (3, 2.0)]
    with pytest.raises(FoldError, match="also read by"):
        peftfx.run(program, "fold")
    folded = peftfx.run(program, "fold{tied=untie}")
    want = first(program(**inputs))
    torch.testing.assert_close(first(folded(**inputs)), want, rtol=1e-4, atol=1e-5)
    state = dict(model.state_dict())
    table: Any
    for attachment in program.attachments:
        branch: Any = program.branch(attachment)
        delta: Tensor = (branch.scale * branch.b @ branch.a).detach()
        turned = delta.T if program.sites[attachment.site].kind == "embedding" else delta
        table = "embed.weight" if turned is not delta else "head.weight"
        state[table] = model.embed.weight.detach() + turned
    untied = type(model)().eval()
    untied.load_state_dict(state)
    torch.testing.assert_close(want, untied(**inputs), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def ranked(captured: Any) -> peftfx.Program:
    return randomise(peftfx.run(captured["decoder"][1], TEXT))


def test_files_hold_ranks_and_scales(captured: Any, ranked: peftfx.Program, tmp_path: Path) -> None:
    """Loaded and replayed without a selector being asked; told without the model; and PEFT's
    patterns, back and forth."""
    model, base = captured["decoder"]
    want = first(ranked(**batch()))
    peftfx.save(ranked, tmp_path / "own")
    loaded = peftfx.load(model, tmp_path / "own")
    assert torch.equal(first(loaded(**batch())), want) and made(loaded) == made(ranked)
    assert all(c.holds for c in loaded.verify())
    told = {p.target: (p.rank, p.scale) for p in describe(tmp_path / "own").places}
    assert told == made(ranked)
    peftfx.save_peft(ranked, tmp_path / "theirs")
    again = peftfx.load_peft(base, tmp_path / "theirs")
    torch.testing.assert_close(first(again(**batch())), want)
    renamed = peftfx.load(model, tmp_path / "own", name="other")
    assert made(renamed) == made(ranked)


@pytest.mark.parametrize("altered", [None, [], {}, {"layers.0.q_proj.weight": {"rank": 4}}, "x", 0])
def test_an_altered_plan_is_named(ranked: peftfx.Program, altered: Any) -> None:
    record = ranked.history[0]
    plan = replace(record.plan, decisions={**record.plan.decisions, "options": altered})
    item: Any = record.applied
    with pytest.raises(
        OptionError, match=r"does not say rank and alpha of layers.*save the adapter"
    ):
        item.at_site(plan, "layers.0.q_proj.weight")
    with pytest.raises(OptionError, match="at least 1"):
        zero = {"layers.0.q_proj.weight": {"rank": 0, "alpha": 1.0}}
        item.at_site(replace(plan, decisions={"options": zero}), "layers.0.q_proj.weight")


def test_pefts_patterns_mean_the_same() -> None:
    """The first pattern that matches counts there, too."""
    import peft

    torch.manual_seed(0)
    model = llama().eval().requires_grad_(False)
    base = peftfx.capture(model, kwargs=batch())
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear",
        rank_pattern={r".*1\.mlp\.up_proj": 3, "up_proj": 5, "layers.0.self_attn.q_proj": 2},
        alpha_pattern={"(q|k)_proj": 3, "q_proj": 9, "down_proj": 1},
    )  # fmt: skip
    with pytest.raises(OptionError, match="matches only what entries before it match"):
        peftfx.run(base, config)  # which PEFT passes over
    config.alpha_pattern = {"(q|k)_proj": 3, "down_proj": 1}
    program = peftfx.run(base, config)
    other: Any = peft.get_peft_model(llama().eval(), config)
    theirs = {
        n.removeprefix("base_model.model.") + ".weight": (m.r["default"], m.scaling["default"])
        for n, m in other.named_modules() if hasattr(m, "lora_A")
    }  # fmt: skip
    assert made(program) == theirs and len({r for r, _ in theirs.values()}) == 4


@pytest.mark.parametrize("start", ["pissa", "olora", "eva", "corda", "lora_ga"])
def test_starts_take_each_sites_rank(captured: Any, start: str) -> None:
    _, base = captured["decoder"]
    text = f"lora{{rank={{q=5,default=3}},alpha={{q=10,default=9}},init={start}}}"
    data: list[Any] = [batch(3, 9, seed) for seed in range(2)]
    if start == "lora_ga":
        data = [(inputs, lambda outputs: first(outputs).square().mean()) for inputs in data]
    program = peftfx.run(base, text, data=data)
    found = made(program)
    assert {a.site for a in program.attachments} == set(found)
    if start == "eva":  # moves ranks within the sum
        assert sum(r for r, _ in found.values()) == 2 * (5 + 3)
        assert all(s == (2.0 if "q_proj" in site else 3.0) for site, (_, s) in found.items())
        return
    assert found == {
        f"layers.{i}.{n}_proj.weight": of for i in (0, 1) for n, of in (("q", (5, 2.0)), ("v", (3, 3.0)))
    }  # fmt: skip
    assert moved(first(base(**batch())), first(program(**batch()))) == 0


def test_the_budget_is_the_sum_of_all_targets(captured: Any) -> None:
    _, base = captured["decoder"]
    text = "adalora{rank={q=6,default=4},target={q=3,default=1},warmup=0,final=0,where=q|v}"
    program = peftfx.run(base, text)
    controllers = peftfx.controllers(program)
    controllers.start(torch.optim.AdamW(controllers.param_groups(1e-3)), 10)
    budget: Any = controllers.each["adalora"]
    assert (budget.budget.first, budget.budget.last) == (2 * (6 + 4), 2 * (3 + 1))
    assert {program.branch(a).scale for a in program.attachments} == {16 / 6, 16 / 4}


def test_the_page_of_a_pass_says_so() -> None:
    from peftfx.pass_pages import page

    (rank,) = [o for o in page(peftfx.LoRA).options if o.name == "rank"]
    assert rank.type == "int, or a map from selectors to it"
    assert "first entry that matches" in rank.meaning


BEYOND_LORA = {
    "loha": "loha{rank={q=3,default=2},alpha={v=4.0,default=8.0},where=q|v}",
    "lokr": "lokr{rank={q=3,default=1},alpha={v=4.0,default=8.0},where=q|v}",
    "vb_lora": "vb_lora{rank={q=3,default=2},length=8,vectors=6,where=q|v}",
}


@pytest.mark.parametrize("method", BEYOND_LORA)
def test_factors_of_other_methods(captured: Any, tmp_path: Path, method: str) -> None:
    """Ranks and scales of each site, in files of ours and, where PEFT has patterns, of PEFT."""
    model, base = captured["encoder"]
    program = randomise(peftfx.run(base, BEYOND_LORA[method]), 0.2)
    found = {a.site: program.branch(a).describe() for a in program.attachments}
    q, v = found["layers.1.query.weight"], found["layers.1.value.weight"]
    assert q != v and found["layers.0.query.weight"] == q
    want = program(**batch(3, 9))
    peftfx.save(program, tmp_path / "own")
    again = peftfx.load(model, tmp_path / "own")
    assert torch.equal(first(again(**batch(3, 9))), first(want))
    peftfx.save_peft(program, tmp_path / "peft")  # the mixtures of vb_lora as their products
    other = peftfx.load_peft(base, tmp_path / "peft")
    torch.testing.assert_close(first(other(**batch(3, 9))), first(want))
    if method == "vb_lora":
        return
    pattern = {"r": 1, "rank_pattern": {"query": 3}, "alpha_pattern": {"query": 6.0}}
    taken = peftfx.run(base, [type(program.history[-1].applied)(**pattern)])
    assert len({taken.branch(a).describe() for a in taken.attachments}) == 2


def test_a_rank_above_a_matrix_of_vb_lora(captured: Any) -> None:
    """It was refused for how far outputs start from the model's."""
    with pytest.raises(OptionError, match=r"rank=33 exceeds its size 32 x 32\. Choose a smaller"):
        peftfx.run(captured["encoder"][1], "vb_lora{rank=33,length=8,vectors=4}")
