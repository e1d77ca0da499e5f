"""Adapters in one safetensors file: diffusers' LoRA; LoRA, LoHa, LoKr and whole changes of kohya's
scripts and of LyCORIS. Which it is, the keys tell.

    diffusers    [unet.|transformer.|...]PATH.lora_A.weight, config as JSON in the header
    kohya        lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight, .alpha

Of one file with adapters of several components (a UNet and its text encoders), each program takes
those that are its own. Scales: kohya's and LyCORIS's alpha over the rank of the file, 1 where there
is none; of a LoKr with two whole matrices always 1, as LyCORIS has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rewriter.errors import (
    ArtifactError,
    BaseMismatchError,
    BaseNeededError,
    RewriteError,
    nearest,
)
from ..rewriter.files.files import header_metadata, parse_json, parse_tensors, read_file
from ..rewriter.parts.formula_parts import KRONECKER, Formula, Hadamard, Kronecker
from ..rewriter.parts.parts import Change, LowRank, Part
from ..rewriter.program.sites import ConvSite, LinearSite, WeightSite
from ..rewriter.storage.artifact import require_finite
from ..rewriter.storage.parts import Parts
from .base import GIVE_BASE, Base, snapshot
from .hf_peft.config import Config
from .hf_peft.lora import lora_parts
from .hf_peft.products import through
from .plain_lora import change_of, no_form

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
FLAT = ("lycoris", "lora_unet", "lora_transformer", "lora_te", "lora_te1", "lora_te2", "lora_te3")
METADATA = "lora_adapter_metadata"

_LEAVES = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "diff",
    "diff_b", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1",
    "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)  # fmt: skip

_FORMS = "lora_", "hada_", "lokr_"

Leaves = dict[str, Tensor]


def read_single_file(program: Base, path: str | Path, component: str = "") -> Parts:
    """An adapter in one file, in parts.

    Args:
        program: which it belongs to.
        path: of the safetensors file.
        component: which adapter of a file with several, such as `unet` or `lora_te1`.

    Raises:
        ArtifactError: (CorruptFileError, NonFiniteError) damaged, of no style that is known, or not
            of this model.
    """
    where = str(path)
    raw = read_file(path)
    tensors = parse_tensors(raw, where)
    for name, tensor in tensors.items():
        if not name.endswith(".alpha"):  # infinite in half precision where it counts for nothing
            require_finite(f"{where}: {name}", tensor, "Save it again.")
    if any(k.endswith((".lora_A.weight", ".lora_B.weight")) for k in tensors):
        return _diffusers(program, tensors, header_metadata(raw, where), where, component)
    if any(k.endswith(tuple(f".{leaf}" for leaf in _LEAVES)) for k in tensors):
        return _kohya(program, tensors, where, component)
    first = next(iter(tensors), "none")
    raise ArtifactError(
        f"{where}: its keys (first: {first!r}) are of no style that is read: diffusers "
        "(...lora_A.weight) or kohya and LyCORIS (...lora_down.weight, ...hada_w1_a, ...lokr_w1)."
    )


def _diffusers(
    program: Base,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    where: str,
    component: str,
) -> Parts:
    said = parse_json(metadata[METADATA].encode(), f"{where}: {METADATA}") if METADATA in metadata \
        else {}  # fmt: skip
    prefix = _component(tensors, COMPONENTS, ".", where, component)
    own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    config: dict[str, Any] = {
        k.removeprefix(prefix): v for k, v in said.items() if k.startswith(prefix)
    }
    alphas = {k: own.pop(k) for k in list(own) if k.endswith(".alpha")}
    for key, alpha in alphas.items():
        if f"{key.removesuffix('alpha')}lora_A.weight" not in own:
            raise ArtifactError(f"{where}: {prefix}{key} is of no LoRA in this file.")
        _scale(alpha, 1, f"{where}: {prefix}{key.removesuffix('.alpha')}")
    if not config:  # a missing alpha means the module's own rank
        ranks = {k.removesuffix(".lora_A.weight"): len(t) for k, t in own.items() if "lora_A" in k}
        config = {
            "r": 1, "lora_alpha": 1, "rank_pattern": {re.escape(m): r for m, r in ranks.items()},
            "alpha_pattern": {
                re.escape(m): float(alphas.get(f"{m}.alpha", r)) for m, r in ranks.items()
            },
        }  # fmt: skip
    config["peft_type"] = "LORA"
    checked = Config(config, where)
    parts = lora_parts(checked, own, program)
    checked.finish()
    if own:
        raise ArtifactError(f"{where}: the key {next(iter(own))!r} is not understood.")
    return Parts(tuple(parts), "diffusers LoRA")


def _component(
    tensors: Mapping[str, Tensor], known: tuple[str, ...], separator: str, where: str, chosen: str
) -> str:
    """The prefix of the keys to take."""
    there = [c for c in known if any(k.startswith(f"{c}{separator}") for k in tensors)]
    if chosen:
        if chosen not in there:
            raise ArtifactError(
                f"{where} has nothing of {chosen!r}; it has {', '.join(there) or 'no components'}."
            )
        return _all_known(tensors, known, separator, where, f"{chosen}{separator}")
    if len(there) > 1:
        raise ArtifactError(
            f"{where} holds adapters of {', '.join(there)}. Say which this program is: "
            f"component={there[0]!r}."
        )
    prefix = f"{there[0]}{separator}" if there else ""
    return _all_known(tensors, known, separator, where, prefix)


def _all_known(
    tensors: Mapping[str, Tensor], known: tuple[str, ...], separator: str, where: str, prefix: str
) -> str:
    """The prefix, where each key has one: what stands beside it is of another component."""
    starts = tuple(f"{c}{separator}" for c in known)
    if prefix and (strange := next((k for k in tensors if not k.startswith(starts)), "")):
        raise ArtifactError(
            f"{where}: the key {strange!r} starts with no component, beside keys of {prefix!r}. "
            f"Rename it to {prefix}... if it is of that, or leave it out."
        )
    return prefix


def _kohya(program: Base, tensors: Mapping[str, Tensor], where: str, component: str) -> Parts:
    prefix = _component(tensors, FLAT, "_", where, component)
    flat = _flat_names(program)
    modules: dict[str, Leaves] = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            module, _, leaf = key.removeprefix(prefix).partition(".")
            if leaf not in _LEAVES:
                raise ArtifactError(f"{where}: the key {key!r} is not understood.")
            modules.setdefault(module, {})[leaf] = tensor
    parts: list[Part] = []
    kinds: set[str] = set()
    for module, leaves in modules.items():
        sites = flat.get(module, [])
        if len(sites) != 1:
            if snapshot(program).knows == "sizes":
                raise BaseNeededError(
                    f"{where}: {prefix}{module} has underscores for dots; only the names of the "
                    f"model's modules tell which. {GIVE_BASE}"
                )
            why = (
                f"fits {', '.join(sites)}"
                if sites
                else f"is none. Nearest: {nearest(module, flat)}"
            )
            raise BaseMismatchError(
                f"{where}: of this model's modules, {prefix}{module} {why}. Use the base that the "
                "adapter was trained on."
            )
        kind, part = _read(program, f"{sites[0]}.weight", leaves, f"{where}: {prefix}{module}")
        kinds.add(kind)
        parts.append(part)
    return Parts(tuple(parts), f"kohya {'/'.join(sorted(kinds))}")


def _flat_names(program: Base) -> dict[str, list[str]]:
    """Module path with underscores -> the modules of that name."""
    flat: dict[str, list[str]] = {}
    names = program.base.base_tensors().keys() | program.tensors.aliases.keys()
    for name in sorted(n.removesuffix(".weight") for n in names if n.endswith(".weight")):
        flat.setdefault(name.replace(".", "_"), []).append(name)
    return flat


def _read(program: Base, name: str, leaves: Leaves, where: str) -> tuple[str, Part]:
    """The form and the part of one module; shapes that no formula fits are an error of the file."""
    sizes = ", ".join(f"{k} {list(t.shape)}" for k, t in leaves.items())
    try:
        return _part(program, name, leaves, where)
    except RewriteError:
        raise
    except (RuntimeError, LookupError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{where}: its tensors ({sizes}) do not belong together. Save it again."
        ) from error


def _part(program: Base, name: str, leaves: Leaves, where: str) -> tuple[str, Part]:
    site = _site(program, name, where)
    weight = program.base.base_tensors()[site.weight]
    matrix = weight.mT if getattr(site, "in_out", False) else weight.flatten(1)
    alpha = leaves.pop("alpha", None)
    magnitude = leaves.pop("dora_scale", None)
    wide = {k: t.float() for k, t in leaves.items()}
    form = next((f for f in _FORMS if any(k.startswith(f) for k in wide)), "")
    if form and (strange := [k for k in wide if not k.startswith(form)]):
        raise ArtifactError(
            f"{where}: {', '.join(strange)} beside {form}...: two forms at one module are not "
            "read. Fold it with the library that wrote it."
        )
    if "lora_down.weight" in wide and "lora_mid.weight" not in wide:
        down, up = wide["lora_down.weight"].flatten(1), _needed(wide, "lora_up.weight", where)
        scale = _scale(alpha, len(down), where)
        rows = _rows_magnitude(magnitude, matrix, where)
        up = up.flatten(1)
        _require_fit(up.shape[0] == matrix.shape[0] and down.shape[1] == matrix.shape[1], where)
        if isinstance(site, ConvSite) and site.groups > 1:
            raise ArtifactError(f"{where}: LoRA of convolutions in groups is not read from files.")
        return "LoRA", LowRank(name, down, up, scale, rows)
    if magnitude is not None:
        raise ArtifactError(f"{where}: dora_scale is read beside LoRA only. Fold it there.")
    if "hada_w1_a" in wide:
        return "LoHa", _loha(name, wide, alpha, matrix, where)
    if any(k.startswith("lokr") for k in wide):
        return "LoKr", _lokr(name, wide, alpha, matrix, where)
    if "diff" in wide and "diff_b" not in wide:
        return "whole", _changed(name, wide["diff"], "whole", matrix, where)
    raise ArtifactError(
        f"{where}: {', '.join(sorted(leaves)) or 'alpha alone'} is no form that is read."
    )


def _changed(name: str, delta: Tensor, kind: str, matrix: Tensor, where: str) -> Change:
    _require_fit(delta.numel() == matrix.numel(), where)
    return Change(name, delta.reshape(matrix.shape), kind)


def _fitting(part: Formula, matrix: Tensor, where: str) -> Formula:
    fits = part.fits(*matrix.shape)
    if not fits:
        part.change(torch.empty(0))  # which fails where its tensors do not belong together
    _require_fit(fits, where)
    return part


def _loha(name: str, wide: Leaves, alpha: Tensor | None, matrix: Tensor, where: str) -> Part:
    factors = [_needed(wide, f"hada_w{i}_{side}", where) for i in (1, 2) for side in "ab"]
    scale = _scale(alpha, factors[1].shape[0], where)
    if "hada_t1" not in wide and "hada_t2" not in wide:
        return _fitting(Hadamard(name, *factors, scale=scale), matrix, where)
    one, two = (
        through(_needed(wide, f"hada_t{i + 1}", where), *factors[2 * i : 2 * i + 2]) for i in (0, 1)
    )
    return _changed(name, one * two * scale, "LoHa", matrix, where)


def _lokr(name: str, wide: Leaves, alpha: Tensor | None, matrix: Tensor, where: str) -> Part:
    own = {n: wide[f"lokr_{n}"] for n in KRONECKER if f"lokr_{n}" in wide}
    for factor in ("w1", "w2"):
        if factor in own and {f"{factor}_a", f"{factor}_b"} & own.keys():
            raise ArtifactError(
                f"{where}: lokr_{factor} is there whole and in factors; the file does not "
                "tell which counts. Leave one out."
            )
        for half in () if factor in own else ("a", "b"):
            _needed(wide, f"lokr_{factor}_{half}", where)
    ranked = own.get("w2_b", own.get("w1_b"))
    rank = max(own["w2"].shape[:2]) if ranked is None else len(ranked)
    scale = 1.0 if ranked is None else _scale(alpha, rank, where)
    part = Kronecker(name, scale, rank, **{n: t.flatten(1) for n, t in own.items()})
    if "lokr_t2" not in wide:
        return _fitting(part, matrix, where)
    two = through(wide["lokr_t2"], own["w2_a"], own["w2_b"])
    one = part.factor("w1", two)[..., None, None]
    return _changed(name, torch.kron(one, two) * scale, "LoKr", matrix, where)


def _needed(wide: Leaves, name: str, where: str) -> Tensor:
    if name not in wide:
        raise ArtifactError(f"{where}: {name} is missing beside {', '.join(sorted(wide))}.")
    return wide[name]


def _scale(alpha: Tensor | None, rank: int, where: str) -> float:
    number = float(rank) if alpha is None else float(alpha)
    if number != number or abs(number) == float("inf"):
        raise ArtifactError(f"{where}: alpha is {number}. Save it in float32.")
    return number / rank


def _rows_magnitude(magnitude: Tensor | None, matrix: Tensor, where: str) -> Tensor | None:
    """A `dora_scale` of rows, `[out, 1]`; of columns it is no DoRA as the paper has it."""
    if magnitude is None:
        return None
    if magnitude.shape[0] != matrix.shape[0]:
        raise ArtifactError(
            f"{where}: dora_scale is {tuple(magnitude.shape)}, of columns (wd_on_out=False), which "
            "only LyCORIS computes. Fold it there."
        )
    return magnitude.float().flatten()


def _require_fit(fits: bool, where: str) -> None:
    if not fits:
        raise ArtifactError(
            f"{where} has other sizes than this model's weight. Use the base that the adapter was "
            "trained on."
        )


def _site(program: Base, name: str, where: str) -> WeightSite:
    stored = program.tensors.stored(name)
    for site in program.sites.by_weight.get(stored, []):
        if isinstance(site, ConvSite) and site.transposed:
            raise ArtifactError(
                f"{where}: {name} is of a transposed convolution, for which these files have no "
                "form. Fold it, or use peftfx.save."
            )
        if isinstance(site, LinearSite | ConvSite):
            return site
    raise ArtifactError(f"{where}: no call of this model multiplies by {name!r}.")


def kohya_file(
    program: Base, parts: Parts, prefix: str = "lora_unet"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parts as kohya's scripts write them: tensors by key, and the header's metadata.

    Raises:
        ArtifactError: it holds more than LoRA, LoHa, LoKr and whole changes of linears and
            convolutions.
    """
    tensors: dict[str, Tensor] = {}
    for part in parts.parts:
        form = isinstance(part, Change | Formula) or (
            isinstance(part, LowRank) and part.a.dim() == 2 == part.b.dim() and not part.lookup
        )
        if not form:
            raise no_form("kohya's files hold changes of linears and convolutions alone", part)
        site = _site(program, part.target, "this adapter")
        kernel = site.kernel if isinstance(site, ConvSite) else ()
        path = f"{prefix}_{part.target.removesuffix('.weight').replace('.', '_')}"
        if isinstance(part, LowRank):
            up = part.b.reshape(*part.b.shape, *(1 for _ in kernel))
            tensors[f"{path}.lora_down.weight"] = _unflat(part.a, kernel)
            tensors[f"{path}.lora_up.weight"] = up
            tensors[f"{path}.alpha"] = torch.tensor(part.scale * len(part.a))
            if part.magnitude is not None:
                tensors[f"{path}.dora_scale"] = part.magnitude.view(-1, 1, *(1 for _ in kernel))
        elif isinstance(part, Change):
            tensors[f"{path}.diff"] = _unflat(part.delta, kernel)
        elif isinstance(part, Hadamard):
            own = {f"hada_{n}": t for n, t in vars(part).items() if isinstance(t, Tensor)}
            tensors |= {f"{path}.{n}": t for n, t in own.items()}
            tensors[f"{path}.alpha"] = torch.tensor(part.scale * len(part.w1_b))
        elif isinstance(part, Kronecker):
            tensors |= {f"{path}.{n}": t for n, t in _kronecker(part, kernel).items()}
        elif isinstance(part, Formula):
            tensors[f"{path}.diff"] = _unflat(change_of(program, part).float(), kernel)
    return tensors, {"ss_network_module": "networks.lora"}


def _kronecker(part: Kronecker, kernel: tuple[int, ...]) -> Leaves:
    """As LyCORIS has it, whose scale is 1 where both factors are whole."""
    own, scale = part.tensors(), part.scale
    if "w1" in own and "w2" in own:
        own["w1"], scale = own["w1"] * scale, 1.0
    if "w2" in own:
        own["w2"] = _unflat(own["w2"], kernel)
    leaves = {f"lokr_{n}": t for n, t in own.items()}
    return leaves | {"alpha": torch.tensor(scale * part.rank)}


def _unflat(matrix: Tensor, kernel: tuple[int, ...]) -> Tensor:
    return matrix.unflatten(1, (-1, *kernel)) if kernel else matrix
