#!/usr/bin/env bash
# torch 2.13.0 (CPU).
# Guess: torch.hash_tensor tells whether a frozen weight is still what it was.
# Seen: it is an xor of words, so it is blind to the changes that happen to weights: -w, w with its entries in another order, and all
# constants (zeros, threes) have one hash; complex64 has no kernel. A single changed entry is seen.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0
env/bin/pip install -q numpy
env/bin/python - <<'PY'
import torch

torch.manual_seed(0)
w = torch.randn(8, 8)
other = w.clone()
other[0, 0] += 1


def same(a, b):
    return bool(torch.hash_tensor(a) == torch.hash_tensor(b))


seen = {
    "w and -w": same(w, -w),
    "w and its transpose": same(w, w.t().contiguous()),
    "zeros and threes": same(torch.zeros(8), torch.full((8,), 3.0)),
    "w and w with one other entry": same(w, other),
}
try:
    torch.hash_tensor(torch.ones(4, dtype=torch.complex64))
    seen["complex64"] = "works"
except NotImplementedError:
    seen["complex64"] = "NotImplementedError"
for what, equal in seen.items():
    print(f"{what}: {equal if isinstance(equal, str) else 'equal hashes' if equal else 'different hashes'}")
if list(seen.values()) != [True, True, True, False, "NotImplementedError"]:
    raise SystemExit("this has changed")
PY
