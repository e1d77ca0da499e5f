"""Wrong lines, seeded one at a time, and what catches each.

    python -m benchmarks.mutations [--only WORD ...]

writes `benchmarks/mutations.json`; with `--only`, over what it says of the same mutations. Every
mutation swaps the code of one function in a forked child, and its probe
(`tests/mutant_probes.py`) has to fail there, in two dtypes and with two seeds; the same probe
passes without it. What catches it is an error of ours (the verifier, or a reader that refuses), or
a check of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peftfx.rewriter.errors import RewriteError
from tests import mutant_probes as probe
from tests.mutant_probes import folds, reference, reloads, runs
from tests.mutants import DTYPES, MODELS, Case, Mutation, applied, base

HERE = Path(__file__).parent
SEEDS = (0, 1)

_LORA, _SQUARE = "lora{rank=4,alpha=6,where=linear}", "lora{rank=32,alpha=6,where=embedding.token}"
_TABLE = "lora{rank=4,alpha=6,where=embedding.token}"
"""Beside linears, factors are folded; elsewhere the delta."""
_ADALORA, _DORA = "adalora{rank=4,alpha=6,where=linear}", "dora{rank=4,alpha=6,where=q|v}"
_SERIAL, _PREFIX = "serial_adapter{bottleneck=6,norms=false}", "prefix_tuning{length=5}"
_PROMPT = "prompt_tuning{length=4}"
_METHODS, _ADDITIVE = "passes/reparameterized", "passes/additive"
_FREEZE, _ROWS = "rewriter/edits/edit.py:Editor.freeze", f"{_METHODS}/dora.py:DoRABranch.rows"

MUTATIONS = tuple(Mutation(*each) for each in [
    # Branches: what they compute, what they fold, and what they start as.
    ("sign", f"{_METHODS}/lora.py:LoRABranch.delta", "* self.scale", "* -self.scale",
     folds(_TABLE)),
    ("scale", f"{_METHODS}/lora.py:LoRABranch.delta", "* self.scale", "* self.scale * 0.8",
     folds(_TABLE)),
    ("scale", f"{_METHODS}/lora.py:LoRABranch.factors", "self.scale", "self.scale * 0.8",
     folds(_LORA)),
    ("transpose", f"{_METHODS}/lora.py:LoRABranch.delta", "b * self.scale,",
     "(b * self.scale).T,",
     folds(_SQUARE)),
    ("sign", f"{_METHODS}/lora.py:LoRABranch.branch", "self.scale", "-self.scale",
     reference(_LORA)),
    ("transpose", f"{_METHODS}/lora.py:LoRABranch.branch", "*self.acting(),",
     "self.acting()[0].T, self.acting()[1],", reference("lora{rank=32,alpha=6,where=q}")),
    # What zeros at first hide, and what usual inputs do.
    ("samples", f"{_METHODS}/lora.py:LoRABranch.branch", "self.dropped(x)",
     "x - x.mean(0, keepdim=True)", runs(_LORA)),
    ("tokens", f"{_METHODS}/lora.py:LoRABranch.branch", "self.dropped(x)", "x.roll(-1, 1)",
     runs(_LORA)),
    ("gradient", f"{_METHODS}/lora.py:LoRABranch.branch", "self.dropped(x)", "x.detach()",
     runs(_LORA)),
    ("gradient", f"{_ADDITIVE}/serial_adapter.py:SerialAdapterBranch.units",
     "linear(z, self.down,", "linear(z.detach(), self.down,", runs(_SERIAL)),
    ("mode", f"{_METHODS}/lora.py:LoRABranch.branch", "self.scale",
     "self.scale * (1 + self.training)", runs(_LORA)),
    ("clip", f"{_METHODS}/lora.py:LoRABranch.branch", "self.dropped(x)", "x.clamp(-6, 6)",
     folds(_LORA)),
    ("clip", f"{_METHODS}/lora.py:LoRABranch.branch", "self.dropped(x)",
     "x * (x.abs() > 0.05)", folds(_LORA)),
    ("scale", f"{_METHODS}/lora.py:LoRA.scale", "return alpha / (", "return 2 * alpha / (",
     reference(_LORA)),
    ("seed", f"{_METHODS}/lora.py:LoRA.made", "self.rank, edit.generator", "self.rank, None",
     probe.same_seed("lora")),
    ("initial value", f"{_METHODS}/factors.py:low_rank_parameters", "torch.zeros(", "torch.ones(",
     runs(_LORA)),
    ("scale", f"{_METHODS}/lora.py:LoRABranch.factors", "self.scale", "self.scale / 2",
     probe.each_branch("lora")),
    ("scale", _ROWS, "beta=2 * self.scale", "beta=self.scale", probe.rows_alone),
    ("sign", _ROWS, "squares + (", "squares - (", reference(_DORA)),
    ("wrong value", _ROWS, "self.m / root", "self.m * root", runs(_DORA)),
    ("sign", f"{_METHODS}/dora.py:DoRABranch.branch", "self.scale", "-self.scale",
     folds(_DORA)),
    ("axis", f"{_METHODS}/dora.py:squared_norms", "dim=1", "dim=0", probe.rows_alone),
    ("sign", f"{_METHODS}/adalora.py:AdaLoRABranch.branch", "self.e * ", "self.e.abs() * ",
     reference(_ADALORA)),
    ("silent skip", f"{_METHODS}/adalora.py:AdaLoRABranch.factors", "self.q * self.e[:, None]",
     "self.q", probe.each_branch("adalora")),
    ("sign", f"{_ADDITIVE}/ia3.py:IA3Output.scale", "self.l", "2 - self.l", reference("ia3")),
    ("side", f"{_ADDITIVE}/ia3.py:IA3.insert", "if at_input else IA3Output",
     "if False else IA3Output", reference("ia3")),
    ("swap", f"{_ADDITIVE}/prefix_tuning.py:PrefixBranch.rows", "self.key, self.value",
     "self.value, self.key", reference(_PREFIX)),
    ("seed", f"{_ADDITIVE}/prefix_tuning.py:PrefixTuning.made", "w, generator=edit.generator",
     "w", probe.same_seed("prefix_tuning")),
    ("silent skip", f"{_ADDITIVE}/serial_adapter.py:SerialAdapterBranch.update",
     "self.up, self.up_bias)", "self.up)", runs(_SERIAL)),
    ("sign", "rewriter/branches/branch.py:Serial.transform",
     "return h + ", "return h - ", reference(_SERIAL)),
    ("order", "rewriter/branches/prompts.py:KeyValue._join", "[rows.to(x.dtype), x]",
     "[x, rows.to(x.dtype)]", reference(_PREFIX)),
    ("feature", "rewriter/branches/prompts.py:Tokens.forward", "self.front + self.length :]",
     ": -self.front - self.length]", reference(_PROMPT)),
    ("cast", "rewriter/branches/shapes.py:linear", "weight.to(x.dtype)",
     "weight.to(torch.float16).to(x.dtype)", folds(_LORA)),
    ("dtype", "rewriter/branches/prompts.py:KeyValue._join", "torch.cat([rows.to(x.dtype), x]",
     "torch.cat([rows.to(x.dtype), x.double()]", runs(_PREFIX)),
    ("feature", "rewriter/branches/branch.py:Branch.spread_last", "(-1, self.features)",
     "(-1, self.features.flip(0))", folds("lora{rank=4,where=v}", "fused")),
    ("feature", "rewriter/branches/branch.py:RowScale.full_rows", "dense[self.own]",
     "dense[self.own.flip(0)]", runs("dora{rank=4,where=v}", "fused")),
    ("silent skip", "passes/selective/bitfit.py:BitFit.insert", "edit.train(bias)", "pass",
     reference("bitfit")),
    # Banks, masks and means.
    ("relation", "rewriter/branches/rowwise.py:RowwiseLowRank._narrowed", "t[ids]",
     "t[ids.flip(0)]",
     probe.by_row),
    ("scale", "rewriter/branches/rowwise.py:RowwiseLowRank._narrowed", "scale[:, None, None]",
     "scale[:1, None, None]", probe.by_row),
    ("mask", "rewriter/edits/attention/keyvalue.py:WidenMask.forward",
     "self.fill)", "0.0)", reference(_PREFIX)),
    ("mask", "rewriter/edits/attention/keyvalue.py:WidenMask.forward",
     "[left, mask]", "[mask, left]",
     reference(_PREFIX)),
    ("mask", "rewriter/edits/stream/hidden.py:Axes.mean", 'reach == "past"', 'reach == "never"',
     probe.stays_causal("unipelt")),
    ("mask", "rewriter/edits/stream/hidden.py:hidden_of",
     "valid_of(program, axes, states), is_causal", "None, is_causal",
     probe.padding_does_not_matter),
    # The core: folding.
    ("silent skip", "rewriter/edits/folding/rules.py:_fold_delta",
     "weight.with_rows_changed(Added(branch, widest(weight.dense())).to)", "weight",
     folds(_LORA)),
    ("scale", "rewriter/weights/blocks.py:Added.__init__", "b * scale", "0.9 * b * scale",
     folds(_LORA)),
    ("axis", "rewriter/edits/folding/rules.py:_fold_rows",
     "c[rows]", "c[: len(block)].flip(0)", folds(_DORA)),
    ("axis", "rewriter/edits/folding/rules.py:_fold_input",
     "weight.with_columns", "weight.with_rows",
     folds("ia3")),
    ("axis", "rewriter/weights/format.py:Dense.rows_scaled",
     "factor[rows]", "factor[: len(block)].flip(0)", folds("ia3")),
    ("transpose", "rewriter/branches/shapes.py:LinearShape.stored",
     "self.matrix(matrix)", "self.matrix(matrix).mT",
     folds(_LORA)),
    ("sign", "rewriter/weights/blocks.py:Added.to", "block.addmm_(self.b[rows], self.a)",
     "block.addmm_(self.b[rows], self.a, alpha=-1)", folds(_LORA)),
    ("relation", "rewriter/program/readers.py:Readers.others", "self.of(name)", "self.of(name)[:0]",
     probe.untied),
    ("silent skip", "rewriter/run/before_fold.py:keep_trained", "after[n] is not t", "False",
     probe.partial_fold),
    ("order", "rewriter/edits/linear/compose.py:compose",
     "(*of_slot(\"output_scale\"), *of_slot(\"output_shift\"))", "of_slot(\"output_shift\")",
     runs("ia3")),
    # The core: what trains, seeds, replays, what was changed.
    ("silent skip", _FREEZE, "train_only(self.program, chosen(self.program) if undecided else ())",
     "None", probe.trains_alone),
    ("seed", "rewriter/pipeline/method.py:Method.random_seed",
     "0 if self.adapter == self.text else",
     "0 if 1 else", probe.adapters_differ),
    ("silent skip", "rewriter/run/replay.py:load_values",
     "own.copy_(placed_like(whole(tensor), own))",
     "pass", reloads(_LORA)),
    ("silent skip", "rewriter/program/unchanged.py:changed", "differs(of_base",
     "False and differs(of_base", probe.base_moved),
    ("silent skip", "rewriter/program/unchanged.py:changed",
     "differs(own", "False and differs(own",
     probe.altered_program),
    ("relation", "rewriter/run/replay.py:_kept", "record.adapter not in names",
     "record.adapter in names", probe.removes),
    # Readers and writers.
    ("cast", "rewriter/storage/artifact.py:_files", "{n: whole(t) for n, t in tensors.items()}",
     "{n: whole(t).half().to(t.dtype) for n, t in tensors.items()}", reloads(_LORA)),
    ("silent skip", "rewriter/files/files.py:tensors_of", "tensor_digest(tensor) != digests[name]",
     "False", probe.flipped_tensor),
    ("silent skip", "rewriter/files/sealed.py:unsealed", "!= manifest.pop(SEAL)",
     "== manifest.pop(SEAL) * 2", probe.altered_manifest),
    ("silent skip", "rewriter/storage/loading.py:load",
     "merkle_root(have) != artifact.base_root", "False",
     probe.other_base),
    ("silent skip", "rewriter/storage/folding.py:Folder.folded",
     "tensor if self.uses", "None if self.uses",
     probe.streamed),
    ("cast", "rewriter/storage/folding.py:Folder._if_changed", ".to(old.dtype)",
     ".to(torch.float8_e4m3fn).to(old.dtype)", probe.streamed),
    ("relation", "rewriter/storage/program_file.py:_manifest", "if p.requires_grad",
     "if not p.requires_grad", probe.program_files),
    # Capture.
    ("mask", "rewriter/graph/modes.py:Attention.forward", "query, key, value, mask, p",
     "query, key, value, None, p", probe.captures),
    ("mode", "rewriter/graph/modes.py:BatchNorm.forward", "self.training or mean is None",
     "True", probe.captures),
    ("mode", "rewriter/graph/modes.py:follow_modes", "modes.get(path, model.training)",
     "model.training", probe.captures),
    ("scale", "rewriter/graph/modes.py:Attention.forward", "scale=scale", "scale=0.5",
     probe.captures),
])  # fmt: skip


def caught(mutation: Mutation, case: Case) -> str:
    """What fails with the mutation; empty if nothing does."""
    with applied(mutation):
        return failed(mutation, case)


def failed(mutation: Mutation, case: Case) -> str:
    """What fails in a probe: an error of ours by its name, or the check; empty if nothing does."""
    try:
        mutation.probe(case)
    except RewriteError as error:
        return f"{type(error).__name__} in {_operation(error)}"
    except AssertionError:
        return said(mutation.probe)
    except Exception as error:  # noqa: BLE001 - loud, but not ours
        return f"raw {type(error).__name__}"
    return ""


def said(check: Callable[..., Any]) -> str:
    """The name of a check."""
    title = (check.__doc__ or "").split(":")[0].split("\n")[0]
    if check.__name__.startswith("test_"):
        return check.__name__
    return f"{title}: {check.__name__}" if title.startswith("tests/") else check.__name__


_OPERATIONS = ("run", "verify_program", "load", "save", "save_program", "load_program", "capture",
               "fold_checkpoint")  # fmt: skip


def _operation(error: BaseException) -> str:
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return next((n.removesuffix("_program") if n == "verify_program" else n
                 for n in names if n in _OPERATIONS), "a call")  # fmt: skip


def isolated(call: Callable[[], str]) -> str:
    """What a call returns in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            text = call()
        except BaseException as error:  # noqa: BLE001 - told to the parent
            text = f"ERROR {type(error).__name__}: {error}"
        os.write(writer, text.encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read().decode()
    os.waitpid(child, 0)
    return text


def tried(mutation: Mutation, clean: dict[Any, str]) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {
        "kind": mutation.kind, "where": mutation.where,
        "mutation": f"{mutation.old} -> {mutation.new}",
    }  # fmt: skip
    for name, dtype in DTYPES.items():
        seen: list[str] = []
        for seed in SEEDS:
            case = Case(dtype, seed)
            if (key := (mutation.probe, case)) not in clean:
                clean[key] = isolated(lambda case=case: failed(mutation, case))
            if clean[key]:
                seen.append(f"PROBE FAILS WITHOUT IT: {clean[key]}")
            else:
                seen.append(isolated(lambda case=case: caught(mutation, case)) or "missed")
        row[name] = ", ".join(dict.fromkeys(seen))
    return row


def holds(row: dict[str, Any]) -> bool:
    """Whether a mutation is caught in both dtypes and with all seeds, for a reason of ours."""
    return not any(word in row[name] for name in DTYPES
                   for word in ("missed", "PROBE", "ERROR", "raw "))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="those whose text holds one of these"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in MODELS:  # captured once; children inherit it
        for dtype in DTYPES.values():
            base(name, dtype)
    clean: dict[Any, str] = {}
    rows: list[dict[str, Any]] = []
    print("| mutation | where | float32 | bfloat16 |\n|---|---|---|---|", flush=True)
    for mutation in (m for m in MUTATIONS if any(o in m.name for o in options.only)):
        row = tried(mutation, clean)
        rows.append(row)
        mark = "" if holds(row) else "**NOT CAUGHT** "
        cells = row["mutation"].replace("|", "\\|"), row["where"], row["float32"], row["bfloat16"]
        print(f"| {mark}{row['kind']}: {' | '.join(cells)} |", flush=True)
    kept = keep(rows)
    print(f"{kept['caught']} of {kept['mutations']} caught")
    sys.exit(kept["caught"] < kept["mutations"])


def keep(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes what was tried over what was known of the same mutations."""
    path = HERE / "mutations.json"
    known: list[dict[str, Any]] = json.loads(path.read_text())["each"] if path.exists() else []
    each = {_key(row): row for row in (*known, *rows)}
    wanted = [(m.where, f"{m.old} -> {m.new}") for m in MUTATIONS]
    rows = [each[key] for key in wanted if key in each]
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "mutations": len(MUTATIONS), "caught": sum(map(holds, rows)), "dtypes": list(DTYPES),
        "seeds": list(SEEDS), "missed": [r["mutation"] for r in rows if not holds(r)],
        "each": rows,
    }  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["where"], row["mutation"]


if __name__ == "__main__":
    main()
