"""Several workers with one PostgreSQL server, which the test starts in a folder of its own."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from peftfx.rewriter.errors import SystemFailedError
from peftfx.search import search
from peftfx.search.sampling import library

from .common import command, distinct, environment, recipes, score, small, space

PACKAGES = ("optuna", "psycopg2")


def programs() -> Path | None:
    """The folder of the server's programs."""
    found = shutil.which("initdb")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return Path(found).parent if found else debian[-1].parent if debian else None


def obstacle() -> str:
    """Why no server can be started here."""
    if missing := [p for p in PACKAGES if importlib.util.find_spec(p) is None]:
        return f"{missing[0]} is not installed"
    if programs() is None:
        return "PostgreSQL is not installed (Debian's package postgresql)"
    if os.geteuid() == 0 and "postgres" not in {u.pw_name for u in pwd.getpwall()}:
        return "PostgreSQL does not run as root, and there is no user postgres"
    return ""


pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle())


@pytest.fixture
def server() -> Generator[str]:
    """The URL of a server without data, which is stopped behind the test."""
    other: dict[str, Any] = {}
    root = os.geteuid() == 0
    folder = Path(tempfile.mkdtemp(dir="/var/tmp" if root else None))  # where others may look, too
    if root:
        other = {"user": "postgres", "cwd": "/"}
        shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tools, data = programs() or Path(), folder / "data"
    options = f"-k {folder} -p {port} -c listen_addresses=127.0.0.1 -c fsync=off"
    start = [
        f"{tools}/pg_ctl",
        "-D",
        f"{data}",
        "-l",
        f"{folder}/log",
        "-w",
        "-o",
        options,
        "start",
    ]
    init = [f"{tools}/initdb", "-D", f"{data}", "-A", "trust", "-U", "peftfx", "--no-sync"]
    try:
        for step in (init, start):
            subprocess.run(step, check=True, capture_output=True, timeout=120, **other)
        yield f"postgresql+psycopg2://peftfx@127.0.0.1:{port}/postgres"
    finally:
        stop = [f"{tools}/pg_ctl", "-D", f"{data}", "-m", "immediate", "stop"]
        subprocess.run(stop, check=False, capture_output=True, timeout=120, **other)
        shutil.rmtree(folder, ignore_errors=True)


def test_workers_share_a_server(server: str) -> None:
    """Two processes and two threads: each configuration once, and all see all."""
    library().logging.set_verbosity(library().logging.ERROR)
    base = small()
    options: Any = {"sampler": "random", "storage": server}
    first = search(base, space(), score, trials=2, **options)
    others = [subprocess.Popen(command(server, 16, 0.02), env=environment()) for _ in range(2)]
    search(base, space(), score, trials=16, jobs=2, **options)
    assert [o.wait(120) for o in others] == [0, 0]
    found = search(base, space(), score, trials=16, **options)
    assert 16 <= len(found.trials) <= 16 + 3 and distinct(recipes(found))
    assert found.trials[:2] == first.trials


def test_a_server_that_is_not_there(server: str) -> None:
    away = server.replace("/postgres", "/nothing")
    with pytest.raises(SystemFailedError, match=r"nothing.*Give another"):
        search(small(), space(), score, trials=2, storage=away)
