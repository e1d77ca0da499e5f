"""What must fail under a seeded mutation (`tests/mutants.py`): `run`, `verify`, `fold` or `load` with
an error of ours, or a check of the tests.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.errors import RewriteError

from . import test_method_checks as checks
from .methods import (
    test_adalora,
    test_bitfit,
    test_dora,
    test_lora,
    test_prefix_tuning,
    test_prompt_tuning,
    test_serial_adapter,
)
from .methods.common import hooked, tensors
from .models import DecoderLayer, batch, first
from .mutants import Case

# Probes: independent references.

Reference = Callable[[nn.Module, peftfx.Program, Mapping[str, Tensor]], Any]


def _wide(program: peftfx.Program) -> dict[str, dict[str, Tensor]]:
    held = tensors(program).items()
    return {site: {n: t.double() for n, t in each.items()} for site, each in held}


def _serial(model: nn.Module, program: peftfx.Program, inputs: Any) -> Any:
    last = {"attn": "o_proj", "ffn": "down"}
    held = {f"layers.0.{last[s.rpartition('.')[2]]}": t for s, t in _wide(program).items()}
    return test_serial_adapter.reference(model, held, inputs)


def _prefix(model: nn.Module, program: peftfx.Program, inputs: Any) -> Any:
    rows = [(t["key"], t["value"]) for t in _wide(program).values()]
    return test_prefix_tuning.reference(model, rows, inputs)


def _prompt(model: nn.Module, program: peftfx.Program, inputs: Any) -> Any:
    (held,) = _wide(program).values()
    return test_prompt_tuning.reference(model, "embed", held["prompt"], inputs)


def _bitfit(model: nn.Module, program: peftfx.Program, inputs: Any) -> Any:
    held = program.named_trainable_parameters().items()
    return test_bitfit.reference(model, {n: t.detach().double() for n, t in held}, inputs)


def _ia3(model: nn.Module, program: peftfx.Program, inputs: Any) -> Any:
    """As `test_ia3.reference`, which tells sides by sizes; here all are equal."""
    held = {site: t["l"] for site, t in _wide(program).items()}
    down = model.get_submodule("layers.0.down")
    scaled = held.pop("layers.0.down")
    handle = down.register_forward_pre_hook(lambda _, i: (i[0] * scaled,))
    with hooked(model, {n: lambda _, o, l=l: o * l for n, l in held.items()}):
        output = model(**inputs)
    handle.remove()
    return output


REFERENCES: dict[str, Reference] = {
    "lora{rank=4,alpha=6,where=linear}": lambda m, p, i: test_lora.reference(m, _wide(p), i, 1.5),
    "lora{rank=32,alpha=6,where=q}": lambda m, p, i: test_lora.reference(m, _wide(p), i, 6 / 32),
    "adalora{rank=4,alpha=6,where=linear}":
        lambda m, p, i: test_adalora.reference(m, _wide(p), i, 1.5),
    "dora{rank=4,alpha=6,where=q|v}": lambda m, p, i: test_dora.reference(m, _wide(p), i, 1.5),
    "ia3": _ia3,
    "serial_adapter{bottleneck=6,norms=false}": _serial,
    "prefix_tuning{length=5}": _prefix,
    "prompt_tuning{length=4}": _prompt,
    "bitfit": _bitfit,
}  # fmt: skip
"""The equations of `tests/methods`, in float64."""


@functools.cache
def reference(recipe: str) -> Callable[[Case], None]:
    """tests/methods: equals its reference."""

    def equals_its_reference(case: Case) -> None:
        model, inputs = case["decoder"][0], batch(4, 11, case.seed, 3)
        by = 0.8 if recipe.startswith(("prefix", "ia3")) else 0.3
        program = case.made(recipe, by=by)
        wide = copy.deepcopy(model).double()
        bare = first(wide(**inputs))
        want = first(REFERENCES[recipe](wide, program, inputs))
        real = inputs["attention_mask"].bool()
        got = first(program(**inputs)).detach()
        case.near(want[real], got[real], bare[real], "equals_its_reference")

    return equals_its_reference


# Probes: the verifier.


@functools.cache
def runs(recipe: str, name: str = "decoder") -> Callable[[Case], None]:
    """`run` and `verify` hold."""

    def run(case: Case) -> None:
        assert all(c.holds for c in case.made(recipe, name).verify())

    return run


@functools.cache
def folds(recipe: str, name: str = "decoder", option: str = "") -> Callable[[Case], None]:
    """`fold` holds; what it folds is compared by the verifier alone."""

    def fold(case: Case) -> None:
        peftfx.run(case.made(recipe, name), f"fold{option}")

    return fold


def partial_fold(case: Case) -> None:
    """tests/test_fold_certificate.py: a partial fold leaves what another adapter trains."""
    program = case.made("bitfit;ia3")
    folded = peftfx.run(program, "fold{names=[ia3]}")
    gone, want = folded.without("ia3"), program.without("ia3")
    assert torch.equal(first(gone(**batch())), first(want(**batch())))


def untied(case: Case) -> None:
    """tests/test_fold_readers.py: a shared tensor is not changed for another reader."""
    program = case.made("lora{rank=4,where=head}", "tied")
    try:
        folded = peftfx.run(program, "fold")
    except RewriteError as error:
        if "also read by" in str(error):
            return
        raise
    raise AssertionError(f"folded into a shared tensor: {folded.history[-1]}")


# Probes: files.


@functools.cache
def reloads(recipe: str) -> Callable[[Case], None]:
    """tests/test_methods.py: what is loaded is what was saved, bit for bit."""

    def save_and_load(case: Case) -> None:
        program = case.made(recipe)
        want = first(program(**batch()))
        with tempfile.TemporaryDirectory() as folder:
            peftfx.save(program, Path(folder) / "a")
            loaded = peftfx.load(case["decoder"][1], Path(folder) / "a")
        assert torch.equal(first(loaded(**batch())), want), "loaded otherwise than saved"

    return save_and_load


def _refused(case: Case, damage: Callable[[Path], None], target: Any = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        peftfx.save(case.made("lora{rank=4}"), path)
        damage(path)
        try:
            peftfx.load(target or case["decoder"][1], path)
        except RewriteError:
            return
    raise AssertionError("damage was loaded")


def flipped_tensor(case: Case) -> None:
    """tests/test_damage.py: a flipped bit of a tensor is refused."""

    def damage(path: Path) -> None:
        file = path / "tensors.safetensors"
        data = bytearray(file.read_bytes())
        data[-2] ^= 1
        file.write_bytes(data)

    _refused(case, damage)


def altered_manifest(case: Case) -> None:
    """tests/test_damage.py: another alpha in a manifest is refused."""

    def damage(path: Path) -> None:
        file = path / "manifest.json"
        file.write_text(file.read_text().replace("lora{rank=4}", "lora{rank=4,alpha=9}"))

    _refused(case, damage)


def other_base(case: Case) -> None:
    """tests/test_artifact.py: a base off by one unit is refused."""
    model = copy.deepcopy(case["decoder"][0])
    model.layers[0].up.weight[0, 0] *= 1.01
    _refused(case, lambda _: None, peftfx.capture(model, kwargs=batch()))


def base_moved(case: Case) -> None:
    """tests/test_fingerprint.py: a base that was written meanwhile is refused."""
    torch.manual_seed(case.seed)
    model = copy.deepcopy(case["decoder"][0])
    program = peftfx.run(peftfx.capture(model, kwargs=batch()), "lora{rank=4}")
    model.layers[0].up.weight.mul_(1.5)
    try:
        peftfx.run(program, "ia3")
    except RewriteError:
        return
    raise AssertionError("the base moved unseen")


def streamed(case: Case) -> None:
    """tests/test_stream.py: shards are those of a fold in memory."""
    model, program = case["decoder"][0], case.made("lora{rank=4,where=q|ffn};ia3{where=k}")
    want = peftfx.run(program, "fold").export_state_dict()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        source.mkdir()
        safetensors.torch.save_file(model.state_dict(), source / "model.safetensors")
        peftfx.fold_checkpoint(program, source, target)
        got = safetensors.torch.load_file(target / "model.safetensors")
    for name, tensor in got.items():
        assert torch.equal(tensor, want[name]), f"{name} is folded otherwise in files"


def program_files(case: Case) -> None:
    """Registered: program files."""
    with tempfile.TemporaryDirectory() as folder:
        program = case.made("prefix_tuning{length=3};lora{rank=4}")
        want = first(program(**batch()))
        peftfx.save_program(program, Path(folder) / "p")
        loaded = peftfx.load_program(Path(folder) / "p")
    got, names = first(loaded(**batch())), set(program.named_trainable_parameters())
    assert set(loaded.named_trainable_parameters()) == names, "something else trains"
    bare = first(case["decoder"][1](**batch()))
    case.near(want.detach(), got.detach(), bare, "program_files")


# Probes: registered checks and other tests.


def registered(check: Callable[..., None], method: str, *more: Any) -> Callable[[Case], None]:
    """A check of `tests/test_method_checks.py` or `tests/test_methods.py`, called as it is."""

    @functools.wraps(check)
    def probe(case: Case) -> None:
        check(case, method, *more)

    return probe


@functools.cache
def same_seed(method: str) -> Callable[[Case], None]:
    return registered(checks.test_the_same_seed_twice_gives_the_same_bits, method)


@functools.cache
def stays_causal(method: str) -> Callable[[Case], None]:
    return registered(checks.test_a_causal_model_stays_causal, method, "decoder")


@functools.cache
def each_branch(method: str) -> Callable[[Case], None]:
    return registered(checks.test_each_branch_is_its_delta, method, "decoder")


def adapters_differ(case: Case) -> None:
    """tests/test_adapter_names.py: two adapters of one method start apart."""
    program = peftfx.run(case["decoder"][1], "lora{name=one};lora{name=two}")
    held = program.named_trainable_parameters()
    (one, *_), (two, *_) = ([t for n, t in held.items() if f".{k}." in n] for k in ("one", "two"))
    assert not torch.equal(one, two), "both adapters start equal"


def rows_alone(case: Case) -> None:
    """tests/methods/test_dora.py: rows are magnitudes over the norms of the moved weight."""
    program = case.made("dora{rank=4,alpha=6,where=q|v}")
    for attachment in program.attachments:
        branch: Any = program.branch(attachment)
        weight = program.module.get_parameter(attachment.site).detach()
        held = {n: p.detach().double() for n, p in branch.named_parameters()}
        wide = weight.double() + 1.5 * held["b"] @ held["a"]
        got, want = branch.rows(weight).detach().double(), held["m"] / wide.norm(dim=1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def by_row(case: Case) -> None:
    """tests/methods/test_bank.py: each row has its own adapter."""
    program = case.made("lora{rank=2,name=a};lora{rank=3,name=b,where=q|o}")
    inputs = batch(3, 9, case.seed)
    got = first(peftfx.run(program, "bank")(**inputs, adapter=torch.tensor([1, 0, -1])))
    bare = first(case["decoder"][1](**inputs))
    for row, name in enumerate("ba"):
        want = first(program.only((name,))(**inputs))[row].detach()
        case.near(want, got[row], bare[row], f"row {row} of a bank")
    assert torch.equal(got[2], bare[2]), "the row without adapter"


def padding_does_not_matter(case: Case) -> None:
    """tests/test_methods.py: what a token gets does not depend on what is padding."""
    program = case.made("unipelt{rank=2,length=3,bottleneck=4}", "open")
    one, two = batch(2, 11, case.seed, 6), batch(2, 11, case.seed, 6)
    two["input_ids"][0, -6:] = (one["input_ids"][0, -6:] + 7) % 60 + 2
    got, want = (first(program(**each))[0, :5] for each in (one, two))
    assert torch.equal(got, want), "padding counts"


def trains_alone(case: Case) -> None:
    """tests/methods/test_lora.py: nothing of a model that required gradients trains on."""
    names = case.made("lora", "grown").named_trainable_parameters()
    assert names and all(n.startswith("peftfx.lora.") for n in names)


class Parts(nn.Module):
    """Attention with a mask, dropout in an evaluated child, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm = DecoderLayer(32, 4, 4, 32), nn.BatchNorm1d(32)
        self.child = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5))
        self.head = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.ones_like(x[0, :, :1]).expand(-1, 8)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        h = self.child(self.block(x, turned, turned * 0, seen))
        return self.head(self.norm(h.transpose(1, 2)).transpose(1, 2))


def captures(case: Case) -> None:
    """tests/test_capture_modes.py: a program computes what its model does, in its modes."""
    torch.manual_seed(case.seed)
    model = Parts().to(case.dtype).train()
    model.child.eval(), model.norm.eval()
    x = torch.randn(3, 5, 32).to(case.dtype)
    program = peftfx.capture(model, (x,))
    assert torch.equal(program(x), model(x)), "a program that is not its model"


def removes(case: Case) -> None:
    """tests/test_methods.py: without an adapter, the other one is as it was."""
    program = case.made("lora{rank=4,name=a};lora{rank=4,name=b}")
    a = peftfx.run(case["decoder"][1], "lora{rank=4,name=a}")
    held = program.named_trainable_parameters()
    with torch.no_grad():
        for name, tensor in a.named_trainable_parameters().items():
            tensor.copy_(held[name])
    assert torch.equal(first(program.without("b")(**batch())), first(a(**batch())))


def altered_program(case: Case) -> None:
    """tests/test_fingerprint.py: no pass runs on a folded weight that was changed."""
    program = case.made("lora{rank=4}")
    folded = peftfx.run(program, "fold")
    with torch.no_grad():
        folded.module.get_parameter("layers.0.q_proj.weight").data.mul_(-1)
    try:
        peftfx.run(folded, "ia3")
    except RewriteError:
        return
    raise AssertionError("a changed weight was not seen")
