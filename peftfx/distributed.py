"""Programs on several ranks, with torch's own engines (DDP, `fully_shard`, DTensor, DCP).

module = peftfx.distributed.shard(peftfx.outline(program))
...                                                       # train module as any other
program = peftfx.inline(module)                           # with sharded parameters
peftfx.distributed.save_checkpoint("run/", program, optimizer, step=100)
peftfx.save(program, "adapter/")                          # complete, from rank 0
"""

from __future__ import annotations

from .rewriter.distributed.checkpoint import Resumed, latest, load_checkpoint, save_checkpoint
from .rewriter.distributed.footprint import Held, held
from .rewriter.distributed.shard import gather, shard
from .rewriter.files.ranks import agree, first, rank, together, world

__all__ = [
    "Held",
    "Resumed",
    "agree",
    "first",
    "gather",
    "held",
    "latest",
    "load_checkpoint",
    "rank",
    "save_checkpoint",
    "shard",
    "together",
    "world",
]
