"""CoDA: blocks on some tokens, against the equations computed row by row without padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peftfx
from peftfx.kernels.soft_topk import coordinate_descent, soft_topk
from peftfx.rewriter.errors import OptionError, PassError

from ..models import batch, first, moved, randomise
from ..zoo import ZOO

CODA = "coda{reduction=3,bottleneck=8}"
PREFILL = "coda{reduction=3,bottleneck=8,causal=prefill}"
Layer = Callable[[Tensor, Tensor], Tensor]


# The reference: nothing of the rewriter, one row at a time, no padding.


def weights(scores: Tensor, k: int, epsilon: float) -> Tensor:
    """The soft top-k of `scores [n]`: bisection for sum min(1, exp((s + a) / epsilon)) = k says
    what is saturated, and the rest sums to what is left."""
    full = scores.detach().double()
    m = bisection(full, k, epsilon)
    rest = m < 1 - 1e-9
    if not bool(rest.any()):
        return torch.ones_like(scores)
    share = (scores[rest] / epsilon).softmax(0) * (k - int((~rest).sum()))
    return torch.ones_like(scores).masked_scatter(rest, share)


def bisection(scores: Tensor, k: int, epsilon: float) -> Tensor:
    low, high = (-scores.max() - 50 * epsilon).item(), (-scores.min() + epsilon).item()
    for _ in range(200):
        middle = (low + high) / 2
        total = ((scores + middle) / epsilon).clamp(max=0).exp().sum().item()
        low, high = (middle, high) if total < k else (low, middle)
    return ((scores + high) / epsilon).clamp(max=0).exp()


def routed(x: Tensor, normed: Tensor, layer: Layer, branch: Any, reduction: int) -> Tensor:
    """`Y = X + P^T diag(P m) (R(P X) - P X) + A(x^)` for one row `x [n, d]`."""
    n = x.shape[0]
    k = math.ceil(n / reduction)
    scores = normed @ branch.router
    chosen = scores.topk(k).indices.sort().values
    m = weights(scores, k, 0.1).to(x)[chosen]
    adapter = F.gelu(normed @ branch.down.T + branch.down_bias) @ branch.up.T + branch.up_bias
    y = x + adapter
    update = layer(x[chosen], chosen) - x[chosen]
    y[chosen] = y[chosen] + m[:, None] * update
    return y


def branches(program: Any) -> list[Any]:
    return [program.branch(a) for a in program.attachments if a.slot == "routed"]


def encoder(model: Any, program: Any, ids: Tensor, reduction: int = 3) -> Tensor:
    x = model.norm(model.words(ids) + model.places.weight[: len(ids)])
    for layer, branch in zip(model.layers, branches(program), strict=True):

        def run(h: Tensor, chosen: Tensor, layer: Any = layer) -> Tensor:
            return layer(h[None], None)[0]

        x = routed(x, x, run, branch, reduction)
    return x


def decoder(model: Any, program: Any, ids: Tensor) -> Tensor:
    cos, sin = model.angles(len(ids))
    x = model.embed(ids)
    for layer, branch in zip(model.layers, branches(program), strict=True):

        def run(h: Tensor, chosen: Tensor, layer: Any = layer) -> Tensor:
            mask = torch.ones(len(h), len(h), dtype=torch.bool).tril()
            return layer(h[None], cos[chosen], sin[chosen], mask)[0]

        x = routed(x, layer.norm1(x), run, branch, 3)
    return model.head(model.norm(x))


def t5_encoder(model: Any, program: Any, ids: Tensor) -> Tensor:
    stack = model.encoder
    bias = stack.block[0].layer[0].SelfAttention.compute_bias(len(ids), len(ids))[0]
    x = model.shared(ids)
    for block, branch in zip(stack.block, branches(program), strict=True):

        def run(h: Tensor, chosen: Tensor, block: Any = block) -> Tensor:
            attention = block.layer[0].SelfAttention
            own = bias[:, chosen][:, :, chosen]
            normed = block.layer[0].layer_norm(h)
            q, k, v = (
                m(normed).view(len(h), 4, 8).transpose(0, 1)
                for m in (attention.q, attention.k, attention.v)
            )
            a = (q @ k.transpose(-1, -2) + own).softmax(-1) @ v
            h = h + attention.o(a.transpose(0, 1).reshape(len(h), 32))
            return block.layer[1](h)

        x = routed(x, block.layer[0].layer_norm(x), run, branch, 3)
    return stack.final_layer_norm(x)


REFERENCES: dict[str, Any] = {"encoder": encoder, "decoder": decoder}


def program_of(captured: Any, name: str, text: str = "", scale: float = 0.2) -> tuple[Any, Any]:
    text = text or (CODA if name in ("encoder", "bert") else PREFILL)
    return captured[name][0], randomise(captured.adapted(name, text), scale)


def rows(lengths: tuple[int, ...], seed: int = 3, left: bool = False) -> dict[str, Tensor]:
    """A batch with one row of every length, padded."""
    inputs = batch(len(lengths), max(lengths), seed)
    for row, length in enumerate(lengths):
        hidden = slice(None, max(lengths) - length) if left else slice(length, None)
        inputs["attention_mask"][row, hidden] = 0
    return inputs


@pytest.mark.parametrize("name", ["encoder", "decoder"])
@pytest.mark.parametrize("lengths", [(9, 9), (5, 11), (1, 2, 3, 4, 13), (1,), (30, 17)])
def test_equations(captured: Any, name: str, lengths: tuple[int, ...]) -> None:
    model, program = program_of(captured, name)
    inputs = rows(lengths)
    with torch.no_grad():
        got = first(program(**inputs))
        for row, length in enumerate(lengths):
            want = REFERENCES[name](model, program, inputs["input_ids"][row, :length])
            torch.testing.assert_close(got[row, :length], want, rtol=1e-4, atol=2e-5)
    dense = first(captured[name][1](**inputs))
    assert moved(dense, got) > 0.05


@pytest.mark.parametrize("lengths", [(9, 9), (5, 11), (2, 3)])
def test_t5_encoder_by_equations(zoo: Any, lengths: tuple[int, ...]) -> None:
    """Relative position biases lose both axes; the decoder stays dense."""
    model, program = zoo.model("t5"), randomise(zoo.adapted("t5", CODA), 0.2)
    assert [a.site for a in program.attachments] == ["s0.layer0.attn", "s0.layer1.attn"]
    inputs = ZOO["t5"].inputs(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        inputs["attention_mask"][row, length:] = 0
    with torch.no_grad():
        got = program(**inputs).encoder_last_hidden_state
        for row, length in enumerate(lengths):
            want = t5_encoder(model, program, inputs["input_ids"][row, :length])
            torch.testing.assert_close(got[row, :length], want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "left"),
    [("encoder", False), ("bert", False), ("decoder", False), ("decoder", True), ("llama", True)],
)
def test_padding_does_not_matter(captured: Any, name: str, left: bool) -> None:
    _, program = program_of(captured, name)
    inputs = rows((5, 11), left=left)
    with torch.no_grad():
        both = first(program(**inputs))
        for row, length in enumerate((5, 11)):
            seen = slice(11 - length, None) if left else slice(None, length)
            ids = inputs["input_ids"][row : row + 1, seen]
            alone = first(program(input_ids=ids, attention_mask=torch.ones_like(ids)))
            torch.testing.assert_close(both[row, seen], alone[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["encoder", "decoder", "llama", "bert"])
def test_all_tokens_taken_is_the_dense_block(captured: Any, name: str) -> None:
    """With n = k every m is 1, so only the adapter is added, and that starts at zero."""
    causal = "" if name in ("encoder", "bert") else ",causal=prefill"
    program = peftfx.run(captured[name][1], f"coda{{reduction=1{causal}}}")
    inputs = rows((5, 11))
    with torch.no_grad():
        want, got = first(captured[name][1](**inputs)), first(program(**inputs))
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[keep], want[keep], rtol=1e-4, atol=2e-5)


def test_unfused_attention_and_static_tokens(captured: Any, zoo: Any) -> None:
    """Plain matmul attention with its own causal mask, and a vision model of 17 tokens."""
    _, base = captured["fused"]
    text = "coda{reduction=4,causal=prefill}"
    program = randomise(peftfx.run(base, text), 0.2)
    ids = batch(2, 9)["input_ids"]
    with torch.no_grad():
        assert first(program(input_ids=ids)).shape == first(base(input_ids=ids)).shape
    sizes = [n.meta["val"].shape[1] for n in program.module.graph.nodes if "routed_index" in n.name]
    assert all("s" in str(s) for s in sizes)
    vision = peftfx.run(zoo["vit"], CODA)
    sizes = [n.meta["val"].shape for n in vision.module.graph.nodes if "routed_index" in n.name]
    assert [s[1] for s in sizes] == [6, 6]
    eager = randomise(peftfx.run(zoo["bert_eager"], CODA), 0.2)
    inputs = rows((5, 11))
    with torch.no_grad():
        both = first(eager(**inputs))
        alone = first(eager(**{n: t[:1, :5] for n, t in inputs.items()}))
    torch.testing.assert_close(both[:1, :5], alone, rtol=1e-4, atol=2e-5)


def test_parameters(captured: Any) -> None:
    """2dr + r + d for the adapter and d for the router, a block."""
    program = captured.adapted("encoder", CODA)
    d, r = 32, 8
    count = sum(p.numel() for p in program.trainable_parameters())
    assert count == 2 * (2 * d * r + r + d + d)
    assert all(not n.startswith("layers") for n in program.named_trainable_parameters())


def test_training_moves_adapters_and_routers_only(captured: Any) -> None:
    program = captured.adapted("encoder", CODA).train()
    frozen = {n: p.clone() for n, p in program.module.named_parameters() if not p.requires_grad}
    start = {n: p.detach().clone() for n, p in program.named_trainable_parameters().items()}
    torch.manual_seed(0)
    target = torch.randn(3, 9, 32)
    optimizer = torch.optim.AdamW(program.trainable_parameters(), 1e-2)
    losses: list[float] = []
    for _ in range(15):
        program.eval()
        loss = F.mse_loss(first(program(**batch(pad=3))), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    for name, parameter in program.named_trainable_parameters().items():
        assert not torch.equal(parameter, start[name]), name
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
        if "router" in name:
            assert float(parameter.grad.abs().max()) > 0
    for name, parameter in program.module.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])


def test_gradients_against_the_equations(captured: Any) -> None:
    model, program = program_of(captured, "encoder")
    inputs = rows((9, 9))
    learnt = program.trainable_parameters()
    outputs = torch.stack([encoder(model, program, ids) for ids in inputs["input_ids"]])
    want = torch.autograd.grad(outputs.square().sum(), learnt)
    got = torch.autograd.grad(first(program(**inputs)).square().sum(), learnt)
    names = list(program.named_trainable_parameters())
    for name, a, b in zip(names, got, want, strict=True):
        assert float(b.abs().max()) > 0, name
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_save_load_replay_and_without(captured: Any, tmp_path: Path) -> None:
    base, (_, program) = captured["encoder"][1], program_of(captured, "encoder")
    want = first(program(**batch(pad=4)))
    peftfx.save(program, tmp_path / "adapter")
    loaded = peftfx.load(base, tmp_path / "adapter")
    assert torch.equal(first(loaded(**batch(pad=4))), want)
    assert torch.equal(first(program.fork()(**batch(pad=4))), want)
    assert torch.equal(first(program.without("coda")(**batch())), first(base(**batch())))
    assert program.verify()[-1].holds


@pytest.mark.parametrize(
    "other",
    ["lora{rank=4}", "ia3", "serial_adapter{bottleneck=6}", "prefix_tuning{length=3}",
     "prompt_tuning{length=3}", "bitfit"],
)  # fmt: skip
def test_order_among_methods_does_not_matter(captured: Any, other: str) -> None:
    _, base = captured["block"]
    outputs: list[Tensor] = []
    inputs = rows((5, 11))
    for text in (f"{other};{PREFILL}", f"{PREFILL};{other}"):
        program = peftfx.run(base, text)
        with torch.no_grad():
            for name, parameter in program.named_trainable_parameters().items():
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            outputs.append(first(program(**inputs)))
            alone = first(program(**{n: t[:1, :5] for n, t in inputs.items()}))
        torch.testing.assert_close(outputs[-1][:1, :5], alone, rtol=1e-4, atol=2e-5)
    assert torch.equal(*outputs)
    assert moved(first(base(**inputs)), outputs[0]) > 0.05


def test_folding_and_the_causal_path(captured: Any) -> None:
    """What folds inside a routed block still folds; without padding masks become a flag."""
    _, base = captured["block"]
    program = randomise(peftfx.run(base, f"lora{{rank=4}};{PREFILL}"), 0.2)
    folded = peftfx.run(program, "fold")
    assert [a.slot for a in folded.attachments] == ["routed"]
    assert "depends on the input" in folded.history[-1].skipped[0][1]
    torch.testing.assert_close(
        first(folded(**batch())), first(program(**batch())), rtol=1e-4, atol=1e-5
    )
    flagged = peftfx.run(base, f"causal{{length=32}};{PREFILL}")
    plain = captured.adapted("block", PREFILL)
    assert "LiveKeys" not in flagged.text()
    got = first(flagged(input_ids=batch()["input_ids"]))
    torch.testing.assert_close(got, first(plain(**batch())), rtol=1e-4, atol=1e-5)


def test_refusals(captured: Any) -> None:
    with pytest.raises(PassError, match="is causal"):
        peftfx.run(captured["decoder"][1], "coda")
    with pytest.raises(PassError, match="is causal"):
        peftfx.run(captured["decoder"][1], "coda{where=ffn or attn}")
    for name, text in (("encoder", CODA), ("block", PREFILL)):
        program = captured.adapted(name, text)
        with pytest.raises(PassError, match="runs on some tokens already"):
            peftfx.run(program, text.replace("{", "{name=b,"))
    with pytest.raises(OptionError, match="reduction"):
        peftfx.run(captured["encoder"][1], "coda{reduction=0}")


@pytest.mark.parametrize(
    ("name", "why"),
    [("swin", "no axis for the 64 tokens"), ("bloom", "merged or missing batch rows"),
     ("segformer", "mixes tokens by their order"), ("gpt_oss", "works along the tokens")],
)  # fmt: skip
def test_regions_that_cannot_lose_tokens(zoo: Any, name: str, why: str) -> None:
    with pytest.raises(PassError, match=why):
        peftfx.run(zoo[name], PREFILL)


def test_feed_forwards_alone(captured: Any) -> None:
    """A selector may route a part of a block; the rest stays dense."""
    model, base = captured["encoder"]
    program = randomise(peftfx.run(base, "coda{bottleneck=8,where=ffn}"), 0.2)
    ids = batch(1, 11)["input_ids"]
    with torch.no_grad():
        x = model.norm(model.words(ids[0]) + model.places.weight[:11])
        for layer, branch in zip(model.layers, branches(program), strict=True):
            q, k, v = (
                m(x).view(11, 4, 8).transpose(0, 1) for m in (layer.query, layer.key, layer.value)
            )
            a = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
            x = layer.norm1(x + layer.dense(a.transpose(0, 1).reshape(11, 32)))

            def run(h: Tensor, chosen: Tensor, layer: Any = layer) -> Tensor:
                return layer.norm2(h + layer.fc2(F.gelu(layer.fc1(h))))

            x = routed(x, x, run, branch, 3)
        got = first(program(input_ids=ids, attention_mask=torch.ones_like(ids)))[0]
    torch.testing.assert_close(got, x, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "reductions"),
    [("encoder", (2, 4)), ("bert", (3,)), ("decoder", (2, 6)), ("llama", (3,))],
)
def test_flops_fall_by_the_reduction(captured: Any, name: str, reductions: tuple[int, ...]) -> None:
    """The frozen linears of the blocks; what is not routed and the adapter are counted apart."""
    model, base = captured[name]

    def flops(program: Any) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            program(**batch(2, 36))
        counts = counter.get_flop_counts()["Global"]
        return sum(counts.get(op, 0) for op in (torch.ops.aten.addmm, torch.ops.aten.mm))

    heads = [m for n, m in model.named_modules() if "pooler" in n or "head" in n]
    sizes = [m.weight.numel() for m in heads if isinstance(m, nn.Linear)]
    rows = 2 if name in ("encoder", "bert") else 72  # the pooler reads one token
    outside = 2 * rows * sum(sizes)
    dense = flops(base) - outside
    assert dense > 0
    causal = "" if name in ("encoder", "bert") else ",causal=prefill"
    for reduction in reductions:
        program = peftfx.run(base, f"coda{{reduction={reduction},bottleneck=8{causal}}}")
        aside = 2 * 72 * 2 * (2 * 32 * 8)
        share = (flops(program) - outside - aside) / dense
        assert 0.95 / reduction < share < 1.05 / reduction + 0.02


def test_onnx(captured: Any, tmp_path: Path) -> None:
    """A decoder with rotary values and grouped queries (the encoder is exported in test_onnx)."""
    pytest.importorskip("onnx")
    _, program = program_of(captured, "block")
    report = peftfx.export_onnx(program, tmp_path / "m.onnx")
    assert report.error <= 1e-5 and len(report.parity) == 3


# The soft top-k itself.


@pytest.mark.parametrize("epsilon", [1.0, 0.3, 0.1, 0.02, 0.001])
@pytest.mark.parametrize(("n", "k"), [(40, 8), (40, 1), (40, 40), (1, 1), (512, 171)])
def test_soft_topk_is_exact(n: int, k: int, epsilon: float) -> None:
    scores = torch.randn(5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n + k))
    m = soft_topk(scores, torch.full((5, 1), k), epsilon)
    assert float((m.sum(-1) - k).abs().max()) <= 1e-12 * max(1, k)
    assert float(m.min()) >= 0 and float(m.max()) <= 1
    for row in range(5):
        torch.testing.assert_close(m[row], bisection(scores[row], k, epsilon), rtol=0, atol=1e-10)
    single = soft_topk(scores.float(), torch.full((5, 1), k), epsilon)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), m, rtol=0, atol=3e-4)


def test_soft_topk_edges() -> None:
    ties = soft_topk(torch.zeros(2, 9), torch.full((2, 1), 3), 0.02)
    torch.testing.assert_close(ties, torch.full((2, 9), 1 / 3))
    scores = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    valid = torch.ones(3, 12, dtype=torch.bool)
    valid[0, 5:], valid[2] = False, False
    m = soft_topk(scores, torch.tensor([[2], [4], [0]]), 0.1, valid)
    torch.testing.assert_close(m.sum(-1), torch.tensor([2.0, 4.0, 0.0]))
    assert not m[~valid].any()
    m.square().sum().backward()
    assert scores.grad is not None and bool(scores.grad.isfinite().all())
    wide = scores.detach()[:2].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: soft_topk(s, torch.tensor([[2], [4]]), 0.3), wide)
    half = soft_topk(scores.detach().bfloat16(), torch.full((3, 1), 4), 0.1)
    assert half.dtype == torch.float32
    extreme = torch.tensor([[1e4, 0.0, -1e4, 1e-3]])
    torch.testing.assert_close(
        soft_topk(extreme, torch.tensor([[2]]), 0.02).sum(), torch.tensor(2.0)
    )


def test_coordinate_descent_misses_the_sum() -> None:
    scores = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    count = torch.full((5, 1), 8)
    near = coordinate_descent(scores, count, 1.0, 20)
    torch.testing.assert_close(near, soft_topk(scores, count, 1.0), rtol=0, atol=1e-9)
    far = coordinate_descent(scores, count, 0.05, 20)
    assert 0.5 < float((far.sum(-1) - 8).abs().max()) < 4


def test_coordinate_descent_is_an_option(captured: Any) -> None:
    _, base = captured["encoder"]
    exact, steps = (
        first(
            randomise(peftfx.run(base, f"coda{{epsilon=1.0,bottleneck=8{more}}}"))(**batch(pad=3))
        )
        for more in ("", ",iterations=60")
    )
    torch.testing.assert_close(exact, steps, rtol=1e-3, atol=1e-4)
