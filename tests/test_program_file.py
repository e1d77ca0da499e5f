"""Program files: whole, exact, without the model's code; damage is found and loads nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftfx
from peftfx.rewriter.branches.branch import Delta, Expression
from peftfx.rewriter.edits.edit import Editor
from peftfx.rewriter.errors import (
    ArtifactError,
    CorruptFileError,
    ExportError,
    FormatTooNewError,
    MetaTensorError,
    NonFiniteError,
    PassError,
)
from peftfx.rewriter.measure.compare import floats
from peftfx.rewriter.program.sites import LinearSite
from peftfx.rewriter.tracing.propagate import propagate

from . import damage
from .models import Convolutional, batch, first, moved, randomise

RECIPES = (
    ("encoder", ""), ("encoder", "lora{rank=4,dropout=0.3,where=q|ffn};ia3;serial_adapter"),
    ("encoder", "prompt_tuning{length=3}"), ("decoder", "prefix_tuning{length=3,projection=8}"),
    ("decoder", "lora{where=ffn};channel_pruning{ratio=0.5}"), ("decoder", "bitfit;causal"),
    ("llama", "lora{where=ffn};channel_pruning;fold"), ("llama", "lora;lower"),
)  # fmt: skip


def save(program: Any, folder: Path) -> int:
    """Saves a program and returns the size of its tensors."""
    peftfx.save_program(program, folder)
    return (folder / "tensors.safetensors").stat().st_size


@pytest.mark.parametrize(("name", "recipe"), RECIPES)
def test_it_comes_back_as_it_was(captured: Any, name: str, recipe: str, tmp_path: Path) -> None:
    _, base = captured[name]
    program = base
    for step in recipe.split(";") if recipe else ():
        program = peftfx.run(program, step)
        program = randomise(program) if program.adapters else program
    save(program, tmp_path / "p")
    loaded = peftfx.load_program(tmp_path / "p")
    inputs = batch(4, 13, pad=0 if "causal" in recipe else 3)
    if "causal" in recipe:
        del inputs["attention_mask"]
    close = 1e-6 if "lower" in recipe else 0.0
    want, got = first(program(**inputs)), first(loaded(**inputs))
    assert float((want - got).detach().abs().max()) <= close * float(want.detach().abs().max())
    assert not loaded.training and loaded.spec == program.spec and not loaded.history
    assert loaded.sites == program.sites and loaded.symbols == program.symbols
    ours, theirs = program.named_trainable_parameters(), loaded.named_trainable_parameters()
    assert ours.keys() == theirs.keys() and all(torch.equal(p, ours[n]) for n, p in theirs.items())
    torch.manual_seed(0)
    want = first(program.train()(**inputs))
    torch.manual_seed(0)
    got = first(loaded.train()(**inputs))
    program.eval()
    assert float((want - got).detach().abs().max()) <= close * float(want.detach().abs().max())
    if theirs:
        torch.autograd.backward([t.square().mean() for t in floats(loaded(**inputs))])
        assert all(p.grad is not None for p in theirs.values())


def test_a_loaded_program_is_a_base_of_its_own(captured: Any, tmp_path: Path) -> None:
    _, base = captured["decoder"]
    program = randomise(peftfx.run(base, "lora{where=ffn};ia3;channel_pruning"))
    save(program, tmp_path / "p")
    loaded = peftfx.load_program(tmp_path / "p")
    with pytest.raises(PassError, match="tensors of an earlier adapter 'lora'"):
        peftfx.run(loaded, "lora")
    more = randomise(peftfx.run(loaded, "lora{name=second,where=ffn|q};channel_pruning"))
    more.verify()
    inputs = batch(2, 12)
    assert moved(first(loaded(**inputs)), first(more(**inputs))) > 0.01
    folded = peftfx.run(more, "fold")
    torch.testing.assert_close(first(folded(**inputs)), first(more(**inputs)), rtol=1e-4, atol=1e-5)
    peftfx.save(more, tmp_path / "adapter")
    again = peftfx.load(loaded, tmp_path / "adapter")
    assert torch.equal(first(again(**inputs)), first(more(**inputs)))
    save(more, tmp_path / "p2")
    twice = peftfx.load_program(tmp_path / "p2")
    assert torch.equal(first(twice(**inputs)), first(more(**inputs)))


def test_what_fits_the_original_model_still_does(captured: Any, tmp_path: Path) -> None:
    model, base = captured["encoder"]
    folded = peftfx.run(randomise(peftfx.run(base, "lora")), "fold")
    save(folded, tmp_path / "p")
    state = peftfx.load_program(tmp_path / "p").export_state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, folded.export_state_dict()[n]) for n, t in state.items())
    pruned = peftfx.run(base, "channel_pruning")
    save(pruned, tmp_path / "q")
    own = peftfx.load_program(tmp_path / "q").export_state_dict()
    assert own["layers.0.fc1.weight"].shape == (48, 32)


def test_a_pruned_program_is_smaller(captured: Any, tmp_path: Path) -> None:
    _, base = captured["decoder"]
    program = peftfx.run(base, "lora{rank=4,where=ffn}")
    sizes = [
        save(p, tmp_path / "p") for p in (
            program, peftfx.run(program, "channel_pruning{ratio=0.5}"),
            peftfx.run(program, "channel_pruning{ratio=0.5};fold"),
        )
    ]  # fmt: skip
    gone = 4 * 2 * 32 * (3 * 32 + 3 * 4)  # bytes of half of three weights and a branch each, twice
    assert abs(sizes[0] - sizes[1] - gone) < 500
    assert sizes[2] < sizes[1] < sizes[0]


LOADER = """
import sys
sys.modules["transformers"] = None
import torch, peftfx
program = peftfx.load_program(sys.argv[1])
inputs = torch.load(sys.argv[2])
out = program(**inputs)
assert torch.equal(out.logits, out["logits"]) and torch.equal(out[0], out.logits)
torch.save(out.logits.detach(), sys.argv[3])
assert "transformers" not in {m.partition(".")[0] for m, held in sys.modules.items() if held}
"""


def test_it_needs_no_code_of_the_model(captured: Any, tmp_path: Path) -> None:
    _, base = captured["llama"]
    program = randomise(peftfx.run(base, "lora{where=ffn};channel_pruning"))
    save(program, tmp_path / "p")
    inputs = batch(2, 12, pad=3)
    torch.save(inputs, tmp_path / "in")
    command = [sys.executable, "-c", LOADER, *(str(tmp_path / n) for n in ("p", "in", "out"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "out"), first(program(**inputs)))
    loaded = peftfx.load_program(tmp_path / "p")
    ids = loaded.generate(inputs["input_ids"], inputs["attention_mask"], 3)
    assert torch.equal(ids, program.generate(inputs["input_ids"], inputs["attention_mask"], 3))


def test_batch_statistics_go_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Convolutional().eval()
    program = peftfx.capture(model, (torch.randn(4, 3, 8, 8),))
    save(program, tmp_path / "p")
    loaded = peftfx.load_program(tmp_path / "p")
    x = torch.randn(5, 3, 8, 8)
    for _ in range(2):
        assert torch.equal(program.train()(x), loaded.train()(x))
    for (n, a), (m, b) in zip(
        sorted(program.module.named_buffers()), sorted(loaded.module.named_buffers()), strict=True
    ):
        assert n == m and torch.equal(a, b)
    assert torch.equal(*(floats(p.eval()(x))[0] for p in (program, loaded)))


def change(folder: Path, name: str, edit: Any) -> None:
    damage.change(folder / name, edit)


@pytest.fixture
def saved(captured: Any, tmp_path: Path) -> Path:
    _, base = captured["encoder"]
    peftfx.save_program(randomise(peftfx.run(base, "lora{rank=2}")), tmp_path / "p")
    return tmp_path / "p"


@pytest.mark.parametrize(
    ("name", "edit", "error", "message"),
    [
        ("program.json", lambda d: d.update(format_version=99), FormatTooNewError, "Upgrade"),
        ("program.json", lambda d: d.update(format_version=0), CorruptFileError, "unknown"),
        (
            "program.json",
            lambda d: d.update(surprise=1),
            CorruptFileError,
            "unknown key 'surprise'",
        ),
        ("program.json", lambda d: d.pop("sites"), CorruptFileError, "'sites' is missing"),
        ("program.json", lambda d: d.update(graph=3), CorruptFileError, "wrong type"),
        ("program.json", lambda d: d.update(sites=[]), CorruptFileError, "malformed"),
        ("program.json", lambda d: d.update(inputs={}), CorruptFileError, "malformed"),
        ("program.json", lambda d: d["tensors"].popitem(), CorruptFileError, "unknown tensors"),
        ("program.json", lambda d: d["extras"].append("no"), CorruptFileError, "malformed"),
        ("program.json", lambda d: d.update(parameters=[]), CorruptFileError, "malformed"),
        ("graph.json", lambda d: d["nodes"].pop(), CorruptFileError, "sha256 differs"),
    ],
)
def test_altered_files(saved: Path, name: str, edit: Any, error: Any, message: str) -> None:
    change(saved, name, edit)
    with pytest.raises(error, match=message):
        peftfx.load_program(saved)


def test_graphs_that_do_not_fit(saved: Path) -> None:
    """With the right hash: operators by name only, known tensors, sites that exist."""
    import hashlib

    good = (saved / "graph.json").read_text()

    def with_graph(edit: Any) -> None:
        (saved / "graph.json").write_text(good)
        change(saved, "graph.json", edit)
        digest = hashlib.sha256((saved / "graph.json").read_bytes()).hexdigest()
        change(saved, "program.json", lambda d: d.update(graph=digest))

    def call(text: str) -> Any:
        return lambda d: next(n for n in d["nodes"] if n[0] == "call_function").__setitem__(2, text)

    for text in ("os.system", "aten.no_such.default", "prims.convert.default", "builtins.eval"):
        with_graph(call(text))
        with pytest.raises(CorruptFileError, match="malformed"):
            peftfx.load_program(saved)
    with_graph(lambda d: d.update(output=d["output"].replace("builtins.tuple", "os.path")))
    with pytest.raises(CorruptFileError, match="malformed"):
        peftfx.load_program(saved)
    with_graph(lambda d: d["values"][0].__setitem__(2, [1, 2, 3]))
    with pytest.raises(CorruptFileError, match="malformed"):
        peftfx.load_program(saved)
    with_graph(lambda d: None)
    assert first(peftfx.load_program(saved)(**batch())).shape[0] == 3


def test_truncations_and_flips_are_found(saved: Path) -> None:
    for name in ("program.json", "graph.json", "tensors.safetensors"):
        path = saved / name
        good = path.read_bytes()
        for cut in (0, 1, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:cut])
            if name != "program.json" or cut < len(good) - 1:  # its last byte is a newline
                with pytest.raises(ArtifactError):
                    peftfx.load_program(saved)
        path.write_bytes(good)
        bad = bytearray(good)
        bad[len(good) // 3] ^= 64
        path.write_bytes(bytes(bad))
        with pytest.raises(ArtifactError):
            peftfx.load_program(saved)
        path.unlink()
        with pytest.raises(ArtifactError):
            peftfx.load_program(saved)
        path.write_bytes(good)
    assert peftfx.load_program(saved).spec.names == ("input_ids", "attention_mask")
    with pytest.raises(ArtifactError, match="not a directory"):
        peftfx.load_program(saved / "nowhere")


def test_what_cannot_be_saved(
    captured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base = captured["encoder"]
    with pytest.raises(MetaTensorError, match="load weights"):
        peftfx.save_program(base.to("meta"), tmp_path / "p")
    program = randomise(peftfx.run(base, "lora"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(ArtifactError, match="other files"):
        peftfx.save_program(program, tmp_path / "photos")
    with torch.no_grad():
        program.trainable_parameters()[0][0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        peftfx.save_program(program, tmp_path / "p")
    from peftfx.rewriter.storage import program_file

    monkeypatch.setattr(program_file, "measure", lambda *_: {"max_rel": 1.0})
    with pytest.raises(ExportError, match="computes something else"):
        peftfx.save_program(base, tmp_path / "p")
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_saving_changes_nothing(captured: Any, tmp_path: Path) -> None:
    _, base = captured["encoder"]
    program = peftfx.run(base, "lora;ia3")
    before, text = program.module, program.text()
    save(program, tmp_path / "p")
    assert program.module is before and program.text() == text
    assert [a.adapter for a in program.attachments].count("lora") == 4


class Noisy(nn.Module):
    """A residual block whose branch is dropped at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(8, 24), nn.Linear(24, 8), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(F.gelu(self.fc1(x)))
        if self.training:
            y = self.drop(y) * (torch.rand(x.shape[0], 1, 1) < 0.5) / 0.5
        return x + y


def test_what_only_training_runs_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = peftfx.capture(Noisy().eval(), (torch.randn(4, 3, 8),))
    assert any(type(m).__name__ == "TrainingOnly" for m in program.module.modules())
    save(program, tmp_path / "p")
    loaded = peftfx.load_program(tmp_path / "p")
    x = torch.randn(6, 5, 8)
    for mode in (True, False):
        torch.manual_seed(1)
        want = program.train(mode)(x)
        torch.manual_seed(1)
        assert torch.equal(loaded.train(mode)(x), want)


def test_it_exports(captured: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    _, base = captured["llama"]
    save(randomise(peftfx.run(base, "lora{where=ffn};channel_pruning")), tmp_path / "p")
    report = peftfx.export_onnx(peftfx.load_program(tmp_path / "p"), tmp_path / "m.onnx")
    assert report.error <= 1e-5 and report.outputs == ("logits",)


class Whole(Expression):
    """A learnt difference to a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(weight.clone())

    def forward(self, w: Tensor) -> Tensor:
        return w + self.w * 2


class Generator(nn.Module):
    """Evaluated once a forward; two sites read what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.randn(3))

    def forward(self) -> dict[str, Tensor]:
        return {"up": self.g + 1, "down": self.g * 3}


class Gated(Delta):
    """A dense branch times a gate that is read from the graph."""

    def __init__(self, site: LinearSite) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(site.out_features, site.in_features) * 0.1)

    def branch(self, x: Tensor, gate: Tensor) -> Tensor:
        return (x @ self.w.T) * gate.sum()


def test_expressions_and_shared_modules_become_operators(captured: Any, tmp_path: Path) -> None:
    _, base = captured["encoder"]
    torch.manual_seed(0)
    edit = Editor(base.fork(), "mine")
    up, down = (base.sites[f"layers.0.fc{i}.weight"] for i in (1, 2))
    assert isinstance(up, LinearSite) and isinstance(down, LinearSite)
    made = edit.share("generator", Generator())
    edit.add(up, Gated(up), gate=edit.item(made, "up"))
    edit.add(down, Gated(down), gate=edit.item(made, "down"))
    other = base.sites["layers.1.fc1.weight"]
    weight = base.module.get_parameter(other.id).detach()
    edit.express(other, other.id, Whole(weight))
    edit.finish()
    propagate(edit.program)
    save(edit.program, tmp_path / "p")
    loaded = peftfx.load_program(tmp_path / "p")
    inputs = batch(2, 12, pad=3)
    want = first(edit.program(**inputs))
    assert torch.equal(first(loaded(**inputs)), want)
    assert moved(first(base(**inputs)), want) > 0.01
    theirs = dict(loaded.module.named_parameters())
    assert torch.equal(theirs["peftfx.mine.generator.g"], made_parameter(edit.program))
    assert torch.equal(theirs[other.id], weight)


def made_parameter(program: Any) -> Tensor:
    return program.module.get_parameter("peftfx.mine.generator.g")
