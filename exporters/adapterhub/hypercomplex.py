"""Compacter's projections in AdapterHub's files: read as factors or as whole matrices, and written.

PATH.adapters.NAME.adapter_down.0.W_left, .W_right    [n, in / n, rank], [n, rank, out / n], or .W
PATH.adapters.NAME.adapter_down.0.b                   the bias
PATH.shared_parameters.NAME.phm_rule                  [n, n, n], or each projection's own
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...rewriter.api import Program
from ...rewriter.errors import ArtifactError
from ...rewriter.parts.parts import Bottleneck, Hypercomplex
from ...rewriter.products.kronecker import hypercomplex_matrix
from ...rewriter.program.sites import ConvSite, EmbeddingSite
from .config import Options
from .leaves import Leaves, needed
from .places import stack_path

_MODULES = {"down": "adapter_down.0", "up": "adapter_up"}


def factored(
    options: Options, plain: Bottleneck, leaves: Leaves, shared: Leaves, where: str
) -> Hypercomplex | None:
    """The adapter of one place; None where its config says more than a `Hypercomplex` holds."""
    more = ("factorized_phm_rule", "shared_W_phm", "ln_before", "ln_after", "use_gating")
    fits = (plain.reads, plain.skips, plain.inside) == ("output", "output", False)
    learnt = isinstance(options.take("scaling", float, int, str), str)
    simple = options.take("phm_layer", bool) and options.take("phm_bias", bool)
    if not (simple and fits) or learnt or any(options.take(k, bool) for k in more):
        return None
    whole = not options.take("factorized_phm_W", bool)
    own: dict[str, Any] = {}
    for name, module in _MODULES.items():
        mine = _below(leaves, module)
        rules = shared if options.take("shared_phm_rule", bool) else mine
        own[f"{name}_rule"] = needed(rules, "phm_rule", where)
        sides = {"left": "W"} if whole else {"left": "W_left", "right": "W_right"}
        own |= {f"{name}_{side}": needed(mine, leaf, where) for side, leaf in sides.items()}
        own[f"{name}_bias"] = needed(mine, "b", where)
        factors = [own[f"{name}_{side}"] for side in sides]
        _require_count(options, own[f"{name}_rule"], factors[0], where)
        matrix = hypercomplex_matrix(own[f"{name}_rule"], *factors)
        if matrix.shape[1:] != own[f"{name}_bias"].shape:
            raise ArtifactError(
                f"{where}: {module} makes {matrix.shape[1]} features, and its bias has "
                f"{list(own[f'{name}_bias'].shape)}. The files do not belong together."
            )
    if leaves:
        raise ArtifactError(f"{where}: the key ...{next(iter(leaves))!r} is not understood.")
    about = plain.activation, plain.scale, plain.dropout
    own |= zip(("activation", "scale", "dropout"), about, strict=True)
    return Hypercomplex("", **own)


def dense(
    options: Options, leaves: Leaves, shared: Leaves, module: str, name: str, where: str
) -> tuple[Tensor, Tensor | None]:
    """`sum_i kron(A_i, W_i)`, `[in, out]`, transposed; either factor may be of low rank, and be
    shared by all layers."""
    own = _below(leaves, module)
    rules = shared if options.take("shared_phm_rule", bool) else own
    rule = _product(rules, "phm_rule", options.take("factorized_phm_rule", bool), where)
    across = options.take("shared_W_phm", bool)
    weights, stem = (shared, f"W_{name}") if across else (own, "W")
    weight = _product(weights, stem, options.take("factorized_phm_W", bool), where)
    _require_count(options, rule, weight, where)
    matrix = hypercomplex_matrix(rule.float(), weight.float())
    return matrix.mT.contiguous(), own.get("b")


def _below(leaves: Leaves, module: str) -> Leaves:
    """The tensors of a module, taken out."""
    names = [k for k in leaves if k.startswith(f"{module}.")]
    return {k.removeprefix(f"{module}."): leaves.pop(k) for k in names}


def _require_count(options: Options, rule: Tensor, weight: Tensor, where: str) -> None:
    if len(rule) == options.take("phm_dim", int) == len(weight):
        return
    raise ArtifactError(
        f"{where}: there are {len(rule)} rules and {len(weight)} matrices, and phm_dim is "
        f"{options.take('phm_dim', int)}. The files do not belong together."
    )


def _product(leaves: Leaves, name: str, in_factors: bool, where: str) -> Tensor:
    if not in_factors:
        return needed(leaves, name, where)
    left, right = (needed(leaves, f"{name}_{side}", where) for side in ("left", "right"))
    return torch.bmm(left, right)


# Writing.


def is_shared(parts: Sequence[Hypercomplex]) -> bool:
    """Whether all projections have the same A."""
    rules = [a for p in parts for a in (p.down_rule, p.up_rule)]
    return all(torch.equal(a, rules[0]) for a in rules)


def options_of_parts(parts: Sequence[Hypercomplex]) -> dict[str, Any]:
    """What the config says of the projections."""
    n, _, rank = parts[0].down_left.shape
    whole = parts[0].down_right is None
    return {
        "phm_layer": True, "phm_dim": n, "phm_rank": 1 if whole else rank,
        "factorized_phm_W": not whole, "shared_phm_rule": is_shared(parts),
    }  # fmt: skip


def style(part: Hypercomplex) -> tuple[Any, ...]:
    """What the library has alike at all places."""
    n, _, rank = part.down_left.shape
    whole = part.down_right is None
    return part.activation, part.scale, part.dropout, n, None if whole else rank


def leaves_of(part: Hypercomplex, own_rules: bool) -> Leaves:
    """The tensors of one place."""
    leaves: Leaves = {}
    for name, module in _MODULES.items():
        right = getattr(part, f"{name}_right")
        left = "W" if right is None else "W_left"
        leaves[f"{module}.{left}"] = getattr(part, f"{name}_left")
        leaves |= {} if right is None else {f"{module}.W_right": right}
        leaves[f"{module}.b"] = getattr(part, f"{name}_bias")
        leaves |= {f"{module}.phm_rule": getattr(part, f"{name}_rule")} if own_rules else {}
    return leaves


def shared_tensors(program: Program, parts: Sequence[Hypercomplex], name: str) -> Leaves:
    """A of all places, which the library keeps with the model; none where each has its own."""
    if not is_shared(parts):
        return {}
    first = (s.weight for s in program.sites if isinstance(s, EmbeddingSite | ConvSite))
    path = f"{stack_path(program, next(first, ''))}.shared_parameters.{name}".lstrip(".")
    return {f"{path}.phm_rule": parts[0].down_rule}
