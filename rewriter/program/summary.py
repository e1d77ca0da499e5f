"""A program in a few lines: the model, where adapters can go, what there are, what trains.

LlamaForCausalLM: 118,368 parameters, 1,024 of them train (0.87 %), evaluation mode, cpu
inputs    input_ids: i64[batch, sequence]
sites     q 2, k 2, v 2, o 2, ffn.up 2, ffn.gate 2, ffn.down 2, head 1
adapters  lora: 1,024 parameters at 4 sites
history   0 lora{rank=4,where=q|v}: 4 sites edited; identity: max_abs 0, max_rel 0
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import Tensor

from .history import ITSELF, Record
from .state import State


def summary(program: State) -> str:
    """The summary as text; `text` has the graph and `sites` the table of sites."""
    rows = {
        "inputs": [*str(program.spec).split("; "), *_optional(program)],
        "sites": [_sites(program)],
        "adapters": [_adapter(program, name) for name in program.adapters],
        "trained": [_trained(program)] if program.owned.get(ITSELF) else [],
        "history": [_record(i, r) for i, r in enumerate(program.history)],
        "see": ["text() for the graph, sites for the table of sites, diff() for what changed"],
    }
    lines = [
        f"{title if not index else '':<10}{line}"
        for title, texts in rows.items()
        for index, line in enumerate(texts)
    ]
    return "\n".join((_model(program), *lines))


def _model(program: State) -> str:
    stored = list(_whole(program))
    every = sum(t.numel() for t in stored)
    training = sum(p.numel() for p in program.trainable_parameters())
    mode = "training" if program.training else "evaluation"
    devices = sorted({str(t.device) for t in stored})
    return (
        f"{type(program.module).__name__}: {every:,} parameters, {training:,} of them train"
        f"{_share(training, every)}, {mode} mode, {', '.join(devices) or 'no tensors'}"
    )


def _optional(program: State) -> list[str]:
    names = [i.name for i in program.spec.inputs if i.optional]
    return [f"calls may leave out {', '.join(names)}"] if names else []


def _whole(program: State) -> Iterator[Tensor]:
    """Every parameter once, trained or not, of branches, too."""
    yield from {id(p): p for p in program.module.parameters()}.values()


def _share(part: int, whole: int) -> str:
    return f" ({100 * part / whole:.3g} %)" if part else ""


def _sites(program: State) -> str:
    roles = Counter(s.role for s in program.sites)
    return ", ".join(f"{role} {count}" for role, count in roles.items()) or "none"


def _adapter(program: State, name: str) -> str:
    tensors = program.adapter_tensors(name)
    count = sum(t.numel() for t in tensors.values())
    sites = {a.site for a in program.attached_by(name)}
    where = f" at {len(sites)} sites" if sites else ""
    learning = {n for n, p in program.module.named_parameters() if p.requires_grad}
    if tensors and tensors.keys() <= program.removed.keys():
        return f"{name}: {count:,} parameters, not in the graph any more"
    still = "" if tensors.keys() & learning else ", none of them trains"
    return f"{name}: {count:,} parameters{where}{still}"


def _trained(program: State) -> str:
    names = program.owned[ITSELF]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"by the model itself: {', '.join(names[:3])}{more}"


def _record(index: int, record: Record) -> str:
    skipped = f", {len(record.skipped)} skipped" if record.skipped else ""
    done = f"{len(record.edited)} sites edited{skipped}"
    return f"{index} {record.text}: {done}; {record.certificate}"
