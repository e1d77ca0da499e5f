"""What AdapterHub has behind the embeddings: invertible adapters, and prompts.

There, position embeddings, their norm and dropout are over: a stream begins. Prompts take no
positions, and tokens keep theirs; every token sees them (as with the library's eager attention:
with another, prompts look at padding, too).
"""

from __future__ import annotations

from ...rewriter.errors import ArtifactError
from ...rewriter.parts.parts import Coupling, Part, Prompt
from .config import INVERTIBLE, Options
from .leaves import popped
from .places import Places, attentions
from .reading import File

COUPLED = {
    f"{side}_{name}_bias" if leaf == "bias" else f"{side}_{name}": f"{letter}.{index}.{leaf}"
    for side, letter in (("first", "F"), ("second", "G"))
    for name, index in (("down", 0), ("up", 2))
    for leaf in ("weight", "bias")
}
"""Tensor of `Coupling` -> key."""


def couplings(options: Options, file: File, places: Places) -> list[Part]:
    """The invertible adapter, if there is one. Its inverse is in prediction heads of the library's
    own alone."""
    if not options.data.get(INVERTIBLE):
        return []
    given = file.take("invertible_adapters")
    if len(given) != 1:
        raise ArtifactError(
            f"{file.where}: {INVERTIBLE} is {options.data[INVERTIBLE]!r}, and the file has "
            f"{len(given)} of it. The files do not belong together; save the adapter again."
        )
    ((path, leaves),) = given.items()
    where = f"{file.where}: {path}"
    own = {name: popped(leaves, key, where) for name, key in COUPLED.items()}
    if leaves:
        raise ArtifactError(
            f"{where}: the key ...{next(iter(leaves))!r} is not understood. Save the adapter again."
        )
    part = Coupling(places.beginning(path), **own, activation=options.take_activation())
    factor = options.take("inv_adapter_reduction_factor", float, int)
    for down in (part.first_down, part.second_down):
        if int(down.shape[1] // factor) != len(down):
            raise ArtifactError(
                f"{file.where}: inv_adapter_reduction_factor={factor} makes "
                f"{int(down.shape[1] // factor)} of {down.shape[1]} features, and the invertible "
                f"adapter has {len(down)}. The files do not belong together; save it again."
            )
    return [part]


PLACES = {"prefix": "stream", "prefix_after_bos": "second"}
"""What the option `combine` is called in `Prompt`."""


def prompts(options: Options, file: File, places: Places) -> list[Part]:
    """Rows where the stream begins, in front of all tokens or behind the first."""
    place = PLACES.get(options.take("combine", str))
    if place is None:
        raise options.refuse("combine", f"known are {' and '.join(PLACES)}")
    if any(s.causal or s.cross for s in attentions(places.program)):
        raise options.refuse(
            "architecture", "in causal models, and in those with two stacks, the library has none"
        )
    given = file.take("prompt_tunings")
    parts: list[Part] = []
    for path, leaves in given.items():
        rows = popped(leaves, "prompt_embedding.weight", f"{file.where}: {path}")
        if leaves or len(given) > 1:
            raise ArtifactError(
                f"{file.where}: {path}: the key ...{next(iter([*leaves, *given]))!r} is not "
                "understood. Save the adapter again."
            )
        if len(rows) != options.take("prompt_length", int):
            raise ArtifactError(
                f"{file.where}: prompt_length is {options.data.get('prompt_length')}, and the file "
                f"has {len(rows)} rows. The files do not belong together; save the adapter again."
            )
        parts.append(
            Prompt(places.beginning(path.removesuffix("prompt_tuning").rstrip(".")), rows, place)
        )
    return parts
