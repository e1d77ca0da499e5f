"""LOHA, LOKR, OFT and BOFT of PEFT: parts of the methods here, both ways."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...passes.reparameterized.lokr import divided
from ...passes.reparameterized.oft import nearest_divisor
from ...rewriter.errors import ArtifactError, BaseMismatchError, NoFormError, RewriteError
from ...rewriter.parts.formula_parts import (
    KRONECKER,
    Butterfly,
    Formula,
    Hadamard,
    Kronecker,
    Rotation,
)
from ...rewriter.parts.parts import Change, Part
from ...rewriter.program.sites import ConvSite, WeightSite
from ..base import Base
from .changes import weight_of
from .config import Config, by_module, resolved
from .formulas import Leaves, matrix_of, misfit, site_of

_HADAMARD = tuple(f"w{i}_{side}" for i in (1, 2) for side in "ab")
_LEAVES: Mapping[str, list[str]] = {
    "LOHA": [f"hada_{n}" for n in (*_HADAMARD, "t1", "t2")],
    "LOKR": [f"lokr_{n}" for n in (*KRONECKER, "t2")],
    "OFT": ["oft_R.weight"],
    "BOFT": ["boft_R", "boft_s"],
}
_TERMS = 100
"""Most terms of a series that are read: PEFT takes 5, and more add nothing long before that."""


def products(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """A part a module; of a product with a core (`use_effective_conv2d`), its exact change."""
    read: Callable[[Config, str, str, Leaves], Part] = {
        "LOHA": _loha, "LOKR": _lokr, "OFT": _oft, "BOFT": _boft,
    }[config.type]  # fmt: skip
    parts: list[Part] = []
    for path, own in by_module(tensors, _LEAVES[config.type]).items():
        for leaf in own:
            del tensors[f"{path}.{leaf}"]
        name = weight_of(program, path, config)
        matrix = matrix_of(program, site_of(program, name, config))
        parts.append(_fitting(config, path, own, matrix, partial(read, config, path, name, own)))
    return parts


def _fitting(
    config: Config, path: str, own: Leaves, matrix: Tensor, read: Callable[[], Part]
) -> Part:
    """A part of a weight `[out, in]`, once its sizes are known to fit."""
    out, size = matrix.shape
    try:
        part = read()
        fits = not isinstance(part, Formula) or part.fits(out, size)
    except RewriteError:
        raise
    except KeyError as error:
        raise ArtifactError(
            f"{config.where}: {path}.{error.args[0]} is missing beside {', '.join(sorted(own))}. "
            "The file is not whole; save the adapter again."
        ) from error
    except (ArithmeticError, RuntimeError, ValueError, IndexError) as error:
        raise misfit(config, path, own) from error
    if isinstance(part, Change):
        if part.delta.numel() != matrix.numel():
            raise BaseMismatchError(
                f"{config.where}: the change of {path} has {part.delta.numel()} numbers, its "
                f"weight {matrix.numel()}. Use the base that the adapter was trained on."
            )
        return Change(part.target, part.delta.reshape(matrix.shape), part.method)
    if isinstance(part, Butterfly):
        _require_blocks(config, path, part, size)
    if not fits:
        raise misfit(config, path, own)
    return part


def _rank_and_scale(config: Config, path: str) -> tuple[int, float]:
    rank = resolved(config.take("rank_pattern", {}), path, config.take("r", 8), config.where)
    if not isinstance(rank, int) or rank < 1:
        raise ArtifactError(f"{config.where}: the rank of {path} is {rank!r}. Save it again.")
    alphas = config.take("alpha_pattern", {})
    alpha = resolved(alphas, path, config.take("alpha", 8, int, float), config.where)
    return rank, float(alpha) / rank


def through(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A convolution's core tensor `[rank, rank, *kernel]` times both factors."""
    return torch.einsum("ijkl,ip,jr->prkl", core.float(), a.float(), b.float())


def _loha(config: Config, path: str, name: str, own: Leaves) -> Part:
    _, scale = _rank_and_scale(config, path)
    factors = [own[f"hada_{n}"] for n in _HADAMARD]
    if "hada_t1" not in own and "hada_t2" not in own:
        return Hadamard(name, *factors, scale=scale)
    one, two = (through(own[f"hada_t{i + 1}"], *factors[2 * i : 2 * i + 2]) for i in (0, 1))
    return Change(name, one * two * scale, config.type)


def _lokr(config: Config, path: str, name: str, own: Leaves) -> Part:
    rank, scale = _rank_and_scale(config, path)
    tensors = {n: own[key] for n in KRONECKER if (key := f"lokr_{n}") in own}
    for factor in ("w1", "w2"):
        for half in () if factor in tensors else ("a", "b"):
            tensors[f"{factor}_{half}"] = own[f"lokr_{factor}_{half}"]  # a KeyError names it
    core, two = own.get("lokr_t2"), tensors.get("w2")
    if core is None and (two is None or two.dim() in (2, 4)):
        return Kronecker(name, scale, rank, **{n: t.flatten(1) for n, t in tensors.items()})
    first = {n: t for n, t in tensors.items() if n.startswith("w1")}
    w1 = Kronecker(name, 1.0, 1, **first).factor("w1", torch.empty(0))
    w2 = through(own["lokr_t2"], tensors["w2_a"], tensors["w2_b"]) if two is None else two.float()
    w1 = w1[..., None, None] if w2.dim() == 4 else w1  # of one axis PEFT multiplies other axes
    return Change(name, torch.kron(w1, w2.contiguous()) * scale, config.type)


def _oft(config: Config, path: str, name: str, own: Leaves) -> Part:
    config.take("r", 0), config.take("oft_block_size", 32), config.take("bias", "none")
    eps, constrained = config.take("eps", 6e-5), config.take("coft", False)
    terms = config.take("num_cayley_neumann_terms", 5)
    series = config.take("use_cayley_neumann", True)
    if not 2 <= terms <= _TERMS:
        raise ArtifactError(
            f"{config.where}: num_cayley_neumann_terms={terms}, and 2 to {_TERMS} are read. Save "
            "the adapter again, with use_cayley_neumann=false."
        )
    share = config.take("block_share", False)
    terms, eps = terms if series else 0, eps if constrained else 0.0
    return Rotation(name, own["oft_R.weight"], share, terms, eps)


def _boft(config: Config, path: str, name: str, own: Leaves) -> Part:
    config.take("bias", "none"), config.take("boft_n_butterfly_factor", 1)
    return Butterfly(name, own["boft_R"], own["boft_s"].flatten())


def _require_blocks(config: Config, path: str, part: Butterfly, inputs: int) -> None:
    if part.blocks is None:
        return
    _, count, size, _ = part.blocks.shape
    said = config.take("boft_block_size", 4), config.take("boft_block_num", 0)
    if said not in ((size, 0), (0, count)) or count * size != inputs:
        raise ArtifactError(
            f"{config.where}: {path} has {count} blocks of {size} for {inputs} inputs, "
            f"and the config says boft_block_size={said[0]}, boft_block_num={said[1]}. The files "
            "do not belong together; save the adapter again."
        )


@dataclass(frozen=True)
class Module:
    """A module with what an adapter has for it.

    Attributes:
        path: of the module.
        part, site: of its weight.
    """

    path: str
    part: Formula
    site: WeightSite

    @property
    def kernel(self) -> tuple[int, ...]:
        """Of a convolution."""
        return self.site.kernel if isinstance(self.site, ConvSite) else ()

    @property
    def sizes(self) -> tuple[int, int]:
        """Outputs, and inputs of a row."""
        count, out, size = self.site.matrices
        return count * out, size


def written_products(
    modules: Sequence[Module], patterns: Callable[..., dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config, but for its target modules, and the tensors by key.

    Args:
        modules: of one kind of parts.
        patterns: ranks and scales by module as options, see `writing.patterns`.

    Raises:
        ArtifactError: PEFT has no config that makes it build such modules.
    """
    first = modules[0].part
    write: Any = {"loha": _written_loha, "lokr": _written_lokr, "oft": _written_oft,
                  "boft": _written_boft}[first.method]  # fmt: skip
    config, leaves = write(modules, patterns)
    tensors = {f"{m.path}.{leaf}": t for m, own in zip(modules, leaves, strict=True)
               for leaf, t in own.items()}  # fmt: skip
    return {"peft_type": first.method.upper(), **config}, tensors


def _alphas(patterns: dict[str, Any]) -> dict[str, Any]:
    return {"alpha" if k == "lora_alpha" else k: v for k, v in patterns.items()}


def _written_loha(modules: Sequence[Module], patterns: Callable[..., dict[str, Any]]) -> Any:
    parts: list[Any] = [m.part for m in modules]
    if any(p.w1_a.dim() > 2 for p in parts):
        raise _no_form(modules, "PEFT has no LoHa of experts")
    ranks = {m.path: p.w1_b.shape[0] for m, p in zip(modules, parts, strict=True)}
    scales = {m.path: p.scale for m, p in zip(modules, parts, strict=True)}
    leaves = [{f"hada_{n}": getattr(p, n) for n in _HADAMARD} for p in parts]
    return _alphas(patterns(ranks, scales)), leaves


def _written_lokr(modules: Sequence[Module], patterns: Callable[..., dict[str, Any]]) -> Any:
    parts: list[Any] = [m.part for m in modules]
    if any(len(m.kernel) == 1 and p.w2 is not None for m, p in zip(modules, parts, strict=True)):
        raise _no_form(modules, "PEFT multiplies other axes of convolutions with one axis")
    ranks = {m.path: p.rank for m, p in zip(modules, parts, strict=True)}
    scales = {m.path: p.scale for m, p in zip(modules, parts, strict=True)}
    both = any(p.w1_a is not None for p in parts)
    wanted = [_lokr_shapes(p) for p in parts]
    sizes = {n for one, _ in wanted for n in one}
    for factor in (-1, *sorted(sizes)):
        made = [_lokr_built(m, ranks[m.path], factor, both) for m in modules]
        if made == wanted:
            break
    else:
        raise _no_form(modules, "PEFT divides all weights by one decompose_factor and rank")
    leaves: list[dict[str, Tensor]] = []
    for module, part in zip(modules, parts, strict=True):
        own = {f"lokr_{n}": t for n, t in part.tensors().items()}
        if module.kernel and part.w2 is not None:
            own["lokr_w2"] = part.w2.unflatten(1, (-1, *module.kernel))
        leaves.append(own)
    config = {"decompose_factor": factor, "decompose_both": both}
    return _alphas(patterns(ranks, scales)) | config, leaves


Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def _lokr_shapes(part: Kronecker) -> Shapes:
    """Sizes of both factors, and their ranks (0: whole)."""
    like = torch.empty(0)
    one, two = (tuple(part.factor(n, like).shape) for n in ("w1", "w2"))
    ranks = tuple(0 if a is None else a.shape[1] for a in (part.w1_a, part.w2_a))
    return one, (*two, *ranks)


def _lokr_built(module: Module, rank: int, factor: int, both: bool) -> Shapes:
    """What PEFT makes of these options."""
    (out, size), kernel = module.sizes, 1
    for axis in module.kernel:
        kernel *= axis
    (o1, o2), (i1, i2) = (divided(n, factor) for n in (out, size // kernel))
    ranks = (
        rank if both and 2 * rank < max(o1, i1) else 0, rank if 2 * rank < max(o2, i2) else 0
    )  # fmt: skip
    return (o1, i1), (o2, i2 * kernel, *ranks)


def _written_oft(modules: Sequence[Module], _: object) -> Any:
    parts: list[Any] = [m.part for m in modules]
    first = parts[0]
    if any((p.share, p.terms, p.eps) != (first.share, first.terms, first.eps) for p in parts):
        raise _no_form(modules, "PEFT rotates all modules in one way")
    sides = [(p.size, m.sizes[1]) for m, p in zip(modules, parts, strict=True)]
    config: dict[str, Any] = {
        "block_share": first.share, "coft": first.eps > 0, "use_cayley_neumann": first.terms > 0,
        **({"eps": first.eps} if first.eps else {}),
        **({"num_cayley_neumann_terms": first.terms} if first.terms else {}),
    }  # fmt: skip
    config |= _blocks(modules, sides, ("oft_block_size", "r"), nearest_divisor)
    return config, [{"oft_R.weight": p.q} for p in parts]


def _written_boft(modules: Sequence[Module], _: object) -> Any:
    parts: list[Any] = [m.part for m in modules]
    if any(p.blocks is None or p.s is None for p in parts):
        raise _no_form(modules, "PEFT's BOFT has both rotations and rows")
    factors = {len(p.blocks) for p in parts}
    if len(factors) > 1:
        raise _no_form(modules, "PEFT has as many butterfly factors everywhere")
    sides = [(p.blocks.shape[-1], m.sizes[1]) for m, p in zip(modules, parts, strict=True)]
    config = {"boft_n_butterfly_factor": factors.pop()}
    config |= _blocks(modules, sides, ("boft_block_size", "boft_block_num"), lambda _, n: n)
    return config, [
        {"boft_R": p.blocks, "boft_s": p.s[None] if m.kernel else p.s[:, None]}
        for m, p in zip(modules, parts, strict=True)
    ]


def _blocks(
    modules: Sequence[Module],
    sides: Iterable[tuple[int, int]],
    words: tuple[str, str],
    taken: Callable[[int, int], int],
) -> dict[str, int]:
    """One size of all blocks, or one number of them, of which PEFT makes those of every module.

    Args:
        sides: size of a block, and inputs, by module.
        words: for the size and for the number.
        taken: what it makes of inputs and of what is said.
    """
    listed = list(sides)
    sizes, counts = ({f(*s) for s in listed} for f in (lambda n, _: n, lambda n, i: i // n))
    for size in sorted(sizes, reverse=True):
        if all(taken(inputs, size) == own for own, inputs in listed):
            return {words[0]: size, words[1]: 0}
    for count in sorted(counts):
        if all(taken(inputs, count) == inputs // own for own, inputs in listed):
            return {words[0]: 0, words[1]: count}
    raise _no_form(modules, "PEFT has blocks of one size, or as many, in all modules")


def _no_form(modules: Collection[Module], rule: str) -> NoFormError:
    names = ", ".join(m.path for m in list(modules)[:3])
    return NoFormError(
        f"{rule}, and this adapter ({names}, ...) has not. Save it with peftfx.save, or fold it."
    )
