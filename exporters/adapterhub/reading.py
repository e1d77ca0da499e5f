"""AdapterHub's tensors as parts.

PATH.adapters.NAME.adapter_down.0.weight     bottlenecks [rank, width]; with `ln_before`, the
                                             norm is `adapter_down.0` once more
PATH.loras.NAME.lora_A, .lora_B, .m.weight   LoRA [rank, in], [out, rank]; (IA)3's [out, 1]
...prefix_tunings.NAME.self_prefix...        prefixes of all layers, once a layer and once more
PATH.prefix_tuning.prefix_gates.NAME.weight  their gates
PATH.invertible_adapters.NAME.F.0.weight     the coupling where the stream begins
PATH.prompt_tuning.prompt_tunings.NAME.prompt_embedding.weight    rows behind the embeddings
PATH.shared_parameters.NAME.phm_rule         what Compacter's layers and VeRA's share
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rewriter.branches.bottleneck import ACTIVATIONS
from ...rewriter.edits.stream.hidden import post_norm
from ...rewriter.errors import ArtifactError
from ...rewriter.parts.parts import Bottleneck, Hypercomplex, Part, Prefix
from ...rewriter.program.sites import SublayerSite
from .config import INVERTIBLE, Options
from .hypercomplex import dense, factored
from .leaves import Leaves, needed, popped
from .places import LOCATIONS, Places, ordinal

_KINDS = (
    "adapters", "loras", "prefix_tunings", "prefix_gates", "shared_parameters",
    "adapter_fusion_layer", "invertible_adapters", "prompt_tunings",
)  # fmt: skip

_LEGACY = {
    f"{place}_text_{kind}_adapters": "adapters"
    for place in ("attention", "layer")
    for kind in ("task", "lang")
}
"""What modules were called by the first versions."""


@dataclass
class File:
    """A file's tensors by kind and module path.

    Attributes:
        where: its path, for errors.
        groups: kind -> module path -> what is below the adapter's name -> tensor.
    """

    where: str
    groups: dict[str, dict[str, Leaves]]

    def take(self, kind: str) -> dict[str, Leaves]:
        """All of one kind, which then counts as read."""
        return self.groups.pop(kind, {})

    def finish(self) -> None:
        """Raises ArtifactError for tensors that no config told to read."""
        for kind, paths in self.groups.items():
            path = next(iter(paths))
            raise ArtifactError(
                f"{self.where}: there are tensors of {kind} (first: {path}.{kind}), and the config "
                "says nothing of them. The files do not belong together; save the adapter again."
            )


def grouped(tensors: Mapping[str, Tensor], name: str, where: str) -> File:
    """The tensors by kind and path.

    Raises:
        ArtifactError: a key is of no kind that is known, or of another adapter.
    """
    pattern = re.compile(rf"(?:(.*)\.)?({'|'.join(_KINDS)})\.{re.escape(name)}\.(.+)")
    groups: dict[str, dict[str, Leaves]] = {}
    for key, tensor in tensors.items():
        today = ".".join(_LEGACY.get(p, p) for p in key.split("."))
        match = pattern.fullmatch(today)
        if match is None:
            raise ArtifactError(
                f"{where}: the key {key!r} belongs to no adapter called {name!r} of a kind that is "
                "read. The library would load nothing of it; rename the keys, or save it again."
            )
        path, kind, leaf = match[1] or "", match[2], match[3]
        groups.setdefault(kind, {}).setdefault(path, {})[leaf] = tensor
    return File(where, groups)


# Bottlenecks.


def bottlenecks(options: Options, file: File, places: Places) -> list[Part]:
    """Houlsby's, Pfeiffer's, parallel adapters and Compacter's."""
    plain = _plan(options, places)
    shared = {k: t for leaves in file.take("shared_parameters").values() for k, t in leaves.items()}
    learnt = options.take("scaling", float, int, str) in ("learned", "channel")
    parts: list[Part] = []
    for path, leaves in file.take("adapters").items():
        target = places.sublayer(path)
        here = f"{file.where}: {path}"
        part = factored(options, plain, dict(leaves), shared, here)
        part = part or _with_tensors(options, plain, dict(leaves), shared, here)
        if isinstance(part, Bottleneck) and learnt == (part.factor is None):
            raise options.refuse("scaling", f"{path} has {'no' if learnt else 'a'} learnt one")
        parts.append(replace(part, target=target))
    _require_places(options, parts, places)
    return parts


def _plan(options: Options, places: Places) -> Bottleneck:
    """All that the config says, with no tensors yet."""
    if options.take(INVERTIBLE, str, type(None)) not in (None, "nice"):
        raise options.refuse(INVERTIBLE, "the library's own forward fails with others than 'nice'")
    scale = options.take("scaling", float, int, str)
    if isinstance(scale, str) and scale not in ("learned", "channel"):
        raise options.refuse("scaling", "known are a number, 'learned' and 'channel'")
    reads, skips = _values(options, places)
    empty = torch.empty(0)
    return Bottleneck(
        "", empty, empty, activation=options.take_activation(), reads=reads, skips=skips,
        scale=1.0 if isinstance(scale, str) else float(scale),
        inside=bool(options.take("adapter_residual_before_ln", bool)) and reads != "residual",
        dropout=float(options.take("dropout", float, int)),
    )  # fmt: skip


def _values(options: Options, places: Places) -> tuple[str, str]:
    """What the adapter reads, and what it skips to."""
    normed, summed = (options.take(f"original_ln_{k}", bool) for k in ("before", "after"))
    residual = options.take("residual_before_ln", bool, str)
    if options.take("is_parallel", bool):
        if not summed:
            raise options.refuse("original_ln_after", "a parallel adapter would lose the stream")
        return "residual", "output"
    if not isinstance(residual, bool):
        raise options.refuse("residual_before_ln", "the stream would be added twice")
    if not summed:  # the sum is the adapter's own skip, and no norm follows
        if not normed or residual or _post_norm(places):
            raise options.refuse("original_ln_after", "the stream would lose a sum or a norm")
        return "stream", "output"
    return ("stream" if normed else "output"), ("stream" if normed and not residual else "output")


def _post_norm(places: Places) -> bool:
    """Whether the program norms its stream behind sublayers."""
    nodes = {n.name: n for n in places.program.module.graph.nodes}
    sublayers = (s for s in places.program.sites if isinstance(s, SublayerSite))
    return any(post_norm(nodes[s.nodes[1]]) for s in sublayers)


def _with_tensors(
    options: Options, part: Bottleneck, leaves: Leaves, shared: Leaves, where: str
) -> Bottleneck:
    before = options.take("ln_before", bool)
    after = options.take("ln_after", bool)
    wanted: Leaves = {}
    norms = {"adapter_norm_before": "before", "adapter_norm_after": "after"}
    for module, side in norms.items():
        for leaf in ("weight", "bias") if (before if side == "before" else after) else ():
            wanted[f"{side}_{leaf}"] = popped(leaves, f"{module}.{leaf}", where)
    for leaf in ("weight", "bias") if before else ():
        if not torch.equal(
            popped(leaves, f"adapter_down.0.{leaf}", where), wanted[f"before_{leaf}"]
        ):
            raise ArtifactError(f"{where}: the norm before is there twice, with other values.")
    for name, module in (("down", f"adapter_down.{int(before)}"), ("up", "adapter_up")):
        whole = options.take("phm_layer", bool)
        read = dense if whole else _linear
        matrix, bias = read(options, leaves, shared, module, name, where)
        wanted[name] = matrix
        wanted |= {} if bias is None else {f"{name}_bias": bias}
    if "scaling" in leaves:
        wanted["factor"] = leaves.pop("scaling")
    if options.take("use_gating", bool):
        wanted |= gate_leaves(leaves, "gate.", where)
    if leaves:
        raise ArtifactError(f"{where}: the key ...{next(iter(leaves))!r} is not understood.")
    return replace(part, **wanted)


def _linear(
    options: Options, leaves: Leaves, shared: Leaves, module: str, name: str, where: str
) -> tuple[Tensor, Tensor | None]:
    return popped(leaves, f"{module}.weight", where), popped(leaves, f"{module}.bias", where)


def _require_places(options: Options, parts: list[Part], places: Places) -> None:
    """Raises ArtifactError where the sublayers with adapters, or their sizes, are not as said."""
    roles = {places.role(p.target) for p in parts}
    for key, role in (
        ("mh_adapter", "o"),
        ("output_adapter", "ffn.down"),
        ("cross_adapter", "cross"),
    ):
        said = options.take(key, bool)
        if said != (role in roles) and (role != "cross" or role in roles):
            raise ArtifactError(
                f"{options.where}: {key} is {said}, and the file has {'no' if said else ''} such "
                "adapters. The files do not belong together; save the adapter again."
            )
    factors = options.take("reduction_factor", float, int, dict)
    for part in parts:
        if not isinstance(part, Bottleneck | Hypercomplex):
            continue
        layer, width = str(places.layer(part.target)), part.width
        factor = (
            factors.get(layer, factors.get("default")) if isinstance(factors, dict) else factors
        )
        rank = max(int(width // float(factor or 1)), 1)
        if factor is None or rank != part.rank:
            raise ArtifactError(
                f"{options.where}: reduction_factor={factor} makes {rank} of {width} features, and "
                f"the adapter behind {part.target} has {part.rank}. The files do not belong "
                "together; save the adapter again."
            )


# Prefixes.


def prefixes(options: Options, file: File, places: Places) -> list[Part]:
    """Rows of all layers in one tensor, or from an embedding through two linears.

    In models with biases by distance the library counts the rows among the keys and not among the
    queries, so that all keys move away.
    """
    relative = any(s.kind == "embedding" and s.role == "relative" for s in places.program.sites)
    length = options.take("prefix_length", int)
    left_out = options.take("leave_out", list)
    if relative and left_out:
        raise options.refuse("leave_out", "layers share biases by distance, with rows or without")
    dropout = options.take("dropout", float, int)
    options.take("flat", bool)
    gated = options.take("use_gating", bool)
    if gated and not options.take("shared_gating", bool):
        raise options.refuse("shared_gating", "keys and values have one gate here")
    if dropout:
        raise options.refuse("dropout", "rows of prefixes are not dropped in training here")
    gates = {
        places.attention(path.removesuffix(".prefix_tuning")).id: gate_leaves(
            leaves, "", file.where
        )
        for path, leaves in file.take("prefix_gates").items()
    }
    pool = _once(file)
    parts: list[Part] = []
    for location in LOCATIONS:
        own = {k.partition(".")[2]: t for k, t in pool.items() if k.startswith(f"{location}.")}
        if not own:
            continue
        sites = places.located(location, left_out)
        rows = _rows(options, own, f"{file.where}: {location}")
        heads = {s.kv_heads for s in sites}
        if len(heads) != 1 or rows.numel() % (length * 2 * len(sites) * max(heads)):
            raise ArtifactError(
                f"{file.where}: {location} has {rows.numel()} numbers, which is not {length} rows "
                f"of {len(sites)} attentions with {sorted(heads)} heads. Use the base that it was "
                "trained on."
            )
        stack = rows.reshape(length, len(sites), 2, max(heads), -1)
        for i, site in enumerate(sites):
            place = "cross" if site.cross else "own"
            part = Prefix(
                "", stack[:, i, 0], stack[:, i, 1], ordinal(places.program, site), False, place,
                keys_moved=relative,
            )  # fmt: skip
            parts.append(replace(part, **gates.pop(site.id)) if gated else part)
    if gates:
        raise ArtifactError(f"{file.where}: there is a gate at {next(iter(gates))}, and no prefix.")
    return parts


def _once(file: File) -> Leaves:
    """The pool of prefixes, which is in the file once for each layer."""
    copies = list(file.take("prefix_tunings").values())
    for other in copies[1:]:
        same = other.keys() == copies[0].keys()
        if not same or any(not torch.equal(t, copies[0][k]) for k, t in other.items()):
            raise ArtifactError(
                f"{file.where}: the prefixes are in the file {len(copies)} times, with other "
                "values. Save the adapter again."
            )
    return dict(copies[0]) if copies else {}


def _rows(options: Options, own: Leaves, where: str) -> Tensor:
    """All rows, `[length, ...]` or flat; told by the tensors, since an ejected prefix says
    `flat: false`."""
    if "control_trans" in own:
        return own["control_trans"]
    activation = ACTIVATIONS[options.take_activation()]
    w1, b1, w2, b2 = (
        needed(own, f"control_trans.{i}.{leaf}", where).float()
        for i in (0, 2) for leaf in ("weight", "bias")
    )  # fmt: skip
    inner = activation(F.linear(needed(own, "wte.weight", where).float(), w1, b1))
    return F.linear(inner, w2, b2)


# Shared by all kinds.


def gate_leaves(leaves: Leaves, prefix: str, where: str) -> Leaves:
    """A gate's tensors, by the parts' names; they are taken out."""
    weight, bias = (popped(leaves, f"{prefix}{leaf}", where) for leaf in ("weight", "bias"))
    return {"gate": weight, "gate_bias": bias}
