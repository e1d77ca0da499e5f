"""What the user trains himself: tensors of the base that are no adapter's.

A model all of whose weights require gradients is as torch made it, and adapters freeze it. As soon
as some weights are frozen, what still requires a gradient was chosen (a fresh head): the program
itself owns it, under the name `ITSELF`, and it trains through every pass and is part of what is
saved. The same can be said with `train{where=...}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ..errors import PassError
from ..graph.aten import set_attribute
from .history import ITSELF
from .sites import ConvSite, EmbeddingSite, ExpertsSite, LinearSite, Site
from .state import State


def chosen(program: State) -> tuple[str, ...]:
    """Names of what the user trains: all that requires gradients, if some weights do not.

    Weights are what linears, convolutions, experts and token embeddings multiply by or look up;
    position tables do not count, since models freeze those themselves.
    """
    parameters = dict(_base(program))
    names = [weight for site in program.sites if (weight := _weight(site)) in parameters]
    weights = [parameters[name] for name in names]
    if all(p.requires_grad for p in weights or parameters.values()):
        return ()
    return tuple(n for n, p in parameters.items() if p.requires_grad)


def _weight(site: Site) -> str:
    counts = not isinstance(site, EmbeddingSite) or site.role == "token"
    multiplies = isinstance(site, LinearSite | ConvSite | ExpertsSite | EmbeddingSite)
    return site.weight if multiplies and counts else ""


def train_only(program: State, names: Sequence[str]) -> None:
    """Lets the program itself own the named parameters, beside those that it owns already, and
    freezes what nobody owns.

    Args:
        program: a fork, edited in place.

    Raises:
        PassError: it has no such parameter.
    """
    program.tensors = program.tensors.with_trained(ITSELF, names)
    owned = program.tensors.trained
    base = dict(_base(program))
    for name in names:
        if name not in base:
            raise PassError(f"{name!r}, which was trained, is no parameter of this program.")
        if not base[name].requires_grad:  # frozen storage is shared
            fresh = nn.Parameter(base[name].detach().clone())
            set_attribute(program.module, name, fresh)
    for name, parameter in base.items():
        if name not in owned:
            parameter.requires_grad_(False)


def require_owned(program: State) -> None:
    """Refuses a base parameter that requires a gradient but is nobody's, once adapters froze the
    rest: its values would be lost, and its storage may be the captured model's.

    Raises:
        PassError: there is one.
    """
    owned = program.tensors.trained
    if not (owned or program.adapters):
        return
    stray = [n for n, p in _base(program) if p.requires_grad and n not in owned]
    if stray:
        more = f" and {len(stray) - 1} more" if len(stray) > 1 else ""
        raise PassError(
            f"{stray[0]}{more} require gradients, but no pass trains them, so what they learn "
            "would not be saved. Set requires_grad_(False) on them again, and say what to "
            "train: run(program, 'train{where=...}')."
        )


def _base(program: State) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters outside of branches, by canonical name."""
    for name, parameter in program.module.named_parameters():
        if not program.inserts(name):
            yield name, parameter
