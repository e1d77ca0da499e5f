"""UniPELT against its equations: gates, causality, and padding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftfx
from peftfx.rewriter.edits.stream.hidden import Axes

from ..models import batch, first, moved, randomise
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
        prefix_gate: what its gate is the mean over, where attention is causal.
        rows: of prefixes, left by hooks on query projections for the attention behind them.
    """

    tensors: Mapping[str, Tensor]
    valid: Tensor | None
    causal: bool
    scale: float = 1.0
    prefix_gate: str = "first"
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])

    def gate(self, name: str, hidden: Tensor, reach: str) -> Tensor:
        weight, bias = self.tensors[f"{name}.gate.weight"], self.tensors[f"{name}.gate.bias"]
        return mean(torch.sigmoid(hidden @ weight.T + bias), self.valid, reach)

    def lora(self, name: str) -> Callable[..., Tensor]:
        a, b = (self.tensors[f"{name}.delta.inner.{n}"] for n in "ab")
        reach = "past" if self.causal else "all"
        return lambda i, o: o + self.gate(name, i[0], reach) * self.scale * (i[0] @ a.T @ b.T)

    def prefix(self, name: str, hidden: Tensor) -> None:
        """Leaves the rows of one attention, [batch, 1 or tokens, length, heads, dim], to the
        patched one."""
        reach = self.prefix_gate if self.causal else "all"
        gate = self.gate(name, hidden, reach)[..., None, None]  # one a sample, or one a query
        key, value = (self.tensors[f"{name}.key_value.inner.{n}"] for n in ("key", "value"))
        self.rows.append((gate * key, gate * value))

    def adapter(self, name: str, seen: Tensor) -> Tensor:
        down, up, down_bias, up_bias = (
            self.tensors[f"{name}.serial.inner.{n}"] for n in ("down", "up", "down_bias", "up_bias")
        )
        gate = self.gate(name, seen, "past" if self.causal else "all")
        return gate * (torch.relu(seen @ down.T + down_bias) @ up.T + up_bias)


def attended(q: Tensor, own: Tensor, v: Tensor, rows: Any, scale: float = 1.0) -> Tensor:
    """One query after the other: the softmax of its scores with its rows and (`own`) with keys."""
    found: list[Tensor] = []
    for t in range(q.shape[2]):
        mine = (r[:, min(t, r.shape[1] - 1)].transpose(1, 2) for r in rows)
        pk, pv = (r.repeat_interleave(v.shape[1] // r.shape[1], 1) for r in mine)
        scores = torch.cat([q[:, :, t : t + 1] @ pk.mT * scale, own[:, :, t : t + 1]], -1)
        found.append(scores.softmax(-1) @ torch.cat([pv, v], 2))
    return torch.cat(found, 2)


@contextlib.contextmanager
def attention_with_gated_rows(reference: Reference) -> Generator[None]:
    """Explicit attention, with the rows that the query projection's hook has left."""
    real = F.scaled_dot_product_attention

    def explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float = 0.0) -> Tensor:
        assert not p
        scale = q.shape[-1] ** -0.5
        own = (q @ k.mT * scale).masked_fill(~mask, float("-inf"))
        return attended(q, own, v, reference.rows.pop(0), scale)

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


@pytest.mark.parametrize("option", ["", "alpha=6", "placement=houlsby", "prefix_gate=past"])
def test_it_equals_its_reference(hand: Any, option: str) -> None:
    _, model, base = hand
    text = RECIPE.replace("}", f",{option}}}") if option else RECIPE
    program = randomise(peftfx.run(base, text), 0.5)
    inputs = batch(4, 11, pad=3)
    options = {
        "alpha=6": {"scale": 3.0},
        "placement=houlsby": {"houlsby": True},
        "prefix_gate=past": {"prefix_gate": "past"},
    }
    want = reference_by_hand(model, program, inputs, **options.get(option, {}))
    check(program, base, want, inputs)


def reference_t5(
    model: Any, program: peftfx.Program, inputs: Mapping[str, Tensor], prefix_gate: str
) -> Any:
    """Both streams of an encoder-decoder; the encoder's values are gated over the encoder."""
    held = parameters(program)
    streams = {
        "encoder": Reference(held, inputs["attention_mask"].bool(), causal=False),
        "decoder": Reference(held, None, causal=True, prefix_gate=prefix_gate),
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
            if position_bias is None:
                position_bias = module.compute_bias(t, t)
            seen = torch.ones(b, 1, t, t, dtype=torch.bool)
            if ref.valid is not None:
                seen = seen & ref.valid[:, None, None]
            if ref.causal:
                seen = seen.tril()
            own = (q @ k.mT + position_bias).masked_fill(~seen, float("-inf"))
            y = attended(q, own, v, ref.rows.pop())
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


@pytest.mark.parametrize("prefix_gate", ["first", "past"])
def test_encoder_decoder_equals_its_reference(zoo: Any, prefix_gate: str) -> None:
    model, base = zoo.model("t5"), zoo["t5"]
    recipe = RECIPE.replace("}", f",prefix_gate={prefix_gate}}}")
    program = randomise(peftfx.run(base, recipe), 0.3)
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 90, (3, n), generator=g) for n in (8, 6)]
    mask = torch.ones_like(ids[0])
    mask[0, -3:] = 0
    inputs = {"input_ids": ids[0], "attention_mask": mask, "decoder_input_ids": ids[1]}
    got = program(**inputs).logits
    want = reference_t5(model, program, inputs, prefix_gate).logits
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


@pytest.mark.parametrize("prefix_gate", ["first", "past"])
@pytest.mark.parametrize("name", ["decoder", "fused", "llama"])
def test_no_token_learns_of_later_ones(captured: Any, name: str, prefix_gate: str) -> None:
    _, base = captured[name]
    recipe = RECIPE.replace("}", f",prefix_gate={prefix_gate}}}")
    program = randomise(peftfx.run(base, recipe), 0.5)
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
