"""Extraction: an adapter that gives a fine-tuned checkpoint back, as far as its ranks go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peftfx
from peftfx.cli import main
from peftfx.rewriter.errors import NonFiniteError, OptionError, PassError, WeightsError

from ..models import batch, first, moved, randomise
from .toys import tensors, write


def tuned(base: peftfx.Program, rank: int = 2) -> dict[str, Tensor]:
    """The base's state dict, all matrices moved by some ranks and all vectors by noise."""
    drawn = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn) * 0.1

    state = base.export_state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.dim() == 2:
            out, size = tensor.shape
            state[name] = tensor + noise(out, rank) @ noise(rank, size)
        elif tensor.is_floating_point():
            state[name] = tensor + noise(*tensor.shape)
    return state


def values(program: peftfx.Program) -> dict[str, Tensor]:
    return peftfx.run(program, "fold").export_state_dict()


@pytest.mark.parametrize("name", ["fused", "decoder"])
def test_all_of_it_comes_back(captured: Any, name: str, tmp_path: Path) -> None:
    _, base = captured[name]
    state = tuned(base)
    program = peftfx.run(base, "extract_lora{rank=2}", sources=[state])
    got = values(program)
    for key, tensor in state.items():
        torch.testing.assert_close(got[key], tensor, rtol=0, atol=2e-6, msg=key)
    assert program.history[-1].certificate.measured["lost"] < 1e-6
    inputs = {n: t for n, t in batch().items() if n in base.spec.names}
    assert moved(first(base(**inputs)), first(program(**inputs))) > 0.01
    peftfx.save(program, tmp_path / "saved")
    again = peftfx.load(base, tmp_path / "saved")
    assert torch.equal(first(again(**inputs)), first(program(**inputs)))


def test_the_error_of_each_site_is_what_singular_values_say(captured: Any) -> None:
    _, base = captured["decoder"]
    state = tuned(base, rank=8)
    program = peftfx.run(base, "extract_lora{rank=3}", sources=[state])
    forms = program.history[-1].plan.decisions["forms"]
    start, missing, total = base.base_tensors(), 0.0, 0.0
    for name, about in forms.items():
        size = torch.linalg.svdvals(state[name].double() - start[name].double())
        off = float((size[3:].square().sum() / size.square().sum()).sqrt())
        assert about["rank"] == 3 and abs(about["error"] - off) < 1e-9
        missing, total = missing + size[3:].square().sum(), total + size.square().sum()
    lost = program.history[-1].certificate.measured["lost"]
    assert abs(lost - float((missing / total) ** 0.5)) < 1e-9 and lost > 0.1
    held = peftfx.run(base, "extract_lora{energy=0.9}", sources=[state])
    for name, about in held.history[-1].plan.decisions["forms"].items():
        size = torch.linalg.svdvals(state[name].double() - start[name].double()).square()
        assert about["rank"] == int((size.cumsum(0) < 0.9 * size.sum()).sum()) + 1


def test_what_is_no_matrix_is_kept_or_told(captured: Any) -> None:
    """Norms; and a table that is the head, too."""
    _, base = captured["tied"]
    state = tuned(base)
    with pytest.raises(
        WeightsError, match=r"different tensors for 'embed.weight' and 'head.weight'"
    ):
        peftfx.run(base, "extract_lora{rank=2}", sources=[state])
    state["head.weight"] = state["embed.weight"]
    program = peftfx.run(base, "extract_lora{rank=2}", sources=[state])
    assert "embed.weight" in program.owned["extracted"]
    got = values(program)
    assert all(torch.allclose(got[n], t, atol=2e-6) for n, t in state.items())
    alone = peftfx.run(base, "extract_lora{rank=2,whole=false}", sources=[state])
    skipped = dict(alone.history[-1].skipped)
    assert not alone.owned.get("extracted") and "whole=true" in skipped["embed.weight"]
    assert {"norm.weight", "layers.0.norm1.weight"} <= skipped.keys()


def test_unchanged_tensors_are_left_alone(captured: Any) -> None:
    _, base = captured["decoder"]
    state = base.export_state_dict()
    with pytest.raises(PassError, match="changed nothing"):
        peftfx.run(base, "extract_lora{rank=2}", sources=[state])
    state["layers.0.up.weight"] = state["layers.0.up.weight"] + 0.5
    program = peftfx.run(base, "extract_lora{energy=1}", sources=[state])
    (attachment,) = program.attachments
    assert attachment.site == "layers.0.up.weight" and not program.owned.get("extracted")
    branch: Any = program.branch(attachment)
    assert branch.a.shape[0] == 1  # a constant has rank one


def _less(state: dict[str, Any]) -> None:
    del state["norm.weight"]


def _more(state: dict[str, Any]) -> None:
    state["norm.weights"] = torch.zeros(3)


def _longer(state: dict[str, Any]) -> None:
    state["norm.weight"] = torch.zeros(33)


def _broken(state: dict[str, Any]) -> None:
    state["norm.weight"] = torch.full((32,), torch.nan)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (_less, WeightsError, "has no tensor 'norm.weight'"),
        (_more, WeightsError, "holds 'norm.weights'.*Nearest: norm.weight"),
        (_longer, WeightsError, r"'norm.weight' is \[33\]"),
        (_broken, NonFiniteError, "norm.weight holds NaN"),
    ],
)
def test_checkpoints_that_do_not_fit(
    captured: Any, change: Any, error: type[Exception], match: str
) -> None:
    _, base = captured["decoder"]
    state = tuned(base)
    change(state)
    with pytest.raises(error, match=match):
        peftfx.run(base, "extract_lora{rank=2}", sources=[state])


def test_options_that_do_not_fit(captured: Any, tmp_path: Path) -> None:
    _, base = captured["decoder"]
    state = tuned(base)
    for text, error, match in (
        ("extract_lora", OptionError, "a rank or an energy"),
        ("extract_lora{rank=0}", OptionError, "at least 1"),
        ("extract_lora{energy=2}", OptionError, r"in \(0, 1\]"),
        ("extract_lora{rank=33}", PassError, "has 32 ranks"),
    ):
        with pytest.raises(error, match=match):
            peftfx.run(base, text, sources=[state])
    with pytest.raises(PassError, match="takes one source"):
        peftfx.run(base, "extract_lora{rank=2}")
    with pytest.raises(PassError, match="a directory with safetensors files or a state dict"):
        peftfx.run(base, "extract_lora{rank=2}", sources=[3])


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Hugging Face model, read by PEFT."""
    import peft
    import transformers

    held = tensors("base")
    after = {n: t.clone() for n, t in held.items()}
    drawn = torch.Generator().manual_seed(0)
    for name, tensor in after.items():
        if "proj" in name or "lm_head" in name:
            out, size = tensor.shape
            tensor += torch.randn(out, 2, generator=drawn) @ torch.randn(2, size, generator=drawn)
    base, new = write(tmp_path, "base"), write(tmp_path, "tuned", after)
    words = ["extract", str(base), str(new), str(tmp_path / "out"), "--rank", "2", "--json"]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["lost"] < 1e-5 and len(said["sites"]) == 22 and not said["trained"]
    ids = torch.tensor([[1, 5, 3, 2]])
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = peft.PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    want = load(new)(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=0, atol=1e-4)
    (new / "model.safetensors").unlink()
    save_file({n: t for n, t in after.items() if "norm" not in n}, new / "model.safetensors")
    assert main(words) == 3
    assert "has no tensor" in json.loads(capsys.readouterr().out)["error"]


def shallow() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6)), {"input": torch.ones(2, 8)}


def test_adapters_of_two_formats_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = shallow()
    base = peftfx.capture(model, kwargs=inputs)
    one = randomise(peftfx.run(base, "lora{rank=1,where=linear}"), seed=1)
    two = randomise(peftfx.run(base, "dora{rank=2,where=linear}"), seed=2)
    peftfx.save(one, tmp_path / "one")
    peftfx.save_peft(two, tmp_path / "two")
    words = ["combine", f"{__name__}:shallow", str(tmp_path / "one"), str(tmp_path / "two"),
             "--json", "--to", "peftfx"]  # fmt: skip
    out = tmp_path / "out"
    assert main([*words, "--weights", "0.5", "-0.5", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["error"] < 1e-6
    got = values(peftfx.load(base, out))
    start, first_, second = base.export_state_dict(), values(one), values(two)
    for name, tensor in got.items():
        want = start[name] + 0.5 * (first_[name] - second[name])
        torch.testing.assert_close(tensor, want, rtol=0, atol=1e-6)
    assert main([*words, "--weights", "1", "--out", str(tmp_path / "no")]) == 2
    assert "1 weights for 2 adapters" in json.loads(capsys.readouterr().out)["error"]
    assert not (tmp_path / "no").exists()
