"""What errors and records say of the places that a method takes, and of those that it leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ..errors import SelectorError
from ..program.selector import WORDS
from ..program.sites import Site
from ..program.state import State


def example_word(program: State, kinds: Sequence[str]) -> str:
    """The word of the commonest role of a program's sites of some kinds; empty without any."""
    sites = program.sites.of(*kinds)
    if not sites:
        return ""
    role = Counter(s.role for s in sites).most_common(1)[0][0]
    site = next(s for s in sites if s.role == role)
    return max(sorted(site.tags & WORDS), key=len)


def of_kind(program: State, sites: Sequence[Site], kind: str, form: str, where: str) -> list[Site]:
    """The sites of the kind that a form of a method stands beside.

    Args:
        form: the method with the option, such as `krona{form=block}`.

    Raises:
        SelectorError: there is none.
    """
    found = [s for s in sites if s.kind == kind]
    if found:
        return found
    example = example_word(program, (kind,))
    remedy = (
        f"Say where, for example {form[:-1]},where={example}}}" if example else "Choose another"
    )
    raise SelectorError(
        f"{form} stands beside {kind} sites, and where={where!r} matches none. {remedy}."
    )


def left_out(program: State, sites: Sequence[Site], why: Callable[[str], str]) -> dict[str, str]:
    """Site id -> why it is left out, with the share of the parameters that its kind holds.

    Args:
        why: kind of site -> the reason.
    """
    stored = dict(program.base.module.named_parameters())
    total = sum(p.numel() for p in stored.values())
    reasons: dict[str, str] = {}
    for kind in dict.fromkeys(s.kind for s in sites):
        mine = [s for s in sites if s.kind == kind]
        weights = {getattr(s, "weight", "") for s in mine} & stored.keys()
        share = sum(stored[w].numel() for w in weights) / total if total else 0.0
        share_left = f"; what is left out so holds {share:.0%} of the parameters" if weights else ""
        reasons |= {s.id: f"{why(kind)}{share_left}" for s in mine}
    return reasons
