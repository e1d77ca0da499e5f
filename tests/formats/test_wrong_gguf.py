"""Readers and writers of GGUF and ONNX Runtime's adapters with one wrong line each: what llama.cpp's
rules, transformers' reader and the runtime compute tells."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftfx.exporters.gguf_adapter import read_gguf_adapter, write_gguf_adapter
from peftfx.exporters.hf_peft import read_peft
from peftfx.passes.interchange.imported import Imported
from peftfx.rewriter.errors import RewriteError
from peftfx.rewriter.run.run import apply_plan
from peftfx.rewriter.storage.parts import Parts

from ..mutants import Case, Mutation, applied
from .gguf_files import lora_of, merged, write_lora
from .peft_cases import CASES, base, inputs, output, program, write

pytestmark = pytest.mark.filterwarnings("ignore")

ADAPTER, NAMES = "exporters/gguf_adapter.py", "exporters/gguf_names.py"

CASES.update({
    "every kind": ("llama", ("LoraConfig", {
        "r": 4, "lora_alpha": 6, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"k_proj": 9},
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "embed_tokens"],
    })),
    "one alpha": ("llama", ("LoraConfig", {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "embed_tokens"],
    })),
})  # fmt: skip


@functools.cache
def stored(case: str) -> tuple[Path, Tensor]:
    folder = Path(tempfile.mkdtemp(prefix="gguf-"))
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
    from .gguf_files import in_file, laid

    model = base("llama")
    changes = merged(folder / "b.gguf")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change = changes.pop(in_file(name), None)
            if change is not None:  # rows as in the model: where each row of the file comes from
                order = laid(model.config, "llama", name, torch.arange(float(len(parameter))))
                parameter[order.long()] += change
        return far(output(model(**inputs("llama"))), want)


def far(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


WRONG = (
    ("rows as they are", f"{NAMES}:paired", "architecture in PAIRED and", "False and", reading),
    ("values in pairs, too", f"{NAMES}:paired", "attn_[qk]", "attn_[qv]", reading),
    ("paired the other way", f"{NAMES}:to_halves", "(heads, -1, 2)", "(heads, 2, -1)", reading),
    ("pairs across heads", f"{NAMES}:to_halves", "(0, (heads, -1, 2)).transpose(1, 2)",
     "(0, (-1, 2)).transpose(0, 1)", reading),
    ("keys have the queries' heads", f"{NAMES}:heads_of",
     "site.heads if site.q in ids else site.kv_heads", "site.heads", reading),
    ("alpha ignored", f"{ADAPTER}:_low_rank", "alpha / a.shape[0] if alpha else 1.0", "1.0", reading),
    ("alpha not over the rank", f"{ADAPTER}:_low_rank", "alpha / a.shape[0]", "alpha", reading),
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
    ("alpha for the scale", f"{ADAPTER}:_scaled", "(part.scale * len(part.a) / alpha)", "part.scale",
     writing),
    ("table written as it is", f"{ADAPTER}:_factors", "part.a.mT if part.lookup else part.a",
     "part.a", writing),
)  # fmt: skip


@pytest.mark.parametrize("probe", [reading, writing])
def test_they_are_right(probe: Callable[[], float]) -> None:
    assert probe() < 1e-5


@pytest.mark.parametrize("kind", [kind for kind, *_ in WRONG])
def test_a_wrong_one_is_seen(kind: str) -> None:
    where, old, new, probe = next(rest for k, *rest in WRONG if k == kind)

    def none(_: Case) -> None:
        """The mutation's own is `probe`."""

    with applied(Mutation(kind, where, old, new, none)):
        try:
            gap = probe()
        except (RewriteError, RuntimeError):
            return  # it refuses, or cannot be computed
        assert gap > 1e-4
