"""A program's tensors under the original model's names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .edits.quantised import dense_weights
from .errors import ExportError
from .fingerprint import require_unchanged
from .sharded import whole

if TYPE_CHECKING:
    from .program import Program


def export_state_dict(program: Program, strict: bool) -> dict[str, Tensor]:
    """See `Program.export_state_dict`."""
    from .program import BRANCHES

    require_unchanged(program)
    held = dict(program._stored())
    held |= dense_weights(program)
    dtypes = {n: t.dtype for n, t in program.base._stored()}
    state: dict[str, Tensor] = {}
    for name in program.state_names:
        source = name if name in program.untied else program.aliases.get(name, name)
        tensor = held.get(source, program.extras.get(source, program.extras.get(name)))
        if tensor is None:
            raise ExportError(f"the tensor {name!r} of the original model is lost.")
        state[name] = whole(tensor).detach().to(dtypes.get(source, tensor.dtype))
    prefix = f"{BRANCHES}."
    extra = [n for n in held if n.startswith(prefix) or n in program.added]
    extra = [n for n in (*extra, *program.untied) if n not in state]
    if strict and (cut := program.reshaped()):
        raise ExportError(
            f"{len(cut)} tensors have another shape than the original model's, first "
            f"{cut[0]}: {tuple(held[cut[0]].shape)}. So load_state_dict cannot work. Save "
            "the program itprogram (peftfx.save_program), or take the tensors with "
            "export_state_dict(strict=False)."
        )
    if extra and strict:
        more = f" and {len(extra) - 6} more" if len(extra) > 6 else ""
        raise ExportError(
            f"{len(extra)} tensors have no place in the original model: "
            f"{', '.join(extra[:6])}{more}. So load_state_dict(strict=True) cannot be "
            "promised. Fold the branches first (run(program, 'fold')), or take everything "
            "with export_state_dict(strict=False)."
        )
    if not strict:
        state.update({n: whole(held[n]).detach() for n in extra})
    return state
