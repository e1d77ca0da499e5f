"""SPoT: where its prompt starts, against the paper's similarities in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import peftfx
from peftfx.passes.additive.prompt_tasks import similarity
from peftfx.rewriter.errors import OptionError, PassError, RewriteError

from ..models import batch, first, moved, randomise
from .common import hooked


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def near(one: Any, other: Any, kind: str) -> float:
    if kind == "mean":
        return cosine(one.mean(0), other.mean(0))
    return float(np.mean([cosine(a, b) for a in one for b in other]))


@pytest.mark.parametrize("kind", ["mean", "pairs"])
def test_similarities(kind: Any) -> None:
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(2, 5, 8))
    got = similarity(torch.tensor(one), torch.tensor(other), kind)
    assert got == pytest.approx(near(one, other, kind), rel=1e-12)
    assert similarity(torch.tensor(one), torch.tensor(one), "mean") == pytest.approx(1.0)


@pytest.fixture
def sources(captured: Any, tmp_path: Path) -> tuple[list[Path], list[Any]]:
    """Four saved prompts, of which the last three are ever less like the first."""
    base, paths, values = captured["decoder"][1], list[Path](), list[Any]()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 32, generator=generator)
    for k in range(4):
        program = peftfx.run(base, f"prompt_tuning{{length=4,name=task_{k}}}")
        (prompt,) = program.trainable_parameters()
        with torch.no_grad():
            prompt.copy_(start + 0.4 * k * torch.randn(4, 32, generator=generator))
        values.append(prompt.detach().double().numpy())
        paths.append(tmp_path / str(k))
        peftfx.save(program, paths[-1])
    return paths, values


def started(program: peftfx.Program) -> Any:
    (prompt,) = program.trainable_parameters()
    return prompt.detach().double().numpy()


@pytest.mark.parametrize("kind", ["mean", "pairs"])
def test_the_nearest_and_their_weighted_mean(captured: Any, sources: Any, kind: str) -> None:
    (paths, values), base = sources, captured["decoder"][1]
    likeness = [near(values[0], v, kind) for v in values[1:]]
    best = int(np.argmax(likeness)) + 1
    one = peftfx.run(base, f"spot{{target=0,similarity={kind}}}", sources=paths)
    np.testing.assert_allclose(started(one), values[best], rtol=1e-6)
    assert f"1 of source {best} task_{best}" in str(one.history[-1])
    order = np.argsort(likeness)[::-1][:2]
    two = peftfx.run(base, f"spot{{target=0,top=2,similarity={kind}}}", sources=paths)
    share = np.array([likeness[i] for i in order]) / sum(likeness[i] for i in order)
    want = sum(s * values[i + 1] for s, i in zip(share, order, strict=True))
    np.testing.assert_allclose(started(two), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_the_neurons_that_prompts_turn_on(captured: Any, name: str, tmp_path: Path) -> None:
    """By hooks on the model itself: gates of gated blocks, else what the activation reads."""
    model, base = captured[name]
    generator, paths = torch.Generator().manual_seed(1), list[Path]()
    on, start = list[Any](), batch(1, 1)
    layers, embedding = ("fc1", "words") if name == "encoder" else ("gate", "embed")
    for k in range(3):
        program = peftfx.run(base, f"prompt_tuning{{length=4,name=task_{k}}}")
        (prompt,) = program.trainable_parameters()
        with torch.no_grad():
            prompt.copy_(torch.randn(4, 32, generator=generator))
        paths.append(tmp_path / str(k))
        peftfx.save(program, paths[-1])
        seen = list[Any]()
        hooks = {f"layers.{i}.{layers}": lambda _, y, s=seen: s.append(y[0, 4]) for i in (0, 1)}
        put = {embedding: lambda _, e, p=prompt: torch.cat([p.detach()[None], e[:, 4:]], 1)}
        longer = {n: torch.cat([torch.ones(1, 4, dtype=t.dtype), t], 1) for n, t in start.items()}
        with hooked(model, {**hooks, **put}):
            model(**longer)
        on.append((torch.cat(seen).detach().double() > 0).double().numpy())
    likeness = [cosine(on[0], o) for o in on[1:]]
    text = "spot{target=0,top=2,similarity=neurons}"
    program = peftfx.run(base, text, data=[start], sources=paths)
    shares = program.history[-1].plan.decisions["weights"]
    want = {f"{k + 1} task_{k + 1}": v / sum(likeness) for k, v in enumerate(likeness)}
    assert shares == pytest.approx(want, rel=1e-9)
    with pytest.raises(PassError, match=r"in front of a batch, and none is given"):
        peftfx.run(base, text, sources=paths)


def test_the_generic_form_replays_without_its_sources(
    captured: Any, sources: Any, tmp_path: Path
) -> None:
    (paths, values), (model, base) = sources, captured["decoder"]
    program = peftfx.run(base, "spot", sources=paths[1:2])
    np.testing.assert_allclose(started(program), values[1], rtol=1e-6)
    mean = peftfx.run(base, "spot{name=m}", sources=paths[1:])
    np.testing.assert_allclose(started(mean), np.mean(values[1:], 0), rtol=1e-5, atol=1e-6)
    inputs = batch(3, 7, pad=2)
    loaded = peftfx.load(base, paths[1])
    assert torch.equal(first(program(**inputs)), first(loaded(**inputs)))  # it is that prompt
    program = randomise(program)
    peftfx.save(program, tmp_path / "own")
    for path in paths:
        path.rename(path.with_suffix(".gone"))
    again = peftfx.load(model, tmp_path / "own")
    assert torch.equal(first(again(**inputs)), first(program(**inputs)))
    assert moved(first(base(**inputs)), first(again(**inputs))) > 0.01
    assert all(c.holds for c in again.verify())


def test_what_is_refused(captured: Any, sources: Any, tmp_path: Path) -> None:
    (paths, _), base = sources, captured["decoder"][1]
    with pytest.raises(PassError, match=r"none is given\. Give saved ones"):
        peftfx.run(base, "spot")
    with pytest.raises(PassError, match=r"need more sources than 4"):
        peftfx.run(base, "spot{target=0,top=4}", sources=paths)
    with pytest.raises(PassError, match=r"need more sources than 1"):
        peftfx.run(base, "spot{target=0}", sources=paths[:1])
    peftfx.save(peftfx.run(base, "prompt_tuning{length=3,name=short}"), tmp_path / "short")
    with pytest.raises(PassError, match=r"of different sizes: .* top=1"):
        peftfx.run(base, "spot", sources=[paths[0], tmp_path / "short"])
    peftfx.save(peftfx.run(base, "ia3"), tmp_path / "ia3")
    with pytest.raises(PassError, match=r"not the vectors of one prompt"):
        peftfx.run(base, "spot", sources=[tmp_path / "ia3"])
    other = captured["encoder"][1]
    with pytest.raises(RewriteError, match="base"):
        peftfx.run(other, "spot", sources=paths[:1])
    for options in ("top=0", "target=-1", "similarity=dot"):
        with pytest.raises(OptionError, match="spot"):
            peftfx.parse(f"spot{{{options}}}")
