"""What folds left of each change, as a table: a row a kind of place."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from .drawing.places import kinds_of, layer_of

HEAD = ("place", "weights", "survives", "least", "in layer", "along")
NUMBERS = HEAD[1:]


def share_rows(shares: Mapping[str, Sequence[float]]) -> list[tuple[str, ...]]:
    """Rows of `HEAD`: how many weights there are, the median share of their changes that survives
    rounding, the least and its layer, and the least share along a change's own direction.

    Args:
        shares: by weight, (along its direction, errors relative to the size of the change).
    """
    rows: list[tuple[str, ...]] = []
    places: dict[str, list[str]] = {}
    for weight, kind in kinds_of(shares).items():
        places.setdefault(kind, []).append(weight)
    for kind, weights in places.items():
        survives = {w: max(0.0, 1 - shares[w][1]) for w in weights}
        least = min(weights, key=survives.__getitem__)
        layer = layer_of(least)
        along = min(shares[w][0] for w in weights)
        middle = statistics.median(survives.values())
        rows.append((
            kind, str(len(weights)), f"{middle:.1%}", f"{survives[least]:.1%}",
            "" if layer is None else str(layer), f"{along:.1%}",
        ))  # fmt: skip
    return rows
