"""Parts as AdapterHub's config and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...rewriter.api import Program
from ...rewriter.errors import NoFormError
from ...rewriter.parts.parts import (
    Bottleneck,
    Coupling,
    Hypercomplex,
    LowRank,
    Part,
    Prefix,
    Prompt,
    Scaling,
)
from ...rewriter.program.sites import LinearSite
from .config import (
    BOTTLENECK_DEFAULTS,
    INVERTIBLE,
    LORA_DEFAULTS,
    PREFIX_DEFAULTS,
    PROMPT_DEFAULTS,
)
from .embeddings import COUPLED, PLACES
from .hypercomplex import is_shared, leaves_of, options_of_parts, shared_tensors, style
from .places import (
    attention_path,
    attentions,
    blocks,
    location_of,
    sites_at,
    stack_path,
    sublayer_path,
    theirs,
)

Written = tuple[dict[str, Any], dict[str, Tensor]]
Behind = Bottleneck | Hypercomplex
"""What stands behind a sublayer."""

_READS = {
    ("output", "output"): {"original_ln_before": False},
    ("stream", "output"): {"original_ln_before": True},
    ("stream", "stream"): {"original_ln_before": True, "residual_before_ln": False},
    ("residual", "output"): {"original_ln_before": False, "is_parallel": True},
}
"""What an adapter reads and skips to -> options."""


def written(program: Program, parts: Sequence[Part], name: str) -> Written:
    """The config and the tensors by key, with an adapter's name in them.

    Raises:
        NoFormError: the library has no architecture that holds all of it.
    """
    kinds: dict[str, list[Any]] = {}
    for part in parts:
        kind = "bottleneck" if isinstance(part, Coupling | Hypercomplex) else part.kind
        kind = LowRank.kind if isinstance(part, LowRank) else kind
        kinds.setdefault(kind, []).append(part)
    odd = kinds.keys() - _WRITERS.keys()
    if odd or kinds.keys() >= {"lowrank", "scaling"}:
        raise NoFormError(
            f"AdapterHub has no form for {', '.join(sorted(odd or kinds))} in one adapter. Save it "
            "with peftfx.save, or write its adapters one by one."
        )
    configs: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for kind, own in kinds.items():
        config, more = _WRITERS[kind](program, own, name)
        configs.append(config)
        tensors |= more
    tensors = theirs(program, tensors)
    if len(configs) == 1:
        return configs[0], tensors
    return {"architecture": "union", "configs": configs}, tensors


# Bottlenecks.


def _bottlenecks(program: Program, parts: Sequence[Behind | Coupling], name: str) -> Written:
    """Adapters behind sublayers, the one where the stream begins, or both."""
    couplings = [p for p in parts if isinstance(p, Coupling)]
    behind = [p for p in parts if not isinstance(p, Coupling)]
    own = _behind(program, behind, name) if behind else (_NOWHERE, {})
    if not couplings:
        return own
    config, tensors = own
    coupling = couplings[0]
    if behind and coupling.activation != behind[0].activation:
        raise NoFormError(
            f"AdapterHub has one activation for an adapter, and here are {coupling.activation} at "
            f"the embeddings and {behind[0].activation} behind sublayers. Write two adapters."
        )
    path = f"{stack_path(program, coupling.target)}.invertible_adapters.{name}".lstrip(".")
    tensors = {f"{path}.{key}": getattr(coupling, n) for n, key in COUPLED.items()} | tensors
    half = coupling.second_down.shape[1]
    factor = _factor(half, len(coupling.second_down))
    more = {INVERTIBLE: "nice", "inv_adapter_reduction_factor": factor}
    return {**config, "non_linearity": coupling.activation, **more}, tensors


_NOWHERE = {
    **BOTTLENECK_DEFAULTS, "mh_adapter": False, "output_adapter": False, "reduction_factor": 16,
}  # fmt: skip
"""The config of no adapter behind any sublayer."""


def _behind(program: Program, parts: Sequence[Behind], name: str) -> Written:
    first = parts[0]
    if (first.reads, first.skips) not in _READS:
        raise NoFormError(
            f"AdapterHub has no adapter that reads the {first.reads} of a sublayer and skips to "
            f"its {first.skips}, as that behind {first.target} does. Choose reads=residual."
        )
    for part in parts:
        if _style(part) != _style(first):
            raise NoFormError(
                f"AdapterHub's adapters are alike at all places, and that behind {part.target} is "
                f"not as that behind {first.target}. Write them as adapters of their own."
            )
    factored = [p for p in parts if isinstance(p, Hypercomplex)]
    own_rules = bool(factored) and not is_shared(factored)
    tensors = shared_tensors(program, factored, name) if factored else {}
    for part in parts:
        path = f"{sublayer_path(program, part.target)}.{name}"
        named = leaves_of(part, own_rules) if isinstance(part, Hypercomplex) else _leaves(part)
        tensors |= {f"{path}.{leaf}": t for leaf, t in named.items()}
    more = options_of_parts(factored) if isinstance(first, Hypercomplex) else _options(first)
    config = {
        **BOTTLENECK_DEFAULTS, **_places(program, parts), **_READS[first.reads, first.skips],
        "non_linearity": first.activation, "scaling": first.scale, "dropout": first.dropout, **more,
    }  # fmt: skip
    return config, tensors


def _options(first: Bottleneck) -> dict[str, Any]:
    """What the config says of plain bottlenecks alone."""
    options = {
        "ln_before": first.before_weight is not None, "ln_after": first.after_weight is not None,
        "adapter_residual_before_ln": first.inside, "use_gating": first.gate is not None,
    }  # fmt: skip
    if first.factor is None:
        return options
    return {**options, "scaling": "learned" if first.factor.numel() == 1 else "channel"}


def _style(part: Behind) -> tuple[Any, ...]:
    if isinstance(part, Hypercomplex):
        return style(part)
    optional = (part.before_weight, part.after_weight, part.gate, part.down_bias, part.up_bias)
    factor = None if part.factor is None else part.factor.shape
    return (
        part.activation, part.scale, part.reads, part.skips, part.inside, part.dropout, factor,
        *(t is None for t in optional),
    )  # fmt: skip


def _leaves(part: Bottleneck) -> dict[str, Tensor]:
    place = int(part.before_weight is not None)
    named = {
        "scaling": part.factor,
        "adapter_norm_before.weight": part.before_weight,
        "adapter_norm_before.bias": part.before_bias,
        "adapter_down.0.weight": part.before_weight,
        "adapter_down.0.bias": part.before_bias,
        f"adapter_down.{place}.weight": part.down,
        f"adapter_down.{place}.bias": _bias(part.down_bias, part.down),
        "adapter_up.weight": part.up,
        "adapter_up.bias": _bias(part.up_bias, part.up),
        "adapter_norm_after.weight": part.after_weight,
        "adapter_norm_after.bias": part.after_bias,
        "gate.weight": part.gate,
        "gate.bias": part.gate_bias,
    }
    return {k: t for k, t in named.items() if t is not None}


def _bias(bias: Tensor | None, matrix: Tensor) -> Tensor:
    return matrix.new_zeros(len(matrix)) if bias is None else bias


def _places(program: Program, parts: Sequence[Behind]) -> dict[str, Any]:
    """Which sublayers of which blocks have adapters, and of which size."""
    every = blocks(program)
    roles: dict[int, set[str]] = {}
    ranks: dict[int, set[int]] = {}
    for part in parts:
        site = next(s for s in sites_at(program, part.target) if isinstance(s, LinearSite))
        index = every.index((site.stream, site.layer))
        roles.setdefault(index, set()).add("cross" if site.cross else site.role)
        ranks.setdefault(index, set()).add(part.rank)
    wanted = set[str]().union(*roles.values())
    decoders = {s.stream for s in attentions(program) if s.cross}
    for index, there in roles.items():
        has = wanted if every[index][0] in decoders else wanted - {"cross"}
        if there != has or len(ranks[index]) > 1:
            raise NoFormError(
                "AdapterHub puts adapters of one size behind the same sublayers of all blocks, "
                f"and block {index} has others. Leave whole blocks out, or write two adapters."
            )
    width = parts[0].width
    factors = {str(i): _factor(width, *r) for i, r in sorted(ranks.items())}
    same = len(set(factors.values())) == 1
    return {
        "mh_adapter": "o" in wanted, "output_adapter": "ffn.down" in wanted,
        "cross_adapter": "cross" in wanted,
        "leave_out": [i for i in range(len(every)) if i not in roles],
        "reduction_factor": next(iter(factors.values())) if same else factors,
    }  # fmt: skip


def _factor(width: int, rank: int) -> float:
    """The reduction factor of which the library makes this rank: `int(width // factor)`."""
    exact = width / rank
    factor = exact if int(width // exact) == rank else width / (rank + 0.5)
    return int(factor) if factor == int(factor) else factor


# Weights.


def _low_rank(program: Program, parts: Sequence[LowRank], name: str) -> Written:
    gated, dora = (len({getattr(p, k) is None for p in parts}) for k in ("gate", "magnitude"))
    if gated > 1 or dora > 1 or any(p.lookup or p.a.dim() != 2 for p in parts):
        raise NoFormError(
            "AdapterHub's LoRA is alike at all weights, which are linears: with gates or without, "
            "with magnitudes or without. Write others as adapters of their own."
        )
    first, rank = parts[0], max(len(p.a) for p in parts)
    equal = len({p.scale for p in parts}) == 1 and first.gate is None
    scale = first.scale if equal and first.magnitude is None else 1.0
    tensors: dict[str, Tensor] = {}
    for part in parts:
        own = _padded(part, rank, part.scale / scale)
        fused = _fused(program, part.target)
        leaves = {"lora_A": own.a.repeat(3, 1) if fused else own.a, "lora_B": own.b}
        if part.magnitude is not None:
            _require_no_bias(program, part)
            leaves["m.weight"] = part.magnitude[:, None]
        if part.gate is not None and part.gate_bias is not None:
            leaves |= {"gate.weight": part.gate, "gate.bias": part.gate_bias}
        path = f"{part.target.removesuffix('.weight')}.loras.{name}"
        tensors |= {f"{path}.{leaf}": t for leaf, t in leaves.items()}
    config = {
        **LORA_DEFAULTS, **_matrices(program, parts), "r": rank, "alpha": scale * rank,
        "dropout": max(p.dropout for p in parts), "use_gating": first.gate is not None,
        "use_dora": first.magnitude is not None,
    }  # fmt: skip
    return config, tensors


def _padded(part: LowRank, rank: int, scale: float) -> LowRank:
    """With as many ranks, the further ones zero, and a scale in `b`."""
    more = rank - len(part.a)
    a = torch.cat([part.a, part.a.new_zeros(more, part.a.shape[1])]) if more else part.a
    b = torch.cat([part.b, part.b.new_zeros(len(part.b), more)], 1) if more else part.b
    return replace(part, a=a, b=b if scale == 1 else b * scale)


def _require_no_bias(program: Program, part: LowRank) -> None:
    if any(s.bias is not None for s in sites_at(program, part.target)):
        raise NoFormError(
            f"{part.target}: AdapterHub's DoRA scales the layer's bias, too, and this one does "
            "not. Fold it, or write it with save_peft."
        )


def _scalings(program: Program, parts: Sequence[Scaling], name: str) -> Written:
    tensors: dict[str, Tensor] = {}
    for part in parts:
        if part.side == "in":
            raise NoFormError(
                f"{part.target}: AdapterHub's (IA)3 scales what layers give, and this one what "
                "they read. Insert it with where=k|v, or fold it."
            )
        _fused(program, part.target)
        tensors[f"{part.target.removesuffix('.weight')}.loras.{name}.lora_B"] = part.vector[:, None]
    own = {"composition_mode": "scale", "init_weights": "ia3", "r": 1, "alpha": 1}
    return {**LORA_DEFAULTS, **_matrices(program, parts), **own}, tensors


def _fused(program: Program, target: str) -> bool:
    """Whether a weight is the projections of q, k and v in this order, one third each.

    Raises:
        NoFormError: it is fused in another way.
    """
    sites = [s for s in sites_at(program, target) if s.features is not None]
    if not sites:
        return False
    roles = [(s.role, s.features) for s in sites]
    third = sum(len(f or ()) for _, f in roles) // 3
    ordered = [(r, tuple(range(i * third, (i + 1) * third))) for i, r in enumerate("qkv")]
    if roles != ordered:
        raise NoFormError(
            f"{target} is fused in a way that AdapterHub has no LoRA for. Fold it, or write it "
            "with save_peft."
        )
    return True


def _matrices(program: Program, parts: Sequence[Part]) -> dict[str, Any]:
    """Which matrices the library shall give an adapter. It calls a feed-forward's matrices by other
    names in some models, so both of them get one where one has it: the other's changes nothing."""
    roles = {s.role for p in parts for s in sites_at(program, p.target)}
    if other := roles - {"q", "k", "v", "ffn.up", "ffn.down"}:
        raise NoFormError(
            f"AdapterHub adapts q, k, v and the feed-forward's up and down, not {min(other)}. "
            "Write it with save_peft."
        )
    feedforward = bool(roles & {"ffn.up", "ffn.down"})
    return {
        "attn_matrices": [r for r in "qkv" if r in roles], "selfattn_lora": bool(roles & {*"qkv"}),
        "intermediate_lora": feedforward, "output_lora": feedforward,
    }  # fmt: skip


# Prefixes.


def _prefixes(program: Program, parts: Sequence[Prefix], name: str) -> Written:
    lengths = {len(p.key) for p in parts}
    gates = {p.gate is None for p in parts}
    sites = {(p.place == "cross", p.layer): p for p in parts}
    every = attentions(program)
    left_out: set[int] = set()
    rows: dict[str, list[Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    counts = {False: 0, True: 0}
    for site in every:
        part = sites.get((site.cross, counts[site.cross]))
        counts[site.cross] += 1
        if part is None:
            left_out.add(blocks(program).index((site.stream, site.layer)))
            continue
        rows.setdefault(location_of(program, site), []).extend((part.key, part.value))
        if part.gate is not None and part.gate_bias is not None:
            path = f"{attention_path(site)}.prefix_tuning.prefix_gates.{name}"
            tensors |= {f"{path}.weight": part.gate, f"{path}.bias": part.gate_bias}
    whole = sum(len(r) for r in rows.values()) == 2 * sum(
        blocks(program).index((s.stream, s.layer)) not in left_out for s in every
    )
    if len(lengths) > 1 or len(gates) > 1 or not whole or any(p.shifted for p in parts):
        raise NoFormError(
            "AdapterHub's prefixes are at all attentions of a block, of one length, and do not "
            "move positions; this one is not so. Insert it with prefix_tuning{where=attention}."
        )
    relative = any(s.kind == "embedding" and s.role == "relative" for s in program.sites)
    if any(p.keys_moved != relative for p in parts):
        raise NoFormError(
            "AdapterHub moves the relative positions of keys behind a prefix, and prefixes here do "
            "not. Save it with peftfx.save."
        )
    for site in every:
        for location, each in rows.items():
            flat = torch.stack(each, 1).flatten()
            path = f"{attention_path(site)}.prefix_tuning.pool.prefix_tunings.{name}.{location}"
            tensors[f"{path}.control_trans"] = flat
    config = {
        **PREFIX_DEFAULTS, "flat": True, "prefix_length": max(lengths),
        "leave_out": sorted(left_out), "use_gating": False in gates,
    }  # fmt: skip
    return config, tensors


def _prompts(program: Program, parts: Sequence[Prompt], name: str) -> Written:
    """Rows where the stream begins."""
    (part, *more) = parts
    combine = next((c for c, place in PLACES.items() if place == part.place), None)
    if combine is None or more:
        raise NoFormError(
            "AdapterHub's prompt is one, behind the position embeddings and their norm, and this "
            "one stands in front of them. Write it with save_peft."
        )
    path = f"{stack_path(program, part.target)}.prompt_tuning.prompt_tunings.{name}".lstrip(".")
    config = {**PROMPT_DEFAULTS, "prompt_length": len(part.values), "combine": combine}
    return config, {f"{path}.prompt_embedding.weight": part.values}


_WRITERS: Mapping[str, Callable[[Program, Sequence[Any], str], Written]] = {
    "bottleneck": _bottlenecks, "lowrank": _low_rank, "scaling": _scalings, "prefix": _prefixes,
    "prompt": _prompts,
}  # fmt: skip
