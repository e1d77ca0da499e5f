"""A program's tensors under the original model's names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ExportError, VerifyError
from ..graph.aten import set_attribute
from ..graph.sharded import whole
from ..program.state import BRANCHES, State
from ..program.unchanged import require_unchanged
from .weight import dense_weights


def put_back(program: State) -> State:
    """The captured program with the tensors that `program` exports, as the original model would
    load them: what is one tensor there is one here.

    Raises:
        VerifyError: several names of one tensor are exported with different values, of which the
            model would keep the last.
    """
    back = program.base.fork()
    gm = back.module
    parameters = dict(gm.named_parameters())
    first: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in export_state_dict(program, strict=True).items():
        canonical = back.aliases.get(name, name)
        other, value = first.setdefault(canonical, (name, tensor))
        if value is not tensor and not torch.equal(value, tensor):
            raise VerifyError(
                f"{other!r} and {name!r} are one tensor in the original model, but are exported "
                "with different values, of which it would keep the last."
            )
        if canonical in parameters:
            fresh = nn.Parameter(tensor, parameters[canonical].requires_grad)
            set_attribute(gm, canonical, fresh)
        elif canonical in dict(gm.named_buffers()):
            set_attribute(gm, canonical, tensor)
    return back


def export_state_dict(program: State, strict: bool) -> dict[str, Tensor]:
    """See `Program.export_state_dict`."""
    require_unchanged(program)
    stored = dict(program._stored())
    stored |= dense_weights(program)
    dtypes = {n: t.dtype for n, t in program.base._stored()}
    state: dict[str, Tensor] = {}
    for name in program.state_names:
        source = program.tensors.stored(name)
        tensor = stored.get(source, program.extras.get(source, program.extras.get(name)))
        if tensor is None:
            raise ExportError(f"the tensor {name!r} of the original model is lost.")
        state[name] = whole(tensor).detach().to(dtypes.get(source, tensor.dtype))
    prefix = f"{BRANCHES}."
    extra = [n for n in stored if n.startswith(prefix) or n in program.added]
    extra = [n for n in (*extra, *program.untied) if n not in state]
    if strict and (cut := program.reshaped()):
        raise ExportError(
            f"{len(cut)} tensors have another shape than the original model's, first "
            f"{cut[0]}: {tuple(stored[cut[0]].shape)}. So load_state_dict cannot work. Save "
            "the program itself (peftfx.save_program), or take the tensors with "
            "export_state_dict(strict=False)."
        )
    if strict and extra and not set(extra) - {*program.untied}:
        raise ExportError(
            f"{extra[0]} was untied (fold{{tied=untie}}), and the original model has no name for "
            "it, so load_state_dict cannot work. Choose fold{tied=both} or fold{tied=keep}, save "
            "the program itself (peftfx.save_program), or take the tensors with "
            "export_state_dict(strict=False)."
        )
    if extra and strict:
        more = f" and {len(extra) - 6} more" if len(extra) > 6 else ""
        raise ExportError(
            f"{len(extra)} tensors have no place in the original model: "
            f"{', '.join(extra[:6])}{more}. So load_state_dict(strict=True) cannot be "
            f"promised. {_remedy(program)}, or take everything with "
            "export_state_dict(strict=False)."
        )
    if not strict:
        state.update({n: whole(stored[n]).detach() for n in extra})
    return state


def _remedy(program: State) -> str:
    """What to do about branches that are left."""
    reasons = {str(program.branch(a).not_foldable) for a in program.attachments} - {""}
    if not reasons:
        return "Fold the branches first (run(program, 'fold'))"
    return (
        f"What is left does not fold ({'; '.join(sorted(reasons))}): keep it as an adapter beside "
        "the base (peftfx.save), save the whole program (peftfx.save_program)"
    )
