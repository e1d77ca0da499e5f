"""AdapterSoup against the mean of its members' weights, and its selection by texts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import BaseMismatchError, OptionError, PassError

from ..models import batch, build, first, moved, randomise
from .common import LAST, check, hooked, tensors

ONE = "serial_adapter{bottleneck=4,norms=false,where=ffn}"


def named(text: str, name: str, seed: int) -> str:
    return f"{text[:-1]}{'' if text.endswith('{}') else ','}name={name},seed={seed}}}"


def several(base: peftfx.Program, text: str = ONE, names: str = "abc") -> peftfx.Program:
    return randomise(peftfx.run(base, ";".join(named(text, n, k) for k, n in enumerate(names))))


def values(program: peftfx.Program, name: str) -> dict[str, np.ndarray[Any, Any]]:
    found = program.adapter_tensors(name).items()
    return {n.removeprefix(f"peftfx.{name}."): t.numpy() for n, t in found}


def adapter(t: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    down, bias = t["down"], t["down_bias"]
    return lambda _, h: h + F.gelu(h @ down.T + bias) @ t["up"].T + t["up_bias"]


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_the_soup_has_the_mean_of_the_weights(captured: Any, name: str) -> None:
    model, base = captured[name]
    program = several(base)
    soup = peftfx.run(program, "adapter_soup")
    each = [values(program, n) for n in "abc"]
    for key, got in values(soup, "adapter_soup").items():
        want = sum(e[key].astype(np.float64) for e in each) / 3
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    inputs, own = batch(4, 11, pad=3), tensors(soup)
    hooks = {LAST[name]["s0"]["ffn"].format(k): adapter(own[f"s0.layer{k}.ffn"]) for k in range(2)}
    with hooked(model, hooks):
        want = model(**inputs)
    check(soup, base, want, inputs)
    assert {a.adapter for a in soup.attachments} == {"adapter_soup"}
    count = sum(p.numel() for p in soup.trainable_parameters())
    assert count == 2 * (2 * 32 * 4 + 4 + 32)  # that of one
    back = soup.without("adapter_soup")
    assert torch.equal(first(back(**inputs)), first(program(**inputs)))


METHODS = {
    "lora": "lora{rank=2,where=q}", "ia3": "ia3{where=k|v}", "prefix": "prefix_tuning{length=2}",
    "parallel": "parallel_adapter{bottleneck=4}", "prompt": "prompt_tuning{length=2}",
    "hyperformer": "hyperformer{tasks=2,bottleneck=2,dim=4,hidden=4,projected=4,norms=false}",
}  # fmt: skip


@pytest.mark.parametrize("kind", METHODS)
def test_any_method_from_files(captured: Any, tmp_path: Path, kind: str) -> None:
    """Replayed, loaded and alone, it needs neither members nor files."""
    _, base = captured["decoder"]
    text, each = METHODS[kind], []
    for k, name in enumerate("ab"):
        one = randomise(peftfx.run(base, named(text, name, k)), seed=k)
        peftfx.save(one, tmp_path / name)
        each.append(values(one, name))
    soup = peftfx.run(base, "adapter_soup{name=both}", sources=[tmp_path / n for n in "ab"])
    for key, got in values(soup, "both").items():
        np.testing.assert_allclose(got, (each[0][key] + each[1][key]) / 2, rtol=1e-6, atol=1e-7)
    want = first(soup(**batch()))
    assert moved(first(base(**batch())), want) > 0.01
    peftfx.save(soup, tmp_path / "both")
    assert torch.equal(first(peftfx.load(base, tmp_path / "both")(**batch())), want)
    assert torch.equal(first(soup.only(("both",))(**batch())), want)
    assert all(c.holds for c in soup.verify())


def test_one_and_its_copies_are_the_one(captured: Any) -> None:
    _, base = captured["block"]
    alone = randomise(peftfx.run(base, named(ONE, "a", 0)))
    soup = peftfx.run(alone, "adapter_soup")
    assert torch.equal(first(soup(**batch())), first(alone(**batch())))
    assert not torch.equal(first(several(base)(**batch())), first(alone(**batch())))
    trained = torch.optim.SGD(soup.trainable_parameters(), lr=0.1)
    first(soup(**batch())).pow(2).mean().backward()
    trained.step()
    assert not torch.equal(first(soup(**batch())), first(alone(**batch())))


def texts(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """30 encodings of each of three domains, whose centres lie apart."""
    drawn = np.random.default_rng(seed)
    return {n: np.eye(8)[k] * 4 + drawn.normal(size=(30, 8)) / 4 for k, n in enumerate("abc")}


def chosen(program: peftfx.Program) -> Any:
    decided = program.history[-1].plan.decisions
    return decided["chosen"], decided["scores"]


def test_members_are_chosen_by_similarity(captured: Any) -> None:
    _, base = captured["block"]
    program, known = several(base), texts()
    new = np.concatenate([texts(1)["c"], texts(1)["b"][:9]])
    text = "adapter_soup{select=similarity,count=2}"
    soup = peftfx.run(program, text, data=(new, known))
    names, scores = chosen(soup)
    assert names == ["c", "b"]
    for name, each in known.items():
        pairs = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x in new for y in each]
        assert scores[name] == pytest.approx(np.mean(pairs))
    both = [values(program, n) for n in "bc"]
    for key, got in values(soup, "adapter_soup").items():
        np.testing.assert_allclose(got, (both[0][key] + both[1][key]) / 2, rtol=1e-6, atol=1e-7)


def test_members_are_chosen_by_clusters(captured: Any) -> None:
    """Clusters are the domains; shares are those of the new texts. The same for the same seed."""
    _, base = captured["block"]
    program, known = several(base), texts()
    new = np.concatenate([texts(1)["b"][:20], texts(1)["a"][:5]])
    text = "adapter_soup{select=clusters,seed=3}"
    soup = peftfx.run(program, text, data=(torch.from_numpy(new), known))
    assert chosen(soup) == (["b", "a"], {"b": 0.8, "a": 0.2})
    again = peftfx.run(program, text, data=(new, known))
    assert chosen(again) == chosen(soup)
    one = peftfx.run(program, "adapter_soup{select=clusters,count=1}", data=(new, known))
    assert torch.equal(first(one(**batch())), first(program.only(("b",))(**batch())))
    six = peftfx.run(program, "adapter_soup{select=clusters,clusters=6}", data=(new, known))
    assert chosen(six)[0] == ["b", "a"]


REFUSED = {
    "another width": (named(ONE.replace("4", "6"), "b", 1), "bottleneck=4 and bottleneck=6"),
    "another activation": (
        named(f"{ONE[:-1]},activation=relu}}", "b", 1), "activation='gelu' and activation='relu'",
    ),
    "other places": (named(ONE.replace("ffn", "attn|ffn"), "b", 1), "only one of them is at s0"),
    "another method": (named("parallel_adapter{bottleneck=4}", "b", 1), "of parallel_adapter"),
    "trained norms": (named("serial_adapter{bottleneck=4}", "b", 1), "trains . tensors"),
    "drawn in training": (named("adamix{bottleneck=4}", "b", 1), "Choose adapters of another"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_alike_is_refused(captured: Any, case: str) -> None:
    _, base = captured["decoder"]
    other, said = REFUSED[case]
    first_ = named("adamix{bottleneck=4}", "a", 0) if "drawn" in case else named(ONE, "a", 0)
    program = peftfx.run(base, f"{first_};{other}")
    with pytest.raises(PassError, match=said):
        peftfx.run(program, "adapter_soup")


def test_bad_input(captured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base = captured["decoder"]
    program, known = several(base), texts()
    new = known["a"]
    wrong: list[tuple[str, Any, str]] = [
        ("adapter_soup{names=[a,z]}", None, "no adapter 'z'"),
        ("adapter_soup{select=clusters}", None, "Give both: run"),
        ("adapter_soup{select=clusters}", (new, {"a": new, "b": new}), "'c' is in one of both"),
        ("adapter_soup{select=clusters,clusters=91}", (new, known), "90 texts .* for 91 clusters"),
        ("adapter_soup{select=similarity}", (new[:, :5], known), "Use one encoder for all"),
        ("adapter_soup{select=similarity}", (new[0], known), r"\[8\], or not finite"),
        ("adapter_soup{select=similarity}", ([["x"]], known), "no array of numbers"),
    ]
    for text, data, said in wrong:
        with pytest.raises(PassError, match=said):
            peftfx.run(program, text, data=data)
    with pytest.raises(PassError, match="has no adapter"):
        peftfx.run(base, "adapter_soup")
    for options in ("count=0", "clusters=0", "seed=-1", "name=a b", "names=[a,a]"):
        with pytest.raises(OptionError, match="adapter_soup"):
            peftfx.parse(f"adapter_soup{{{options}}}")
    peftfx.save(program.only(("a",)), tmp_path / "a")
    with torch.no_grad():
        other = build("decoder")
        other.head.weight += 1
    with pytest.raises(BaseMismatchError, match="head"):
        peftfx.run(peftfx.capture(other, kwargs=batch()), "adapter_soup", sources=[tmp_path / "a"])
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    with pytest.raises(OptionError, match="pip install scikit-learn"):
        peftfx.run(program, "adapter_soup{select=clusters}", data=(new, known))
