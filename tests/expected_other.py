"""Hand-written expectations of plain torch, vision, sound and diffusion models."""

from __future__ import annotations

from .expect import FF, Attn, Convs, Expect, Stream
from .expected_text import BART_FF, bart_layer

# Plain torch.


def _multihead(path: str) -> tuple[str, str, str]:
    """`nn.MultiheadAttention` keeps q, k and v in one weight."""
    name = f"{path}in_proj_weight"
    return f"{name}[0:32]", f"{name}[32:64]", f"{name}[64:96]"


_TORCH_LAYER = (
    Attn(*_multihead("self_attn."), "self_attn.out_proj", before="dropout"),
    FF("linear1", "linear2", act="relu", before="dropout"),
)
_RESNET = Convs("BatchNorm")

# Vision transformers: pre-norm.
_VIT = Attn("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj",
            before="dropout")  # fmt: skip
_MLP = FF("mlp.fc1", "mlp.fc2")


def _swin(stage: int, width: int, heads: int) -> Stream:
    """Windows are merged by views after the attention's dropout; the FFN's dropout is its last."""
    attention = Attn(_VIT.q, _VIT.k, _VIT.v, _VIT.o, heads, heads, before="view")
    feed_forward = FF("mlp.fc1", "mlp.fc2", before="dropout")
    path = f"swin.encoder.layers.{stage}.blocks.{{i}}."
    return Stream(path, (attention, feed_forward), width=width)


def _convnext(stage: int, width: int) -> Stream:
    path = f"convnext.encoder.stages.{stage}.layers.{{i}}."
    return Stream(path, (FF("pwconv1", "pwconv2", before="mul"),), norms=1, width=width)


_CLIP = Attn("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_LLAMA = Attn("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
              kv=2, causal=True)  # fmt: skip

# Diffusion: convolutional blocks whose shortcut is projected where channels change, and
# transformers over the pixels inside of them.


def _unet_transformer(path: str, width: int, heads: int) -> Stream:
    dim = width // heads
    names = [[f"attn{n}.to_{p}" for p in ("q", "k", "v", "out.0")] for n in (1, 2)]
    own, cross = (
        Attn(q, k, v, o, heads, heads, dim, cross=i == 1, before="div")
        for i, (q, k, v, o) in enumerate(names)
    )
    inner = 4 * width
    gated = "ff.net.0.proj"  # GEGLU: the value first, then the gate
    feed_forward = FF(f"{gated}[0:{inner}]", "ff.net.2", f"{gated}[{inner}:{2 * inner}]")
    path = f"{path}.transformer_blocks.{{i}}."
    return Stream(path, (own, cross, feed_forward), norms=3, layers=1, width=width)


def _resnets(width: int, layers: int = 1) -> Stream:
    return Stream("", (Convs("conv2d"),), layers=layers, width=width)


_RESNETS = (
    "down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "mid_block.resnets.0",
    "mid_block.resnets.1", "up_blocks.0.resnets.0", "up_blocks.0.resnets.1",
    "up_blocks.1.resnets.0", "up_blocks.1.resnets.1",
)  # fmt: skip
_SHORTCUTS = tuple(r for r in _RESNETS if not r.startswith(("down_blocks.0", "mid")))
_TRANSFORMERS = (
    "down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
)  # fmt: skip
UNET = Expect(
    (
        _resnets(16),  # down 0
        _unet_transformer(_TRANSFORMERS[0], 16, 4),
        _resnets(32, 3),  # down 1 and the middle: channels change once
        _unet_transformer(_TRANSFORMERS[1], 32, 4),
        _resnets(32), _resnets(32), _resnets(16),  # up: every block concatenates a skip
        _unet_transformer(_TRANSFORMERS[2], 16, 4),
        _resnets(16),
        _unet_transformer(_TRANSFORMERS[3], 16, 4),
    ),
    other=(
        "time_embedding.linear_1", "time_embedding.linear_2",
        *(f"{r}.time_emb_proj" for r in _RESNETS),
    ),
    convs=(
        "conv_in", "conv_out", "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.upsamplers.0.conv", *(f"{r}.conv{n}" for r in _RESNETS for n in (1, 2)),
        *(f"{r}.conv_shortcut" for r in _SHORTCUTS),
        *(f"{t}.proj_{side}" for t in _TRANSFORMERS for side in ("in", "out")),
    ),
    norms=5,
)  # fmt: skip

_DIT_EMBEDDER = "transformer_blocks.{}.norm1.emb.{}"
DIT = Expect(
    (
        Stream(
            "transformer_blocks.{i}.",
            (
                Attn("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", before="mul"),
                FF("ff.net.0.proj", "ff.net.2", before="mul"),
            ),
            norms=0,
        ),
    ),
    head=("proj_out_2",),
    other=(
        "proj_out_1", *(f"transformer_blocks.{i}.norm1.linear" for i in (0, 1)),
        *(
            _DIT_EMBEDDER.format(i, f"timestep_embedder.linear_{n}")
            for i in (0, 1) for n in (1, 2)
        ),
    ),
    embeddings=tuple(
        f"type:{_DIT_EMBEDDER.format(i, 'class_embedder.embedding_table')}" for i in (0, 0, 1)
    ),
    convs=("conv.patch:pos_embed.proj",),
    calls={_DIT_EMBEDDER.format(0, f"timestep_embedder.linear_{n}"): 2 for n in (1, 2)},
)  # fmt: skip

_TOWER = "vision_model.encoder.layers.{i}."

OTHER: dict[str, Expect] = {
    "mlp": Expect(head=("3",), other=("0",)),
    "resnet": Expect(
        (
            Stream("blocks.0.", (_RESNET,), layers=1, width=8),
            Stream("blocks.1.", (_RESNET,), layers=1, width=16),
        ),
        head=("head",), norms=1,
        convs=("stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2",
               "blocks.1.shortcut"),
    ),
    "transformer_encoder": Expect((Stream("layers.{i}.", _TORCH_LAYER),)),
    "multihead_attention": Expect(
        (Stream("layers.{i}.", (Attn(*_multihead(""), "out_proj", before="transpose"),), norms=0),)
    ),
    "vit": Expect(
        (Stream("vit.layers.{i}.", (_VIT, FF("mlp.fc1", "mlp.fc2", before="dropout"))),),
        head=("classifier",), norms=1,
        convs=("conv.patch:vit.embeddings.patch_embeddings.projection",),
    ),
    "swin": Expect(
        (_swin(0, 16, 2), _swin(1, 32, 4)), head=("classifier",), norms=3,
        other=("swin.encoder.layers.0.downsample.reduction",),
        convs=("conv.patch:swin.embeddings.patch_embeddings.projection",),
        embeddings=tuple(
            f"relative:swin.encoder.layers.{s}.blocks.{b}.attention."
            "relative_position_bias.relative_position_bias_table"
            for s in (0, 1) for b in (0, 1)
        ),
    ),
    "convnext": Expect(
        (_convnext(0, 8), _convnext(1, 16)), head=("classifier",), norms=3,
        convs=(
            "conv.patch:convnext.embeddings.patch_embeddings",
            "conv.patch:convnext.encoder.stages.1.downsampling_layer.1",
            *(
                f"conv.depthwise:convnext.encoder.stages.{s}.layers.{i}.dwconv"
                for s in (0, 1) for i in (0, 1)
            ),
        ),
    ),
    "segformer": Expect(
        (
            Stream(
                "segformer.stages.0.blocks.{i}.",
                (
                    Attn(_VIT.q, _VIT.k, _VIT.v, _VIT.o, before="dropout"),
                    FF("mlp.fc1", "mlp.fc2", before="dropout"),
                ),
                norms=3,
            ),
        ),
        head=("classifier",), norms=2,
        convs=(
            "segformer.stages.0.patch_embeddings.proj",
            *(
                f"conv.patch:segformer.stages.0.blocks.{i}.attention"
                ".sequence_reduction.sequence_reduction" for i in (0, 1)
            ),
            *(f"conv.depthwise:segformer.stages.0.blocks.{i}.mlp.dwconv.dwconv" for i in (0, 1)),
        ),
    ),
    "clip": Expect(
        (
            Stream("vision_model.encoder.layers.{i}.", (_CLIP, _MLP)),
            Stream(
                "text_model.encoder.layers.{i}.",
                (Attn(_CLIP.q, _CLIP.k, _CLIP.v, _CLIP.o, causal=True), _MLP),
            ),
        ),
        head=("visual_projection", "text_projection"), norms=3,
        convs=("conv.patch:vision_model.embeddings.patch_embedding",),
        embeddings=(
            "position:vision_model.embeddings.position_embedding",
            "token:text_model.embeddings.token_embedding",
            "position:text_model.embeddings.position_embedding",
        ),
    ),
    "llava": Expect(
        (
            # The model reads the last vision layer but one: the last one is dead.
            Stream(
                "model.vision_tower.encoder.layers.{i}.",
                (Attn(_CLIP.q, _CLIP.k, _CLIP.v, _CLIP.o, dim=10), _MLP), layers=1, width=40,
            ),
            Stream(
                "model.language_model.layers.{i}.",
                (_LLAMA, FF("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", act="silu")),
            ),
        ),
        head=("lm_head",), norms=2,
        other=("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
        convs=("conv.patch:model.vision_tower.embeddings.patch_embedding",),
        embeddings=(
            "token:model.language_model.embed_tokens",
            "position:model.vision_tower.embeddings.position_embedding",
        ),
    ),
    "whisper": Expect(
        (
            Stream("model.encoder.layers.{i}.", (bart_layer("self_attn"), BART_FF)),
            Stream(
                "model.decoder.layers.{i}.",
                (bart_layer("self_attn", causal=True), bart_layer("encoder_attn", True), BART_FF),
                norms=3,
            ),
        ),
        head=("proj_out",), ties=("proj_out",), norms=2,
        convs=("model.encoder.conv1", "model.encoder.conv2"),
        embeddings=(
            "token:model.decoder.embed_tokens", "position:model.encoder.embed_positions",
            "position:model.decoder.embed_positions",
        ),
    ),
    "unet": UNET,
    "dit": DIT,
}  # fmt: skip
