"""Inserting parts of imported adapters that stand in front of something: prefixes, prompts."""

from __future__ import annotations

from collections.abc import Iterable

from ...rewriter.branches.gated import GatedKeyValue
from ...rewriter.edits.edit import Editor
from ...rewriter.errors import BaseMismatchError, PassError
from ...rewriter.parts.parts import Prefix
from ...rewriter.program.sites import AttentionSite, EmbeddingSite, Site
from ...rewriter.program.state import State
from ..additive.prefix_tuning import PrefixBranch
from .sublayer_parts import gate_of, require_size


def entrance(program: State) -> EmbeddingSite:
    """The one table of tokens, in front of which prompts go."""
    tables = [s for s in program.sites if isinstance(s, EmbeddingSite) and s.role == "token"]
    if len(tables) != 1:
        raise PassError(
            f"a prompt goes in front of the tokens, and this model has {len(tables)} token tables."
        )
    return tables[0]


def prefix_sites(sites: Iterable[Site]) -> dict[str, list[AttentionSite]]:
    """The attentions of each `Prefix.place`, in graph order."""
    every = [s for s in sites if isinstance(s, AttentionSite)]
    own = [s for s in every if not s.cross]
    decoders = {s.stream for s in every if s.cross}
    return {
        "stack": [] if decoders else own,
        "decoder": [s for s in own if s.stream in decoders],
        "own": own,
        "cross": [s for s in every if s.cross],
    }


_PLACES = {
    "stack": "of one stack of layers",
    "decoder": "of a decoder beside an encoder",
    "own": "of tokens with one another",
    "cross": "of a decoder with its encoder",
}


def insert_prefix(edit: Editor, part: Prefix) -> None:
    """Puts the rows of a prefix in front of the keys and values of its attention."""
    sites = prefix_sites(edit.program.sites)
    here = sites[part.place]
    if part.layer >= len(here):
        have = ", ".join(f"{len(s)} {_PLACES[n]}" for n, s in sites.items() if s)
        raise BaseMismatchError(
            f"the adapter has a prefix for attention {part.layer} {_PLACES[part.place]}, and this "
            f"model has {have or 'none'}. Use the base that the adapter was trained on."
        )
    site = here[part.layer]
    widths = edit.key_value_widths(site)
    for rows, width in zip((part.key, part.value), widths, strict=True):
        require_size(rows.shape[1:] == (site.kv_heads, width), site.id, rows)
    key, value = (t.to(edit.like(site), copy=True) for t in (part.key, part.value))
    gate = gate_of(edit, site, part)
    branch = PrefixBranch(key, value)
    edit.prepend_kv(site, branch if gate is None else GatedKeyValue(branch), gate=gate)
