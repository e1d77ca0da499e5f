"""Hand-written expectations of text models, from reading their source."""

from __future__ import annotations

from dataclasses import replace

from .expect import FF, Attn, Expect, Mix, Stream

# Encoders: post-norm, dropout on every branch.
_BERT = Attn(
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", before="dropout",
)  # fmt: skip
_BERT_FF = FF("intermediate.dense", "output.dense", before="dropout")


def _bert(root: str) -> Stream:
    return Stream(f"{root}encoder.layer.{{i}}.", (_BERT, _BERT_FF))


def _tables(root: str, token: str, position: str, kind: str = "") -> tuple[str, ...]:
    named = [("token", token), ("position", position), ("type", kind)]
    return tuple(f"{role}:{root}{name}" for role, name in named if name)


_BERT_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_BERT_EAGER = Expect(
    (_bert(""),), other=("pooler.dense",), embeddings=_tables("embeddings.", *_BERT_TABLES),
    norms=1,
)  # fmt: skip
_MINILM_PARTS = (replace(_BERT, heads=12, kv=12, dim=32), _BERT_FF)
_MINILM = Stream("encoder.layer.{i}.", _MINILM_PARTS, layers=6, width=384)

_DISTILBERT = Stream(
    "distilbert.transformer.layer.{i}.",
    (
        Attn("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        FF("ffn.lin1", "ffn.lin2", before="dropout"),
    ),
)

# Decoders: pre-norm, causal.
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = Attn(*_QKV, "self_attn.o_proj", kv=2, causal=True)
LLAMA_FF = FF("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", act="silu")
_GEMMA_FF = replace(LLAMA_FF, act="gelu")
LAYERS = "model.layers.{i}."
_EXPERTS = FF(
    "mlp.experts.gate_up_proj[{up}]", "mlp.experts.down_proj", "mlp.experts.gate_up_proj[{gate}]",
    act="silu", before="reshape", experts=5, router="mlp.gate",
)  # fmt: skip


def decoder(
    *parts: Attn | FF, norms: int = 2, tied: bool = False, parallel: bool = False
) -> Expect:
    return Expect(
        (Stream(LAYERS, parts, norms=norms, parallel=parallel),), head=("lm_head",),
        embeddings=("token:model.embed_tokens",), norms=1, ties=("lm_head",) if tied else (),
    )  # fmt: skip


def _experts(inner: int) -> FF:
    up, gate = f"{inner}:{2 * inner}", f"0:{inner}"
    return replace(
        _EXPERTS, up=_EXPERTS.up.format(up=up), gate=_EXPERTS.gate.format(gate=gate)
    )  # fmt: skip


QWEN_MOE = replace(
    _experts(24),
    shared=FF("mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj",
              "mlp.shared_expert.gate_proj", act="silu"),
    shared_gate="mlp.shared_expert_gate",
)  # fmt: skip

_FUSED = "attention.query_key_value"
_NEOX = Attn(
    f"{_FUSED}[0:8,24:32,48:56,72:80]", f"{_FUSED}[8:16,32:40,56:64,80:88]",
    f"{_FUSED}[16:24,40:48,64:72,88:96]", "attention.dense", causal=True, before="dropout",
)  # fmt: skip

# Text to text.
_T5_QKVO = ("q", "k", "v", "o")


def _t5(block: str, side: str, cross: bool = False) -> Attn:
    names = [f"layer.{block}.{side}.{n}" for n in _T5_QKVO]
    causal = not cross
    return Attn(
        names[0], names[1], names[2], names[3], cross=cross, causal=causal, before="dropout"
    )


def _t5_ff(block: int) -> FF:
    dense = f"layer.{block}.DenseReluDense"
    return FF(f"{dense}.wi_1", f"{dense}.wo", f"{dense}.wi_0", act="gelu", before="dropout")


_T5_SELF = _t5("0", "SelfAttention")
_BIAS = "layer.0.SelfAttention.relative_attention_bias"
T5 = Expect(
    (
        Stream("encoder.block.{i}.", (replace(_T5_SELF, causal=False), _t5_ff(1))),
        Stream(
            "decoder.block.{i}.", (_T5_SELF, _t5("1", "EncDecAttention", True), _t5_ff(2)), norms=3
        ),
    ),
    head=("lm_head",), ties=("lm_head",), norms=2,
    embeddings=(
        "token:shared", "token:shared",
        f"relative:encoder.block.0.{_BIAS}", f"relative:decoder.block.0.{_BIAS}",
    ),
)  # fmt: skip


def bart_layer(attention: str, cross: bool = False, causal: bool = False) -> Attn:
    names = [f"{attention}.{n}_proj" for n in ("q", "k", "v", "out")]
    return Attn(
        names[0], names[1], names[2], names[3], cross=cross, causal=causal, before="dropout"
    )


BART_FF = FF("fc1", "fc2", before="dropout")


def bart_streams(norms: tuple[int, int] = (2, 3)) -> tuple[Stream, ...]:
    encoder = (bart_layer("self_attn"), BART_FF)
    decoder = (bart_layer("self_attn", causal=True), bart_layer("encoder_attn", True), BART_FF)
    return (
        Stream("model.encoder.layers.{i}.", encoder, norms=norms[0]),
        Stream("model.decoder.layers.{i}.", decoder, norms=norms[1]),
    )


_GPT2_QKV = "attn.c_attn"

# Beyond the list.
_FALCON = "self_attention.query_key_value"
_BLOOM = Attn(
    f"{_FALCON}[0:8,24:32,48:56,72:80]", f"{_FALCON}[8:16,32:40,56:64,80:88]",
    f"{_FALCON}[16:24,40:48,64:72,88:96]", "self_attention.dense", causal=True, before="dropout",
)  # fmt: skip
_LATENT = Attn(  # keys: 8 features a head from the latent, 4 shared ones with the rotation
    "self_attn.q_b_proj", "self_attn.kv_b_proj[0:8,16:24,32:40,48:56]",
    "self_attn.kv_b_proj[8:16,24:32,40:48,56:64]", "self_attn.o_proj", dim=12, causal=True,
    rotated="self_attn.kv_a_proj_with_mqa[12:16]",
    inner=("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa[0:12]"),
)  # fmt: skip
DEEPSEEK_MOE = replace(
    _experts(24), before="add", experts=6,
    shared=FF("mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj",
              "mlp.shared_experts.gate_proj", act="silu"),
)  # fmt: skip
_ALBERT = Stream(  # one layer's weights, called twice
    "encoder.albert_layer_groups.0.albert_layers.0.",
    (
        Attn("attention.query", "attention.key", "attention.value", "attention.dense",
             before="dropout"),
        FF("ffn", "ffn_output"),
    ),
)  # fmt: skip
_ALBERT_CALLS = [
    f"{_ALBERT.path}{name}" for part in _ALBERT.parts for _, name in part.roles()
]  # fmt: skip
_ODD, _EVEN = (",".join(f"{i}:{i + 1}" for i in range(s, 112, 2)) for s in (1, 0))
_LFM_FF = FF("feed_forward.w3", "feed_forward.w2", "feed_forward.w1", act="silu")
_LFM = (
    Stream(LAYERS, (Mix("conv.in_proj", "conv.out_proj"), _LFM_FF), layers=1),
    Stream(
        LAYERS,
        (replace(LLAMA, o="self_attn.out_proj"), _LFM_FF), layers=1, norms=4, first=1,
    ),
)  # fmt: skip

TEXT: dict[str, Expect] = {
    "bert": Expect(
        (_bert("bert."),), head=("classifier",), other=("bert.pooler.dense",),
        embeddings=_tables("bert.embeddings.", *_BERT_TABLES), norms=1,
    ),
    "bert_eager": _BERT_EAGER,
    "minilm": replace(_BERT_EAGER, streams=(_MINILM,)),
    "roberta": Expect(
        (_bert("roberta."),), head=("lm_head.decoder",), other=("lm_head.dense",), norms=2,
        embeddings=_tables("roberta.embeddings.", *_BERT_TABLES), ties=("lm_head.decoder",),
    ),
    "distilbert": Expect(
        (_DISTILBERT,), head=("classifier",), other=("pre_classifier",), norms=1,
        embeddings=_tables("distilbert.embeddings.", "word_embeddings", "position_embeddings"),
    ),
    "gpt2": Expect(
        (
            Stream("transformer.h.{i}.", (
                Attn(f"{_GPT2_QKV}[0:32]", f"{_GPT2_QKV}[32:64]", f"{_GPT2_QKV}[64:96]",
                     "attn.c_proj", causal=True, before="dropout"),
                FF("mlp.c_fc", "mlp.c_proj", before="dropout"),
            )),
        ),
        head=("lm_head",), ties=("lm_head",), norms=1,
        embeddings=_tables("transformer.", "wte", "wpe"),
    ),
    "gpt_neox": Expect(
        (
            Stream(
                "gpt_neox.layers.{i}.",
                (_NEOX, FF("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", before="dropout")),
                parallel=True,
            ),
        ),
        head=("lm_head",), embeddings=("token:gpt_neox.embed_in",), norms=1,
    ),
    "phi": decoder(
        replace(LLAMA, o="self_attn.dense", before="dropout"),
        FF("mlp.fc1", "mlp.fc2", before="dropout"), norms=1, parallel=True,
    ),
    "phi3": decoder(
        Attn("self_attn.qkv_proj[0:32]", "self_attn.qkv_proj[32:48]", "self_attn.qkv_proj[48:64]",
             "self_attn.o_proj", kv=2, causal=True, before="dropout"),
        FF("mlp.gate_up_proj[56:112]", "mlp.down_proj", "mlp.gate_up_proj[0:56]", act="silu",
           before="dropout"),
    ),
    "llama": decoder(LLAMA, LLAMA_FF, tied=True),
    "llama_eager": decoder(LLAMA, LLAMA_FF),
    "mistral": decoder(LLAMA, LLAMA_FF),
    "qwen2": decoder(LLAMA, LLAMA_FF),
    "qwen3": decoder(LLAMA, LLAMA_FF, norms=4),
    "gemma": decoder(LLAMA, _GEMMA_FF, tied=True),
    "gemma2": decoder(
        replace(LLAMA, before="mul"), replace(_GEMMA_FF, before="mul"), norms=4, tied=True
    ),
    "gemma3": decoder(
        replace(LLAMA, before="mul"), replace(_GEMMA_FF, before="mul"), norms=6, tied=True
    ),
    "mixtral": decoder(LLAMA, _experts(56)),
    "qwen2_moe": decoder(LLAMA, QWEN_MOE),
    "falcon": Expect(
        (
            Stream("transformer.h.{i}.", (
                Attn(f"{_FALCON}[0:16,32:48]", f"{_FALCON}[16:24,48:56]",
                     f"{_FALCON}[24:32,56:64]", "self_attention.dense", kv=2, causal=True,
                     before="matmul"),
                FF("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", before="matmul"),
            ), parallel=True),
        ),
        head=("lm_head",), ties=("lm_head",), norms=1,
        embeddings=("token:transformer.word_embeddings",),
    ),
    "bloom": Expect(
        (
            Stream("transformer.h.{i}.", (
                _BLOOM, FF("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", before="dropout"),
            )),
        ),
        head=("lm_head",), ties=("lm_head",), norms=2,
        embeddings=("token:transformer.word_embeddings",),
    ),
    "deepseek_v3": decoder(_LATENT, DEEPSEEK_MOE, norms=4),
    "albert": Expect(
        (replace(_ALBERT, shared=True),), other=("encoder.embedding_hidden_mapping_in", "pooler"),
        embeddings=_tables("embeddings.", *_BERT_TABLES), norms=1,
        calls={name: 2 for name in _ALBERT_CALLS},
    ),
    "gpt_oss": decoder(
        LLAMA,
        replace(_EXPERTS, up=f"mlp.experts.gate_up_proj[{_ODD}]", router="mlp.router",
                gate=f"mlp.experts.gate_up_proj[{_EVEN}]", act="gelu"),
    ),
    "lfm2": Expect(
        _LFM, one_stream=True, head=("lm_head",), ties=("lm_head",), norms=1,
        embeddings=("token:model.embed_tokens",),
        convs=("conv.depthwise:model.layers.0.conv.conv",),
    ),
    "t5": T5,
    "bart": Expect(
        bart_streams(), head=("lm_head",), ties=("lm_head",), norms=2,
        embeddings=(
            "token:model.shared", "token:model.shared",
            "position:model.encoder.embed_positions", "position:model.decoder.embed_positions",
        ),
    ),
    "mamba": Expect(
        (
            Stream("backbone.layers.{i}.mixer.", (
                Mix("in_proj", "out_proj", ("x_proj", "dt_proj")),
            ), norms=1),
        ),
        head=("lm_head",), ties=("lm_head",), norms=1, embeddings=("token:backbone.embeddings",),
        convs=tuple(f"conv.depthwise:backbone.layers.{i}.mixer.conv1d" for i in (0, 1)),
    ),
    "mamba2": Expect(
        (Stream("backbone.layers.{i}.mixer.", (Mix("in_proj", "out_proj"),), norms=2),),
        head=("lm_head",), norms=1, embeddings=("token:backbone.embeddings",),
        convs=tuple(f"conv.depthwise:backbone.layers.{i}.mixer.conv1d" for i in (0, 1)),
    ),
}  # fmt: skip
