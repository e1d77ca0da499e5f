"""P-tuning against torch's LSTM, Hugging Face PEFT, and prompt tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import OptionError

from ..models import batch, bert, first, moved, randomise
from .common import check, hooked, tensors

LSTM = "p_tuning{length=3}"
MLP = "p_tuning{length=3,encoder=mlp,hidden=7}"


def network(t: dict[str, Tensor], recipe: str) -> Tensor:
    """P by torch's own modules."""
    t = {n.removeprefix("network."): p for n, p in t.items()}
    x = t["embedding"]
    if recipe == LSTM:
        h = t["lstm.0.weight_hh"].shape[-1]
        lstm = nn.LSTM(x.shape[1], h, 2, bidirectional=True)
        held = dict(lstm.named_parameters())
        with torch.no_grad():
            for name, parameter in held.items():
                leaf, _, rest = name.rpartition("_l")
                layer, _, direction = rest.partition("_")
                parameter.copy_(t[f"lstm.{layer}.{leaf}"][1 if direction else 0])
        x = lstm(x[:, None])[0][:, 0]
    layers = len([n for n in t if n.startswith("mlp") and n.endswith("weight")])
    for k in range(layers):
        x = (x.clamp(min=0) if k else x) @ t[f"mlp.{k}.weight"].T + t[f"mlp.{k}.bias"]
    return x.detach()


@pytest.mark.parametrize("recipe", [LSTM, MLP])
def test_p_tuning_equals_its_reference(hand: Any, recipe: str) -> None:
    name, model, base = hand
    program = randomise(peftfx.run(base, recipe), 0.3)
    (own,) = tensors(program).values()
    rows, inputs = network(own, recipe), batch(4, 11, pad=3)
    longer = {n: torch.cat([torch.ones(4, 3, dtype=t.dtype), t], 1) for n, t in inputs.items()}
    table = "words" if name == "encoder" else "embed"
    with hooked(model, {table: lambda _, e: torch.cat([rows.expand(4, -1, -1), e[:, 3:]], 1)}):
        want = first(model(**longer))[:, 3:]
    check(program, base, want, inputs)


def test_pseudo_tokens_inside_the_text(captured: Any) -> None:
    """A template: the rows stand wherever the text has their ids, and fold into the table."""
    model, base = captured["encoder"]
    program = randomise(peftfx.run(base, "p_tuning{ids=[60,61,62]}"), 0.3)
    rows = network(next(iter(tensors(program).values())), LSTM)
    inputs = batch(4, 11, pad=3)
    ids = inputs["input_ids"].clamp(max=59)
    ids[:, 2], ids[:, 5], ids[:, 6] = 60, 61, 62
    inputs = {**inputs, "input_ids": ids}

    def put(_: Any, e: Tensor) -> Tensor:
        for row, token in zip(rows, (60, 61, 62), strict=True):
            e = torch.where((ids == token)[..., None], row, e)
        return e

    with hooked(model, {"words": put}):
        want = model(**inputs)
    check(program, base, want, inputs)
    baked = peftfx.run(program, "bake")
    folded = peftfx.run(baked, "fold")
    assert torch.equal(first(baked(**inputs)), first(program(**inputs)))
    assert not folded.attachments
    assert torch.equal(first(folded(**inputs)), first(program(**inputs)))


def test_trainable_count(captured: Any) -> None:
    """n d + 2 layers, 2 directions, 4 gates (d/2)(d + d/2 + 2), and 2 (d^2 + d)."""
    _, base = captured["bert"]
    d, n = 32, 3
    program = peftfx.run(base, LSTM)
    count = n * d + 2 * 2 * 4 * (d // 2) * (d + d // 2 + 2) + 2 * (d * d + d)
    assert sum(p.numel() for p in program.trainable_parameters()) == count
    h = 7
    mlp = peftfx.run(base, MLP)
    count = n * d + (d * h + h) + (h * h + h) + (h * d + d)
    assert sum(p.numel() for p in mlp.trainable_parameters()) == count


@pytest.mark.parametrize("recipe", [LSTM, MLP])
def test_the_network_is_baked_exactly(captured: Any, recipe: str, tmp_path: Path) -> None:
    base = captured.double("decoder")
    program = randomise(peftfx.run(base, recipe.replace("3", "3,dropout=0.5", 1)), 0.3).train()
    baked = peftfx.run(program, peftfx.controllers(program).finish()).eval()
    gap = (first(baked(**batch())) - first(program.eval()(**batch()))).detach().abs().max()
    assert float(gap) <= 1e-12
    assert [tuple(p.shape) for p in baked.trainable_parameters()] == [(3, 32)]
    peftfx.save(baked, tmp_path / "a")
    assert torch.equal(first(peftfx.load(base, tmp_path / "a")(**batch())), first(baked(**batch())))
    assert not peftfx.controllers(baked).finish().passes


@pytest.mark.parametrize("encoder", ["LSTM", "MLP"])
def test_peft_both_ways(encoder: str, tmp_path: Path) -> None:
    """Its encoder's tensors in ours give its prompt; what is baked here is a prompt there."""
    import peft

    torch.manual_seed(0)
    model = bert().eval()
    base = peftfx.capture(model, kwargs=batch())
    config = peft.PromptEncoderConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=3, encoder_hidden_size=8,
        encoder_reparameterization_type=encoder,
    )  # fmt: skip
    other: Any = peft.get_peft_model(model, config).eval()
    theirs = {n: p.detach() for n, p in other.prompt_encoder["default"].named_parameters()}
    recipe = f"p_tuning{{length=3,encoder={encoder.lower()},hidden=8}}"
    program = peftfx.run(base, recipe)
    linears = sorted({n.rpartition(".")[0] for n in theirs if n.startswith("mlp_head")})
    with torch.no_grad():
        for name, own in next(iter(tensors(program).values())).items():
            _, kind, *rest = name.split(".")
            if kind == "embedding":
                own.copy_(theirs["embedding.weight"])
            elif kind == "mlp":
                own.copy_(theirs[f"{linears[int(rest[0])]}.{rest[1]}"])
            else:
                leaf = f"lstm_head.{rest[1]}_l{rest[0]}"
                own.copy_(torch.stack([theirs[leaf], theirs[f"{leaf}_reverse"]]))
    inputs = batch(4, 11)
    want = first(other(**inputs))[:, 3:]
    check(program, base, want, inputs)
    baked = peftfx.run(program, "bake")
    peftfx.save_peft(baked, tmp_path / "a", task="FEATURE_EXTRACTION")
    again = peftfx.load_peft(base, tmp_path / "a")
    assert torch.equal(first(again(**inputs)), first(baked(**inputs)))


def test_a_prompt_in_the_encoder_of_two(zoo: Any) -> None:
    program = peftfx.run(zoo["t5"], "p_tuning{length=2}")
    assert len(program.history[-1].edited) == 1
    ids = batch(3, 9)["input_ids"] % 60
    inputs = {**batch(3, 7), "decoder_input_ids": ids}
    assert moved(first(zoo["t5"](**inputs)), first(program(**inputs))) > 1e-3


def test_bad_options(captured: Any) -> None:
    for options in ("length=0", "hidden=0", "layers=0", "dropout=1", "ids=[]", "ids=[2,2]"):
        with pytest.raises(OptionError, match="p_tuning"):
            peftfx.parse(f"p_tuning{{{options}}}")
    with pytest.raises(OptionError, match="id 64 is beyond its 64 rows"):
        peftfx.run(captured["encoder"][1], "p_tuning{ids=[64]}")
