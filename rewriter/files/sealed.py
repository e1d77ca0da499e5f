"""Manifests that hold a hash of themselves, so that no flipped bit in one goes unseen."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import CorruptFileError, FormatTooNewError
from .files import write_json

SEAL = "sha256"


def seal_of(rest: Mapping[str, Any]) -> str:
    """sha256 of what a manifest says, whatever its spacing."""
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as a file, with the hash of the rest of it."""
    return write_json({**manifest, SEAL: seal_of(json.loads(json.dumps(manifest)))})


def unsealed(data: Any, keys: Mapping[str, Any], known: int, where: str) -> dict[str, Any]:
    """The manifest that `sealed` wrote, checked; the first format had no seal.

    Args:
        data: its JSON.
        keys: what it holds, and the types.
        known: newest format that is read.
        where: its file, for errors.

    Raises:
        CorruptFileError: altered, malformed or unknown keys.
        FormatTooNewError: written by a newer version.
    """
    version = version_of(data, known, where)
    if version == 1:
        return checked(data, keys, where)
    manifest = checked(data, {**keys, SEAL: str}, where)
    if seal_of({k: v for k, v in manifest.items() if k != SEAL}) != manifest.pop(SEAL):
        raise CorruptFileError(f"{where} was altered (its sha256 differs). Save it again.")
    return manifest


def version_of(data: Any, known: int, where: str) -> int:
    """The format version of a manifest; another one is refused before all else is looked at.

    Raises:
        CorruptFileError, FormatTooNewError: it is malformed, or newer than `known`.
    """
    if not isinstance(data, dict):
        raise CorruptFileError(f"{where} is not a JSON object.")
    version: Any = data.get("format_version")  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    if type(version) is int and version > known:
        said: Any = data.get("versions")  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        by = said.get("peftfx") if isinstance(said, dict) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        raise FormatTooNewError(
            f"{where} has format {version}{f', written by peftfx {by}' if by else ''}; this "
            f"version reads up to {known}. Upgrade peftfx."
        )
    if type(version) is not int or version < 1:
        raise CorruptFileError(f"{where}: format_version {version!r} is unknown.")
    return version


def checked(data: Any, keys: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A JSON object with exactly the given keys, each of its type.

    Raises:
        CorruptFileError: it is not.
    """
    if not isinstance(data, dict):
        raise CorruptFileError(f"{where} is not a JSON object.")
    content: dict[str, Any] = data  # pyright: ignore[reportUnknownVariableType]
    unknown = sorted(set(content) - set(keys))
    missing = sorted(set(keys) - set(content))
    if unknown or missing:
        what = f"unknown key {unknown[0]!r}" if unknown else f"key {missing[0]!r} is missing"
        raise CorruptFileError(f"{where}: {what}. The file was altered or is of another format.")
    for key, kind in keys.items():
        number = kind is int and isinstance(content[key], bool)
        if number or not isinstance(content[key], kind):
            raise CorruptFileError(f"{where}: {key!r} has the wrong type.")
    return content


def compare_versions(said: Mapping[str, Any], own: str, where: str) -> None:
    """Warns of a file that a newer peftfx or a newer major torch wrote.

    Args:
        said: the manifest's `versions`.
        own: the version of this peftfx.
        where: the file.
    """
    for name, here, parts in (("peftfx", own, 2), ("torch", str(torch.__version__), 1)):
        there = said.get(name)
        if isinstance(there, str) and _number(there, parts) > _number(here, parts):
            warnings.warn(
                f"{where} was written with {name} {there[:40]}, this is {name} {here}: what is "
                f"loaded may differ. Upgrade {name}, or check it with program.verify().",
                UserWarning,
                stacklevel=2,
            )


def _number(version: str, parts: int) -> tuple[int, ...]:
    return tuple(int(n[:9]) for n in re.findall(r"\d+", version[:40])[:parts])
