"""Parts as PEFT's tensors and config."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...rewriter.errors import NoFormError
from ...rewriter.parts.formula_parts import Formula
from ...rewriter.parts.parts import Invoked, LowRank, Part, Rows, Scaling, Trained
from ...rewriter.program.sites import (
    ConvSite,
    EmbeddingSite,
    ExpertsSite,
    LinearSite,
    NormSite,
    WeightSite,
)
from ...rewriter.storage.parts import Parts
from ..base import Base, snapshot
from .config import PREFIX, resolved
from .lora import TWICE, require_first
from .products import Module, written_products
from .shared import modules_of, shared_form
from .soft_prompts import Written, prefix, prompt

_HEADS = {
    **dict.fromkeys(("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")),
    "QUESTION_ANS": ("qa_outputs",),
}

_HEADED = ("LORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT")
"""Types whose adapters of a task hold its head."""

VERSION = "0.21.2"
"""Of PEFT, whose keys these are."""


def written(program: Base, parts: Parts) -> Written:
    """The config and the tensors by key.

    Raises:
        NoFormError: PEFT has no type that holds all of it.
    """
    kinds = {LowRank.kind if isinstance(p, LowRank) else p.kind for p in parts.parts} - {"trained"}
    trained = [p for p in parts.parts if isinstance(p, Trained)]
    if kinds == {"invoked"}:
        return _invoked(program, parts)
    if (native := shared_form(program, parts.parts)) is not None:
        config, tensors = native
        config["target_modules"] = target_modules(program, modules_of(parts.parts))
    elif "lowrank" in kinds and kinds <= {"lowrank", "rows"}:
        config, tensors = _lora(program, parts.parts, trained)
    elif kinds == {"scaling"}:
        config, tensors = _ia3(program, parts.parts)
    elif kinds == {"rows"} and not trained and len(parts.parts) == 1:
        config, tensors = _tokens(parts.parts)
    elif len(kinds) == 1 and any(isinstance(p, Formula) for p in parts.parts):
        config, tensors = _products(program, parts.parts, trained)
    elif kinds == {"prompt"} and len(parts.parts) == 1:
        config, tensors = prompt(parts.parts)
    elif kinds == {"prefix"}:
        config, tensors = prefix(parts.parts)
    elif not kinds and (norms := _norms(program, trained)) is not None:
        return norms
    else:
        remedy = (
            "Give it a rank (--rank), and be told what that loses, or save it whole (--to peftfx)."
            if kinds & {"change"} and kinds <= {"change", "lowrank"}
            else "Save it with peftfx.save, or write its adapters one by one."
        )
        raise NoFormError(
            f"no type of PEFT holds {', '.join(sorted(kinds)) or 'only whole parameters'} in one "
            f"adapter. {remedy}"
        )
    saved, keys = _modules_to_save(program, trained, config)
    level = "base_model." if kinds & {"prompt", "prefix"} else PREFIX
    tensors |= {f"{level}{k}": t for k, t in keys.items()}
    return config | ({"modules_to_save": saved} if saved else {}), tensors


def _invoked(program: Base, parts: Parts) -> Written:
    invoked = [p for p in parts.parts if isinstance(p, Invoked)]
    plain = (LowRank(p.target, p.a, p.b, p.scale, dropout=p.dropout) for p in invoked)
    others = (p for p in parts.parts if not isinstance(p, Invoked))
    config, tensors = written(program, replace(parts, parts=(*plain, *others)))
    return config | {"alora_invocation_tokens": invoked[0].ids.tolist()}, tensors


def _lora(program: Base, parts: Sequence[Part], trained: Sequence[Trained]) -> Written:
    low = [p for p in parts if isinstance(p, LowRank)]
    if len({p.magnitude is None for p in low}) > 1:
        said = "PEFT has magnitudes at all modules of an adapter or at none; this has both."
        raise NoFormError(said)
    sites = [_site(program, p) for p in low]
    experts = [p.target for p, s in zip(low, sites, strict=True) if s.kind == "experts"]
    stacks = _nested(program, experts)
    packed = ".in_proj_weight"
    attention = {p.target.removesuffix(packed) for p in low if p.target.endswith(packed)}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for part, site in zip(low, sites, strict=True):
        path = stacks.get(part.target) or _path(part.target, attention)
        tensors |= {f"{PREFIX}{path}.{leaf}": t for leaf, t in _leaves(part, site).items()}
        wrapped = part.target in stacks
        plain = part.target if wrapped else re.sub(r"\.base_layer(?=\.|$)", "", path)
        ranks[plain] = part.a.shape[-2]
        scales[plain] = part.scale / (TWICE if path.endswith(".base_layer.out_proj") else 1)
    modules = [m for m in ranks if m not in stacks and not _inside(m, attention)]
    config: dict[str, Any] = {
        "peft_type": "LORA", "target_modules": target_modules(program, modules),
        "lora_dropout": max(p.dropout for p in low), "use_dora": low[0].magnitude is not None,
        **patterns(ranks, scales),
    }  # fmt: skip
    if stacks:
        config["target_parameters"] = sorted(stacks)
        config["target_modules"] = config["target_modules"] or []
    if all(isinstance(s, LinearSite) and s.in_out for s in sites):
        config["fan_in_fan_out"] = True
    for more in (_token_rows(parts), _biases(program, low, trained, ranks)):
        config |= more[0]
        tensors |= more[1]
    return config, tensors


def _inside(module: str, attention: Collection[str]) -> bool:
    """Whether it is the output of an attention that an adapter wraps as a whole."""
    return module not in attention and module.rpartition(".out_proj")[0] in attention


def _token_rows(parts: Sequence[Part]) -> Written:
    """Rows of embeddings that train."""
    rows = {p.target.removesuffix(".weight"): p for p in parts if isinstance(p, Rows)}
    if not rows:
        return {}, {}
    leaf = "token_adapter.trainable_tokens_delta"
    config = {"trainable_token_indices": {n: p.ids.tolist() for n, p in rows.items()}}
    return config, {f"{PREFIX}{n}.{leaf}": p.values for n, p in rows.items()}


def _biases(
    program: Base, low: Sequence[LowRank], trained: Sequence[Trained], ranks: Collection[str]
) -> Written:
    """Biases beside the factors: those that the model lacks are those of `lora_B`."""
    config: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    added = {t.target: t.values for t in trained if _is_added(program, t.target)}
    if added:  # PEFT gives lora_B of all modules a bias, or of none
        config["lora_bias"] = True
        for part in low:
            zero = part.b.new_zeros(part.b.shape[0])
            bias = added.get(part.target.removesuffix("weight") + "bias", zero) / part.scale
            tensors[f"{PREFIX}{part.target.removesuffix('weight')}lora_B.bias"] = bias
    biases = [n for n in _lone_biases(trained) if n not in added]
    if biases:
        own = {b.removesuffix(".bias") for b in biases} <= set(ranks)
        config["bias"] = "lora_only" if own else "all"
    return config, tensors


def _lone_biases(trained: Iterable[Trained]) -> list[str]:
    """The biases that train where the rest of their module does not."""
    names = [t.target for t in trained]
    whole = {n.rpartition(".")[0] for n in names if not n.endswith(".bias")}
    return [n for n in names if n.endswith(".bias") and n.rpartition(".")[0] not in whole]


def _is_added(program: Base, name: str) -> bool:
    """Whether it is a bias that the model does not have."""
    base = program.base.base_tensors()
    weight = program.tensors.stored(f"{name.removesuffix('bias')}weight")
    return name.endswith("bias") and name not in base and weight in base


def _site(program: Base, part: Part) -> WeightSite:
    stored, lookup = program.tensors.stored(part.target), getattr(part, "lookup", False)
    for site in program.sites.by_weight.get(stored, []):
        if isinstance(site, EmbeddingSite) == lookup:
            return site
    raise NoFormError(f"no call of this model reads {part.target!r} as the adapter does.")


def _path(name: str, attention: Collection[str]) -> str:
    if name.endswith(".in_proj_weight"):
        return name.removesuffix(".in_proj_weight")
    path = name.removesuffix(".weight")
    owner, _, last = path.rpartition(".")
    return f"{owner}.base_layer.{last}" if last == "out_proj" and owner in attention else path


def _nested(program: Base, names: Collection[str]) -> dict[str, str]:
    """Parameter -> path of its wrapper: the first one of a module is innermost."""
    order = sorted(names, key=lambda n: n.endswith("down_proj"))
    paths: dict[str, str] = {}
    for name in order:
        module = name.rpartition(".")[0]
        outer = sum(n.rpartition(".")[0] == module for n in order[order.index(name) + 1 :])
        paths[name] = module + ".base_layer" * outer
    return paths


def _leaves(part: LowRank, site: WeightSite) -> dict[str, Tensor]:
    """The tensors of one site, by what PEFT calls them."""
    a, b = part.a, part.b
    if isinstance(site, EmbeddingSite):
        leaves = {"lora_embedding_A": a, "lora_embedding_B": b}
    elif isinstance(site, ExpertsSite):
        require_first(site)
        leaves = {"lora_A.weight": a.flatten(0, 1), "lora_B.weight": b.permute(1, 2, 0).flatten(1)}
    elif isinstance(site, ConvSite):
        if site.transposed:
            raise NoFormError(
                f"{part.target}: PEFT has no LoRA of transposed convolutions. Fold it, or save it "
                "with peftfx.save."
            )
        if a.dim() > 2:
            raise NoFormError(
                f"{part.target}: PEFT's factors read all groups of a convolution, and these one "
                "each, as the convolution does. Fold them, or write plain tensors."
            )
        b = b.reshape(-1, b.shape[-1])
        ones = [1 for _ in site.kernel]
        leaves = {
            "lora_A.weight": a.unflatten(1, (-1, *site.kernel)),
            "lora_B.weight": b.view(*b.shape, *ones),
        }
    else:
        leaves = {"lora_A.weight": a, "lora_B.weight": b}
    if part.magnitude is not None:
        shape = (1, -1, *(1 for _ in site.kernel)) if isinstance(site, ConvSite) else (-1,)
        leaves["lora_magnitude_vector"] = part.magnitude.reshape(shape)
    return leaves


def patterns(ranks: Mapping[str, int], scales: Mapping[str, float]) -> dict[str, Any]:
    """`r`, `lora_alpha` and the patterns of the modules that have others."""
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    alphas = {m: _alpha(scales[m], r) for m, r in ranks.items()}
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    said: dict[str, Any] = {
        "r": rank, "lora_alpha": alpha,
        "rank_pattern": {re.escape(m): r for m, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {re.escape(m): a for m, a in sorted(alphas.items()) if a != alpha},
    }  # fmt: skip
    for wanted, key, default in ((ranks, "rank_pattern", rank), (alphas, "alpha_pattern", alpha)):
        for module, value in wanted.items():
            if resolved(said[key], module, default, key) != value:
                raise NoFormError(
                    f"PEFT's {key} cannot tell {module} from a module whose path ends like it. "
                    "Give both one rank and one alpha."
                )
    return said


def _alpha(scale: float, rank: int) -> float | int:
    """The alpha of which `alpha / rank` is the scale, to the last bit where there is one."""
    alpha = scale * rank
    near = [alpha, float(round(alpha))]
    exact = next((a for a in near if a / rank == scale), alpha)
    return int(exact) if exact == int(exact) else exact


def target_modules(program: Base, modules: Collection[str]) -> list[str] | str:
    """What makes PEFT adapt exactly these modules: last names, whole paths, or an expression."""
    every = {n.rpartition(".")[0] for n in program.base.base_tensors()} | set(modules)
    every |= {n.rpartition(".")[0] for n in program.tensors.aliases}
    if snapshot(program).knows == "sizes":  # which other modules there are is not known
        return sorted(modules)
    for names in (sorted({m.rpartition(".")[2] for m in modules}), sorted(modules)):
        taken = {m for m in every if any(m == n or m.endswith(f".{n}") for n in names)}
        if taken == set(modules):
            return names
    return "|".join(re.escape(m) for m in sorted(modules))


def _products(program: Base, parts: Sequence[Part], trained: Sequence[Trained]) -> Written:
    """LOHA, LOKR, OFT or BOFT."""
    modules = [
        Module(p.target.removesuffix(".weight"), p, _site(program, p))
        for p in parts
        if isinstance(p, Formula)
    ]
    config, tensors = written_products(modules, patterns)
    targets = [m.path for m in modules]
    config["target_modules"] = target_modules(program, targets)
    if biases := _lone_biases(trained):
        own = {b.removesuffix(".bias") for b in biases} <= set(targets)
        config["bias"] = f"{config['peft_type'].lower()}_only" if own else "all"
    return config, {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}


def _ia3(program: Base, parts: Sequence[Part]) -> Written:
    tensors: dict[str, Tensor] = {}
    sides: dict[str, str] = {}
    for part in parts:
        if isinstance(part, Scaling):
            path = part.target.removesuffix(".weight")
            if path in sides:
                raise NoFormError(f"PEFT scales inputs or outputs of {path}, not both.")
            sides[path] = part.side
            shape = (1, -1) if part.side == "in" else (-1, 1)
            tensors[f"{PREFIX}{path}.ia3_l"] = part.vector.view(shape)
    inputs = [m for m, side in sides.items() if side == "in"]
    config = {
        "peft_type": "IA3",
        "target_modules": target_modules(program, sides),
        "feedforward_modules": target_modules(program, inputs) if inputs else [],
    }
    return config, tensors


def _tokens(parts: Sequence[Part]) -> Written:
    (part,) = parts
    if not isinstance(part, Rows):
        raise NoFormError(f"{part.kind} is no table of rows.")
    path = part.target.removesuffix(".weight")
    config = {
        "peft_type": "TRAINABLE_TOKENS", "token_indices": part.ids.tolist(),
        "target_modules": [path],
    }  # fmt: skip
    return config, {f"{PREFIX}{path}.trainable_tokens_delta": part.values}


def _norms(program: Base, trained: Sequence[Trained]) -> Written | None:
    """LN_TUNING, if all that trains are normalisations."""
    modules = {t.target.rpartition(".")[0] for t in trained}
    known = {s.weight.rpartition(".")[0] for s in program.sites if isinstance(s, NormSite)}
    if not modules or not modules <= known:
        return None
    given = {t.target: t.values for t in trained}
    tensors: dict[str, Tensor] = {}
    for name, tensor in program.base.base_tensors().items():
        module, _, leaf = name.rpartition(".")
        if module in modules:
            key = f"{PREFIX}{module}.ln_tuning_layers.{leaf}"
            tensors[key] = given.get(name, tensor.detach())
    return {"peft_type": "LN_TUNING", "target_modules": target_modules(program, modules)}, tensors


def _modules_to_save(
    program: Base, trained: Iterable[Trained], config: Mapping[str, Any]
) -> tuple[list[str], dict[str, Tensor]]:
    """Modules that are saved whole, and tensors by key; biases beside factors need no module."""
    given = {t.target: t.values for t in trained if not _is_added(program, t.target)}
    if config.get("bias", "none") != "none":
        keys: dict[str, Tensor] = {}
        for name in [n for n in _lone_biases(trained) if n in given]:
            path = name.removesuffix(".bias")
            inner = f"{path}.base_layer.bias" if _adapted(path, config) else name
            keys[inner] = given.pop(name)
    else:
        keys = {}
    modules = sorted({n.rpartition(".")[0] for n in given})
    base = program.base.base_tensors()
    for module in modules:
        for name, tensor in base.items():
            if name.rpartition(".")[0] == module:
                keys[name] = given.get(name, tensor.detach())
    return modules, keys


def with_head(
    program: Base, config: dict[str, Any], tensors: dict[str, Tensor], task: str | None
) -> Written:
    """With the modules that PEFT looks for in the file of every adapter of a task."""
    names = _HEADS.get(task or "", ())
    saved: list[str] = list(config.get("modules_to_save") or ())
    missing: dict[str, Tensor] = {}
    for name, tensor in program.base.base_tensors().items():
        module, key = name.rpartition(".")[0], f"{PREFIX}{name}"
        wanted = module.rpartition(".")[2] in names and not _adapted(module, config)
        if wanted and key not in tensors:
            missing[key] = tensor.detach()
            saved.append(module)
    if not missing or config["peft_type"] not in _HEADED:
        return config, tensors
    return config | {"modules_to_save": sorted(set(saved))}, missing | tensors


def _adapted(path: str, config: Mapping[str, Any]) -> bool:
    targets: Any = config.get("target_modules") or []
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == t or path.endswith(f".{t}") for t in targets)
