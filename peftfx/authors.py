"""What a method is written with, under names that stay where they are.

    from peftfx.authors import Delta, Editor, LinearSite, Method

CONTRIBUTING.md has the words that they go with.
"""

from __future__ import annotations

from .rewriter.branches.branch import (
    Axes,
    Branch,
    Combine,
    Delta,
    Expression,
    InputScale,
    OutputScale,
    RowScale,
    Serial,
)
from .rewriter.branches.gated import GatedDelta, GatedKeyValue, GatedSerial
from .rewriter.branches.input_map import InputMap
from .rewriter.branches.input_shift import InputShift, OutputShift
from .rewriter.branches.prompts import KeyValue, Tokens
from .rewriter.branches.routing import Inserted, Routed
from .rewriter.branches.shapes import Shape, linear
from .rewriter.edits.calls.call import Value
from .rewriter.edits.edit import Editor
from .rewriter.errors import OptionError, PassError
from .rewriter.pipeline.aliases import Alias, instead, renamed
from .rewriter.pipeline.controller import Controller
from .rewriter.pipeline.method import Method
from .rewriter.pipeline.options import BySite
from .rewriter.pipeline.passes import Pass
from .rewriter.program.history import Contract, Plan
from .rewriter.program.sites import (
    AttentionSite,
    ConvSite,
    EmbeddingSite,
    ExpertsSite,
    FeedForwardSite,
    LinearSite,
    MixerSite,
    NormSite,
    Site,
    SublayerSite,
    WeightSite,
)
from .rewriter.program.state import State

__all__ = [
    "Alias",
    "AttentionSite",
    "Axes",
    "Branch",
    "BySite",
    "Combine",
    "Contract",
    "Controller",
    "ConvSite",
    "Delta",
    "Editor",
    "EmbeddingSite",
    "ExpertsSite",
    "Expression",
    "FeedForwardSite",
    "GatedDelta",
    "GatedKeyValue",
    "GatedSerial",
    "InputMap",
    "InputScale",
    "InputShift",
    "Inserted",
    "KeyValue",
    "LinearSite",
    "Method",
    "MixerSite",
    "NormSite",
    "OptionError",
    "OutputScale",
    "OutputShift",
    "Pass",
    "PassError",
    "Plan",
    "Routed",
    "RowScale",
    "Serial",
    "Shape",
    "Site",
    "State",
    "SublayerSite",
    "Tokens",
    "Value",
    "WeightSite",
    "instead",
    "linear",
    "renamed",
]
