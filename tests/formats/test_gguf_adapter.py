"""LoRA in GGUF files: what llama.cpp makes of them, and what its converter writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import peftfx
from peftfx.exporters.formats import format_of, load_adapter, save_adapter
from peftfx.exporters.gguf.adapter import _write as write_tensors  # pyright: ignore[reportPrivateUsage]
from peftfx.exporters.gguf.adapter import read_gguf_adapter
from peftfx.exporters.gguf.names import AS_THEY_ARE, PAIRED, paired, to_halves
from peftfx.rewriter.errors import ArtifactError, CorruptFileError, NonFiniteError, RewriteError

from ..damage import cuts, flips
from ..models import randomise
from .gguf_files import load, lora_of, merged, write_base, write_lora, written
from .peft_cases import CASES, base, inputs, output, program, write
from .test_hf_peft import near

pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return output(model(**inputs("llama")))


@pytest.mark.parametrize(
    "recipe",
    [
        "lora{rank=2,where=linear and not head}",
        "lora{rank=3,where=head|q|k}",
        "lora{rank=2,where=embedding.token|v}",
        "lora{rank=2,where=q};lora{rank=4,alpha=3,where=k,name=more}",
    ],
)
def test_what_is_written_is_what_llama_cpp_adds(recipe: str, tmp_path: Path) -> None:
    """The change is added to the tensors of the base's file, which transformers reads."""
    made = randomise(peftfx.run(program("llama"), recipe), 0.2)
    for adapter in made.adapters:
        alone = made
        for other in set(made.adapters) - {adapter}:
            alone = alone.without(other)
        path = tmp_path / f"{adapter}.gguf"
        assert not save_adapter(made, path, "gguf", adapter)
        assert format_of(path) == "gguf"
        changed = write_base(tmp_path / "model.gguf", base("llama"), changes=merged(path))
        near(logits(load(changed)), output(alone(**inputs("llama"))))
        again = load_adapter(program("llama"), path)
        assert again.adapters == (adapter,) and "read from gguf llama LoRA" in str(
            again.history[-1]
        )
        near(output(again(**inputs("llama"))), output(alone(**inputs("llama"))))


CASES.update({
    "gguf": ("llama", ("LoraConfig", {
        "r": 4, "lora_alpha": 6,
        "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj", "lm_head", "embed_tokens"],
    })),
})  # fmt: skip


@pytest.mark.parametrize("case", ["lora", "gguf"])
def test_what_the_converter_writes_is_what_peft_computes(case: str, tmp_path: Path) -> None:
    want = write(case, tmp_path / "peft")
    tensors, alpha = lora_of(tmp_path / "peft", "llama", "llama")
    path = write_lora(tmp_path / "a.gguf", tensors, alpha)
    read = load_adapter(program("llama"), path)
    near(output(read(**inputs("llama"))), want)
    save_adapter(read, tmp_path / "b.gguf", "gguf")
    theirs, ours = (gguf.GGUFReader(tmp_path / f"{n}.gguf") for n in "ab")
    first = {t.name: torch.from_numpy(t.data) for t in theirs.tensors}
    second = {t.name: torch.from_numpy(t.data) for t in ours.tensors}
    assert first.keys() == second.keys()
    assert all(torch.equal(second[n], t) for n, t in first.items())
    for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"):
        assert theirs.get_field(key).contents() == ours.get_field(key).contents()  # pyright: ignore


@pytest.mark.parametrize("case", ["patterns", "rslora", "pissa"])
def test_scales_that_differ_are_in_b(case: str, tmp_path: Path) -> None:
    want = write(case, tmp_path / "peft")
    save_adapter(peftfx.load_peft(program("llama"), tmp_path / "peft"), tmp_path / "a.gguf", "gguf")
    changed = write_base(
        tmp_path / "model.gguf", base("llama"), changes=merged(tmp_path / "a.gguf")
    )
    near(logits(load(changed)), want)


def test_what_is_not_low_rank_tells_what_it_loses(tmp_path: Path) -> None:
    want = write("dora", tmp_path / "peft")
    read = peftfx.load_peft(program("llama"), tmp_path / "peft")
    assert not save_adapter(read, tmp_path / "full.gguf", "gguf", rank=32)
    near(output(load_adapter(program("llama"), tmp_path / "full.gguf")(**inputs("llama"))), want)
    lost = save_adapter(read, tmp_path / "thin.gguf", "gguf")
    assert lost and all(0 < share < 1 for share in lost.values())


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_alpha_nothing_scales(alpha: float | None, tmp_path: Path) -> None:
    factors = {"blk.0.attn_v.weight.lora_a": draw(2, 32), "blk.0.attn_v.weight.lora_b": draw(16, 2)}
    path = write_lora(tmp_path / "a.gguf", factors, alpha)
    model = base("llama")
    with torch.no_grad():
        a, b = factors.values()
        model.model.layers[0].self_attn.v_proj.weight += b @ a
    near(output(load_adapter(program("llama"), path)(**inputs("llama"))), logits(model))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def test_norms_and_quantised_factors_come_in(tmp_path: Path) -> None:
    b, norm = draw(32, 32), draw(32) + 1
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter"), writer.add_string("adapter.type", "lora")
    data = gguf.quants.quantize(b.numpy(), kind)
    writer.add_tensor("blk.1.attn_output.weight.lora_a", np.eye(32, dtype=np.float16))
    writer.add_tensor("blk.1.attn_output.weight.lora_b", data, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", norm.numpy())
    written(writer, tmp_path / "a.gguf")
    read = load_adapter(program("llama"), tmp_path / "a.gguf")
    assert "llama.cpp leaves out" in str(read.history[-1])
    model = base("llama")
    with torch.no_grad():
        change = torch.from_numpy(gguf.quants.dequantize(data, kind))
        model.model.layers[1].self_attn.o_proj.weight += change
        model.model.norm.weight.copy_(norm)
    near(output(read(**inputs("llama"))), logits(model))


@pytest.mark.parametrize("architecture", [*PAIRED, *AS_THEY_ARE])
def test_rows_lie_as_transformers_reads_them(architecture: str) -> None:
    """Its reader, given rows that hold their own number, says where each belongs."""
    from transformers import modeling_gguf_pytorch_utils as theirs

    supported = {n.replace("_", "") for n in theirs.GGUF_SUPPORTED_ARCHITECTURES}
    if architecture.replace("_", "") not in supported:
        assert architecture in ("granite", "granitemoe", "bert", "gemma"), "nothing to compare with"
        return
    kind = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)
    reader = kind(config={"num_attention_heads": 4, "num_key_value_heads": 2})
    numbered = torch.arange(16.0)[:, None].expand(16, 16).contiguous()
    for leaf, heads in (
        ("attn_q", 4),
        ("attn_k", 2),
        ("attn_v", 2),
        ("ffn_up", 1),
        ("ffn_down", 1),
    ):
        file = f"blk.0.{leaf}.weight"
        got = torch.from_numpy(np.array(reader.process(numbered.numpy(), file).weights))
        ours = to_halves(numbered, heads) if paired(architecture, file) else numbered
        transposed = architecture == "gpt2" and leaf.startswith("ffn")  # stored [in, out] there
        assert torch.equal(got.mT if transposed else got, ours), file


def changed(path: Path, name: str = "qwen3_moe") -> Any:
    """The model with an adapter's file added by llama.cpp's rule: of each expert on its own, gates in
    the first half of the rows, as transformers' code parts them."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.get_field("adapter.lora.alpha").contents())  # pyright: ignore
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    model = base(name)
    experts = model.model.layers[0].mlp.experts
    inner = experts.gate_up_proj.shape[1] // 2
    rows = {"down": experts.down_proj, "gate": experts.gate_up_proj[:, :inner],
            "up": experts.gate_up_proj[:, inner:]}  # fmt: skip
    with torch.no_grad():
        for kind, weight in rows.items():
            key = f"blk.0.ffn_{kind}_exps.weight"
            if f"{key}.lora_a" in tensors:
                a, b = tensors.pop(f"{key}.lora_a"), tensors.pop(f"{key}.lora_b")
                for expert, matrix in enumerate(weight):
                    matrix += alpha / b.shape[-1] * b[expert] @ a[expert]
        query = model.model.layers[0].self_attn.q_proj.weight
        if "blk.0.attn_q.weight.lora_a" in tensors:
            a, b = (tensors.pop(f"blk.0.attn_q.weight.lora_{n}") for n in "ab")
            query += alpha / b.shape[-1] * b @ a
    assert not tensors
    return model


@pytest.mark.parametrize(
    "recipe",
    ["lora{rank=2,where=experts}", "lora{rank=2,alpha=3,where=ffn.up|ffn.down|q}",
     "lora{rank=3,where=ffn.gate}"],
)  # fmt: skip
def test_experts_lie_as_llama_cpp_multiplies_by_them(recipe: str, tmp_path: Path) -> None:
    made = randomise(peftfx.run(program("qwen3_moe"), recipe), 0.2)
    path = tmp_path / "a.gguf"
    assert not save_adapter(made, path, "gguf")
    want = output(made(**inputs("qwen3_moe")))
    near(logits(changed(path)), want)
    near(output(load_adapter(program("qwen3_moe"), path)(**inputs("qwen3_moe"))), want)


def test_experts_of_peft_go_through_both_ways(tmp_path: Path) -> None:
    want = write("experts", tmp_path / "peft")
    read = load_adapter(program("qwen3_moe"), tmp_path / "peft")
    save_adapter(read, tmp_path / "a.gguf", "gguf")
    near(logits(changed(tmp_path / "a.gguf")), want)
    again = load_adapter(program("qwen3_moe"), tmp_path / "a.gguf")
    save_adapter(again, tmp_path / "again", "peft")
    back = load_adapter(program("qwen3_moe"), tmp_path / "again")
    near(output(back(**inputs("qwen3_moe"))), want)


def test_factors_of_experts_that_differ_keep_their_own_ranks(tmp_path: Path) -> None:
    names = {n: f"blk.0.ffn_{n}_exps.weight" for n in ("gate", "up", "down")}
    tensors = {
        f"{names['gate']}.lora_a": draw(4, 2, 32), f"{names['gate']}.lora_b": draw(4, 24, 2),
        f"{names['up']}.lora_a": draw(4, 3, 32), f"{names['up']}.lora_b": draw(4, 24, 3),
        f"{names['down']}.lora_a": draw(4, 2, 24), f"{names['down']}.lora_b": draw(4, 32, 2),
    }  # fmt: skip
    path = write_lora(tmp_path / "a.gguf", tensors, 5.0, "qwen3moe")
    read = load_adapter(program("qwen3_moe"), path)
    near(output(read(**inputs("qwen3_moe"))), logits(changed(path)))
    save_adapter(read, tmp_path / "b.gguf", "gguf")
    shapes = {t.name: t.data.shape for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert shapes == {n: tuple(t.shape) for n, t in tensors.items()}
    flat = {k: t[0] for k, t in tensors.items()}
    with pytest.raises(ArtifactError, match=r"ffn_gate_exps.weight has factors .* no stacks"):
        load_adapter(program("qwen3_moe"), write_lora(tmp_path / "c.gguf", flat, 5.0, "qwen3moe"))
    few = {k: t[:3] for k, t in tensors.items()}
    with pytest.raises(ArtifactError, match=r"is \[3, 32, 24\], and it has \[4, 32, 24\]"):
        load_adapter(program("qwen3_moe"), write_lora(tmp_path / "d.gguf", few, 5.0, "qwen3moe"))


def _drop(name: str) -> Any:
    return lambda t: {k: v for k, v in t.items() if k != name}


Q_A, Q_B = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"

BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no partner": (_drop(Q_B), {}, ArtifactError, "attn_q.weight has lora_a alone"),
    "ranks": (lambda t: t | {Q_A: draw(3, 32)}, {}, ArtifactError, "ranks do not agree"),
    "stacks": (lambda t: t | {Q_A: draw(2, 2, 32), Q_B: draw(2, 32, 2)}, {}, ArtifactError,
               "are no matrices"),
    "sizes": (lambda t: t | {Q_A: draw(2, 16)}, {}, ArtifactError, "Use the base that"),
    "another layer": (lambda t: {k.replace("blk.0", "blk.7"): v for k, v in t.items()}, {},
                      ArtifactError, "this model has no 'blk.7.attn_q.weight'. Nearest"),
    "unknown tensor": (lambda t: t | {"rope_freqs.weight": draw(4)}, {}, ArtifactError,
                       "'rope_freqs.weight' is not understood"),
    "not a number": (lambda t: t | {Q_A: draw(2, 32) * float("nan")}, {}, NonFiniteError, "NaN"),
    "a model": (lambda t: t, {"general.type": "model"}, ArtifactError, "general.type is 'model'"),
    "another kind": (lambda t: t, {"adapter.type": "loha"}, ArtifactError, "adapter.type is 'loha'"),
    "invoked": (lambda t: t, {"adapter.alora.invocation_tokens": [3, 4]}, ArtifactError, "aLoRA"),
    "nothing": (lambda t: {}, {}, ArtifactError, "holds nothing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(BAD))
def test_a_bad_file_is_refused(fault: str, tmp_path: Path) -> None:
    change, fields, kind, text = BAD[fault]
    tensors = change({Q_A: draw(2, 32), Q_B: draw(32, 2)})
    path = write_lora(tmp_path / "a.gguf", tensors, 4.0, fields=fields)
    before = program("llama")
    with pytest.raises(kind, match=text) as caught:
        load_adapter(before, path)
    assert "a.gguf" in str(caught.value) and not before.adapters


@pytest.mark.parametrize(
    ("architecture", "text"),
    [("qwen2", "of architecture qwen2, and this model of llama"), ("nobody", "nobody")],
)
def test_another_architecture_is_refused(architecture: str, text: str, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.gguf", {Q_A: draw(2, 32), Q_B: draw(32, 2)}, 4.0, architecture)
    with pytest.raises(ArtifactError, match=text):
        load_adapter(program("llama"), path)


def test_what_files_cannot_say_is_refused(tmp_path: Path) -> None:
    made = peftfx.run(program("llama"), "lora{rank=2,where=q};prompt_tuning{length=2}")
    with pytest.raises(ArtifactError, match="has a prompt"):
        save_adapter(made, tmp_path / "a.gguf", "gguf", "prompt_tuning")
    with pytest.raises(ArtifactError, match="no architecture"):
        save_adapter(peftfx.run(program("attention"), "lora{rank=2}"), tmp_path / "a.gguf", "gguf")
    bert = peftfx.run(program("t5"), "lora{rank=2,where=q}")
    with pytest.raises(ArtifactError, match="how GGUF files of architecture 't5'"):
        save_adapter(bert, tmp_path / "a.gguf", "gguf")
    assert not list(tmp_path.iterdir())


def test_damage_is_refused(tmp_path: Path) -> None:
    """Cut or altered, a file is an error of ours, or an adapter; nothing hangs or is allocated."""
    path = write_lora(tmp_path / "a.gguf", {Q_A: draw(2, 32), Q_B: draw(32, 2)}, 4.0)
    good, before = path.read_bytes(), program("llama")
    for bad in cuts(good, 30):
        path.write_bytes(bad)
        with pytest.raises(CorruptFileError if bad[:4] == b"GGUF" else ArtifactError):
            load_adapter(before, path)
    refused = 0
    for bad in flips(good, 300):
        path.write_bytes(bad)
        try:
            read_gguf_adapter(before, path)
        except RewriteError:
            refused += 1
    assert refused > 50


HUGE = (2**63).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("at", "data", "text"),
    [
        (8, HUGE, "claims 9223372036854775808 tensors"),
        (16, HUGE, "and 9223372036854775808 keys"),
        (24, HUGE, "truncated at key 0"),
        (4, (9).to_bytes(4, "little"), "GGUF version 9"),
        (4, (3).to_bytes(4, "big"), "big-endian"),
    ],
)
def test_huge_counts_are_refused(at: int, data: bytes, text: str, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.gguf", {Q_A: draw(2, 32), Q_B: draw(32, 2)}, 4.0)
    bad = bytearray(path.read_bytes())
    bad[at : at + len(data)] = data
    path.write_bytes(bad)
    with pytest.raises(ArtifactError, match=text):
        load_adapter(program("llama"), path)


def test_names_are_there_once(tmp_path: Path) -> None:
    other = Q_A.replace("attn_q", "attn_k")
    tensors = {Q_A: draw(2, 32), Q_B: draw(32, 2), other: draw(2, 32)}
    path = write_lora(tmp_path / "a.gguf", tensors, 4.0)
    good = path.read_bytes()
    path.write_bytes(good.replace(other.encode(), Q_A.encode()))
    with pytest.raises(CorruptFileError, match=f"'{Q_A}' is there twice"):
        load_adapter(program("llama"), path)
    path.write_bytes(good.replace(b"adapter.type", b"general.type"))
    with pytest.raises(CorruptFileError, match=r"the key 'general.type' is there twice"):
        load_adapter(program("llama"), path)


def test_tensors_of_any_size_lie_where_the_package_reads_them(tmp_path: Path) -> None:
    given = {"a": draw(3, 5), "b": draw(7, 1).half(), "c": draw(8, 32)}
    write_tensors(tmp_path / "a.gguf", "llama", 2.0, given)
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert read.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(torch.from_numpy(read[name].data.copy()), tensor)
