#!/usr/bin/env bash
# torch 2.13.0 (CPU).
# Guess: what torch.export.export accepts, ExportedProgram.module() gives back as a module, whatever its children are called.
# Seen: children of a ModuleDict under Python keywords ("in", "class") export, and module() raises a SyntaxError, because the code that
# torch.fx generates writes their path as attributes (self.parts.in.weight). Eager runs them, and fx keeps the names.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q numpy
env/bin/python - <<'PY'
import torch


class Parts(torch.nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.parts = torch.nn.ModuleDict(
            {first: torch.nn.Linear(4, 4), second: torch.nn.Linear(4, 2)}
        )

    def forward(self, x):
        for part in self.parts.values():
            x = part(x)
        return x


def outcome(*names):
    model, x = Parts(*names).eval(), torch.randn(2, 4)
    model(x)
    exported = torch.export.export(model, (x,))
    try:
        exported.module()
        return "module"
    except SyntaxError as error:
        return f"SyntaxError: {error.msg}"


seen = {names: outcome(*names) for names in (("inner", "head"), ("in", "class"))}
for names, what in seen.items():
    print(f"children {names}: eager runs, export works, module() gives: {what}")
if seen != {("inner", "head"): "module", ("in", "class"): "SyntaxError: invalid syntax"}:
    raise SystemExit("this has changed")
PY
