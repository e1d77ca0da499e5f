"""The capture cache: quick, equal in everything, and never wrong."""

from __future__ import annotations

import hashlib
import importlib
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftfx
from peftfx.rewriter.capture import cache, graphfile
from peftfx.rewriter.capture.trial import Trial
from peftfx.rewriter.files.files import parse_json, write_json
from peftfx.rewriter.graph.aten import shape, source_line
from peftfx.rewriter.graph.symbols import Symbols
from peftfx.rewriter.tracing.propagate import fake_mode

from .models import (
    Convolutional,
    Decoder,
    Encoder,
    batch,
    bert,
    build,
    first,
    llama,
    moved,
    randomise,
)
from .rooms import FILES, IMPORTS, room

FRESH: dict[str, Callable[[], Any]] = {
    "decoder": lambda: Decoder(tied=True), "bert": bert, "convolutional": Convolutional,
}  # fmt: skip


def made(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = FRESH[name]().eval()
    return model, {"x": torch.randn(2, 3, 8, 8)} if name == "convolutional" else batch(pad=2)


class Spent:
    def __init__(self) -> None:
        self.seconds = 0.0

    def capture(self, *args: Any, **options: Any) -> peftfx.Program:
        begun = time.process_time()
        program = peftfx.capture(*args, **options)
        self.seconds = time.process_time() - begun
        return program


def environment_of(program: peftfx.Program) -> Any:
    return next(n.meta["val"].fake_mode.shape_env for n in program.module.graph.nodes)


@pytest.mark.parametrize("name", FRESH)
def test_a_recalled_program_is_the_same(name: str, tmp_path: Path) -> None:
    (model, inputs), (again, _), spent = made(name), made(name), Spent()
    one = spent.capture(model, kwargs=inputs, cache=tmp_path)
    slow = spent.seconds
    two = spent.capture(again, kwargs=inputs, cache=tmp_path)
    assert (one.cached, two.cached) == ("stored", "recalled")
    assert spent.seconds < slow / 4  # the benchmark says how much; this one is noisy
    assert one.text() == two.text() and one.sites == two.sites and one.spec == two.spec
    assert one.symbols == two.symbols and one.identity == two.identity
    assert one.aliases == two.aliases and one.state_names == two.state_names
    assert list(one.module.state_dict()) == list(two.module.state_dict())
    for node, other in zip(one.module.graph.nodes, two.module.graph.nodes, strict=True):
        assert node.name == other.name and source_line(node) == source_line(other)
        assert shape(node) is None or str(shape(node)) == str(shape(other))
    for mode in (True, False):
        outputs: list[Any] = []
        for program in (one, two):
            torch.manual_seed(3)
            outputs.append(program.train(mode)(**inputs))
        assert type(outputs[0]) is type(outputs[1])
        assert torch.equal(first(outputs[0]), first(outputs[1]))
    if name == "convolutional":
        return
    for text in ("ia3;prefix_tuning", "prompt_tuning"):
        assert peftfx.run(one, text).text() == peftfx.run(two, text).text()
    program = randomise(peftfx.run(two, "lora{where=linear and not head}"))
    first(program(**inputs)).square().mean().backward()
    assert sum(p.grad is not None for p in program.trainable_parameters()) > 20
    folded = peftfx.run(program, "fold")
    assert moved(first(again(**inputs)), first(folded(**inputs))) > 0.01
    assert len(list(tmp_path.iterdir())) == 1


def test_a_recalled_program_keeps_its_dynamic_sizes(tmp_path: Path) -> None:
    model, inputs = made("bert")
    peftfx.capture(model, kwargs=inputs, cache=tmp_path)
    program = peftfx.capture(model, kwargs=inputs, cache=tmp_path)
    assert program.cached == "recalled" and program.spec.ranges["sequence"] == (1, 64)
    other = batch(5, 23)
    assert torch.equal(first(program(**other)), first(model(**other)))
    environment = environment_of(program)
    before = len(environment.guards)
    peftfx.run(program, "lora{where=linear};prompt_tuning{length=3}")
    assert len(environment.guards) == before


def test_what_a_trace_depends_on_is_in_the_key(tmp_path: Path) -> None:
    def note(model: nn.Module, inputs: Any, **options: Any) -> str:
        return peftfx.capture(model.eval(), kwargs=inputs, cache=tmp_path, **options).cached

    def encoder() -> Encoder:
        return Encoder(layers=1)

    inputs = batch()
    assert note(encoder(), inputs) == "stored"
    assert note(encoder(), inputs) == "recalled"
    changed = encoder()
    changed.layers[0].heads = 2  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    assert note(changed, inputs) == "stored"
    untied, tied = Decoder(), Decoder(tied=True)
    assert [note(untied, inputs), note(tied, inputs)] == ["stored", "stored"]
    assert note(Encoder(), inputs) == "stored"
    assert note(encoder().to(torch.float64), inputs) == "stored"
    assert note(encoder(), batch(4, 9)) == "stored"
    assert note(encoder(), inputs, dynamic=None) == "stored"
    dropout = encoder()
    dropout.layers[0].drop.p = 0.3  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    assert note(dropout, inputs) == "stored"
    trained = encoder()
    with torch.no_grad():
        trained.pooler.weight.mul_(2)
    program = peftfx.capture(trained.eval(), kwargs=inputs, cache=tmp_path)
    assert program.cached == "recalled"
    assert torch.equal(first(program(**inputs)), first(trained(**inputs)))


def test_code_that_changed_is_traced_again(tmp_path: Path, monkeypatch: Any) -> None:
    source = (
        "import torch\nfrom cached_part import act\nclass Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.fc = torch.nn.Linear(4, 4)\n"
        "    def forward(self, x):\n        return act(self.fc(x))\n"
    )
    part = "import torch\ndef act(x):\n    return torch.relu(x)\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    x = {"x": torch.randn(2, 4)}

    def note(net: str, helper: str) -> tuple[str, Any, Any]:
        (tmp_path / "cached_net.py").write_text(net)
        (tmp_path / "cached_part.py").write_text(helper)
        for name in ("cached_net", "cached_part"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        model = importlib.import_module("cached_net").Net().eval()
        program = peftfx.capture(model, kwargs=x, cache=tmp_path / "cache")
        return program.cached, program(**x), model(**x)

    assert note(source, part)[0] == "stored"
    assert note(source, part)[0] == "recalled"
    cached, got, want = note(source, part.replace("relu", "tanh"))
    assert cached == "stored" and torch.equal(got, want)
    cached, got, want = note(source.replace("act(self.fc(x))", "act(self.fc(x)) + 1"), part)
    assert cached == "stored" and torch.equal(got, want)
    for name in ("cached_net", "cached_part"):
        sys.modules.pop(name, None)


def resealed(path: Path, change: Callable[[Any], Any]) -> None:
    """Alters an entry's content under a right checksum, as an attacker would."""
    data = parse_json(path.read_bytes().partition(b"\n")[2], "")
    change(data["graph"])
    body = write_json(data)
    path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def retarget(graph: Any, op: str, target: str) -> None:
    next(n for n in graph["nodes"] if n[0] == op)[2] = target


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda p: p.write_bytes(b""),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-100]),
    "one bit": lambda p: p.write_bytes(p.read_bytes().replace(b"linear", b"lineas", 1)),
    "not a file": lambda p: (p.unlink(), p.mkdir()),
    "a function": lambda p: resealed(p, lambda g: retarget(g, "call_function", "os.system")),
    "an operator": lambda p: resealed(p, lambda g: retarget(g, "call_function", "prim.Print.x")),
    "a path": lambda p: resealed(p, lambda g: retarget(g, "call_module", 'x"); import os; ("')),
    "a name": lambda p: resealed(p, lambda g: g["inputs"][0].append("x): import os\n#")),
    "a size": lambda p: resealed(p, lambda g: g["environment"]["guards"].append("exit(1)")),
    "a module": lambda p: resealed(p, lambda g: g["modules"].update({"m": ["Linear", {}]})),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_entry_is_ignored(tmp_path: Path, name: str) -> None:
    model, inputs = made("convolutional")
    peftfx.capture(model, kwargs=inputs, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    DAMAGES[name](path)
    program = peftfx.capture(model, kwargs=inputs, cache=tmp_path)
    assert torch.equal(program(**inputs), model(**inputs))
    if name == "not a file":
        assert program.cached.startswith("not cached: ")
        return
    assert program.cached.startswith("stored again: "), program.cached
    assert peftfx.capture(model, kwargs=inputs, cache=tmp_path).cached == "recalled"


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.iterator = iter(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def test_what_cannot_be_cached_is_captured_all_the_same(tmp_path: Path) -> None:
    x = {"x": torch.randn(2, 4)}
    program = peftfx.capture(Hidden(), kwargs=x, cache=tmp_path)
    assert program.cached == "not cached: an attribute is a tuple_iterator"
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda *_: None)
    assert "hooks" in peftfx.capture(hooked, args=(x["x"],), cache=tmp_path).cached
    blocked = tmp_path / "file"
    blocked.write_text("")
    program = peftfx.capture(
        Convolutional().eval(), kwargs=made("convolutional")[1], cache=blocked / "below"
    )
    assert program.cached.startswith(("not cached", "stored again"))
    assert peftfx.capture(Hidden(), kwargs=x).cached == ""


def test_a_graph_on_meta_is_recalled(tmp_path: Path) -> None:
    notes: list[str] = []
    for _ in range(2):
        with torch.device("meta"):
            model = llama().eval()
        program = peftfx.capture(model, kwargs=batch(), cache=tmp_path)
        notes.append(program.cached)
    assert notes == ["stored", "recalled"]
    adapted = peftfx.run(program, "lora;ia3")  # pyright: ignore[reportPossiblyUnboundVariable]
    assert {r.certificate.kind for r in adapted.history} == {"unmeasured"}


def test_arguments_read_back() -> None:
    for item in (
        None, True, 3, -2.5, float("inf"), "x", [1, (2, [3])], (), slice(0, None, 2), {"a": 1},
        torch.float16, torch.device("cpu"), torch.strided, torch.channels_last,
    ):  # fmt: skip
        written = parse_json(write_json(graphfile.encode(item, {})), "")
        assert graphfile.decode(written, []) == item
    with pytest.raises(ValueError, match="object"):
        graphfile.encode(object(), {})


GLOBALS = """
import torch, uuid
from torch import nn
SCALE, RATES, SESSION, SALT = 1.0, {"drop": 0.5}, uuid.uuid4().hex, object()
class Config:
    def __init__(self):
        self.before = hash(self)
    def __hash__(self):
        return hash(SALT)
class Net(nn.Module):
    power = 1
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.hidden, self.config = [1.0], Config()
    def forward(self, x):
        return nn.functional.dropout(self.fc(x) * SCALE, RATES["drop"], self.training) ** self.power
"""


def test_constants_of_modules_and_classes(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "cached_globals.py").write_text(GLOBALS)
    module: Any = importlib.import_module("cached_globals")
    model, x = module.Net().eval(), torch.randn(2, 4)

    def recalls() -> str:
        program = peftfx.capture(model, (x,), cache=tmp_path / "cache")
        for mode in (True, False):
            program.train(mode), model.train(mode)
            torch.manual_seed(0)
            got = program(x)
            torch.manual_seed(0)
            assert torch.equal(got, model(x))
        return program.cached

    assert [recalls(), recalls()] == ["stored", "recalled"]
    module.SCALE = 3.0
    assert [recalls(), recalls()] == ["stored", "recalled"]
    module.RATES["drop"] = 0.25  # in training only
    assert [recalls(), recalls()] == ["stored", "recalled"]
    module.Net.power = 2
    assert [recalls(), recalls()] == ["stored", "recalled"]
    # As in the next process: a text that `uuid` draws, and a hash of text, which Python seeds.
    module.SESSION, module.SALT = uuid.uuid4().hex, object()
    model.config = module.Config()
    assert recalls() == "recalled"
    model.config.before += 1
    assert recalls() == "stored"
    unset = ["a", "b"]
    model.config.options = {"_use_default_values": unset, "a": 1}
    assert recalls() == "stored"
    unset.reverse()  # diffusers lists a set
    assert recalls() == "recalled"
    model.config.options["a"] = 2
    assert recalls() == "stored"


def test_the_key_covers_the_code_that_captures() -> None:
    """All that the files of `capture/` import, but for the program that is made of a capture."""
    reached, waiting = set[str](), [n for n in FILES if room(n) == "capture"]
    while waiting:
        name = waiting.pop()
        if name in FILES and name not in reached and name != "api":
            reached.add(name)
            waiting += IMPORTS[name]
    assert len(reached) > 50
    assert {name.partition("/")[0] for name in reached} == set(cache.ROOMS)


def test_functions_of_one_line_and_what_classes_enclose(tmp_path: Path) -> None:
    """Differences that only training shows, so that nothing but the key tells them apart."""

    class Rated(nn.Module):
        def __init__(self, rate: Callable[[], float]) -> None:
            super().__init__()
            self.fc, self.rate = nn.Linear(4, 4), rate

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(self.fc(x), self.rate(), self.training)

    def enclosed(rate: float) -> nn.Module:
        class Enclosing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return nn.functional.dropout(self.fc(x), rate, self.training)

        return Enclosing()

    few, many = lambda: 0.1, lambda: 0.9  # fmt: skip
    x = torch.randn(2, 4)
    for pair in ([Rated(few), Rated(many)], [enclosed(0.1), enclosed(0.9)]):
        notes: list[str] = []
        for model in (*pair, *pair):
            program = peftfx.capture(model.eval(), (x,), cache=tmp_path)
            notes.append(program.cached)
            torch.manual_seed(0)
            got = program.train()(x)
            torch.manual_seed(0)
            assert torch.equal(got, model.train()(x))
        assert notes == ["stored", "stored", "recalled", "recalled"]


def test_what_is_recalled_is_tried(tmp_path: Path, monkeypatch: Any) -> None:
    """State that no key can hold: what a function of another module returns."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "cached_state.py").write_text(
        "import random\nfrom torch import nn\nclass Scale:\n    __slots__ = ('value',)\n"
        "STATE = Scale()\nSTATE.value = 1.0\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(4, 4)\n"
        "    def forward(self, x):\n        return self.fc(x) * STATE.value\n"
    )
    module: Any = importlib.import_module("cached_state")
    model, x = module.Net().eval(), torch.randn(2, 4)
    notes: list[str] = []
    for value in (1.0, 1.0, 3.0, 3.0):
        module.STATE.value = value
        program = peftfx.capture(model, (x,), cache=tmp_path / "cache")
        assert torch.equal(program(x), model(x))
        notes.append(program.cached)
    assert notes[:2] == ["stored", "recalled"] and notes[3] == "recalled"
    assert notes[2] == "stored again: the model computes something else than it did"


class Shifted(nn.Linear):
    """A linear with a buffer that nothing writes."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("shift", torch.ones(4))
        self.shift: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + self.shift


@pytest.mark.parametrize(("made", "modes"), [(Shifted, 1), (lambda: nn.BatchNorm1d(4), 2)])
def test_a_graph_without_modes_is_tried_in_one(
    made: Callable[[], nn.Module], modes: int, tmp_path: Path, monkeypatch: Any
) -> None:
    model, x, ran, of_graph = made().eval(), torch.randn(3, 4), list[Any](), Trial.of_graph

    def counted(self: Trial, inputs: Any, training: bool | None = False) -> Any:
        ran.append(training)
        return of_graph(self, inputs, training)

    peftfx.capture(model, (x,), cache=tmp_path)
    monkeypatch.setattr(Trial, "of_graph", counted)
    assert peftfx.capture(model, (x,), cache=tmp_path).cached == "recalled"
    assert ran == [False, True][:modes]


class Masked(nn.Module):
    """One attention whose mask is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x)[:, None] for p in (self.q, self.k, self.v))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return x + self.o(seen[:, 0])


def test_the_content_of_a_mask_that_sites_depend_on(tmp_path: Path) -> None:
    model, x = Masked().eval(), torch.randn(2, 5, 8)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()

    def recall(x: torch.Tensor, mask: torch.Tensor) -> tuple[str, bool]:
        program = peftfx.capture(model, (x, mask), cache=tmp_path)
        (site,) = program.sites.of("attention")
        return program.cached, getattr(site, "causal")  # noqa: B009

    assert recall(x, causal) == ("stored", True)
    assert recall(x + 1, causal) == ("recalled", True)  # no site depends on that
    note, found = recall(x, torch.ones(5, 5, dtype=torch.bool))
    assert note.startswith("stored again: a mask") and not found


class Padded(nn.Module):
    """Pads to a multiple of four, so that torch notes alternatives: a size is 1, or another 0."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens = x.shape[:2]
        x = nn.functional.pad(self.up(x), (0, 0, 0, -tokens % 4))
        x = x.reshape(rows, -1, 4, 8).transpose(1, 2).reshape(rows, -1, 8)
        return self.down(x)[:, :tokens]


def test_guards_with_alternatives(tmp_path: Path) -> None:
    model, x = Padded().eval(), torch.randn(2, 7, 8)
    assert peftfx.capture(model, (x,), cache=tmp_path).cached == "stored"
    program = peftfx.capture(model, (x,), cache=tmp_path)
    assert program.cached == "recalled" and "|" in str(environment_of(program).guards)
    x = torch.randn(3, 9, 8)
    assert torch.equal(program(x), model(x))
    peftfx.save_program(program, tmp_path / "program")
    assert torch.equal(peftfx.load_program(tmp_path / "program")(x), model(x))


@pytest.mark.parametrize(
    ("guard", "holds"),
    [("Eq(s0, 8) | (s0 > 9)", True), ("(s0 < 9) & ~Eq(Mod(s0, 2), 0)", False), ("s0 | 3", None),
     ("s0 ^ 3", None), ("not s0", None), ("s0 < s0 < 3", None)],
)  # fmt: skip
def test_guards_that_are_read(guard: str, holds: bool | None) -> None:
    data = {"symbols": [["s0", 8, 2, None]], "guards": [guard]}
    if holds:
        assert str(Symbols(data).environment.guards[0].expr) == guard
    else:
        said = "does not hold" if holds is False else "not an expression of sizes|boolean|Boolean"
        with pytest.raises((ValueError, TypeError), match=said):
            Symbols(data)


def test_torch_looks_nothing_up(tmp_path: Path) -> None:
    """Its own cache of fake evaluations, which costs more than it saves, is empty, as recalled."""
    for note in ("stored", "recalled"):
        base = peftfx.capture(build("tiny"), kwargs=batch(), cache=tmp_path)
        mode = fake_mode(peftfx.run(base, "lora{rank=2}").module)
        assert base.cached == note
        assert not mode.cache_enabled and not mode.shape_env.fake_tensor_cache
