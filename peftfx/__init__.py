"""peftfx: parameter-efficient fine-tuning as rewrite passes over torch.fx graphs.

    program = peftfx.capture(model, kwargs={"input_ids": ids, "attention_mask": mask})
    program = peftfx.run(program, "lora{rank=8,where=q|v}")
    program.module(**batch)                                   # train it with anything
    peftfx.save(program, "adapter/")
    merged = peftfx.run(program, "fold").export_state_dict()  # loads into the original model

Pass classes (`peftfx.LoRA`, ...) are found in `passes/`; `__init__.pyi` lists them for editors.
"""

from __future__ import annotations

from typing import Any

from .drawing import draw_sites
from .exporters.hf_names import checkpoint_of
from .exporters.hf_peft.adapter import load_peft, save_peft
from .exporters.hf_peft.recipe import from_peft_config
from .registry import load_passes
from .rewriter.api import Program
from .rewriter.blocks.outline import inline, outline
from .rewriter.capture.capture import capture
from .rewriter.errors import RewriteError
from .rewriter.pipeline.passes import REGISTRY, Pass
from .rewriter.pipeline.syntax import Pipeline, parse
from .rewriter.program.site_table import Sites
from .rewriter.program.sites import Site
from .rewriter.run.run import run
from .rewriter.scores.observe import observe, tap
from .rewriter.storage.artifact import VERSION, save
from .rewriter.storage.filling import load_weights
from .rewriter.storage.loading import load
from .rewriter.storage.program_file import load_program, save_program
from .rewriter.storage.stream import fold_checkpoint
from .rewriter.training.controllers import controllers
from .training.fit import fit
from .training.lightning import lightning_callback
from .training.pretrained import as_hf
from .training.trainer import trainer_callback

__version__ = VERSION

load_passes()
globals().update({cls.__name__: cls for cls in REGISTRY.values()})


def export_onnx(program: Program, path: Any, **options: Any) -> Any:
    """Writes a program as ONNX and proves it; see `exporters/onnx/export.py`."""
    from .exporters.onnx.export import export_onnx as export

    return export(program, path, **options)


def __dir__() -> list[str]:
    return sorted(globals())


__all__ = [
    "Pass",
    "Pipeline",
    "Program",
    "RewriteError",
    "Site",
    "Sites",
    "as_hf",
    "capture",
    "checkpoint_of",
    "controllers",
    "draw_sites",
    "export_onnx",
    "fit",
    "fold_checkpoint",
    "from_peft_config",
    "inline",
    "lightning_callback",
    "load",
    "load_peft",
    "load_program",
    "load_weights",
    "observe",
    "outline",
    "parse",
    "run",
    "save",
    "save_peft",
    "save_program",
    "tap",
    "trainer_callback",
]
