"""The changes of weights by the formulas of PEFT's types that no method here computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...passes.reparameterized.vera import projections
from ...rewriter.errors import ArtifactError, BaseMismatchError, BaseNeededError, RewriteError
from ...rewriter.parts.parts import Change, LowRank, Part
from ...rewriter.parts.shared_parts import vera
from ...rewriter.program.sites import ConvSite, LinearSite, WeightSite
from ..base import GIVE_BASE, Base
from .changes import weight_of
from .config import Config, by_module

Leaves = dict[str, Tensor]
Formula = Callable[[Config, str, Leaves, Tensor], Tensor]


def changes(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """The exact change of each weight; VERA and DELORA are low-rank."""
    formula, leaves = _FORMULAS[config.type]
    modules, shared = by_module(tensors, leaves), Leaves()
    if config.type == "VERA":
        places = [site_of(program, weight_of(program, p, config), config) for p in modules]
        shared = _projections(config, tensors, [matrix_of(program, s).shape for s in places])
    parts: list[Part] = []
    for path, own in modules.items():
        for leaf in own:
            del tensors[f"{path}.{leaf}"]
        name = weight_of(program, path, config)
        site = site_of(program, name, config)
        matrix = matrix_of(program, site)
        if config.type == "VERA":
            parts.append(_vera(config, name, own, shared, matrix))
            continue
        if config.type == "DELORA":
            parts.append(_delora(config, path, name, own, matrix))
            continue
        delta = _computed(formula, config, path, own, matrix)
        if delta.numel() != matrix.numel():
            raise BaseMismatchError(
                f"{config.where}: the change of {path} has {delta.numel()} numbers, its weight "
                f"{matrix.numel()}. Use the base that the adapter was trained on."
            )
        parts.append(Change(name, delta.reshape(matrix.shape), config.type))
    return parts


def _computed(formula: Formula, config: Config, path: str, own: Leaves, matrix: Tensor) -> Tensor:
    """The change of one weight, float32."""
    try:
        return formula(config, path, {k: t.float() for k, t in own.items()}, matrix)
    except RewriteError:
        raise
    except KeyError as error:
        raise ArtifactError(
            f"{config.where}: {path}.{error.args[0]} is missing beside {', '.join(sorted(own))}. "
            "The file is not whole; save the adapter again."
        ) from error
    except (ArithmeticError, RuntimeError, ValueError, IndexError) as error:
        raise misfit(config, path, own) from error


def _require(fits: bool, config: Config, path: str, own: Leaves) -> None:
    if not fits:
        raise misfit(config, path, own)


def misfit(config: Config, path: str, own: Leaves) -> ArtifactError:
    sizes = ", ".join(f"{k} {list(t.shape)}" for k, t in own.items())
    return ArtifactError(
        f"{config.where}: the tensors of {path} ({sizes}) do not belong together, or to this base. "
        "Use the base that the adapter was trained on, or save it again."
    )


def _shira(config: Config, path: str, own: Leaves, matrix: Tensor) -> Tensor:
    config.take("r", 32)
    rows, columns = own["shira_indices"].long()
    _require(len(rows) == own["shira_weight"].numel(), config, path, own)
    if len(rows) and (int(rows.max()) >= matrix.shape[0] or int(columns.max()) >= matrix.shape[1]):
        raise ArtifactError(f"{config.where}: an index of {path} is beyond its weight.")
    delta = torch.zeros(matrix.shape)
    return delta.index_put((rows, columns), own["shira_weight"], accumulate=True)


def _miss(config: Config, path: str, own: Leaves, matrix: Tensor) -> Tensor:
    config.take("r", 64), config.take("mini_r", 1)
    start = config.data.get("init_weights", True)
    if start not in (True, False):
        raise ArtifactError(f"{config.where}: MISS with init_weights={start!r} is not read.")
    block = own["miss_block"]
    return block.repeat(-(-matrix.shape[1] // len(block)), 1)[: matrix.shape[1]].mT


_RANK = 1 << 16
"""Largest rank of matrices that are drawn again."""


def _vera(config: Config, name: str, own: Leaves, shared: Leaves, matrix: Tensor) -> Part:
    """`diag(b) B diag(d) A`, of which each weight has the first rows and columns."""
    if len(own) != 2:
        raise ArtifactError(f"{config.where}: {name} has {', '.join(own)} alone. Save it again.")
    out, size = matrix.shape
    sides = own["vera_lambda_d"].numel(), own["vera_lambda_b"].numel()
    _require(sides == (len(shared["vera_A"]), out), config, name, own)
    vectors = own["vera_lambda_d"], own["vera_lambda_b"]
    dropout = float(config.take("vera_dropout", 0.0, int, float))
    return vera(name, *vectors, shared["vera_A"], shared["vera_B"], size, dropout)


def _projections(config: Config, tensors: dict[str, Tensor], sizes: Sequence[torch.Size]) -> Leaves:
    """VeRA's shared matrices: of the file, or drawn again as PEFT draws them where they are not."""
    rank, key = config.take("r", 256), config.take("projection_prng_key", 0)
    left_out = not config.take("save_projection", True)
    shared = {k: tensors.pop(k) for k in ("vera_A", "vera_B") if k in tensors}
    if len(shared) == 2 or not sizes:
        return shared
    if not left_out or shared or not 1 <= rank <= _RANK:
        raise ArtifactError(
            f"{config.where}: vera_A and vera_B are not in the file, and the config does not say "
            "that they are left out (save_projection=False). Save the adapter again."
        )
    height, width = (max(side) for side in zip(*sizes, strict=True))
    generator = torch.Generator().manual_seed(key)
    return dict(zip(("vera_A", "vera_B"), projections(rank, width, height, generator), strict=True))


def _delora(config: Config, path: str, name: str, own: Leaves, matrix: Tensor) -> Part:
    """`B diag(lambda / (r |a_i| |b_i|)) A diag(w)`, w the norms of the base's columns."""
    config.take("r", 8), config.take("rank_pattern", {})
    config.take("delora_lambda", 15, int, float), config.take("lambda_pattern", {})
    _require(len(own) == len(_FORMULAS["DELORA"][1]), config, path, own)
    a, b, columns = own["delora_A"].float(), own["delora_B"].float(), own["delora_w_norm"]
    fits = a.shape[::-1] == (matrix.shape[1], b.shape[1]) and columns.numel() == matrix.shape[1]
    _require(fits and own["delora_lambda"].numel() == 1, config, path, own)
    sizes = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
    return LowRank(name, a * columns, b * (own["delora_lambda"] / (len(a) * sizes)), 1.0)


def _hira(config: Config, path: str, own: Leaves, matrix: Tensor) -> Tensor:
    """`W o (B A)`, entry by entry."""
    config.take("r", 32), config.take("rank_pattern", {})
    return _numbers(config, path, matrix) * (own["hira_B"] @ own["hira_A"])


def _hra(config: Config, path: str, own: Leaves, matrix: Tensor) -> Tensor:
    """`W (H_1 ... H_r - 1)` of Householder reflections; of one basis of all their vectors where
    training made them orthogonal (`apply_GS`)."""
    config.take("r", 8), config.take("bias", "none")
    vectors, turned = own["hra_u"], _numbers(config, path, matrix)
    if config.take("apply_GS", False):
        basis = torch.linalg.qr(vectors).Q
        return -2 * turned @ basis @ basis.mT
    for column in (vectors / vectors.norm(dim=0)).mT:
        turned = turned - 2 * torch.outer(turned @ column, column)
    return turned - matrix.float()


def _c3a(config: Config, path: str, own: Leaves, matrix: Tensor) -> Tensor:
    """Circulant blocks: entry `[k, j]` of one is its kernel's at `j - k`, over the inputs."""
    (
        config.take("block_size", 256),
        config.take("block_size_pattern", {}),
        config.take("bias", "none"),
    )
    kernel = own["c3a_kernel"]
    places = torch.arange(kernel.shape[2])
    blocks = kernel[:, :, (places - places[:, None]) % kernel.shape[2]]
    return blocks.transpose(1, 2).reshape(matrix.shape) / matrix.shape[1]


def _none(config: Config, path: str, own: Leaves, matrix: Tensor) -> Tensor:
    raise ArtifactError(f"{config.where}: {path} has no formula.")


_FORMULAS: dict[str, tuple[Formula, list[str]]] = {
    "VERA": (_none, ["vera_lambda_b", "vera_lambda_d"]),
    "SHIRA": (_shira, ["shira_weight", "shira_indices"]),
    "MISS": (_miss, ["miss_block"]),
    "DELORA": (_none, ["delora_A", "delora_B", "delora_lambda", "delora_w_norm"]),
    "HIRA": (_hira, ["hira_A", "hira_B"]),
    "HRA": (_hra, ["hra_u"]),
    "C3A": (_c3a, ["c3a_kernel"]),
}  # fmt: skip


def _numbers(config: Config, path: str, matrix: Tensor) -> Tensor:
    if matrix.is_meta:
        raise BaseNeededError(
            f"{config.where}: the change of {path} depends on its weight's numbers. {GIVE_BASE}"
        )
    return matrix.float()


def site_of(program: Base, name: str, config: Config) -> WeightSite:
    stored = program.tensors.stored(name)
    for site in program.sites.by_weight.get(stored, []):
        if isinstance(site, ConvSite) and site.transposed:
            raise ArtifactError(
                f"{config.where}: {name} is of a transposed convolution, for which these files "
                "have no form. Fold it, or use peftfx.save."
            )
        if isinstance(site, LinearSite | ConvSite):
            return site
    raise ArtifactError(f"{config.where}: no call of this model multiplies by {name!r}.")


def matrix_of(program: Base, site: WeightSite) -> Tensor:
    """The base's weight as `[out, in]`; on meta, where only its size is known."""
    weight = program.base.base_tensors()[site.weight]
    return weight.mT if getattr(site, "in_out", False) else weight.flatten(1)
