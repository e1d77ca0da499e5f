"""Adapters in one file: diffusers' own, and kohya's and LyCORIS's forms against their formulas."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftfx
from peftfx.exporters.formats import load_adapter, save_adapter
from peftfx.rewriter.errors import ArtifactError, CorruptFileError, NonFiniteError

from ..models import randomise
from .peft_cases import base, inputs, output, program
from .test_hf_peft import near

pytestmark = pytest.mark.filterwarnings("ignore")

CONV, LINEAR = "down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in"
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def moved(changes: dict[str, Tensor]) -> Tensor:
    """What the UNet computes with changes of its weights."""
    model = base("unet")
    with torch.no_grad():
        for name, change in changes.items():
            weight = model.get_submodule(name).weight
            weight += change.reshape(weight.shape)
        return output(model(**inputs("unet")))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


def shape_of(name: str) -> torch.Size:
    return base("unet").get_submodule(name).weight.shape


def flat(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


@pytest.mark.parametrize("alpha", [4, 16])
@pytest.mark.parametrize("said", [True, False])
def test_diffusers_own_files(alpha: int, said: bool, tmp_path: Path) -> None:
    """With the config in the header; without, a missing alpha means scale 1."""
    from peft import LoraConfig

    model = base("unet")
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q", "conv1", "proj_in"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(draw(*parameter.shape))
    model.save_lora_adapter(str(tmp_path))
    (path,) = tmp_path.glob("*.safetensors")
    if not said:
        save_file(load_file(path), path)
        model.delete_adapters("default")
        model.load_lora_adapter(str(tmp_path), weight_name=path.name, prefix=None)
    with torch.no_grad():
        want = output(model.eval()(**inputs("unet")))
    got = load_adapter(program("unet"), path)
    near(output(got(**inputs("unet"))), want)
    assert got.adapters == (path.stem,)


def lora(name: str, rank: int, alpha: float | None) -> tuple[dict[str, Tensor], Tensor]:
    out, size, *kernel = shape_of(name)
    down, up = draw(rank, size, *kernel), draw(out, rank, *(1 for _ in kernel), seed=1)
    tensors = {f"{flat(name)}.lora_down.weight": down, f"{flat(name)}.lora_up.weight": up}
    if alpha is not None:
        tensors[f"{flat(name)}.alpha"] = torch.tensor(alpha)
    change = up.flatten(1) @ down.flatten(1) * ((rank if alpha is None else alpha) / rank)
    return tensors, change


def test_lora_of_kohya(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for name, rank, alpha in ((QUERY, 2, 3.0), (CONV, 3, 1.0), (LINEAR, 4, None)):
        more, changes[name] = lora(name, rank, alpha)
        tensors |= more
    save_file(tensors, tmp_path / "a.safetensors")
    got = load_adapter(program("unet"), tmp_path / "a.safetensors", name="style")
    near(output(got(**inputs("unet"))), moved(changes))
    assert got.adapters == ("style",)
    save_adapter(got, tmp_path / "b.safetensors", "kohya")
    again = load_file(tmp_path / "b.safetensors")
    for key, tensor in tensors.items():
        assert torch.equal(again[key], tensor), key


def test_loha_and_lokr_and_whole_changes(tmp_path: Path) -> None:
    out, size = shape_of(QUERY)
    hada = {n: draw(*s, seed=i) for i, (n, s) in enumerate(
        {"hada_w1_a": (out, 2), "hada_w1_b": (2, size), "hada_w2_a": (out, 2),
         "hada_w2_b": (2, size)}.items())}  # fmt: skip
    one = (hada["hada_w1_a"] @ hada["hada_w1_b"]) * (hada["hada_w2_a"] @ hada["hada_w2_b"]) * 3 / 2
    rows, columns, *kernel = shape_of(CONV)
    lokr = {"lokr_w1": draw(2, 2), "lokr_w2": draw(rows // 2, columns // 2, *kernel, seed=1)}
    two = torch.kron(lokr["lokr_w1"][..., None, None], lokr["lokr_w2"])
    whole = draw(*shape_of(LINEAR))
    tensors = {f"{flat(QUERY)}.{n}": t for n, t in hada.items()}
    tensors |= {f"{flat(CONV)}.{n}": t for n, t in lokr.items()}
    tensors |= {
        f"{flat(QUERY)}.alpha": torch.tensor(3.0), f"{flat(LINEAR)}.diff": whole,
        f"{flat(CONV)}.alpha": torch.tensor(100000.0).half(),  # infinite, and without effect
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    got = load_adapter(program("unet"), tmp_path / "a.safetensors")
    near(output(got(**inputs("unet"))), moved({QUERY: one, CONV: two, LINEAR: whole}))
    kinds = {a.site: type(got.branch(a)).__name__ for a in got.attachments}
    assert kinds[f"{QUERY}.weight"] == "LoHaBranch" and kinds[f"{CONV}.weight"] == "LoKrBranch"
    save_adapter(got, tmp_path / "b.safetensors", "kohya")
    again = load_file(tmp_path / "b.safetensors")
    for key, tensor in tensors.items():
        assert key == f"{flat(CONV)}.alpha" or torch.equal(again[key], tensor), key


@pytest.mark.parametrize("core", [True, False])
def test_products_of_convolutions(core: bool, tmp_path: Path) -> None:
    """Of patches, or with a core tensor, which comes in as the change."""
    rows, columns, *kernel = shape_of(CONV)
    patch = 9 * columns
    if core:
        hada = {
            f"hada_w{i}_{s}": draw(2, n, seed=i)
            for i in (1, 2)
            for s, n in (("a", rows), ("b", columns))
        }
        hada |= {f"hada_t{i}": draw(2, 2, *kernel, seed=i + 5) for i in (1, 2)}
        products = [torch.einsum("ijkl,ip,jr->prkl", hada[f"hada_t{i}"], hada[f"hada_w{i}_a"],
                                 hada[f"hada_w{i}_b"]) for i in (1, 2)]  # fmt: skip
    else:
        hada = {f"hada_w{i}_{s}": draw(*n, seed=i) for i in (1, 2)
                for s, n in (("a", (rows, 2)), ("b", (2, patch)))}  # fmt: skip
        products = [hada[f"hada_w{i}_a"] @ hada[f"hada_w{i}_b"] for i in (1, 2)]
    tensors = {f"{flat(CONV)}.{n}": t for n, t in hada.items()}
    save_file(tensors | {f"{flat(CONV)}.alpha": torch.tensor(3.0)}, tmp_path / "a.safetensors")
    got = load_adapter(program("unet"), tmp_path / "a.safetensors")
    near(output(got(**inputs("unet"))), moved({CONV: products[0] * products[1] * 1.5}))


def test_dora_of_rows(tmp_path: Path) -> None:
    tensors, change = lora(QUERY, 2, 4.0)
    weight = base("unet").get_submodule(QUERY).weight.detach()
    magnitude = draw(len(weight)).abs() + 0.5
    tensors[f"{flat(QUERY)}.dora_scale"] = magnitude[:, None]
    save_file(tensors, tmp_path / "a.safetensors")
    full = weight + change
    want = moved({QUERY: magnitude[:, None] * full / full.norm(dim=1, keepdim=True) - weight})
    got = load_adapter(program("unet"), tmp_path / "a.safetensors")
    near(output(got(**inputs("unet"))), want)


def test_each_component_of_one_file(tmp_path: Path) -> None:
    tensors, change = lora(QUERY, 2, 4.0)
    tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = draw(2, 8)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match=r"lora_unet, lora_te. Say which"):
        load_adapter(program("unet"), tmp_path / "a.safetensors")
    got = load_adapter(program("unet"), tmp_path / "a.safetensors", component="lora_unet")
    near(output(got(**inputs("unet"))), moved({QUERY: change}))


@pytest.mark.parametrize(
    "recipe",
    ["dora{rank=2", "loha{rank=2,alpha=3", "lokr{rank=1,decompose_both=true", "lokr{rank=20,alpha=3",
     "oft{block=4"],
)  # fmt: skip
def test_what_trained_here_goes_to_kohya(recipe: str, tmp_path: Path) -> None:
    """What has no form there as the whole change."""
    made = randomise(peftfx.run(program("unet"), f"{recipe},where='to_q|conv1'}}"), 0.1)
    save_adapter(made, tmp_path / "a.safetensors", "kohya")
    again = load_adapter(program("unet"), tmp_path / "a.safetensors")
    near(output(again(**inputs("unet"))), output(made(**inputs("unet"))))


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "another model": (lambda t: {k.replace("to_q", "to_x"): v for k, v in t.items()},
                      ArtifactError, "to_x is none. Nearest"),
    "unknown leaf": (lambda t: {**t, f"{flat(QUERY)}.lora_extra": draw(2)}, ArtifactError,
                     "not understood"),
    "no up": (lambda t: {k: v for k, v in t.items() if "lora_up" not in k}, ArtifactError, "is missing"),
    "infinite alpha": (lambda t: {**t, f"{flat(QUERY)}.alpha": torch.tensor(float("inf"))},
                       ArtifactError, "alpha is inf"),
    "not a number": (lambda t: {k: v * float("nan") for k, v in t.items()}, NonFiniteError, "NaN"),
    "sizes": (lambda t: {k: v[:, :3].contiguous() if "lora_down" in k else v for k, v in t.items()}, ArtifactError,
              "other sizes"),
    "style": (lambda t: {"x.weight": draw(2)}, ArtifactError, "of no style"),
    "another component's name": (lambda t: {**t, "foo_unet_x.lora_down.weight": draw(2)},
                                 ArtifactError, "'foo_unet_x.lora_down.weight' starts with no comp"),
    "a bias beside": (lambda t: {**t, f"{flat(QUERY)}.diff_b": draw(8)}, ArtifactError,
                      "diff_b beside lora_.*two forms"),
    "alpha alone": (lambda t: {f"{flat(QUERY)}.alpha": torch.tensor(1.0)}, ArtifactError,
                    "alpha alone is no form"),
    "a factor twice": (lambda t: {f"{flat(QUERY)}.lokr_{n}": draw(2, 2) for n in
                                  ("w1", "w1_a", "w1_b", "w2")}, ArtifactError, "lokr_w1 is there whole"),
    "columns": (lambda t: {**t, f"{flat(QUERY)}.dora_scale": draw(1, 8)}, ArtifactError,
                "of columns"),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(BAD))
def test_a_bad_file_is_refused(fault: str, tmp_path: Path) -> None:
    change, kind, text = BAD[fault]
    tensors, _ = lora(QUERY, 2, 4.0)
    save_file(change(copy.copy(tensors)), tmp_path / "a.safetensors")
    with pytest.raises(kind, match=text):
        load_adapter(program("unet"), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("more", "text"),
    [({"mid_block.x.lora_A.weight": draw(2, 8)}, "starts with no component"),
     ({f"unet.{QUERY}.alpha": torch.tensor(float("nan"))}, "alpha is nan"),
     ({f"unet.{LINEAR}.alpha": torch.tensor(1.0)}, "is of no LoRA in this file")],
)  # fmt: skip
def test_a_bad_file_of_diffusers_is_refused(
    more: dict[str, Tensor], text: str, tmp_path: Path
) -> None:
    out, size = shape_of(QUERY)
    factors = {"A": draw(2, size), "B": draw(out, 2)}
    tensors = {f"unet.{QUERY}.lora_{n}.weight": t for n, t in factors.items()}
    save_file(tensors | more, tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match=text):
        load_adapter(program("unet"), tmp_path / "a.safetensors")


def test_damage_is_refused(tmp_path: Path) -> None:
    tensors, _ = lora(QUERY, 2, 4.0)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorruptFileError):
        load_adapter(program("unet"), path)


@pytest.mark.parametrize("leaf", ["hada_w1_b", "hada_w2_a"])
def test_shapes_that_no_formula_fits(leaf: str, tmp_path: Path) -> None:
    out, size = shape_of(QUERY)
    tensors = {"hada_w1_a": (out, 2), "hada_w1_b": (2, size), "hada_w2_a": (out, 2),
               "hada_w2_b": (2, size)}  # fmt: skip
    for shape in ((3,), (), (5, 7)):
        changed = {f"{flat(QUERY)}.{n}": draw(*s) for n, s in (tensors | {leaf: shape}).items()}
        save_file(changed, tmp_path / "a.safetensors")
        with pytest.raises(ArtifactError, match=rf"to_q: its tensors \(.*{leaf}.*Save it again"):
            load_adapter(program("unet"), tmp_path / "a.safetensors")
