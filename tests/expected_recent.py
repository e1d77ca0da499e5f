"""Hand-written expectations of recent text models, from reading their source."""

from __future__ import annotations

from dataclasses import replace

from .expect import FF, Attn, Expect, Mix, Stream
from .expected_text import LAYERS, LLAMA, LLAMA_FF, QWEN_MOE, decoder

_HEAD = ("lm_head",)
_TOKENS = ("token:model.embed_tokens",)

# Each head of the queries' projection makes 8 features and then their 8 gates.
_GATED = replace(
    LLAMA, q="self_attn.q_proj[0:8,16:24,32:40,48:56]",
    gate="self_attn.q_proj[8:16,24:32,40:48,56:64]",
)  # fmt: skip
_DELTA = "linear_attn."
_QWEN_NEXT = (
    Stream(
        LAYERS,
        (Mix(f"{_DELTA}in_proj_qkvz", f"{_DELTA}out_proj", also=(f"{_DELTA}in_proj_ba",)), QWEN_MOE),
        layers=1, norms=3,
    ),
    Stream(LAYERS, (_GATED, QWEN_MOE), layers=1, norms=4, first=1),
)  # fmt: skip

# The last layer reads the keys and values of the one before.
_GELU = replace(LLAMA_FF, act="gelu", before="mul")
_PER_LAYER = FF("per_layer_input_gate", "per_layer_projection", before="mul")
_NORMED = replace(LLAMA, before="mul")
_BORROWED = replace(
    _NORMED, k="/model.layers.0.self_attn.k_proj", v="/model.layers.0.self_attn.v_proj"
)


def _gemma4(attention: Attn, layer: int, norms: int) -> Stream:
    parts = (attention, _GELU, _PER_LAYER)
    return Stream(LAYERS, parts, layers=1, first=layer, norms=norms)


_GEMMA3N_OTHER = (
    "altup.modality_router", "altup.prediction_coefs", "altup.correction_coefs",
    "laurel.linear_left", "laurel.linear_right", "per_layer_input_gate", "per_layer_projection",
)  # fmt: skip
_SIDE = ("side:model.embed_tokens_per_layer", *_TOKENS)

_FALCON_FF = replace(
    LLAMA_FF,
    up="feed_forward.up_proj",
    down="feed_forward.down_proj",
    gate="feed_forward.gate_proj",
)
_NEMOTRON = (  # two sublayers of the model are one layer: a mixer and a feed-forward block
    Stream("model.layers.0.", (
        Mix("mixer.in_proj", "mixer.out_proj"),
        FF("/model.layers.1.mixer.experts.up_proj", "/model.layers.1.mixer.experts.down_proj",
           act="relu", before="add", experts=6, router="/model.layers.1.mixer.gate",
           shared=FF("/model.layers.1.mixer.shared_experts.up_proj",
                     "/model.layers.1.mixer.shared_experts.down_proj", act="relu")),
    ), layers=1, norms=3),
    Stream("model.layers.2.mixer.", (
        Attn("q_proj", "k_proj", "v_proj", "o_proj", kv=2, causal=True),
        FF("/model.layers.3.mixer.up_proj", "/model.layers.3.mixer.down_proj", act="relu"),
    ), layers=1, first=1),
)  # fmt: skip

# A shared transformer, called before two of the mixers; its feed-forward block is no residual one.
_SHARED = "model.layers.1.shared_transformer."
_SHARED_QKVO = tuple(f"{_SHARED}self_attn.{n}_proj" for n in "qkvo")
_SHARED_FF = tuple(f"{_SHARED}feed_forward.{n}" for n in ("gate_up_proj", "down_proj"))


def _adapter(call: int) -> tuple[str, ...]:
    return tuple(f"{_SHARED}feed_forward.gate_up_proj_adapter_list.{call}.{n}" for n in (0, 1))


def _zamba(call: int, inner: tuple[str, ...], norms: int) -> tuple[Stream, Stream]:
    """One call of the shared transformer, and the mixer behind it."""
    q, k, v, o = (f"/{name}" for name in _SHARED_QKVO)
    names = (*inner, *_adapter(call), f"model.layers.{call + 1}.linear")
    attention = Attn(q, k, v, o, dim=16, causal=True, inner=tuple(f"/{n}" for n in names))
    mixer = Stream(
        f"model.layers.{call + 1}.mamba_decoder.mamba.", (Mix("in_proj", "out_proj"),),
        layers=1, norms=2, first=2 * call + 2,
    )  # fmt: skip
    before = replace(attention, before="linear")
    return Stream("", (before,), layers=1, norms=norms, first=2 * call + 1), mixer


_LOOP = Attn("qkv[0:32]", "qkv[32:64]", "qkv[64:96]", "out", causal=True)
_LOOP_WEIGHTS = tuple(f"blocks.0.{n}" for n in ("qkv", "out", "up", "down"))

_ABSORBED = Attn(  # of the score's two products, the rotated one stands for it
    "self_attn.q_b_proj[8:12,20:24,32:36,44:48]", "self_attn.kv_a_proj_with_mqa[12:16]",
    "self_attn.kv_a_proj_with_mqa[0:12]", "", kv=1, dim=4, causal=True,
    inner=("self_attn.q_b_proj[0:8,12:20,24:32,36:44]", "self_attn.q_a_proj",
           "self_attn.kv_b_proj", "self_attn.o_proj"),
)  # fmt: skip
_MODERN = Attn(
    "attn.Wqkv[0:32]", "attn.Wqkv[32:64]", "attn.Wqkv[64:96]", "attn.Wo", before="dropout"
)
_MODERN_FF = FF("mlp.Wi[56:112]", "mlp.Wo", "mlp.Wi[0:56]")

RECENT: dict[str, Expect] = {
    "qwen3_5": decoder(_GATED, LLAMA_FF, norms=4),
    "qwen3_next": Expect(
        _QWEN_NEXT, one_stream=True, head=_HEAD, norms=1, embeddings=_TOKENS,
        convs=("conv.depthwise:model.layers.0.linear_attn.conv1d",),
    ),
    "gemma4": Expect(
        (
            _gemma4(replace(_NORMED, dim=16), 0, norms=7),
            _gemma4(replace(_BORROWED, dim=16), 1, norms=6),
        ),
        one_stream=True, head=_HEAD, ties=_HEAD, norms=2, embeddings=_SIDE,
        other=("model.per_layer_model_projection",),
    ),
    "gemma3n": Expect(
        (
            Stream(LAYERS, (_NORMED, _GELU), layers=1, norms=6),
            Stream(LAYERS, (_BORROWED, _GELU), layers=1, norms=5, first=1),
        ),
        one_stream=True, head=_HEAD, ties=_HEAD, norms=8, embeddings=_SIDE,
        other=(
            "model.per_layer_model_projection", "model.altup_projections.0",
            "model.altup_unembed_projections.0",
            *(f"model.layers.{i}.{n}" for i in range(2) for n in _GEMMA3N_OTHER),
        ),
        calls={f"model.layers.{i}.altup.modality_router": 2 for i in range(2)},
    ),
    "falcon_h1": Expect(  # the multipliers are 1
        (
            Stream(LAYERS, (Mix("mamba.in_proj", "mamba.out_proj"), LLAMA), parallel=True),
            Stream(LAYERS, (_FALCON_FF,)),
        ),
        one_stream=True, head=_HEAD, norms=1, embeddings=_TOKENS,
        convs=tuple(f"conv.depthwise:model.layers.{i}.mamba.conv1d" for i in (0, 1)),
    ),
    "nemotron_h": Expect(
        _NEMOTRON, one_stream=True, head=_HEAD, norms=1, embeddings=("token:model.embeddings",),
        convs=("conv.depthwise:model.layers.0.mixer.conv1d",),
    ),
    "zamba2": Expect(
        (
            Stream("model.layers.0.mamba.", (Mix("in_proj", "out_proj"),), layers=1),
            *_zamba(0, _SHARED_FF, norms=2), *_zamba(1, (), norms=0),
        ),
        one_stream=True, head=_HEAD, norms=1, embeddings=_TOKENS,
        ties=("lm_head", *_SHARED_QKVO, *_SHARED_FF, *_adapter(0), *_adapter(1)),
        calls=dict.fromkeys((*_SHARED_QKVO, *_SHARED_FF), 2),
        convs=(
            "conv.depthwise:model.layers.0.mamba.conv1d",
            *(f"conv.depthwise:model.layers.{i}.mamba_decoder.mamba.conv1d" for i in (1, 2)),
        ),
    ),
    "looped": Expect(
        (
            Stream("blocks.0.", (_LOOP, FF("up", "down")), layers=3, shared=True),
        ),
        head=("head",), embeddings=("token:embed",), ties=_LOOP_WEIGHTS,
        calls=dict.fromkeys(_LOOP_WEIGHTS, 3),
    ),
    "absorbed": replace(
        decoder(_ABSORBED, LLAMA_FF, norms=4),
        fixed=tuple(f"model.layers.{i}.self_attn.kv_b_proj" for i in (0, 1)),
        calls={f"model.layers.{i}.self_attn.kv_b_proj": 2 for i in (0, 1)},
    ),
    "modernbert": Expect(
        (
            Stream("model.layers.{i}.", (_MODERN, _MODERN_FF), layers=1, norms=1),
            Stream("model.layers.{i}.", (_MODERN, _MODERN_FF), layers=1, norms=2, first=1),
        ),
        one_stream=True, head=("decoder",), other=("head.dense",), ties=("decoder",), norms=3,
        embeddings=("token:model.embeddings.tok_embeddings",),
    ),
}  # fmt: skip
