"""Every error a user can meet. One base class; each also derives from the nearest builtin.

A message says, in this order: what went wrong, where (site, op, source line), and what to do, with
the nearest valid choices.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Mapping
from typing import Any


class RewriteError(Exception):
    """Base of all errors raised by peftfx.

    Attributes:
        kind: which exit code the command line gives it: `usage` (say something else), `contract`
            (a promise was measured and broken), `base` (other weights than the adapter's),
            `damage` (a file), `system` (disk, memory, ranks).
        report: what was found all the same, as JSON; the command line prints it with the error.
    """

    kind: str = "usage"
    report: Mapping[str, Any] | None = None


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

    kind = "contract"


class BaseChangedError(VerifyError):
    """Stored tensors that programs share are not what they were when a program was made."""


class FoldError(RewriteError, RuntimeError):
    """A branch cannot be folded into constants."""


class RanksError(RewriteError, RuntimeError):
    """The ranks of a distributed job differ, or one of them failed."""

    kind = "system"


class NonFiniteError(RewriteError, ValueError):
    """A tensor holds NaN or infinity."""

    kind = "damage"


class MetaTensorError(RewriteError, RuntimeError):
    """Values are needed, but a tensor is on the meta device."""


class ExportError(RewriteError, RuntimeError):
    """A program cannot be written in the requested form."""


class ParityError(VerifyError, ExportError):
    """What was written computes something else than the program."""


class ArtifactError(RewriteError, ValueError):
    """A saved adapter cannot be read or does not fit."""

    kind = "damage"


class PathError(ArtifactError):
    """What a path names is not there, or is not what is asked for."""

    kind = "usage"


class BaseNeededError(ArtifactError):
    """What an adapter means depends on its base, which is not given."""

    kind = "usage"


class NoFormError(ArtifactError):
    """An adapter has no form in the format that it is to be written in."""

    kind = "usage"


class SystemFailedError(ArtifactError):
    """The system does not read or write: a full disk, no permission, a broken device."""

    kind = "system"


class CorruptFileError(ArtifactError):
    """A file is truncated, altered or malformed."""


class WeightsError(ArtifactError):
    """A checkpoint's tensors do not fit the program."""

    kind = "base"


class FormatTooNewError(ArtifactError):
    """A file was written by a newer format version than this one reads."""


class BaseMismatchError(ArtifactError):
    """The adapter was trained on other base weights."""

    kind = "base"


_PATHS = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTEMPTY, errno.EEXIST,
    errno.ELOOP, errno.EINVAL,
)  # fmt: skip


def refused(error: OSError, message: str, kind: type[RewriteError] | None = None) -> RewriteError:
    """The error of a system call: a PathError where its path is wrong, else a SystemFailedError; or
    one of class `kind`, with their kind."""
    cls = PathError if error.errno in _PATHS else SystemFailedError
    if kind is None:
        return cls(message)
    failure = kind(message)
    failure.kind = cls.kind
    return failure


def nearest(word: str, choices: Iterable[str], count: int = 3) -> str:
    """Returns the closest of `choices` to `word` as text for an error message."""
    close = difflib.get_close_matches(word, list(choices), n=count, cutoff=0.3)
    return ", ".join(close) if close else "(nothing similar)"
