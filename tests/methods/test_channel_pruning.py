"""Channel pruning: the cut program is the masked model, with adapters in place, in every form."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import ExportError, FoldError, OptionError
from peftfx.rewriter.measure.compare import floats
from peftfx.rewriter.program.sites import LinearSite

from .. import models
from ..conftest import Rewritten
from ..models import batch, first, moved, randomise
from ..zoo import ZOO

NAMES = ("encoder", "decoder", "gpt2", "phi3", "t5")
ADAPTED = "lora{rank=4,where=ffn|q};ia3;serial_adapter{bottleneck=4,norms=false}"
PRUNE = "channel_pruning{ratio=0.4}"


@dataclass
class Linear:
    """What stands around one linear: `y = out * (W x' + b + sum s B A x')`, `x' = in * mask * x`.

    A delta is (a, b, s, rows): rows None for all outputs, else those of a fused weight.
    `serial` are the tensors of a bottleneck with skip on y.
    """

    mask: Tensor | None = None
    input_scale: Tensor | None = None
    deltas: list[tuple[Tensor, Tensor, float, Tensor | None]] = field(default_factory=list)
    output_scale: Tensor | None = None
    serial: Mapping[str, Tensor] | None = None

    def __call__(self, module: nn.Module, inputs: Any, _: Any) -> Tensor:
        x = inputs[0]
        for factor in (self.mask, self.input_scale):
            x = x if factor is None else x * factor
        y = module.forward(x)
        for a, b, scale, rows in self.deltas:
            d = scale * (x @ a.T) @ b.T
            y = y + d if rows is None else y.index_add(-1, rows, d)
        y = y if self.output_scale is None else y * self.output_scale
        if self.serial is None:
            return y
        t = self.serial
        return y + F.gelu(y @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]


def masked(model: nn.Module, linears: Mapping[str, Linear], inputs: Mapping[str, Tensor]) -> Any:
    """The model's output with the given linears, by module name."""
    handles = [model.get_submodule(n).register_forward_hook(f) for n, f in linears.items()]
    try:
        return model(**inputs)
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(name: str, rows: int = 3, tokens: int = 9) -> dict[str, Tensor]:
    return ZOO[name].inputs(rows, tokens) if name in ZOO else batch(rows, tokens)


class Pair:
    """Models in one dtype and what was captured from them, by (name, dtype)."""

    def __init__(self) -> None:
        self.made: dict[Any, Any] = {}
        self.rewritten = Rewritten()

    def adapted(self, name: str, dtype: torch.dtype = torch.float32) -> peftfx.Program:
        """A copy of the program with the adapters, which are placed once a module."""
        base = self(name, dtype)[1]
        return self.rewritten.get(name, f"{ADAPTED} {dtype}", lambda: peftfx.run(base, ADAPTED))

    def __call__(self, name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
        if (name, dtype) not in self.made:
            made = ZOO[name].build() if name in ZOO else models.build(name)
            model = copy.deepcopy(made).to(dtype)
            self.made[name, dtype] = model, peftfx.capture(model, kwargs=inputs_of(name))
        return self.made[name, dtype]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def kept_of(program: Any) -> dict[str, list[int]]:
    return dict(program.history[-1].plan.decisions["kept"])


def linears_of(program: Any, kept: dict[str, list[int]]) -> dict[str, Linear]:
    """The reference's description of a program's adapters, with the channels not kept masked."""
    found: dict[str, Linear] = {}
    last: dict[str, str] = {}
    for site in program.sites:
        if isinstance(site, LinearSite):
            found.setdefault(site.module, Linear())
        if site.kind == "linear" and site.role in ("o", "ffn.down") and not site.cross:
            kind = "attn" if site.role == "o" else "ffn"
            last[f"{site.stream}.layer{site.layer}.{kind}"] = site.module
        elif site.kind == "linear" and site.role == "o":
            last[f"{site.stream}.layer{site.layer}.cross"] = site.module
    for attachment in program.attachments:
        site, branch = program.sites[attachment.site], program.branch(attachment)
        held = {n: p.detach().clone() for n, p in branch.named_parameters()}
        if attachment.slot == "serial":
            key = site.id if site.id in last else site.id.rpartition(".")[0] + ".cross"
            found[last[key]].serial = held
            continue
        linear = found[site.module]
        if attachment.slot == "delta":
            rows = None if site.features is None else torch.tensor(site.features)
            linear.deltas.append((held["a"], held["b"], branch.scale, rows))
        elif attachment.slot == "input_scale":
            linear.input_scale = held["l"]
        else:
            scale = held["l"]
            if site.features is not None:
                weight = program.module.get_parameter(site.weight)
                full = torch.ones(weight.shape[1 if site.in_out else 0]).to(scale)
                full[list(site.features)] = scale
                scale = full * (1 if linear.output_scale is None else linear.output_scale)
            linear.output_scale = scale
    for site_id, keep in kept.items():
        down = program.sites[program.sites[site_id].down]
        mask = torch.zeros(down.in_features, dtype=program.module.get_parameter(down.weight).dtype)
        mask[keep] = 1
        found[down.module].mask = mask
    return found


def site_of(program: Any, site_id: str) -> LinearSite:
    site = program.sites[site_id]
    assert isinstance(site, LinearSite)
    return site


def check(model: Any, before: Any, after: Any, name: str, limit: float) -> None:
    """`after` is `before` with masked channels, at another size than captured."""
    inputs = inputs_of(name, 2, 12)
    wanted = masked(model, linears_of(before, kept_of(after)), inputs)
    want, got = first(wanted).detach(), first(after(**inputs)).detach()
    assert float((want - got).abs().max()) <= limit * float(want.abs().max())


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_cut_program_is_the_masked_model(pair: Pair, name: str, adapted: bool) -> None:
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model, base = pair(name, dtype)
        program = randomise(pair.adapted(name, dtype), 0.2) if adapted else base
        inputs = inputs_of(name, 2, 12)
        plain = masked(model, linears_of(program, {}), inputs)
        torch.testing.assert_close(  # the reference itself is right about the adapters
            first(program(**inputs)), first(plain), rtol=10 * limit, atol=10 * limit
        )
        pruned = peftfx.run(program, PRUNE)
        check(model, program, pruned, name, limit)
        assert moved(first(program(**inputs)), first(pruned(**inputs))) > 0.01
        assert pruned.symbols == program.symbols and pruned.spec == program.spec


@pytest.mark.parametrize("name", NAMES)
def test_folding_before_or_after_gives_the_same(pair: Pair, name: str) -> None:
    model, _ = pair(name, torch.float64)
    program = randomise(pair.adapted(name, torch.float64), 0.2)
    one = peftfx.run(program, f"{PRUNE};fold")
    two = peftfx.run(program, f"fold;{PRUNE}")
    (first_kept,) = (r.plan.decisions["kept"] for r in one.history if "kept" in r.plan.decisions)
    assert first_kept == kept_of(two)
    assert {a.slot for a in one.attachments} == {"serial"}
    check(model, program, peftfx.run(program, PRUNE), name, 1e-12)
    inputs = inputs_of(name, 2, 12)
    for a, b in zip(floats(one(**inputs)), floats(two(**inputs)), strict=True):
        limit = 1e-12 * max(1.0, float(b.detach().abs().max()))
        torch.testing.assert_close(a, b, rtol=0, atol=limit)
    shapes = [{n: p.shape for n, p in q.module.named_parameters()} for q in (one, two)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", NAMES)
def test_everything_coupled_shrinks(pair: Pair, name: str) -> None:
    _, base = pair(name)
    program = pair.adapted(name)
    pruned = peftfx.run(program, PRUNE)
    for site_id, keep in kept_of(pruned).items():
        block: Any = pruned.sites[site_id]
        down: Any = pruned.sites[block.down]
        for linear in {block.up, block.gate or block.up}:
            assert site_of(pruned, linear).out_features == len(keep)
        assert down.in_features == len(keep) < site_of(program, block.down).in_features
    for attachment in pruned.attachments:
        site = pruned.sites[attachment.site]
        for n, p in pruned.branch(attachment).named_parameters():
            if isinstance(site, LinearSite) and n == "b":
                assert p.shape[0] == site.out_features
            if isinstance(site, LinearSite) and n == "a":
                assert p.shape[1] == site.in_features
    sizes = [sum(p.numel() for p in q.module.parameters()) for q in (program, pruned)]
    assert sizes[1] < sizes[0]
    said = pruned.history[-1].certificate.measured["removed"]
    assert said == pytest.approx(1 - sizes[1] / sizes[0])
    before = {n: p for n, p in program.module.named_parameters()}
    assert pruned.named_trainable_parameters().keys() == program.named_trainable_parameters().keys()
    assert all(before[n].shape == p.shape for n, p in base.module.named_parameters())


@pytest.mark.parametrize("name", ["decoder", "phi3"])
def test_training_goes_on(pair: Pair, name: str) -> None:
    pruned = randomise(peftfx.run(pair.adapted(name), PRUNE), 0.05).train()
    frozen = {n: p.clone() for n, p in pruned.module.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(pruned.trainable_parameters(), lr=1e-2)
    inputs = inputs_of(name)
    losses: list[float] = []
    for _ in range(8):
        logits = first(pruned(**inputs))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for n, p in pruned.named_trainable_parameters().items():
            assert p.grad is not None and float(p.grad.abs().sum()) > 0, n
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    held = dict(pruned.module.named_parameters())
    assert all(torch.equal(held[n], p) for n, p in frozen.items())


@pytest.mark.parametrize(
    "recipe",
    ["lora{rank=4,where=ffn};ia3;channel_pruning", "lora{where=ffn};channel_pruning;fold",
     "lora{where=ffn};fold;channel_pruning", "bitfit;channel_pruning;ia3",
     "channel_pruning;lora{where=ffn};channel_pruning{ratio=0.5};prefix_tuning{length=3}"],
)  # fmt: skip
def test_artifacts_replay_the_cut(pair: Pair, recipe: str, tmp_path: Path) -> None:
    model, base = pair("encoder")
    program = base
    for step in recipe.split(";"):
        program = peftfx.run(program, step)
        program = randomise(program, 0.2) if program.adapters else program
    inputs = batch(2, 12, pad=3)
    want = first(program(**inputs))
    assert moved(first(base(**inputs)), want) > 0.01
    program.verify()
    peftfx.save(program, tmp_path / "a")
    loaded = peftfx.load(model, tmp_path / "a")
    assert torch.equal(first(loaded(**inputs)), want)
    assert [r.text for r in loaded.history] == [r.text for r in program.history]
    again = program.only(program.adapters)
    assert torch.equal(first(again(**inputs)), want)
    name = program.adapters[0]
    alone = program.only((name,))
    assert alone.adapters == (name,)
    less = program.without(name)
    assert name not in less.adapters and less.sites.of("linear") == program.sites.of("linear")


def test_the_original_model_does_not_take_it(pair: Pair) -> None:
    model, base = pair("encoder")
    pruned = peftfx.run(base, PRUNE)
    with pytest.raises(ExportError, match=r"another shape .* layers.0.fc1.weight: \(39, 32\)"):
        pruned.export_state_dict()
    state = pruned.export_state_dict(strict=False)
    assert state["layers.0.fc1.bias"].shape == (39,) and set(state) == set(model.state_dict())


def test_checkpoints(pair: Pair, tmp_path: Path) -> None:
    """Weights stream into a program whose artifact cuts them; nothing is folded into old shapes."""
    model, base = pair("encoder")
    (tmp_path / "base").mkdir()
    state = {n: t.contiguous() for n, t in model.state_dict().items()}
    save_file(state, tmp_path / "base" / "model.safetensors")
    program = randomise(peftfx.run(base, "lora{where=ffn};channel_pruning"), 0.2)
    with pytest.raises(FoldError, match="another shape than in the checkpoint"):
        peftfx.fold_checkpoint(program, tmp_path / "base", tmp_path / "folded")
    assert not (tmp_path / "folded").exists()
    loaded = peftfx.load_weights(program, tmp_path / "base")
    assert torch.equal(first(loaded(**batch())), first(program(**batch())))


def test_onnx_is_smaller_and_agrees(pair: Pair, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    program = randomise(pair.adapted("block"), 0.2)
    pruned = peftfx.run(program, "channel_pruning{ratio=0.5}")
    sizes = {}
    for key, made in (("whole", program), ("cut", pruned), ("folded", peftfx.run(pruned, "fold"))):
        report = peftfx.export_onnx(made, tmp_path / f"{key}.onnx")
        assert report.error <= 1e-5
        sizes[key] = report.size
    assert sizes["folded"] < sizes["cut"] < sizes["whole"] - 10_000


def test_magnitude_scores_the_adapted_weight(pair: Pair) -> None:
    _, base = pair("decoder")
    program = randomise(peftfx.run(base, "lora{rank=4,where=ffn};ia3"), 0.3)
    pruned = peftfx.run(program, PRUNE)
    folded = peftfx.run(program, "fold")
    held = dict(folded.module.named_parameters())
    for layer, keep in enumerate(kept_of(pruned).values()):
        gate, up, down = (
            held[f"layers.{layer}.{n}.weight"].detach() for n in ("gate", "up", "down")
        )
        score = gate.pow(2).sum(1) + up.pow(2).sum(1) + down.pow(2).sum(0)
        assert keep == sorted(score.topk(len(keep)).indices.tolist())
    plain = peftfx.run(base, PRUNE)
    assert kept_of(plain) != kept_of(pruned)


def loss_of(inputs: dict[str, Tensor]) -> Any:
    labels = inputs["input_ids"]
    return lambda o: F.cross_entropy(first(o)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_taylor_scores_the_loss(pair: Pair) -> None:
    """Against gradients of the eager model with the adapters merged."""
    model, base = pair("decoder", torch.float64)
    program = randomise(peftfx.run(base, "lora{rank=4,where=ffn};ia3{where=ffn.down}"), 0.3)
    batches = [batch(3, 8, seed=s) for s in (1, 2)]
    data = [(b, loss_of(b)) for b in batches]
    pruned = peftfx.run(program, "channel_pruning{ratio=0.4,score=taylor}", data=data)
    merged = copy.deepcopy(model)
    merged.load_state_dict(peftfx.run(program, "fold").export_state_dict())
    merged.requires_grad_(True)
    for b in batches:
        loss_of(b)(merged(**b)).backward()
    for layer, keep in enumerate(kept_of(pruned).values()):
        held = [merged.get_parameter(f"layers.{layer}.{n}.weight") for n in ("gate", "up", "down")]
        parts = [(w * w.grad).detach().abs() for w in held]
        score = parts[0].sum(1) + parts[1].sum(1) + parts[2].sum(0)
        assert keep == sorted(score.topk(len(keep)).indices.tolist())
    assert kept_of(pruned) != kept_of(peftfx.run(program, PRUNE))
    versions = [p.requires_grad for p in program.module.parameters()]
    assert any(versions) and not all(versions)
    for wrong, message in (
        (None, "needs batches"), ([], "data is empty"), ([batches[0]], "returns no loss"), ([3], "mapping"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            peftfx.run(program, "channel_pruning{score=taylor}", data=wrong)


def test_global_ranking_and_rounding(pair: Pair) -> None:
    model, _ = pair("encoder")
    uneven = copy.deepcopy(model)
    with torch.no_grad():
        uneven.layers[1].fc1.weight[:20] *= 0.01
        uneven.layers[1].fc2.weight[:, :20] *= 0.01
    program = peftfx.capture(uneven, kwargs=batch())
    widths = lambda text: [len(k) for k in kept_of(peftfx.run(program, text)).values()]  # noqa: E731
    assert widths("channel_pruning{ratio=0.25}") == [48, 48]
    a, b = widths("channel_pruning{ratio=0.25,scope=global}")
    assert a + b == 96 and b < 48 < a
    assert widths("channel_pruning{ratio=0.3,round_to=16}") == [48, 48]
    assert all(w % 8 == 0 for w in widths("channel_pruning{ratio=0.3,scope=global,round_to=8}"))
    whole = peftfx.run(program, "channel_pruning{ratio=0.1,round_to=64}")
    assert [reason for _, reason in whole.history[-1].skipped] == [
        "all of its channels are kept"
    ] * 2
    one = peftfx.run(program, "channel_pruning{where=layer in [1]}")
    assert list(kept_of(one)) == ["s0.layer1.ffn.block"]
    for text in ("ratio=0.0", "ratio=1.0", "round_to=0", "score=luck", "where=attn"):
        with pytest.raises(peftfx.RewriteError):
            peftfx.run(program, f"channel_pruning{{{text}}}")
