"""Readers of other libraries' adapters as functions of bytes: of a JSON document with the config and
the header of the tensors, whose numbers are all alike, or of the file itself.

    python -m tests.fuzzing_adapters    writes the corpus, with the libraries themselves

A reader of another format is one more line in `TARGETS`.
"""

from __future__ import annotations

import functools
import json
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from peftfx.exporters.adapterhub.config import SAFE
from peftfx.exporters.adapterhub.files import read_adapterhub
from peftfx.exporters.base import Files, checkpoint, require_fit
from peftfx.exporters.formats import read_adapter
from peftfx.exporters.gguf.adapter import read_gguf_adapter
from peftfx.exporters.hf_peft.config import CONFIG, TENSORS
from peftfx.exporters.hf_peft.writing import written
from peftfx.exporters.mlx import TENSORS as MLX_TENSORS
from peftfx.exporters.onnx.adapter import save as save_onnx_adapter
from peftfx.exporters.onnx.adapter_file import parse_onnx_adapter
from peftfx.exporters.plain_lora import plain_lora
from peftfx.rewriter.errors import RewriteError
from peftfx.rewriter.files.files import parse_json, write_tensors
from peftfx.rewriter.files.torch_bin import parse_torch_bin, write_torch_bin

from . import writers
from .temporary import lasting

CORPUS = Path(__file__).parent / "corpus"
LARGEST = 2**20
"""Bytes of tensors that a document may ask for."""

Document = Mapping[str, Any]


@functools.cache
def _place() -> Path:
    shared = Path("/dev/shm")
    return lasting("peftfx-fuzz", shared if shared.is_dir() else None)


def _tensors(header: Any) -> bytes:
    """A safetensors file of that header, whose float32 numbers are 0.747."""
    about = header.values() if isinstance(header, dict) else ()  # pyright: ignore
    ends = [e for a in about if isinstance(a, dict) and isinstance(o := a.get("data_offsets"), list)
            for e in o if isinstance(e, int)]  # fmt: skip
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"?" * min(max([0, *ends]), LARGEST)


def _directory(document: Document, tensors: str) -> Path:
    (_place() / CONFIG).write_text(json.dumps(document.get("config")))
    (_place() / tensors).write_bytes(_tensors(document.get("header")))
    return _place()


def _single_file(document: Document) -> Path:
    path = _place() / "a.safetensors"
    path.write_bytes(_tensors(document.get("header")))
    return path


_DOCUMENTS: dict[str, Callable[[Document], Path]] = {
    "peft": lambda document: _directory(document, TENSORS),
    "peft_text": lambda document: _directory(document, TENSORS),
    "mlx": lambda document: _directory(document, MLX_TENSORS),
    "single_file": _single_file,
    "adapterhub": lambda document: _directory(document, SAFE),
}
"""Name -> what writes a document as an adapter of that format."""


def _document_of(name: str, data: bytes) -> None:
    """Reads an adapter as far as conversion does, but for writing it."""
    document = parse_json(data, "it")
    if not isinstance(document, dict):
        return
    path = _DOCUMENTS[name](document)  # pyright: ignore[reportUnknownArgumentType]
    if name == "adapterhub":
        read_adapterhub(_bert(), path)
        return
    base = _text() if name == "peft_text" else writers.base()
    parts = read_adapter(base, path)
    require_fit(base, parts, "it")
    for write in (written, plain_lora):
        try:
            write(base, parts)
        except RewriteError:
            continue


def _gguf(data: bytes) -> None:
    path = _place() / "a.gguf"
    path.write_bytes(data)
    parts = read_gguf_adapter(_llama(), path)
    require_fit(_llama(), parts, "it")


TARGETS: dict[str, Callable[[bytes], Any]] = {
    **{name: functools.partial(_document_of, name) for name in _DOCUMENTS},
    "gguf": _gguf,
    "onnx_adapter": lambda data: parse_onnx_adapter(data, "it"),
    "torch_bin": lambda data: parse_torch_bin(data, "it"),
}
"""Name -> what reads bytes."""


@functools.cache
def _bert() -> Any:
    from .formats.write_with_peftfx import program

    return program("bert")


@functools.cache
def _text() -> Any:
    """A language model, for prompts, rows of keys, norms and tokens."""
    from .formats.peft_cases import program

    return program("llama")


@functools.cache
def _llama() -> Files:
    """A layer of Llama as its files' headers tell it."""
    shapes = {"model.embed_tokens": (64, 32), "model.norm": (32,), "lm_head": (64, 32)}
    layer = {
        "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48), "input_layernorm": (32,), "post_attention_layernorm": (32,),
    }  # fmt: skip
    shapes |= {f"model.layers.0.{n}": s for n, s in layer.items()}
    folder = _place() / "llama"
    folder.mkdir(exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"{n}.weight": torch.zeros(s) for n, s in shapes.items()}
    (folder / "model.safetensors").write_bytes(write_tensors(tensors))
    return checkpoint(folder)


def _document(folder: Path, tensors: str) -> bytes:
    """The config and the header of an adapter, in short: options that are off are left out."""
    raw = (folder / tensors).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    config = json.loads((folder / CONFIG).read_text()) if (folder / CONFIG).is_file() else {}
    config = {k: v for k, v in config.items() if v not in (None, False, {}, [])}
    return json.dumps({"config": config, "header": json.loads(raw[8 : 8 + size])}).encode()


_TEXT = {
    "prompt": "prompt", "prefix": "prefix", "multitask": "multitask", "norms": "norms",
    "rows": "rows", "lora_rows": "token rows", "invocation": "invocation",
}  # fmt: skip
"""Name of a document -> the case of `formats/peft_cases` that it is of."""


def _write() -> None:
    import peft
    from safetensors.torch import save_file

    from .formats.peft_cases import CASES, base

    both: dict[str, Any] = {"target_modules": ["up", "down"]}
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "lora": ("Lora", {"r": 2, "rank_pattern": {"up": 1}, "bias": "all"}),
        "dora": ("Lora", {"r": 2, "use_dora": True, "use_rslora": True}),
        "pissa": ("Lora", {"r": 2, "init_lora_weights": "pissa"}),
        "adalora": ("AdaLora", {"init_r": 2, "target_r": 1, "total_step": 9}),
        "ia3": ("IA3", {"feedforward_modules": ["down"]}),
        "loha": ("LoHa", {"r": 2}), "lokr": ("LoKr", {"r": 2}), "vera": ("Vera", {"r": 2}),
        "shira": ("Shira", {"r": 1}), "miss": ("Miss", {"r": 2}),
        "oft": ("OFT", {"oft_block_size": 4}), "boft": ("BOFT", {"boft_block_size": 4}),
        "hira": ("Hira", {"r": 2}), "hra": ("HRA", {"r": 2}), "c3a": ("C3A", {"block_size": 8}),
        "delora": ("Delora", {"r": 2}), "beft": ("Beft", {}),
        "vblora": ("VBLoRA", {"num_vectors": 6, "vector_length": 8, "topk": 2}),
        "vblora_largest": ("VBLoRA", {"num_vectors": 6, "vector_length": 8, "topk": 2,
                                      "save_only_topk_weights": True}),
    }  # fmt: skip
    documents: dict[tuple[str, str], bytes] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, (kind, options) in configs.items():
            config = getattr(peft, f"{kind}Config")(**both, **options)
            peft.get_peft_model(writers.Net(), config).save_pretrained(place)  # pyright: ignore
            documents["peft", name] = _document(folder, TENSORS)
        for name, case in _TEXT.items():
            model, (kind, options) = CASES[case]
            adapted: Any = peft.get_peft_model(base(model), getattr(peft, kind)(**options))
            adapted.save_pretrained(place)
            documents["peft_text", name] = _document(folder, TENSORS)
        for name in ("lora", "dora", "full"):
            factors = {"up.lora_a": torch.ones(16, 2), "up.lora_b": torch.ones(2, 48)}
            factors |= {"up.m": torch.ones(48)} if name == "dora" else {}
            factors = {"up.weight": torch.ones(48, 16)} if name == "full" else factors
            (folder / CONFIG).write_text(
                json.dumps({"fine_tune_type": name, "lora_parameters": {"scale": 2.0, "rank": 2}})
            )
            save_file(factors, folder / MLX_TENSORS)
            documents["mlx", name] = _document(folder, MLX_TENSORS)
        (folder / CONFIG).unlink()
        forms: dict[str, dict[str, tuple[int, ...]]] = {
            "diffusers": {"unet.up.lora_A.weight": (2, 16), "unet.up.lora_B.weight": (48, 2)},
            "kohya": {"lora_unet_up.lora_down.weight": (2, 16), "lora_unet_up.alpha": (),
                      "lora_unet_up.lora_up.weight": (48, 2), "lora_unet_up.dora_scale": (48, 1)},
            "loha": {"lycoris_up.hada_w1_a": (48, 2), "lycoris_up.hada_w1_b": (2, 16),
                     "lycoris_up.hada_w2_a": (48, 2), "lycoris_up.hada_w2_b": (2, 16)},
            "lokr": {"lycoris_up.lokr_w1": (6, 4), "lycoris_up.lokr_w2_a": (8, 2),
                     "lycoris_up.lokr_w2_b": (2, 4), "lycoris_up.alpha": ()},
            "whole": {"lora_unet_up.diff": (48, 16)},
        }  # fmt: skip
        for name, shapes in forms.items():
            save_file({k: torch.ones(s) for k, s in shapes.items()}, folder / "a")
            documents["single_file", name] = _document(folder, "a")
        documents |= _more(folder)
    for (target, name), text in documents.items():
        (CORPUS / target).mkdir(exist_ok=True)
        (CORPUS / target / name).write_bytes(text + b"\n" * (target in _DOCUMENTS))


def _more(folder: Path) -> dict[tuple[str, str], bytes]:
    """Adapters of a BERT by AdapterHub, of a Llama in GGUF, and a file of `torch.save`."""
    from safetensors.torch import save_file

    from .formats.gguf_files import write_lora

    documents: dict[tuple[str, str], bytes] = {}
    for source in ("seq_bn", "lora", "ia3", "prefix_flat", "unipelt", "seq_bn_inv", "prompt"):
        case = Path(__file__).parent / "formats" / "adapterhub" / f"bert-{source}"
        if not case.is_dir():
            continue
        tensors = torch.load(case / "pytorch_adapter.bin", weights_only=True)
        save_file({n: t.clone() for n, t in tensors.items()}, folder / SAFE)
        (folder / CONFIG).write_bytes((case / CONFIG).read_bytes())
        documents["adapterhub", source] = _document(folder, SAFE)
    query = {"blk.0.attn_q.weight.lora_a": torch.ones(2, 32)}
    query["blk.0.attn_q.weight.lora_b"] = torch.ones(32, 2)
    for name, alpha in (("alpha", 4.0), ("plain", None)):
        documents["gguf", name] = write_lora(folder / "a.gguf", query, alpha).read_bytes()
    pair = {"up.lora_A.weight": torch.ones(4, 1), "up.lora_B.weight": torch.ones(1, 3).half()}
    save_onnx_adapter(folder / "a.onnx_adapter", pair)
    documents["onnx_adapter", "pair"] = (folder / "a.onnx_adapter").read_bytes()
    documents["torch_bin", "two"] = write_torch_bin({"a": torch.ones(2, 3), "b": torch.ones(1)})
    return documents


if __name__ == "__main__":
    _write()
