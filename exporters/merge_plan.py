"""Of which tensors each tensor of a merge is made.

Models are merged whole, or layers are stacked: layer n of the result is made of one layer of each
source of its slice. What belongs to no layer is made by the first slice if it embeds tokens or
positions, else by the last one, as mergekit does it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..rewriter.errors import OptionError, WeightsError
from ..rewriter.files.files import JSON_LIMIT, parse_json, read_file
from ..rewriter.storage.safetensors_checkpoint import Checkpoint
from .base import tied_names
from .mergekit import LAYER, Config, Slice, places

_EMBEDS = re.compile(r"emb|\bw[tp]e\b")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What configurations call the number of layers."""
_BY_LAYER = ("layer_types", "no_rope_layers")
"""Lists in configurations with an entry for each layer."""


@dataclass(frozen=True)
class Model:
    """One of the checkpoints, with other names of its tensors."""

    name: str
    files: Checkpoint
    tied: Mapping[str, str]

    @staticmethod
    def read(name: str, folder: Path) -> Model:
        files = Checkpoint.read(folder)
        return Model(name, files, tied_names(folder, files))

    def has(self, tensor: str) -> bool:
        return tensor in self.files.entries or self.tied.get(tensor) in self.files.entries

    def stored(self, tensor: str) -> str:
        """What its files call a tensor."""
        return tensor if tensor in self.files.entries else self.tied[tensor]


@dataclass(frozen=True)
class Origin:
    """Of what a tensor is made.

    Attributes:
        config: that says how.
        place: of its layer among those of its slice, from 0 to 1.
        names: model -> what that calls its tensor.
    """

    config: Config
    place: float
    names: Mapping[str, str]


@dataclass(frozen=True)
class Stack:
    """A merge as it will be.

    Attributes:
        origins: by the names of the result's tensors.
        layers: of the result, as (model, its layer); None where models are merged whole.
    """

    origins: Mapping[str, Origin]
    layers: tuple[tuple[str, int], ...] | None = None

    def configured(self, config: dict[str, Any], models: Mapping[str, Model]) -> None:
        """Writes the layers into a `config.json` of one of the models.

        Raises:
            WeightsError: it does not say how many layers there are.
        """
        if self.layers is None:
            return
        key = next((k for k in _COUNTS if isinstance(config.get(k), int)), None)
        if key is None:
            raise WeightsError(
                f"config.json says no number of layers ({', '.join(_COUNTS)}), so layers cannot be "
                "stacked. Use models instead of slices."
            )
        config[key] = len(self.layers)
        for listed in (k for k in _BY_LAYER if isinstance(config.get(k), list)):
            own = {m: _config(models[m]).get(listed) for m, _ in self.layers}
            if lacking := [m for m, said in own.items() if not isinstance(said, list)]:
                raise WeightsError(
                    f"the config.json of {lacking[0]} does not say {listed}, by layer, which "
                    "another model's does. Stack models of one architecture."
                )
            config[listed] = [(own[m] or [])[layer] for m, layer in self.layers]


def stack_of(config: Config, models: Mapping[str, Model], lead: Model) -> Stack:
    """Plans a merge.

    Raises:
        OptionError: a slice has layers that a model does not have.
        WeightsError: the models' tensors do not fit together.
    """
    names = dict.fromkeys(n for m in (lead, *models.values()) for n in m.files.entries)
    if config.slices:
        heights = {name: _height(model) for name, model in models.items()}
        _require_layers(config, heights)
        whole = len(config.slices) == 1 and all(
            ends == (0, heights[m]) for m, ends in config.slices[0].ranges.items()
        )
        if not whole:
            return _stacked(config, models)
        config = config.slices[0].config
    at = places(names)
    return Stack({n: Origin(config, at[n], dict.fromkeys(config.models, n)) for n in names})


def _height(model: Model) -> int:
    """How many layers a model has.

    Raises:
        WeightsError: it has several stacks of them, or none.
    """
    found: dict[str, int] = {}
    for name in model.files.entries:
        if match := LAYER.match(name):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    if len(found) != 1:
        said = f"stacks of layers ({', '.join(found)})" if found else "no layers"
        raise WeightsError(f"{model.name} has {said}: slices are of models with one stack of them.")
    return next(iter(found.values()))


def _require_layers(config: Config, heights: Mapping[str, int]) -> None:
    for part in config.slices:
        for model, (_, end) in part.ranges.items():
            if end > heights[model]:
                raise OptionError(
                    f"{config.where}, line {part.line}: layer_range ends at {end}, and {model} has "
                    f"{heights[model]} layers. Give one that ends there at most."
                )


def _stacked(config: Config, models: Mapping[str, Model]) -> Stack:
    stored = {m: {*model.files.entries} for m, model in models.items()}
    beside = {m: {n for n in names if not LAYER.match(n)} for m, names in stored.items()}
    first = next(iter(beside))
    for name, own in beside.items():
        if differ := sorted(own ^ beside[first]):
            raise WeightsError(
                f"{first} and {name} do not both store {differ[0]!r}, so it is not clear what the "
                "stacked model has. Stack models that store the same tensors beside their layers."
            )
    ends = (config.slices[0], config.slices[-1])
    embeds = {n for n in beside[first] if _EMBEDS.search(n)}
    others = beside[first] - embeds
    origins = {n: _alike(ends[0].config, n) for n in sorted(embeds)}
    layers: list[tuple[str, int]] = []
    for part in config.slices:
        for name, origin in _layers(part, models, len(layers)):
            origins[name] = origin
        lead = part.config.base or part.config.models[0]
        layers += [(lead, layer) for layer in range(*part.ranges[lead])]
    origins |= {n: _alike(ends[1].config, n) for n in sorted(others)}
    return Stack(origins, tuple(layers))


def _alike(config: Config, name: str) -> Origin:
    return Origin(config, 0.0, dict.fromkeys(config.models, name))


def _layers(part: Slice, models: Mapping[str, Model], above: int) -> Iterator[tuple[str, Origin]]:
    """The tensors of a slice's layers; `above` are those of the slices before."""
    start, count = {m: first for m, (first, _) in part.ranges.items()}, part.count
    for index in range(count):
        place = index / (count - 1) if count > 1 else 1.0
        rests = dict.fromkeys(
            rest
            for m in start
            for n in models[m].files.entries
            if (rest := _rest(n, start[m] + index)) is not None
        )
        for before, behind in rests:
            names = {m: f"{before}.{first + index}.{behind}" for m, first in start.items()}
            yield f"{before}.{above + index}.{behind}", Origin(part.config, place, names)


def _rest(name: str, layer: int) -> tuple[str, str] | None:
    """What stands around the number of a layer in a name; None for those of other layers."""
    match = LAYER.match(name)
    return (match[1], name[match.end() :]) if match and int(match[2]) == layer else None


def _config(model: Model) -> Mapping[str, Any]:
    path = model.files.directory / "config.json"
    found: Any = parse_json(read_file(path, JSON_LIMIT), str(path))
    return found if isinstance(found, dict) else {}


def shards(sizes: Mapping[str, int], largest: int) -> dict[str, list[str]]:
    """File -> its tensors: in their order, in files of about that many bytes."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > largest:
            groups, filled = [*groups, []], 0
        groups[-1].append(name)
        filled += size
    return dict(zip(_files(len(groups)), groups, strict=True))


def _files(count: int) -> Sequence[str]:
    if count == 1:
        return ("model.safetensors",)
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
