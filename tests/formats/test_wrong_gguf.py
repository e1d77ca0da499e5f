"""Readers and writers of GGUF and ONNX Runtime's adapters with one wrong line each: what llama.cpp's
rules, transformers' reader and the runtime compute tells."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peftfx.exporters.formats import load_adapter, save_adapter
from peftfx.exporters.gguf.adapter import read_gguf_adapter, write_gguf_adapter
from peftfx.exporters.gguf.base import write_directory
from peftfx.exporters.hf_peft.adapter import read_peft
from peftfx.exporters.onnx.adapter import read_onnx_adapter, write_onnx_adapter
from peftfx.passes.interchange.imported import Imported
from peftfx.rewriter.errors import RewriteError
from peftfx.rewriter.run.run import apply_plan
from peftfx.rewriter.storage.parts import Parts

from ..mutants import Case, Mutation, applied
from ..temporary import lasting
from .gguf_files import in_file, laid, load, lora_of, merged, write_base, write_lora
from .peft_cases import CASES, base, inputs, output, program, write
from .test_gguf_adapter import changed, draw
from .test_onnx_adapter import values_of

pytestmark = pytest.mark.filterwarnings("ignore")

ADAPTER, NAMES = "exporters/gguf/adapter.py", "exporters/gguf/names.py"
EXPERTS = "exporters/gguf/experts.py"
ONNX, BASE = "exporters/onnx/adapter.py", "exporters/gguf/base.py"

CASES.update({
    "every kind": ("llama", ("LoraConfig", {
        "r": 4, "lora_alpha": 6, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"k_proj": 9},
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "embed_tokens"],
    })),
    "factors": ("llama", ("LoraConfig", {
        "r": 4, "alpha_pattern": {"k_proj": 9}, "target_modules": ["q_proj", "k_proj", "up_proj"],
    })),
    "one alpha": ("llama", ("LoraConfig", {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "embed_tokens"],
    })),
})  # fmt: skip


@functools.cache
def stored(case: str) -> tuple[Path, Tensor]:
    folder = lasting("gguf")
    return folder, write(case, folder)


def computed(parts: Parts) -> Tensor:
    item = Imported(name="theirs")
    plan = item.plan(program("llama"), sources=[parts])
    return output(apply_plan(program("llama"), item, plan, check=False)(**inputs("llama")))


def reading() -> float:
    """Of a file as the converter writes it."""
    folder, want = stored("one alpha")
    tensors, alpha = lora_of(folder, "llama", "llama")
    path = write_lora(folder / "a.gguf", tensors, alpha)
    return far(computed(read_gguf_adapter(program("llama"), path)), want)


def writing() -> float:
    """By llama.cpp's rules, in the base as transformers has it."""
    folder, want = stored("every kind")
    parts = read_peft(program("llama"), folder)
    write_gguf_adapter(program("llama"), folder / "b.gguf", parts)
    model = base("llama")
    changes = merged(folder / "b.gguf")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change = changes.pop(in_file(name), None)
            if change is not None:  # rows as in the model: where each row of the file comes from
                order = laid(model.config, "llama", name, torch.arange(float(len(parameter))))
                parameter[order.long()] += change
        return far(output(model(**inputs("llama"))), want)


def experts() -> float:
    """Of a file of stacks, each with factors of its own; read, and written again."""
    sizes = {"gate": (2, 32, 24), "up": (3, 32, 24), "down": (2, 24, 32)}
    tensors: dict[str, Tensor] = {}
    for kind, (rank, narrow, wide) in sizes.items():
        tensors[f"blk.0.ffn_{kind}_exps.weight.lora_a"] = draw(4, rank, narrow)
        tensors[f"blk.0.ffn_{kind}_exps.weight.lora_b"] = draw(4, wide, rank)
    with tempfile.TemporaryDirectory() as place:
        path, again = Path(place) / "a.gguf", Path(place) / "b.gguf"
        write_lora(path, tensors, 5.0, "qwen3moe")
        want = output(changed(path)(**inputs("qwen3_moe")))
        read = load_adapter(program("qwen3_moe"), path)
        save_adapter(read, again, "gguf")
        back = output(changed(again)(**inputs("qwen3_moe")))
    return max(far(output(read(**inputs("qwen3_moe"))), want), far(back, want))


def turning() -> float:
    """A file of ONNX Runtime, by the products that its inputs are in."""
    folder, want = stored("factors")
    parts = read_peft(program("llama"), folder)
    write_onnx_adapter(program("llama"), folder / "a.onnx_adapter", parts)
    values, model = values_of(folder / "a.onnx_adapter"), base("llama")
    with torch.no_grad():
        for name in [n for n in values if n.endswith("lora_A.weight")]:
            module = name.removesuffix(".lora_A.weight")
            change = values[name] @ values[f"{module}.lora_B.weight"]
            model.get_submodule(module).weight += change.T
        ours = far(output(model(**inputs("llama"))), want)
    back = computed(read_onnx_adapter(program("llama"), folder / "a.onnx_adapter"))
    return max(ours, far(back, want))


@functools.cache
def small_base() -> tuple[Path, dict[str, Tensor]]:
    path = write_base(lasting("gguf") / "m.gguf", base("llama"))
    return path, load(path).state_dict()


def dequantising() -> float:
    """A base's tensors, as transformers has them."""
    path, theirs = small_base()
    with tempfile.TemporaryDirectory() as folder:
        write_directory(path, Path(folder))
        ours = load_file(Path(folder) / "model.safetensors")
    return max(float((ours[n] - t).abs().max()) for n, t in theirs.items())


def far(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


Wrong = tuple[str, str, str, str, Callable[[], float]]

WRONG: tuple[Wrong, ...] = (
    ("rows as they are", f"{NAMES}:paired", "architecture in PAIRED and", "False and", reading),
    ("values in pairs, too", f"{NAMES}:paired", "attn_[qk]", "attn_[qv]", reading),
    ("paired the other way", f"{NAMES}:to_halves", "(heads, -1, 2)", "(heads, 2, -1)", reading),
    ("pairs across heads", f"{NAMES}:to_halves", "(0, (heads, -1, 2)).transpose(1, 2)",
     "(0, (-1, 2)).transpose(0, 1)", reading),
    ("keys have the queries' heads", f"{NAMES}:heads_of",
     "site.heads if site.q in ids else site.kv_heads", "site.heads", reading),
    ("alpha ignored", f"{ADAPTER}:_low_rank", "alpha / a.shape[-2] if alpha else 1.0", "1.0", reading),
    ("alpha not over the rank", f"{ADAPTER}:_low_rank", "alpha / a.shape[-2]", "alpha", reading),
    ("factors exchanged", f"{ADAPTER}:_low_rank", "a, b = factors[A], factors[B]",
     "b, a = factors[A].mT, factors[B].mT", reading),
    ("table as it is", f"{ADAPTER}:_low_rank", "a.mT.contiguous() if lookup", "a if lookup", reading),
    ("lookups for products", f"{ADAPTER}:_low_rank", "lookup=lookup", "lookup=False", reading),
    ("layers backwards", f"{ADAPTER}:_target", "return models[file]",
     "return models[file.replace('.0.', '.x.').replace('.1.', '.0.').replace('.x.', '.1.')]",
     reading),
    ("rows written as they are", f"{NAMES}:rows_in_file",
     "return to_pairs(rows, heads_of(program, weight)).contiguous()", "return rows", writing),
    ("written the other way", f"{NAMES}:to_pairs", "(heads, 2, -1)", "(heads, -1, 2)", writing),
    ("scaled twice", f"{ADAPTER}:_scaled", "if own == alpha else",
     "* part.scale if own == alpha else", writing),
    ("other scales forgotten", f"{ADAPTER}:_scaled", "own == alpha", "True", writing),
    ("alpha for the scale", f"{ADAPTER}:_scaled", "(part.scale * rank / alpha)", "part.scale",
     writing),
    ("scale left out of a slot", f"{ONNX}:slots", "part.b.float() * part.scale", "part.b", turning),
    ("a slot's factor as it is", f"{ONNX}:slots", "part.a.mT", "part.a", turning),
    ("factors as they are", f"{ONNX}:read_onnx_adapter", "leaves[A].mT.contiguous()",
     "leaves[A].contiguous()", turning),
    ("scaled again", f"{ONNX}:read_onnx_adapter", "a, b, 1.0", "a, b, 1.0 / len(a)", turning),
    ("a slot's sizes backwards", "exporters/onnx/adapter_file.py:onnx_adapter_pieces",
     "*tensor.shape)", "*tensor.shape[::-1])", turning),
    ("numbers backwards", f"{ADAPTER}:_write", "array.reshape(-1)", "array.reshape(-1)[::-1].copy()",
     writing),
    ("base's rows as they are", f"{BASE}:_value", "if paired(file.architecture, key)", "if False",
     dequantising),
    ("base's heads exchanged", f"{BASE}:_value", '".attn_q." in key', '".attn_k." in key',
     dequantising),
    ("norms shifted everywhere", f"{BASE}:_value", "file.architecture in SHIFTED and ", "",
     dequantising),
    ("tensors in another order", f"{BASE}:_write_file", "for name in tensors:",
     "for name in reversed(tensors):", dequantising),
    ("gates below", f"{EXPERTS}:joined", "gate, up = (low", "up, gate = (low", experts),
    ("one scale for both", f"{EXPERTS}:_stacked", "(up.scale / gate.scale)", "1.0", experts),
    ("ranks of the other", f"{EXPERTS}:_stacked", "(gate.a.shape[1], 0)", "(0, gate.a.shape[1])",
     experts),
    ("halves exchanged", f"{EXPERTS}:parted", "part.b.chunk(2, 1)", "part.b.chunk(2, 1)[::-1]",
     experts),
    ("a rank left out", f"{EXPERTS}:parted", "rows.flatten(0, 1).any(0)", "rows[0, :1].abs()[0] > 0.1",
     experts),
    ("table written as it is", f"{ADAPTER}:_factors", "part.a.mT if part.lookup else part.a",
     "part.a", writing),
)  # fmt: skip


@pytest.mark.parametrize("probe", [reading, writing, turning, dequantising, experts])
def test_they_are_right(probe: Callable[[], float]) -> None:
    assert probe() < 1e-5


@pytest.mark.parametrize("kind", [kind for kind, *_ in WRONG])
def test_a_wrong_one_is_seen(kind: str) -> None:
    _, where, old, new, probe = next(w for w in WRONG if w[0] == kind)

    def none(_: Case) -> None:
        """The mutation's own is `probe`."""

    with applied(Mutation(kind, where, old, new, none)):
        try:
            gap = probe()
        except (RewriteError, RuntimeError):
            return  # it refuses, or cannot be computed
        assert gap > 1e-4
