"""Several adapters at once: order does not matter, each can go, all survive folding and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.rewriter.errors import ArtifactError

from .models import batch, first, moved, randomise

NAMES = ("encoder", "decoder", "fused")
ALL = (
    "lora{where=linear and not head};ia3;serial_adapter{bottleneck=6};prefix_tuning{length=3};"
    "prompt_tuning{length=4};bitfit"
)


def inputs(program: peftfx.Program, rows: int = 4, tokens: int = 11) -> dict[str, Tensor]:
    return {n: t for n, t in batch(rows, tokens).items() if n in program.spec.names}


def output(program: peftfx.Program) -> Tensor:
    return first(program(**inputs(program)))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert moved(want, got) <= tolerance


def copy_values(source: peftfx.Program, target: peftfx.Program) -> None:
    values = source.named_trainable_parameters()
    theirs = target.named_trainable_parameters()
    assert set(values) == set(theirs)
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(values[name])


@pytest.mark.parametrize("name", NAMES)
def test_all_six_survive_verify_files_and_removal(captured: Any, name: str, tmp_path: Path) -> None:
    model, base = captured[name]
    program = randomise(peftfx.run(base, ALL), 0.05)
    want = output(program)
    assert moved(output(base), want) > 0.01
    assert all(c.holds for c in program.verify())
    peftfx.save(program, tmp_path / "all")
    loaded = peftfx.load(model, tmp_path / "all")
    assert torch.equal(output(loaded), want) and loaded.text() == program.text()
    for adapter in program.adapters:
        peftfx.save(program, tmp_path / adapter, adapters=[adapter])
        alone = peftfx.load(base, tmp_path / adapter)
        assert alone.adapters == (adapter,)
        assert torch.equal(output(alone), output(program.only((adapter,))))
    assert torch.equal(output(program), want)


@pytest.mark.parametrize("name", NAMES)
def test_all_six_fold_as_far_as_they_can(captured: Any, name: str) -> None:
    _, base = captured[name]
    program = randomise(peftfx.run(base, ALL), 0.05)
    folded = peftfx.run(program, "fold")
    close(output(folded), output(program), 1e-4)
    assert {a.slot for a in folded.attachments} == {"serial", "key_value", "tokens"}
    assert all(c.holds for c in folded.verify())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("lora{where=o|ffn.down}", "serial_adapter{bottleneck=5}"),
        ("ia3{where=o|ffn.up}", "serial_adapter{bottleneck=5}"),
        ("bitfit", "serial_adapter{bottleneck=5,norms=false}"),
        ("lora{where=linear}", "bitfit"), ("ia3", "bitfit"), ("lora{where=linear}", "ia3"),
        ("prefix_tuning{length=3}", "prompt_tuning{length=2}"),
        ("lora{where=q}", "lora{where=q|k,name=b}"),
    ],
)  # fmt: skip
def test_two_passes_commute(captured: Any, name: str, one: str, two: str) -> None:
    _, base = captured[name]
    a, b = peftfx.run(base, f"{one};{two}"), peftfx.run(base, f"{two};{one}")
    copy_values(randomise(a, 0.2), b)
    close(output(a), output(b))
    if "prefix" not in one:
        folded = peftfx.run(a, "fold")
        close(output(folded), output(a), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_delta_below_an_adapter_reaches_it(captured: Any, name: str) -> None:
    """h + f(h) with h = linear + delta: the same as the adapter on the folded linear."""
    _, base = captured[name]
    tuned = randomise(peftfx.run(base, "lora{where=o|ffn.down}"))
    both = peftfx.run(tuned, "serial_adapter{bottleneck=5,norms=false}")
    merged = peftfx.run(peftfx.run(tuned, "fold"), "serial_adapter{bottleneck=5,norms=false}")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        mine = merged.named_trainable_parameters()
        for parameter_name, parameter in both.named_trainable_parameters().items():
            if parameter_name in mine:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
                mine[parameter_name].copy_(parameter)
    close(output(both), output(merged), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_two_prefixes_are_one_longer_prefix(captured: Any, name: str) -> None:
    _, base = captured[name]
    two = randomise(peftfx.run(base, "prefix_tuning{length=3};prefix_tuning{length=2,name=b}"), 0.5)
    one = peftfx.run(base, "prefix_tuning{length=5}")
    values = two.named_trainable_parameters()
    with torch.no_grad():
        for key, parameter in one.named_trainable_parameters().items():
            outer = values[key.replace("peftfx.prefix_tuning", "peftfx.b")]
            parameter.copy_(torch.cat([outer, values[key]]))
    close(output(two), output(one))


@pytest.mark.parametrize("name", NAMES)
def test_two_prompts_are_one_longer_prompt(captured: Any, name: str) -> None:
    _, base = captured[name]
    two = randomise(peftfx.run(base, "prompt_tuning{length=3};prompt_tuning{length=2,name=b}"), 0.5)
    one = peftfx.run(base, "prompt_tuning{length=5}")
    inner, outer = two.trainable_parameters()
    with torch.no_grad():
        one.trainable_parameters()[0].copy_(torch.cat([outer, inner]))
        joined = output(one)
        one.trainable_parameters()[0].copy_(torch.cat([inner, outer]))
    assert min(moved(joined, output(two)), moved(output(one), output(two))) < 1e-5
    assert output(two.without("b")).shape == output(base).shape


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["bitfit;ia3", "ia3;bitfit"])
def test_folding_a_scale_keeps_trained_biases(
    captured: Any, name: str, text: str, tmp_path: Path
) -> None:
    model, base = captured[name]
    program = randomise(peftfx.run(base, text), 0.3)
    folded = peftfx.run(program, "fold")
    close(output(folded), output(program), 1e-4)
    assert all(c.holds for c in folded.verify())
    close(output(folded.without("ia3")), output(program.without("ia3")))
    close(output(folded.without("bitfit")), output(program.without("bitfit")), 1e-4)
    peftfx.save(folded, tmp_path / "a")
    close(output(peftfx.load(model, tmp_path / "a")), output(program), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_adapter_on_a_folded_one(captured: Any, name: str, tmp_path: Path) -> None:
    model, base = captured[name]
    folded = peftfx.run(randomise(peftfx.run(base, "lora")), "fold")
    again = randomise(peftfx.run(folded, "lora{name=second,where=q|k}"), seed=3)
    both = peftfx.run(again, "fold")
    close(output(both), output(again), 1e-4)
    close(output(again.without("second")), output(folded))
    fresh = peftfx.run(base, "lora{name=second,where=q|k}")
    copy_values(again, fresh)
    close(output(both.without("lora")), output(fresh), 1e-4)
    for index, program in enumerate((again, both)):
        peftfx.save(program, tmp_path / str(index))
        close(output(peftfx.load(model, tmp_path / str(index))), output(program), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_training_continues_after_a_replay(captured: Any, name: str) -> None:
    _, base = captured[name]
    program = randomise(peftfx.run(base, ALL), 0.05).train()
    again = program.only(program.adapters)
    assert again.training
    for some in (program, again):
        torch.manual_seed(1)
        output(some).pow(2).mean().backward()
    mine, theirs = program.named_trainable_parameters(), again.named_trainable_parameters()
    assert set(mine) == set(theirs)
    for key, parameter in mine.items():
        grad = theirs[key].grad
        assert (parameter.grad is None) == (grad is None), key
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, grad)


def test_lowering_among_other_passes(captured: Any, tmp_path: Path) -> None:
    model, base = captured["decoder"]
    program = randomise(peftfx.run(base, ALL), 0.05)
    lowered = peftfx.run(program, "lower")
    close(output(lowered), output(program))
    close(output(peftfx.run(lowered, "fold")), output(program), 1e-4)
    close(output(peftfx.run(lowered, "lora{name=z,where=q}")), output(program))
    assert peftfx.run(lowered, "lower{target=off}").text() == program.text()
    close(output(lowered.without("lora")), output(program.without("lora")))
    peftfx.save(lowered, tmp_path / "a")
    close(output(peftfx.load(model, tmp_path / "a")), output(program))


def test_artifacts_stack_and_names_must_differ(captured: Any, tmp_path: Path) -> None:
    model, base = captured["encoder"]
    peftfx.save(randomise(peftfx.run(base, "lora{name=a}")), tmp_path / "a")
    peftfx.save(randomise(peftfx.run(base, "ia3{name=b}"), 0.3), tmp_path / "b")
    both = peftfx.load(peftfx.load(model, tmp_path / "a"), tmp_path / "b")
    assert both.adapters == ("a", "b") and all(c.holds for c in both.verify())
    reverse = peftfx.load(peftfx.load(model, tmp_path / "b"), tmp_path / "a")
    close(output(both), output(reverse))
    with pytest.raises(ArtifactError, match="adapter 'a' already"):
        peftfx.load(both, tmp_path / "a")
    assert both.adapters == ("a", "b")


def test_modes_follow_through_every_step(captured: Any, tmp_path: Path) -> None:
    _, base = captured["encoder"]
    training = base.fork().train()
    program = peftfx.run(training, "lora")
    assert program.training and program.without("lora").training
    assert peftfx.run(program, "fold").training
    peftfx.save(program, tmp_path / "a")
    assert peftfx.load(training, tmp_path / "a").training
    assert not peftfx.load(base, tmp_path / "a").training
