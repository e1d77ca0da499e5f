"""Every error a user can meet. One base class; each also derives from the nearest builtin.

A message says, in this order: what went wrong, where (site, op, source line), and what to do, with
the nearest valid choices.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RewriteError(Exception):
    """Base of all errors raised by peftfx."""


class CaptureError(RewriteError, ValueError):
    """The model cannot be captured as one graph."""


class InputError(RewriteError, ValueError):
    """A call's inputs do not fit what was captured."""


class SelectorError(RewriteError, LookupError):
    """A selector is malformed, or a part of it matches nothing."""


class SiteError(RewriteError, KeyError):
    """A site is asked for by an id that none has, or that several have."""

    def __str__(self) -> str:  # a KeyError shows its key quoted
        return str(self.args[0]) if self.args else ""


class OptionError(RewriteError, ValueError):
    """A pass, pipeline text or recipe has a wrong option or value."""


class PassError(RewriteError, RuntimeError):
    """A pass could not be applied; the program is what it was before."""


class BlockError(RewriteError, ValueError):
    """A program's layers cannot be made callable blocks, or not with these options."""


class VerifyError(RewriteError, RuntimeError):
    """A measured contract does not hold, or a graph is malformed."""


class BaseChangedError(VerifyError):
    """Stored tensors that programs share are not what they were when a program was made."""


class FoldError(RewriteError, RuntimeError):
    """A branch cannot be folded into constants."""


class RanksError(RewriteError, RuntimeError):
    """The ranks of a distributed job differ, or one of them failed."""


class NonFiniteError(RewriteError, ValueError):
    """A tensor holds NaN or infinity."""


class MetaTensorError(RewriteError, RuntimeError):
    """Values are needed, but a tensor is on the meta device."""


class ExportError(RewriteError, RuntimeError):
    """A program cannot be written in the requested form."""


class ArtifactError(RewriteError, ValueError):
    """A saved adapter cannot be read or does not fit."""


class CorruptFileError(ArtifactError):
    """A file is truncated, altered or malformed."""


class WeightsError(ArtifactError):
    """A checkpoint's tensors do not fit the program."""


class FormatTooNewError(ArtifactError):
    """A file was written by a newer format version than this one reads."""


class BaseMismatchError(ArtifactError):
    """The adapter was trained on other base weights."""


def nearest(word: str, choices: Iterable[str], count: int = 3) -> str:
    """Returns the closest of `choices` to `word` as text for an error message."""
    close = difflib.get_close_matches(word, list(choices), n=count, cutoff=0.3)
    return ", ".join(close) if close else "(nothing similar)"
