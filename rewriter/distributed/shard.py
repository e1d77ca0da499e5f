"""Sharding a program's blocks over ranks with torch's `fully_shard` (FSDP2), and gathering it.

Each block is a unit: its weights are gathered when it runs and dropped behind it. The root is one
more, with the embeddings, the head and everything that passes have inserted. Parameters are sharded
one by one along their first axis, so neither the number of blocks nor any size has to be a multiple
of the number of ranks; a rank beyond a tensor's rows holds none of it.

Single numbers stay whole, and so do adapters whose method reads their tensors while it trains (its
controller's losses and budgets run outside of any unit). Their gradients are averaged all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..api import Program
from ..blocks.hidden_names import names
from ..blocks.module import Outlined
from ..errors import MetaTensorError, RanksError
from ..files.ranks import agree, together
from ..graph.aten import set_attribute
from ..graph.module import device_of
from ..graph.placement import relocate
from ..graph.sharded import has_shards, is_sharded, placed_like, whole
from ..pipeline.method import Method
from ..program.state import BRANCHES


def shard(module: Outlined, mesh: Any = None, **options: Any) -> Outlined:
    """Shards an outlined program in place, block by block; every rank calls it.

    What it held of the program as captured is sharded too, so that a rank keeps its part only. The
    model and the programs that you still hold keep theirs: delete them, or map their weights from
    files (`load_weights`).

    Args:
        module: made by `outline`, with the same values on every rank (which is checked).
        mesh: a `DeviceMesh`; default all ranks.
        options: of `torch.distributed.fsdp.fully_shard`: reshard_after_forward, offload_policy,
            mp_policy (reductions only: the graph has the dtypes that it was captured with).

    Returns:
        `module`. Build the optimizer from its parameters now. `inline(module)` is a program.

    Raises:
        RanksError: there is no process group, ranks have different programs or values, or the
            module cannot be sharded. MetaTensorError: it has no values. Nothing was changed.
    """
    from torch.distributed.fsdp import fully_shard

    if not (dist.is_available() and dist.is_initialized()):
        raise RanksError(
            "there is no process group. Start the script with torchrun and call "
            "torch.distributed.init_process_group() first."
        )
    together("checking the module", lambda: _check(module, options))
    agree("the recipe", "; ".join(r.text for r in names(module).flat.program.history))
    agree("the names and sizes of parameters", _layout(module))
    agree("the value of a parameter", {n: checksum(t) for n, t in module.named_parameters()})
    before, device = dict(module.named_parameters()), device_of(module)
    unsharded = _unsharded(module)
    for unit in (*names(module).blocks, module):
        fully_shard(unit, mesh=mesh, ignored_params=unsharded, **options)
    for parameter in unsharded:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average)
    own = names(module)
    origin = own.flat.program.origin
    own.flat = replace(own.flat, program=replace(own.flat.program, origin=None))
    own.follow(device, device_of(module))
    if origin is not None:
        base = _sharded_base(origin, before, dict(module.named_parameters()))
        program = replace(own.flat.program, origin=base, prints=None)
        own.flat = replace(own.flat, program=program)
    return module


def _check(module: Outlined, options: Mapping[str, Any]) -> None:
    """Everything that `fully_shard` would only find in the first forward, or not at all."""
    if has_shards(module):
        raise RanksError("the module is sharded already.")
    if any(block.offload is not None for block in names(module).blocks):
        raise RanksError(
            "the blocks' frozen parameters are on the CPU (offload=True), which shards cannot be. "
            "Outline without it, and shard with offload_policy=CPUOffloadPolicy()."
        )
    policy = options.get("mp_policy")
    dtype = None if policy is None else policy.param_dtype
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise MetaTensorError(
                f"{name} is on the meta device. Load weights before sharding "
                "(peftfx.load_weights maps them from files, so ranks of a machine share them)."
            )
        if dtype is not None and parameter.is_floating_point() and parameter.dtype != dtype:
            raise RanksError(
                f"mp_policy computes in {dtype}, but the graph was captured in {parameter.dtype} "
                f"({name}). Capture in that dtype, or train under torch.autocast."
            )
    for label, unit in _units(module):
        dtypes = sorted({str(p.dtype)[6:] for p in unit if p.requires_grad})
        if len(dtypes) > 1:
            raise RanksError(
                f"{label} trains parameters of several dtypes ({', '.join(dtypes)}), whose "
                "gradients torch cannot reduce together. Give them one dtype."
            )


def _unsharded(module: Outlined) -> set[nn.Parameter]:
    """What stays whole on every rank."""
    program = names(module).flat.program
    controlled = [
        r.adapter or "" for r in program.history
        if isinstance(r.applied, Method) and r.applied.controller.whole
    ]  # fmt: skip
    owned = {n for adapter in controlled for n in program.owned.get(adapter, ())}
    inside = tuple(f"{BRANCHES}.{adapter}." for adapter in controlled)
    return {
        p for n, p in module.named_parameters()
        if not p.dim() or n in owned or (inside and n.startswith(inside))
    }  # fmt: skip


def _average(parameter: Tensor) -> None:
    """Averages the gradient of a parameter that every rank has whole."""
    if parameter.grad is not None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def _units(module: Outlined) -> Iterator[tuple[str, list[nn.Parameter]]]:
    rest = {id(p): p for p in module.parameters()}
    for block in names(module).blocks:
        own = list(block.parameters())
        rest = {i: p for i, p in rest.items() if all(p is not q for q in own)}
        yield block.path, own
    yield "the root", list(rest.values())


def _layout(module: nn.Module) -> dict[str, Any]:
    return {
        n: [str(p.dtype)[6:], list(p.shape), p.requires_grad] for n, p in module.named_parameters()
    }


def checksum(tensor: Tensor) -> int:
    """The sum of a tensor's bytes as integers: the same on every machine, and quick."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_complex() or flat.element_size() not in (2, 4, 8):
        return int(flat.view(torch.uint8).sum(dtype=torch.int64))
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return int(flat.view(kind).sum(dtype=torch.int64))


def _sharded_base(
    base: Program, before: Mapping[str, Tensor], now: Mapping[str, Tensor]
) -> Program:
    """The program as captured with sharded tensors: where they are the module's, the same ones."""
    program = base.fork()
    like = next((t for t in now.values() if is_sharded(t)), None)
    for name, parameter in list(program.module.named_parameters()):
        here = now.get(name, like)
        if here is None or not parameter.dim():
            continue
        same = name in before and before[name].data_ptr() == parameter.data_ptr()
        value = now[name].detach() if same else placed_like(parameter.detach(), here)
        set_attribute(program.module, name, nn.Parameter(value, parameter.requires_grad))
    device = device_of(program.module)
    relocate(program.module, device_of(base.module), device)
    tables = [{n: t.to(device) for n, t in d.items()} for d in (program.extras, program.sample)]
    return replace(program, origin=None, extras=tables[0], sample=tables[1])


def gather(program: Program) -> Program:
    """The program with complete parameters on every rank, itself if it has them; collective."""
    if not has_shards(program.module):
        return program
    whole_by_id: dict[int, tuple[Any, Tensor]] = {}
    base = _gathered(program.base, whole_by_id)
    return base if program.origin is None else replace(_gathered(program, whole_by_id), origin=base)


def _gathered(program: Program, wholes: dict[int, tuple[Any, Tensor]]) -> Program:
    """`wholes`: by storage (while it lives), so that what programs share they go on sharing."""
    forked = program.fork()
    for name, parameter in list(forked.module.named_parameters(remove_duplicate=False)):
        if not is_sharded(parameter):
            continue
        sharded: Any = parameter.detach()
        part = sharded.to_local().untyped_storage()
        if part._cdata not in wholes:
            wholes[part._cdata] = part, whole(sharded)
        complete = wholes[part._cdata][1]
        set_attribute(forked.module, name, nn.Parameter(complete, parameter.requires_grad))
    return replace(forked, origin=program.origin)
