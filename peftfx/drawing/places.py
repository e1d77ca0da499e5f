"""Names of weights as a layer and a kind of place."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

NUMBER = re.compile(r"(?<=[._])\d+(?=[._]|$)")


def layer_of(target: str) -> int | None:
    """The first number in a name."""
    found = NUMBER.search(target)
    return int(found[0]) if found else None


def kinds_of(targets: Iterable[str]) -> dict[str, str]:
    """Names without their layers, as short as they tell places apart: `self_attn.q_proj`, or where
    there are several stacks `encoder.self_attn.q_proj`."""
    split = {target: _split(target) for target in targets}
    stacks = {before for before, _ in split.values() if before}
    parts = zip(*(s.split(".") for s in stacks), strict=False)
    common = len([*itertools.takewhile(lambda same: len(set(same)) == 1, parts)])
    kinds: dict[str, str] = {}
    for target, (before, rest) in split.items():
        own = before.split(".")[common:] if len(stacks) > 1 and before else []
        kinds[target] = ".".join([*own[:1], rest])
    return kinds


def _split(target: str) -> tuple[str, str]:
    """What stands before the layer's number, and behind."""
    short = target.removesuffix(".weight")
    found = NUMBER.search(short)
    if not found or found.end() == len(short):
        return "", short
    return short[: found.start()].strip("._"), short[found.end() :].strip("._")
