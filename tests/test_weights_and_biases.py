"""`fit(loggers=["wandb"])` with the library itself, offline; skipped where it is not installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TRAINING = """
import json, peftfx, torch
from torch import nn
base = peftfx.capture(nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 4),))
program = peftfx.run(base, "lora{rank=2,where=linear}")
batches = [{"input": torch.randn(2, 4)} for _ in range(3)]
done = peftfx.fit(
    program, batches, lambda out, batch: out.pow(2).mean(), held_out=batches[:1], progress=False,
    loggers=["wandb"],
)
print(json.dumps([done.losses, done.held_out]))
"""

READING = """
import json, pathlib
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore
store, rows = DataStore(), []
store.open_for_scan(str(next(pathlib.Path("wandb").glob("offline-run-*/*.wandb"))))
while data := store.scan_data():
    record = Record.FromString(data)
    if record.WhichOneof("record_type") == "history":
        items = record.history.item
        rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    if record.WhichOneof("record_type") == "exit":
        rows.append(record.exit.exit_code)
print(json.dumps(rows))
"""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_a_run_holds_every_step(tmp_path: Path) -> None:
    """In processes of its own, since the library keeps one running that writes the file."""

    def said(code: str) -> Any:
        env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    losses, held_out = said(TRAINING)
    *rows, ended = said(READING)
    assert [row["train/loss"] for row in rows] == losses and ended == 0
    assert [row["_step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["held_out/loss"] == held_out[-1][1]
