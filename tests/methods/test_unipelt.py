"""UniPELT against its equations: gates, causality, padding, settling, and its neighbours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftfx
from peftfx.rewriter.edits.hidden import Axes
from peftfx.rewriter.errors import PassError

from ..models import batch, bert, first, moved, randomise
from .common import check, hooked

RECIPE = "unipelt{rank=2,length=3,bottleneck=4}"


# The reference: forward hooks and an explicit attention, with naive loops over samples and tokens.


def mean(x: Tensor, valid: Tensor | None, reach: str) -> Tensor:
    """[batch, tokens, 1] -> [batch, 1, 1], or [batch, tokens, 1] for `past`."""
    rows: list[Tensor] = []
    for b in range(x.shape[0]):
        real = [t for t in range(x.shape[1]) if valid is None or bool(valid[b, t])]
        if reach == "past":
            spans = [[s for s in real if s <= t] for t in range(x.shape[1])]
            rows.append(torch.stack([x[b, s].mean(0) if s else x[b, 0] * 0 for s in spans]))
        else:
            rows.append(x[b, real[:1] if reach == "first" else real].mean(0, keepdim=True))
    return torch.stack(rows)


@dataclass
class Reference:
    """UniPELT's equations in one stream.

    Attributes:
        tensors: our parameters by name, without the adapter's name.
        valid: bool [batch, tokens], None if no token is padding.
        rows: of prefixes, left by hooks on query projections for the attention behind them.
    """

    tensors: Mapping[str, Tensor]
    valid: Tensor | None
    causal: bool
    scale: float = 1.0
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])

    def gate(self, name: str, hidden: Tensor, reach: str) -> Tensor:
        weight, bias = self.tensors[f"{name}.gate.weight"], self.tensors[f"{name}.gate.bias"]
        return mean(torch.sigmoid(hidden @ weight.T + bias), self.valid, reach)

    def lora(self, name: str) -> Callable[..., Tensor]:
        a, b = (self.tensors[f"{name}.delta.inner.{n}"] for n in "ab")
        reach = "past" if self.causal else "all"
        return lambda i, o: o + self.gate(name, i[0], reach) * self.scale * (i[0] @ a.T @ b.T)

    def prefix(self, name: str, hidden: Tensor) -> None:
        """Leaves the rows of one attention, [batch, length, heads, dim], to the patched one."""
        gate = self.gate(name, hidden, "first" if self.causal else "all")[..., None]
        key, value = (self.tensors[f"{name}.key_value.inner.{n}"] for n in ("key", "value"))
        self.rows.append((gate * key, gate * value))

    def adapter(self, name: str, seen: Tensor) -> Tensor:
        down, up, down_bias, up_bias = (
            self.tensors[f"{name}.serial.inner.{n}"] for n in ("down", "up", "down_bias", "up_bias")
        )
        gate = self.gate(name, seen, "past" if self.causal else "all")
        return gate * (torch.relu(seen @ down.T + down_bias) @ up.T + up_bias)


@contextlib.contextmanager
def attention_with_gated_rows(reference: Reference) -> Generator[None]:
    """Explicit attention, with the rows that the query projection's hook has left."""
    real = F.scaled_dot_product_attention

    def explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float = 0.0) -> Tensor:
        assert not p
        rows = (r.transpose(1, 2) for r in reference.rows.pop(0))
        pk, pv = (r.repeat_interleave(k.shape[1] // r.shape[1], 1) for r in rows)
        scores = q @ torch.cat([pk, k], 2).mT / q.shape[-1] ** 0.5
        seen = torch.ones(*mask.shape[:-1], pk.shape[2], dtype=torch.bool)
        scores = scores.masked_fill(~torch.cat([seen, mask], -1), float("-inf"))
        return scores.softmax(-1) @ torch.cat([pv, v], 2)

    F.scaled_dot_product_attention = explicit  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


def parameters(program: peftfx.Program) -> dict[str, Tensor]:
    named = program.named_trainable_parameters()
    return {n.removeprefix("peftfx.unipelt."): p.detach() for n, p in named.items()}


def reference_by_hand(
    model: Any, program: peftfx.Program, inputs: Mapping[str, Tensor], **options: Any
) -> Any:
    """The hand-written encoder (post-norm) or decoder (pre-norm, rotary, grouped queries)."""
    post = hasattr(model, "pooler")
    houlsby = options.pop("houlsby", False)
    valid = inputs["attention_mask"].bool()
    held = options.pop("tensors", parameters(program))
    ref = Reference(held, valid, causal=not post, **options)
    query, value, up, down = (
        ("query", "value", "fc1", "fc2") if post else ("q_proj", "v_proj", "norm2", "down")
    )
    residual: dict[int, Tensor] = {}
    hooks: dict[str, Callable[..., Any]] = {}

    def hook(n: int, layer: Any) -> None:
        name, lora = f"layers.{n}.", ref.lora(f"layers.{n}.{query}")

        def on_query(i: Any, o: Tensor) -> Tensor:
            ref.prefix(f"s0.layer{n}.attn.core", i[0])
            return lora(i, o)

        def on_down(_: Any, o: Tensor) -> Tensor:
            stream = residual[n] + o
            seen = o if houlsby else layer.norm2(stream) if post else stream
            return o + ref.adapter(f"s0.layer{n}.ffn", seen)

        hooks[name + query], hooks[name + value] = on_query, ref.lora(name + value)
        hooks[name + up] = lambda i, o: (residual.update({n: i[0]}), o)[1]
        hooks[name + down] = on_down

    for n, layer in enumerate(model.layers):
        hook(n, layer)
    with hooked(model, hooks), attention_with_gated_rows(ref):
        try:
            return model(**inputs)
        finally:
            assert not ref.rows


@pytest.mark.parametrize("option", ["", "alpha=6", "placement=houlsby"])
def test_it_equals_its_reference(hand: Any, option: str) -> None:
    _, model, base = hand
    text = RECIPE.replace("}", f",{option}}}") if option else RECIPE
    program = randomise(peftfx.run(base, text), 0.5)
    inputs = batch(4, 11, pad=3)
    options = {"alpha=6": {"scale": 3.0}, "placement=houlsby": {"houlsby": True}}
    want = reference_by_hand(model, program, inputs, **options.get(option, {}))
    check(program, base, want, inputs)


def reference_t5(model: Any, program: peftfx.Program, inputs: Mapping[str, Tensor]) -> Any:
    """Both streams of an encoder-decoder; the encoder's values are gated over the encoder."""
    held = parameters(program)
    streams = {
        "encoder": Reference(held, inputs["attention_mask"].bool(), causal=False),
        "decoder": Reference(held, None, causal=True),
    }
    hooks: dict[str, Callable[..., Any]] = {}
    patched: list[Any] = []

    def attention(module: Any, ref: Reference, site: str, name: str) -> None:
        def forward(x: Tensor, mask: Any = None, position_bias: Any = None, **_: Any) -> Any:
            ref.prefix(site, x)
            b, t, _d = x.shape
            q, k, v = (
                m(x).view(b, t, 4, 8).transpose(1, 2) for m in (module.q, module.k, module.v)
            )
            pk, pv = (r.transpose(1, 2) for r in ref.rows.pop())
            if position_bias is None:
                position_bias = module.compute_bias(t, t)
            seen = torch.ones(b, 1, t, t, dtype=torch.bool)
            if ref.valid is not None:
                seen = seen & ref.valid[:, None, None]
            if ref.causal:
                seen = seen.tril()
            own = (q @ k.mT + position_bias).masked_fill(~seen, float("-inf"))
            weights = torch.cat([q @ pk.mT, own], -1).softmax(-1)
            y = weights @ torch.cat([pv, v], 2)
            return module.o(y.transpose(1, 2).reshape(b, t, -1)), position_bias, None

        module.forward = forward
        patched.append(module)
        hooks[f"{name}.q"], hooks[f"{name}.v"] = ref.lora(f"{name}.q"), ref.lora(f"{name}.v")

    for s, (side, ref) in enumerate(streams.items()):
        for n, block in enumerate(getattr(model, side).block):
            name = f"{side}.block.{n}.layer"
            attention(block.layer[0].SelfAttention, ref, f"s{s}.layer{n}.attn.core",
                      f"{name}.0.SelfAttention")  # fmt: skip
            ffn = f"s{s}.layer{n}.ffn"
            hooks[f"{name}.{len(block.layer) - 1}"] = lambda _i, o, ref=ref, ffn=ffn: (
                o + ref.adapter(ffn, o)
            )
            if side == "decoder":
                cross = f"{name}.1.EncDecAttention"
                hooks[f"{cross}.q"] = ref.lora(f"{cross}.q")
                hooks[f"{cross}.v"] = streams["encoder"].lora(f"{cross}.v")
    try:
        with hooked(model, hooks):
            return model(**inputs)
    finally:
        for module in patched:
            del module.forward


def test_encoder_decoder_equals_its_reference(zoo: Any) -> None:
    model, base = zoo.model("t5"), zoo["t5"]
    program = randomise(peftfx.run(base, RECIPE), 0.3)
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 90, (3, n), generator=g) for n in (8, 6)]
    mask = torch.ones_like(ids[0])
    mask[0, -3:] = 0
    inputs = {"input_ids": ids[0], "attention_mask": mask, "decoder_input_ids": ids[1]}
    got, want = program(**inputs).logits, reference_t5(model, program, inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert moved(base(**inputs).logits, got) > 0.01


# Gates.


@pytest.mark.parametrize("reach", ["all", "past", "first"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_means_over_tokens(reach: Any, side: str) -> None:
    x = torch.rand(3, 7, 1)
    valid = torch.ones(3, 7, dtype=torch.bool)
    valid[0, -3:] = valid[1, 5:] = False
    valid = valid.flip(1) if side == "left" else valid
    torch.testing.assert_close(Axes(0, (1,)).mean(x, valid, reach), mean(x, valid, reach))
    torch.testing.assert_close(Axes(0, (1,)).mean(x, None, reach), mean(x, None, reach))
    turned = Axes(1, (0,)).mean(x.transpose(0, 1), valid, reach).transpose(0, 1)
    torch.testing.assert_close(turned, mean(x, valid, reach))
    deep = Axes(0, (2,)).mean(x[:, None], valid, reach)[:, 0]
    torch.testing.assert_close(deep, mean(x, valid, reach))
    many = torch.rand(2, 600, 1).bfloat16()  # a running count in bfloat16 would stop at 256
    got = Axes(0, (1,)).mean(many, None, reach)
    torch.testing.assert_close(got, mean(many.float(), None, reach).bfloat16())


def test_trainable_count_of_minilm_shapes() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(
        vocab_size=64, hidden_size=384, intermediate_size=1536, num_hidden_layers=6,
        num_attention_heads=12, max_position_embeddings=32,
    )).eval()  # fmt: skip
    program = peftfx.run(peftfx.capture(model, kwargs=batch()), "unipelt")
    d, layers, r, low, length = 384, 6, 48, 8, 10
    parts = (2 * 2 * low * d, 2 * length * d, 2 * d * r + r + d, 4 * (d + 1))
    count = sum(p.numel() for p in program.trainable_parameters())
    assert count == layers * sum(parts) == 352_824


def test_a_projected_prefix_is_gated_as_well(captured: Any) -> None:
    model, base = captured["decoder"]
    program = randomise(peftfx.run(base, RECIPE.replace("}", ",projection=5}")), 0.3)
    held = parameters(program)
    for n in range(2):
        name = f"s0.layer{n}.attn.core.key_value.inner"
        t = {k.removeprefix(f"{name}."): p for k, p in held.items() if k.startswith(name)}
        inner = torch.tanh(t["embedding"] @ t["inner.weight"].T + t["inner.bias"])
        both = (inner @ t["outer.weight"].T + t["outer.bias"]).view(3, 2, 2, 8)
        held |= {f"{name}.key": both[:, 0], f"{name}.value": both[:, 1]}
    inputs = batch(4, 11, pad=3)
    want = reference_by_hand(model, program, inputs, tensors=held)
    check(program, base, want, inputs)


def test_padding_does_not_count_unless_asked(captured: Any) -> None:
    _, base = captured["bert"]
    ours = randomise(peftfx.run(base, RECIPE), 0.5)
    theirs = randomise(peftfx.run(base, RECIPE.replace("}", ",padding=true}")), 0.5)
    full, padded = batch(2, 11), batch(2, 11, pad=6)
    torch.testing.assert_close(first(ours(**full)), first(theirs(**full)), rtol=1e-5, atol=1e-6)
    assert moved(first(ours(**padded))[:1, :5], first(theirs(**padded))[:1, :5]) > 1e-3
    alone = {n: t[:1, :5] for n, t in padded.items()}
    got = first(ours(**padded))[:1, :5]
    torch.testing.assert_close(got, first(ours(**alone)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["decoder", "fused", "llama"])
def test_no_token_learns_of_later_ones(captured: Any, name: str) -> None:
    _, base = captured[name]
    program = randomise(peftfx.run(base, RECIPE), 0.5)
    taken = program.spec.names
    inputs = {n: t for n, t in batch(3, 9).items() if n in taken}
    later = {n: t.clone() for n, t in inputs.items()}
    later["input_ids"][:, 6:] = (later["input_ids"][:, 6:] + 7) % 60 + 2
    before, after = first(program(**inputs)), first(program(**later))
    assert torch.equal(before[:, :6], after[:, :6])
    assert moved(before[:, 6:], after[:, 6:]) > 0.01
    short = {n: t[:, :6] for n, t in inputs.items()}
    torch.testing.assert_close(first(program(**short)), before[:, :6], rtol=1e-5, atol=1e-5)


def test_a_causal_gate_ends_as_the_mean_over_all_tokens(captured: Any) -> None:
    _, base = captured["decoder"]
    program = randomise(peftfx.run(base, RECIPE), 0.5)
    path = "peftfx.unipelt.layers.0.q_proj.gate"
    linear = program.sites["layers.0.q_proj.weight"]
    inputs = batch(3, 9, pad=4)
    gate = peftfx.tap(program, {"g": path})(**inputs)[1]["g"].detach()
    x = peftfx.tap(program, {"x": linear}, at="input")(**inputs)[1]["x"]
    held = parameters(program)
    opened = torch.sigmoid(
        x @ held["layers.0.q_proj.gate.weight"].T + held["layers.0.q_proj.gate.bias"]
    )
    assert gate.shape == (3, 9, 1) and 0 < float(gate.min()) < float(gate.max()) < 1
    torch.testing.assert_close(gate[:, -1:], mean(opened, inputs["attention_mask"].bool(), "all"))


@pytest.mark.parametrize(("name", "norms"), [("bert", 2), ("vit", 0)])
def test_the_adapter_reads_a_normed_stream_in_post_norm_models(
    zoo: Any, name: str, norms: int
) -> None:
    base = zoo[name]
    program = peftfx.run(base, RECIPE)
    assert program.text().count(" layer_norm(") - base.text().count(" layer_norm(") == norms


def test_weights_shared_by_layers_are_left_alone(zoo: Any) -> None:
    program = peftfx.run(zoo["albert"], RECIPE)
    skipped = dict(program.history[-1].skipped)
    assert "at 2 places" in skipped["s0.layer0.attn.core"]
    assert [a.slot for a in program.attachments] == ["serial", "serial"]


# Settling.


@pytest.fixture
def trained(captured: Any) -> tuple[peftfx.Program, peftfx.Program, list[dict[str, Tensor]]]:
    """A base, UniPELT on it with parameters that matter, and calibration batches."""
    _, base = captured["encoder"]
    data = [batch(4, 9, seed=1, pad=4), batch(2, 6, seed=2)]
    return base, randomise(peftfx.run(base, RECIPE), 0.4), data


def test_settling_puts_mean_gates_in_their_place(trained: Any) -> None:
    base, program, data = trained
    paths = {p: p for p in program.shared}
    assert len(paths) == 8
    seen = [peftfx.tap(program, paths)(**b)[1] for b in data]
    means = {p: float(torch.cat([s[p].detach().flatten() for s in seen]).mean()) for p in paths}
    settled = peftfx.run(program, "bake{names=[unipelt]}", data=iter(data))
    assert not settled.shared and not any(a.reads.get("gate") for a in settled.attachments)
    for attachment in settled.attachments:
        gate = attachment.path.rpartition(".")[0] + ".gate"
        got: Any = settled.branch(attachment)
        assert got.constant == pytest.approx(means[gate], abs=1e-6)
    gap = max(
        float((a - b).detach().abs().max())
        for inputs in data
        for a, b in zip(program(**inputs), settled(**inputs), strict=True)
    )
    assert settled.history[-1].certificate.measured["data_abs"] == pytest.approx(gap)
    assert gap > 0
    assert moved(first(base(**data[0])), first(settled(**data[0]))) > 0.01
    count = sum(p.numel() for p in settled.trainable_parameters())
    assert count == sum(p.numel() for p in program.trainable_parameters()) - 8 * 33
    with pytest.raises(PassError, match="nothing to settle"):
        peftfx.run(settled, "bake{names=[unipelt]}", data=data)


def test_settling_a_causal_gate_takes_its_last_value(captured: Any) -> None:
    _, base = captured["decoder"]
    program = randomise(peftfx.run(base, RECIPE), 0.4)
    data = [batch(4, 9, seed=1, pad=4)]
    path = "peftfx.unipelt.s0.layer0.ffn.gate"
    gate = peftfx.tap(program, {"g": path})(**data[0])[1]["g"].detach()
    settled = peftfx.run(program, "bake", data=data)
    branch: Any = settled.module.get_submodule("peftfx.unipelt.s0.layer0.ffn.serial")
    assert branch.constant == pytest.approx(float(gate[:, -1].mean()), abs=1e-6)


def test_settling_needs_data(trained: Any) -> None:
    _, program, _ = trained
    for text in ("bake", "bake{names=[unipelt]}"):
        with pytest.raises(PassError, match=r"data=\[batch, \.\.\.\]"):
            peftfx.run(program, text)
    with pytest.raises(PassError, match="no batches"):
        peftfx.run(program, "bake", data=[])


def test_settled_lora_folds_exactly() -> None:
    torch.manual_seed(0)
    base = peftfx.capture(bert().double().eval(), kwargs=batch())
    program = randomise(peftfx.run(base, RECIPE), 0.4)
    kept = peftfx.run(program, "fold")
    assert not kept.history[-1].edited and len(kept.history[-1].skipped) == 8
    assert "it reads gate" in str(kept.history[-1])
    settled = peftfx.run(program, "bake", data=[batch(4, 9, pad=3)])
    folded = peftfx.run(settled, "fold")
    assert len(folded.history[-1].edited) == 4
    inputs = batch(3, 8, seed=5, pad=2)
    gap = first(folded(**inputs)) - first(settled(**inputs))
    assert float(gap.detach().abs().max()) < 1e-13
    assert {a.slot for a in folded.attachments} == {"key_value", "serial"}
    alone = peftfx.run(base, RECIPE.replace("}", ",where=q|v}"))
    alone = peftfx.run(randomise(alone, 0.4), "bake", data=[batch()])
    merged = peftfx.run(alone, "fold{names=[unipelt]}")
    assert set(merged.export_state_dict()) == set(base.export_state_dict())
    assert torch.equal(first(program(**inputs)), first(peftfx.run(program, "fold")(**inputs)))


def test_settled_programs_save_load_and_go(trained: Any, captured: Any, tmp_path: Path) -> None:
    base, program, data = trained
    model, _ = captured["encoder"]
    settled = randomise(peftfx.run(program, "bake", data=data), 0.1, seed=3)
    want = first(settled(**data[0]))
    peftfx.save(settled, tmp_path / "a")
    for target in (model, base):
        loaded = peftfx.load(target, tmp_path / "a")
        assert torch.equal(first(loaded(**data[0])), want)
        assert loaded.text() == settled.text()
        assert "data_rel" in str(loaded.history[-1].certificate)
    assert torch.equal(first(settled.without("unipelt")(**data[0])), first(base(**data[0])))
    assert all(c.holds for c in settled.verify())
    folded = peftfx.run(settled, "fold")
    peftfx.save(folded, tmp_path / "b")
    again = peftfx.load(base, tmp_path / "b")
    torch.testing.assert_close(first(again(**data[0])), first(folded(**data[0])))


@pytest.mark.parametrize("name", ["encoder", "decoder"])
@pytest.mark.parametrize("form", ["gated", "settled"])
def test_both_forms_export(captured: Any, name: str, form: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    _, base = captured[name]
    program = randomise(peftfx.run(base, RECIPE), 0.4)
    if form == "settled":
        program = peftfx.run(program, "bake", data=[batch(pad=3)])
    report = peftfx.export_onnx(program, tmp_path / "m.onnx")
    assert report.error <= 1e-5


@pytest.mark.parametrize("form", ["gated", "settled"])
def test_both_forms_compile_and_train(captured: Any, form: str) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, RECIPE)
    if form == "settled":
        program = peftfx.run(program, "bake", data=[batch()])
    program.train()
    frozen = {n: p.clone() for n, p in program.module.named_parameters() if not p.requires_grad}
    inputs, target = batch(4, 9, pad=3), torch.randn(4, 32, generator=torch.manual_seed(0))
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    compiled: Any = torch.compile(program.module, fullgraph=True, backend="aot_eager")
    losses: list[float] = []
    for _ in range(15):
        loss = (compiled(**inputs)[1] - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(
        torch.equal(dict(program.module.named_parameters())[n], p) for n, p in frozen.items()
    )
    if form == "gated":
        gates = [p for n, p in program.named_trainable_parameters().items() if ".gate." in n]
        assert len(gates) == 16 and all(p.grad is not None and p.grad.any() for p in gates)


# Beside other methods at the same sites.


def by_name(program: peftfx.Program) -> peftfx.Program:
    """Moves every trainable parameter by an amount that depends on its name alone."""
    with torch.no_grad():
        for name, p in program.named_trainable_parameters().items():
            g = torch.Generator().manual_seed(sum(map(ord, name)))
            p.add_(torch.randn(p.shape, generator=g) * 0.2)
    return program


@pytest.mark.parametrize(
    ("other", "commutes"),
    [("lora{rank=2}", True), ("lora{rank=2,where=ffn.down}", True), ("ia3", True),
     ("bitfit", True), ("prefix_tuning{length=2}", True), ("prompt_tuning{length=2}", True),
     ("serial_adapter{bottleneck=4}", False)],
)  # fmt: skip
def test_stacks(hand: Any, other: str, commutes: bool) -> None:
    _, _, base = hand
    one, two = (by_name(peftfx.run(base, p)) for p in ([RECIPE, other], [other, RECIPE]))
    inputs = batch(3, 9, pad=3)
    real = inputs["attention_mask"].bool()
    a, b = first(one(**inputs))[real], first(two(**inputs))[real]
    assert (moved(a, b) < 1e-5) == commutes
    alone = {n: t[:1, :6] for n, t in inputs.items()}
    for program in (one, two):
        got = first(program(**alone))
        torch.testing.assert_close(first(program(**inputs))[:1, :6], got, rtol=1e-4, atol=1e-5)
        settled = peftfx.run(program, "bake{names=[unipelt]}", data=[inputs])
        folded = peftfx.run(settled, "fold")
        assert len([s for s in folded.history[-1].edited if "q" in s or "v" in s]) >= 4
        rest = program.without("unipelt")
        assert rest.adapters == tuple(n for n in program.adapters if n != "unipelt")
        assert "unipelt" not in rest.text()
