"""Parts of PEFT's LORA and ADALORA tensors: factors, scales, magnitudes, biases, experts."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...passes.reparameterized.initial_factors import olora, pissa
from ...rewriter.errors import ArtifactError, BaseMismatchError, BaseNeededError
from ...rewriter.parts.parts import Invoked, LowRank, Part
from ...rewriter.program.sites import ConvSite, ExpertsSite, LinearSite, WeightSite
from ..base import CAPTURE, GIVE_BASE, Base, snapshot, values
from .changes import bias_with, no_module, require_depth
from .config import Config, by_module, resolved

LEAVES = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B",
    "lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_A", "lora_B", "lora_E",
    "lora_ranknum", "lora_diag", "lora_velora_embed",
    *(f"lora_monteclora_sampler.{n}" for n in ("expert_weights", "expert_weights_prior",
                                               "gaussian_var_prior", "std_prior")),
)  # fmt: skip
"""KaSA's diagonal; what VeLoRA and MonteCLoRA do in training alone is read, and used nowhere."""

TWICE = 2
"""How often PEFT 0.21 adds the change of the output projection inside `nn.MultiheadAttention`, in
training and when it merges: it writes it into the weight and then merges that layer, too."""

_PLAIN = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Initialisations that leave the base as it is."""


def lora_parts(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """Takes the tensors of LORA or ADALORA; what is left belongs to no adapter layer."""
    scales = _Scales(config)
    start = config.take("init_lora_weights", True, bool, str)
    dropout = float(config.take("lora_dropout", 0.0, float, int))
    dora, biased = config.take("use_dora", False), config.take("lora_bias", False)
    config.take("bias", "none")
    config.take("trainable_token_indices", None, list, dict)
    config.take("ensure_weight_tying", False)
    config.take("velora_config", None, dict), config.take("monteclora_config", None, dict)
    require_depth(config, program)
    if config.take("use_qalora", False) and snapshot(program).knows == "sizes":
        raise BaseNeededError(f"{config.where}: use_qalora pools what the base has. {GIVE_BASE}")
    if config.take("arrow_config", None, dict):
        raise ArtifactError(
            f"{config.where}: arrow_config chooses among LoRAs for each token, and holds none. "
            "Convert those LoRAs one by one, or combine them into one with PEFT's "
            "add_weighted_adapter."
        )
    truncated = config.take("kasa_config", None, dict) is not None
    tokens = config.take("alora_invocation_tokens", None, list)
    parts: list[Part] = []
    layers = by_module(tensors, LEAVES)
    stacks = _stacked(program, layers, config)
    for path, leaves in layers.items():
        for leaf in leaves:
            del tensors[f"{path}.{leaf}"]
        if dora and not any(leaf.startswith("lora_magnitude_vector") for leaf in leaves):
            raise _lacking(config, path, "use_dora", "lora_magnitude_vector")
        if biased and "lora_B.weight" in leaves and "lora_B.bias" not in leaves:
            raise _lacking(config, path, "lora_bias", "lora_B.bias")
        name, site = stacks[path]
        if config.type == "ADALORA":
            part = _adalora(config, scales, path, name, leaves)
        elif "lora_embedding_A" in leaves:
            part = _lookup(scales, path, name, leaves)
        else:
            part = _product(config, scales, path, name, leaves, site, dropout)
        if start not in _PLAIN:
            part = _residual(config, program, part, str(start))
        elif truncated:
            part = _truncated(config, program, part, leaves)
        parts.append(_invoked(config, part, tokens) if tokens else part)
        if (bias := leaves.get("lora_B.bias")) is not None:
            parts.append(bias_with(program, name, bias.float() * part.scale))
    return parts


def _lacking(config: Config, path: str, option: str, leaf: str) -> ArtifactError:
    return ArtifactError(
        f"{config.where}: {option}=true, but {path}.{leaf} is missing. The files do not belong "
        "together; save the adapter again."
    )


class _Scales:
    """`alpha / r`, or `alpha / sqrt(r)`, of each module."""

    def __init__(self, config: Config) -> None:
        self.where = config.where
        self.rank = config.take("r", 8)
        self.alpha = config.take("lora_alpha", 8, int, float)
        ranks = config.take("rank_pattern", {})
        self.ranks: Mapping[str, Any] = {} if config.type == "ADALORA" else ranks
        self.alphas: Mapping[str, Any] = config.take("alpha_pattern", {})
        self.root = config.take("use_rslora", False)

    def of(self, path: str, rank: int) -> float:
        """The scale of a module whose factors have this rank.

        Raises:
            ArtifactError: the config says another rank.
        """
        said = resolved(self.ranks, path, self.rank, self.where)
        if said != rank:
            raise ArtifactError(
                f"{self.where}: the rank of {path} is {said}, but its tensors have {rank}. The "
                "files do not belong together; save the adapter again."
            )
        alpha = resolved(self.alphas, path, self.alpha, self.where)
        return float(alpha) / (math.sqrt(rank) if self.root else rank)


def _pair(
    config: str, path: str, leaves: Mapping[str, Tensor], a: str, b: str, whole: bool = True
) -> list[Tensor]:
    """Two factors; `whole`, not stored block below block."""
    if a not in leaves or b not in leaves:
        lost = b if a in leaves else a
        raise ArtifactError(
            f"{config}: {path}.{lost} is missing beside {sorted(leaves)}. The file is not whole; "
            "save the adapter again."
        )
    narrow, wide = leaves[a], leaves[b]
    if min(narrow.dim(), wide.dim()) < 2 or (whole and not _one_rank(narrow, wide)):
        raise ArtifactError(
            f"{config}: {path} has {a} {list(narrow.shape)} and {b} {list(wide.shape)}, which are "
            "no matrices of one rank. Save the adapter again."
        )
    if not (narrow.is_floating_point() and wide.is_floating_point()):
        raise ArtifactError(
            f"{config}: {path} has factors of {str(narrow.dtype)[6:]} and {str(wide.dtype)[6:]}, "
            "which are no real numbers. Save the adapter again in float32."
        )
    return [narrow, wide]


def _one_rank(narrow: Tensor, wide: Tensor) -> bool:
    """Whether two factors meet; of a convolution in groups, the second has the ranks of a group."""
    read, written = narrow.shape[0], wide.shape[1]
    return read == written or (narrow.dim() > 2 and written > 0 and read % written == 0)


def _product(
    config: Config,
    scales: _Scales,
    path: str,
    name: str,
    leaves: Mapping[str, Tensor],
    site: WeightSite | None,
    dropout: float,
) -> LowRank:
    blocks = config.take("use_bdlora", None, dict)
    a, b = _pair(config.where, path, leaves, "lora_A.weight", "lora_B.weight", not blocks)
    if config.take("use_qalora", False):
        a = _pooled(config, path, a, site)
    magnitude = leaves.get("lora_magnitude_vector", leaves.get("lora_magnitude_vector.weight"))
    if isinstance(site, ExpertsSite):
        rank = a.shape[0] // site.experts
        a, b = _experts(config, path, a, b, site)
        return LowRank(name, a, b, scales.of(name, rank))  # told by parameter, not by module
    if blocks and isinstance(site, LinearSite):
        a, b = _blocks(config, path, a, b, site, int(blocks.get("nblocks", 1)))
    rank = a.shape[0]
    a, b = a.flatten(1), b.flatten(1)
    if isinstance(site, ConvSite) and site.groups > 1:
        b = b.unflatten(0, (site.groups, -1))  # a reads the channels of all groups
    magnitude = None if magnitude is None else magnitude.flatten()
    scale = scales.of(path, rank) * (TWICE if path.endswith(".base_layer.out_proj") else 1)
    return LowRank(name, a, b, scale, magnitude, False, dropout)


def _lookup(scales: _Scales, path: str, name: str, leaves: Mapping[str, Tensor]) -> LowRank:
    a, b = _pair(scales.where, path, leaves, "lora_embedding_A", "lora_embedding_B")
    magnitude = leaves.get("lora_magnitude_vector", leaves.get("lora_magnitude_vector.weight"))
    magnitude = None if magnitude is None else magnitude.flatten()
    return LowRank(name, a, b, scales.of(path, a.shape[0]), magnitude, True)


def _experts(
    config: Config, path: str, a: Tensor, b: Tensor, site: ExpertsSite
) -> tuple[Tensor, Tensor]:
    """`A [experts * rank, in]` by expert, `B [out, rank * experts]` by rank.

    Before PEFT 0.19 tensors stored `[experts, out, in]` were taken for `[experts, in, out]`.
    """
    require_first(site)
    first, second = a.unflatten(0, (site.experts, -1)), b.unflatten(1, (-1, site.experts))
    second = second.permute(2, 0, 1)
    swapped = not site.in_out and config.version < (0, 19)
    if swapped and config.version == (0,) and a.shape[1] == b.shape[0]:
        raise ArtifactError(
            f"{config.where}: nothing says which version of PEFT wrote {path}, and versions before "
            "0.19 mean the transpose. Add its peft_version to the config."
        )
    return (second.mT, first.mT) if swapped else (first, second)


def require_first(site: ExpertsSite) -> None:
    """Raises ArtifactError for a stack of which PEFT would take another axis for the experts."""
    if site.place:
        raise ArtifactError(
            f"{site.weight} has its experts along axis {site.place}, and PEFT counts them along "
            "the first: its factors are of other matrices. Save it with peftfx.save, or fold it."
        )


def _adalora(
    config: Config, scales: _Scales, path: str, name: str, leaves: Mapping[str, Tensor]
) -> LowRank:
    """`alpha / (ranknum + 1e-5) B (E A)`; the pruned ranks are gone from the file, and the number
    that divides is the one that training began with."""
    a, b = _pair(config.where, path, leaves, "lora_A", "lora_B")
    e = leaves.get("lora_E")
    if e is None or e.shape != (len(a), 1):
        raise ArtifactError(
            f"{config.where}: {path}.lora_E is missing, or has not one number a rank. Save the "
            "adapter again."
        )
    start = config.take("init_r", 12)
    alpha = resolved(scales.alphas, path, scales.alpha, config.where)
    return LowRank(name, a * e, b, float(alpha) / (start + 1e-5))


def _pooled(config: Config, path: str, a: Tensor, site: WeightSite | None) -> Tensor:
    """QA-LoRA's `A [rank, in / group]` on what all columns read: of means of groups, times their
    number. Beside a float layer PEFT leaves the option out, and has a plain A."""
    size = config.take("qalora_group_size", 16)
    if isinstance(site, LinearSite) and a.shape[1] == site.in_features:
        return a
    if not isinstance(site, LinearSite) or a.shape[1] * size != site.in_features:
        raise BaseMismatchError(
            f"{config.where}: {path} has lora_A {list(a.shape)}, which does not read its inputs in "
            f"groups of qalora_group_size={size}. Use the base that the adapter was trained on."
        )
    return a.repeat_interleave(size, 1) * (a.shape[1] / size)


def _blocks(
    config: Config, path: str, a: Tensor, b: Tensor, site: LinearSite, count: int
) -> tuple[Tensor, Tensor]:
    """Block-diagonal factors (BD-LoRA), stored block below block, as whole ones."""
    if a.shape[1] * count == site.in_features and count > 1:
        a = torch.block_diag(*a.chunk(count))
    elif b.shape[1] * count == a.shape[0] and count > 1:
        b = torch.block_diag(*b.chunk(count))
    if a.shape[1] != site.in_features or b.shape[1] != a.shape[0]:
        raise ArtifactError(
            f"{config.where}: {path} has factors {list(a.shape)} and {list(b.shape)}, which are no "
            f"{count} blocks. Save the adapter again."
        )
    return a, b


def _dense(config: Config, program: Base, part: LowRank, option: str) -> Tensor:
    """The base's weight `[out, in]` in float32, of a plain adapter of a linear.

    Raises:
        ArtifactError: it is none.
    """
    weight = values(program, part.target, f"{config.where}: {option}")
    stored = program.tensors.stored(part.target)
    sites = [s for s in program.sites.by_weight.get(stored, []) if isinstance(s, LinearSite)]
    if not sites or part.magnitude is not None:
        raise ArtifactError(
            f"{config.where}: {option} is read for plain factors of linears, and {part.target} has "
            "others. Convert it where it was trained."
        )
    return (weight.mT if sites[0].in_out else weight).float()


def _truncated(
    config: Config, program: Base, part: LowRank, leaves: Mapping[str, Tensor]
) -> LowRank:
    """KaSA: `s B diag(d) A` beside a base that lost its smallest singular triples, as many as the
    rank: the change against the untouched base, of twice the rank."""
    dense = _dense(config, program, part, "kasa_config")
    u, s, v = torch.linalg.svd(dense, full_matrices=False)
    rank = part.a.shape[0]
    if "lora_diag" not in leaves or rank >= len(s):
        raise ArtifactError(f"{config.where}: {part.target} has no lora_diag, or too high a rank.")
    a = torch.cat([part.a.float(), v[-rank:]])
    b = torch.cat([part.b.float() * leaves["lora_diag"], -u[:, -rank:] * s[-rank:] / part.scale], 1)
    return replace(part, a=a, b=b)


def _invoked(config: Config, part: LowRank, tokens: list[Any]) -> Invoked:
    """aLoRA: the adapter acts from the last place on where these tokens stand."""
    if not all(type(t) is int for t in tokens) or part.magnitude is not None or part.lookup:
        raise ArtifactError(
            f"{config.where}: alora_invocation_tokens={tokens!r} are read as whole numbers, with "
            f"plain factors of linears; {part.target} has others. Save it again with PEFT."
        )
    ids = torch.tensor(tokens)
    return Invoked(part.target, part.a, part.b, part.scale, ids, part.dropout)


_OTHER_BASES = {
    "pissa": " (of a decomposition by random vectors)", "corda": " (by its own calibration data)",
    "lora_ga": " (by its own gradients)", "loftq": " (the base quantised, by its own settings)",
}  # fmt: skip


def _residual(config: Config, program: Base, part: LowRank, start: str) -> LowRank:
    """The change against the untouched base, of an adapter that trained on what its first factors
    left of it: `s (B A - B0 A0)`, of twice the rank."""
    dense = _dense(config, program, part, f"init_lora_weights={start!r}")
    rank = part.a.shape[0]
    if start == "pissa":
        a, b = pissa(dense, rank, part.scale)
    elif start.lower() == "olora":
        a, b = olora(dense, rank)
    else:
        remedy = "Merge it there, and save the whole model"
        if start != "loftq":
            remedy = "Convert it there: save_pretrained(path_initial_model_for_weight_conversion=)"
        raise ArtifactError(
            f"{config.where}: with init_lora_weights={start!r} the adapter trained on another "
            f"base{_OTHER_BASES.get(start.partition('_niter')[0], '')}, which the file does not "
            f"hold. {remedy}."
        )
    own = torch.cat([part.a.float(), a]), torch.cat([part.b.float(), -b], 1)
    return replace(part, a=own[0], b=own[1])


def _stacked(
    program: Base, layers: Mapping[str, Any], config: Config
) -> dict[str, tuple[str, WeightSite | None]]:
    """Module path -> (parameter, one of its sites). Several parameters of one module
    (`target_parameters`) are wrapped in their order, the first innermost (`base_layer`)."""
    names = program.base.base_tensors().keys() | program.tensors.aliases.keys()
    targeted = config.take("target_parameters", [], list)
    plain_of = {path: re.sub(r"(^|\.)base_layer(?=\.|$)", "", path) for path in layers}
    nested = targeted or any(path != plain for path, plain in plain_of.items())
    if nested and snapshot(program).knows != "calls":
        raise BaseNeededError(
            f"{config.where}: it adapts parameters of experts or of nn.MultiheadAttention, whose "
            f"layout the files of a base do not say. {CAPTURE}"
        )
    stored = program.base.base_tensors()
    targets = [n for n in stored if any(n == t or n.endswith(f".{t}") for t in targeted)]
    chosen: dict[str, tuple[str, WeightSite | None]] = {}
    for path, plain in plain_of.items():
        name = _parameter(plain, names)
        wrapped = [n for n in targets if n.rpartition(".")[0] == plain]
        if wrapped:
            same = [p for p, inner in plain_of.items() if inner == plain]
            name = _wrapped(config, plain, wrapped, sorted(same, key=len, reverse=True), path)
        if name is None:
            raise no_module(config, plain, names)
        sites = program.sites.by_weight.get(program.tensors.stored(name), [None])
        chosen[path] = name, sites[-1]
    return chosen


def _wrapped(config: Config, module: str, names: list[str], paths: list[str], path: str) -> str:
    """The parameter of one of several wrappers around a module, innermost first."""
    if len(paths) != len(names):
        raise ArtifactError(
            f"{config.where}: {module} has adapters for {len(paths)} parameters, and the config "
            f"names {len(names)}: {', '.join(names)}."
        )
    if len(names) > 1 and {n.rpartition(".")[2] for n in names} != {"gate_up_proj", "down_proj"}:
        raise ArtifactError(
            f"{config.where}: {', '.join(names)} are wrapped in the order in which the model makes "
            "them, which a captured program does not know. Give each an adapter of its own."
        )
    return sorted(names, key=lambda n: n.endswith("down_proj"))[paths.index(path)]


def _parameter(path: str, names: Collection[str]) -> str | None:
    """The weight of a module; of `nn.MultiheadAttention` that of its three projections."""
    tried = (f"{path}.weight", f"{path}.in_proj_weight", path)
    return next((n for n in tried if n in names), None)
