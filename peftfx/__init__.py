"""peftfx: parameter-efficient fine-tuning as rewrite passes over torch.fx graphs.

    program = peftfx.capture(model, kwargs={"input_ids": ids, "attention_mask": mask})
    program = peftfx.run(program, "lora{rank=8,where=q|v}")
    program.module(**batch)                                   # train it with anything
    peftfx.save(program, "adapter/")
    merged = peftfx.run(program, "fold").export_state_dict()  # loads into the original model
"""

from __future__ import annotations

from .registry import load_passes
from .rewriter.artifact import load, save
from .rewriter.capture import capture
from .rewriter.errors import RewriteError
from .rewriter.passes import REGISTRY, Pass
from .rewriter.pipeline import Pipeline, parse, run
from .rewriter.program import Program

__version__ = "0.1.0"

load_passes()
globals().update({cls.__name__: cls for cls in REGISTRY.values()})

__all__ = [
    "Pass", "Pipeline", "Program", "RewriteError", "capture", "export_onnx", "load", "parse",
    "run", "save", *(cls.__name__ for cls in REGISTRY.values()),
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name == "export_onnx":
        from .exporters.onnx_export import export_onnx

        return export_onnx
    raise AttributeError(f"module 'peftfx' has no attribute {name!r}")
