"""Kills, full disks, flipped bits and fuzzed readers, counted.

    python -m benchmarks.faults [--quick] [--writer NAME] [kills] [flips] [disk_full] [fuzz]

writes `benchmarks/faults.json`. Kills: a forked child writes again and again and is killed at a
random moment; what is read must be a whole old or new version, and a job that was killed must go on
to the same bytes. Flips and truncations: reading must refuse, or give just what was written. Full
disks: what was there must still be readable. Fuzzing takes atheris where it is installed, else it
is left out; `--readers NAME ...` counts some again.
"""

from __future__ import annotations

import argparse
import collections
import json
import mmap
import os
import platform
import random
import resource
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from peftfx import many
from peftfx.exporters import merge
from peftfx.rewriter.errors import RewriteError
from peftfx.rewriter.files import directory, files, job
from peftfx.rewriter.storage import stream
from tests.damage import cuts, flips
from tests.fuzzing import TARGETS
from tests.writers import WRITERS, Writer, prepared

from .fuzz import fuzz, fuzz_here

HERE = Path(__file__).parent


# Kills.


def kills(
    count: int, keep: Callable[[dict[str, Any]], None], names: Sequence[str]
) -> dict[str, Any]:
    """Killed writers; `broken` and `left` should be 0. Keeps what is counted so far."""
    counted: dict[str, Any] = {}
    with prepared():
        for name in names:
            counted[name] = _kills(WRITERS[name], count)
            keep(counted)
    return counted


def _kills(writer: Writer, count: int) -> dict[str, int]:
    draw, seen = random.Random(0), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        for number in (1, 2):  # warms what children inherit
            (warm := Path(place) / f"warm{number}").mkdir()
            writer.write(warm, number)
        window = _window(writer, Path(place))
        for attempt in range(count):
            folder = Path(place) / f"k{attempt if not writer.replaces else 0}"
            folder.mkdir(exist_ok=True)
            if writer.replaces and attempt == 0:
                writer.write(folder, 1)
            seen[_kill(writer, folder, draw.uniform(0, window))] += 1
            seen["left"] += _left(writer, folder)
            if writer.resumes:
                same = _bytes(folder / writer.made) == _bytes(Path(place) / "warm2" / writer.made)
                seen["resumed, equal" if same else "resumed, OTHER"] += 1
    return {"runs": count, "window_ms": round(1000 * window), **seen}


def _bytes(folder: Path) -> dict[str, bytes]:
    """The files of a folder but the records, which have the times of files and work."""
    records = {stream.RECORD, merge.RECORD, many.REPORT}
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in records)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def _window(writer: Writer, place: Path) -> float:
    """Seconds from the first temporary file to the end of writing."""
    times: list[float] = []
    for attempt in range(3):
        folder = place / (f"w{attempt}" if not writer.replaces else "w")
        folder.mkdir(exist_ok=True)
        started: list[float] = []
        _at_start(lambda started=started: started.append(time.perf_counter()))
        if writer.several:  # perhaps by other processes
            started.append(time.perf_counter())
        writer.write(folder, 1 + attempt % 2)
        times.append(time.perf_counter() - started[0])
        _at_start(None)
    return max(times[1:])


_temporary, _hidden = directory.temporary, job.hidden


def _at_start(call: Callable[[], Any] | None) -> None:
    """Calls something whenever writing begins."""

    def told(target: Path, kind: str) -> Path:
        if call is not None:
            call()
        return _temporary(target, kind)

    def hidden(target: Path) -> Path:
        if call is not None:
            call()
        return _hidden(target)

    directory.temporary = files.temporary = told  # pyright: ignore[reportPrivateImportUsage]
    job.hidden = hidden


def _kill(writer: Writer, folder: Path, delay: float) -> str:
    shared = mmap.mmap(-1, 8)  # (writes begun, writes done)
    shared[:8] = struct.pack("<ii", 0, 0)
    child = os.fork()
    if child == 0:
        _write_for_ever(writer, folder, shared)
    until = time.monotonic() + 60
    while struct.unpack("<ii", shared[:8])[0] < 1 and time.monotonic() < until:
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    _, done = struct.unpack("<ii", shared[:8])
    try:
        number = writer.read(folder)
    except RewriteError:
        return "broken" if writer.replaces or done else "absent"
    except (AssertionError, OSError, ValueError):
        return "broken"
    return "new" if done or number == 2 else "old"


def _write_for_ever(writer: Writer, folder: Path, shared: mmap.mmap) -> None:
    begun = done = 0

    def begins() -> None:
        nonlocal begun
        begun += 1
        shared[:8] = struct.pack("<ii", begun, done)

    try:
        _at_start(begins)
        while writer.replaces or not done:
            writer.write(folder, 2 - done % 2)
            done += 1
            shared[:8] = struct.pack("<ii", begun, done)
        time.sleep(60)
    finally:
        traceback.print_exc()
        os._exit(1)


def _left(writer: Writer, folder: Path) -> int:
    """Leftovers after the next successful write."""
    if writer.replaces:
        writer.write(folder, 1)
    elif writer.resumes:
        writer.write(folder, 2)
    else:
        files.write_file(folder / "next", b"")
    return sum(1 for _ in folder.rglob(".*"))


# Flipped bits and truncations.


def flipped(flip_count: int, cut_count: int) -> dict[str, Any]:
    """Damaged files: `other` (read with other values) and `raw` (an error not ours) should be 0."""
    result: dict[str, Any] = {}
    for name, writer in WRITERS.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            if writer.files:
                writer.write(folder, 3)
            for file in writer.files:
                path = folder / file
                good = path.read_bytes()
                want = writer.state(folder)
                for kind, damaged in (
                    ("flips", flips(good, flip_count)), ("cuts", cuts(good, cut_count)),
                ):  # fmt: skip
                    seen = collections.Counter[str]()
                    for bad in damaged:
                        path.write_bytes(bad)
                        seen[_outcome(writer, folder, want)] += 1
                    result.setdefault(f"{name}: {path.name}", {})[kind] = dict(seen)
                path.write_bytes(good)
    return result


def _outcome(writer: Writer, folder: Path, want: str) -> str:
    try:
        return "same" if writer.state(folder) == want else "other"
    except RewriteError:
        return "refused"
    except Exception:  # noqa: BLE001 - to be counted
        traceback.print_exc()
        return "raw"


# Full disks.


def disk_full(
    spaces: tuple[int, ...], names: Sequence[str], known: dict[str, Any]
) -> dict[str, Any]:
    """A new version does not fit: what was there must be, and nothing must be left over; with room,
    the same call goes on. `known` is what was counted of others."""
    seen = dict(known)
    with prepared():
        for name in names:
            for space in spaces:
                seen[f"{name}, {space} bytes free"] = _disk_full(WRITERS[name], space)
    return {"cases": len(seen), "ok": sum(s.startswith("ok") for s in seen.values()), "each": seen}


def _disk_full(writer: Writer, space: int) -> str:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place]
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            writer.write(folder, 1)
            if mounted and not writer.replaces:  # its source is there now
                shutil.rmtree(folder / writer.made)
            if mounted:
                free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
                (folder / "ballast").write_bytes(bytes(max(0, free - space)))
            else:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (space, before[1]))
            how = "tmpfs" if mounted else "RLIMIT_FSIZE"
            try:
                writer.write(folder, 2)
                said, want = "written", 2
            except RewriteError:
                said, want = "refused", 1
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            whole = _whole(writer, folder, want)
            left = [str(p) for p in folder.rglob(".*")]
            (folder / "ballast").unlink(missing_ok=True)
            writer.write(folder, 2)  # with room, the same call goes on
            whole = whole and _whole(writer, folder, 2)
            return f"{'ok' if whole and not left else 'BROKEN'}: {said} ({how})"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            if mounted:
                subprocess.run(["umount", "-l", place], check=True)


def _whole(writer: Writer, folder: Path, want: int) -> bool:
    """Whether a number is there; or, where nothing is replaced, not more than whole folders."""
    if not writer.replaces and want == 1:
        try:
            writer.read(folder)
        except RewriteError:
            return writer.several or not (folder / writer.made).exists()
        return False
    return writer.read(folder) == want or not writer.numbered


def _kept() -> dict[str, Any]:
    """What was counted before."""
    path = HERE / "faults.json"
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--seconds", type=int, default=40, help="of fuzzing for each reader")
    parser.add_argument("--readers", nargs="+", choices=sorted(TARGETS), default=list(TARGETS))
    parser.add_argument(
        "--writer", nargs="+", choices=WRITERS, help="these alone, killed or without room"
    )
    parser.add_argument("--target", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("sections", nargs="*", default=["kills", "flips", "disk_full", "fuzz"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.target:
        fuzz_here(options.target[0], int(options.target[1]))
        return
    small = 10 if options.quick else 1

    def keep(name: str, counted: dict[str, Any]) -> None:
        if options.quick:
            return
        result = _kept()
        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        others = result.get(name, {}) if options.writer else {}  # counted before
        result |= {name: others | counted, "machine": machine}
        (HERE / "faults.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")

    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "kills": lambda: kills(
            200 // small, lambda counted: keep("kills", counted), options.writer or list(WRITERS)
        ),
        "flips": lambda: flipped(300 // small, 50 // small),
        "disk_full": lambda: disk_full(
            (0, 4096, 16384, 32768),
            options.writer or list(WRITERS),
            _kept().get("disk_full", {}).get("each", {}) if options.writer else {},
        ),
        "fuzz": lambda: fuzz(
            options.seconds // small,
            options.readers,
            _kept().get("fuzz", {}).get("each", {}),
            lambda counted: keep("fuzz", counted),
        ),
    }
    for name in options.sections:
        counted = sections[name]()
        print(name, json.dumps(counted, indent=1), flush=True)
        keep(name, counted)


if __name__ == "__main__":
    main()
