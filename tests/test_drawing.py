"""Drawings: what is on them, that nothing overlaps, both formats, and the command line."""

from __future__ import annotations

import io
import re
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.cli import main
from peftfx.drawing import parameters, picture
from peftfx.drawing.canvas import Canvas, Rect, Text, shorten, text_width
from peftfx.drawing.repeats import common, runs
from peftfx.rewriter.errors import ArtifactError, ExportError, OptionError

from .models import Decoder, DecoderLayer, EncoderLayer, batch
from .test_cli import TINY

SVG = "{http://www.w3.org/2000/svg}"
CASES = [
    ("encoder", None), ("encoder", "q|v"), ("decoder", "ffn.down and layer==1"), ("tied", "head"),
    ("fused", "k"), ("fused", "norm"), ("encoder", "attention"), ("decoder", "sublayer"),
    ("translator", "cross"), ("parallel", "ffn"), ("chain", None), ("chain", "layers.7"),
    ("names", None),
]  # fmt: skip


class Cross(EncoderLayer):
    """An encoder block whose attention reads keys and values from elsewhere."""

    def read(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            m(s).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for m, s in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        a = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.dense(a))
        return self.norm2(x + self.fc2(self.fc1(x).relu()))


class Translator(nn.Module):
    """An encoder, and a decoder that reads its result."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.targets = nn.Embedding(64, 32), nn.Embedding(64, 32)
        self.encoder, self.decoder = EncoderLayer(32, 4, 64), Cross(32, 4, 64)
        self.head = nn.Linear(32, 64)

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        memory = self.encoder(self.words(input_ids), None)
        return self.head(self.decoder.read(self.targets(targets), memory))


class Parallel(nn.Module):
    """Attention and feed-forward read one norm and are added to one residual."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(DecoderLayer(32, 4, 2, 64) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        b, t, d = x.shape
        for block in self.blocks:
            assert isinstance(block, DecoderLayer)
            h = block.norm1(x)
            one = torch.ones(1, device=x.device)
            q, k, v = block.project(h, one, 0 * one)
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            a = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
            x = x + block.o_proj(a) + block.down(block.gate(h).sigmoid() * block.up(h))
        return x


class Chain(nn.Module):
    """No residual at all: linears of many widths, then some of one."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [8 + 3 * i for i in range(40)] + [64] * 20
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


class Names(nn.Module):
    """Names that are long, and that XML must escape."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.ModuleDict({"a_name_that_does_not_fit_into_any_box_at_all": nn.Linear(8, 8)})
        self.parts = nn.ModuleDict({"<b>&": nn.Linear(8, 8), "of" * 30: inner})

    def forward(self, x: Tensor) -> Tensor:
        for module in (m for m in self.modules() if isinstance(m, nn.Linear)):
            x = module(x).tanh()
        return x


@pytest.fixture(scope="module")
def programs(captured: Any) -> Any:
    made: dict[str, peftfx.Program] = {}
    ids = batch()["input_ids"]

    def program(name: str) -> peftfx.Program:
        torch.manual_seed(0)
        if name == "translator" and name not in made:
            kwargs = {"input_ids": ids, "targets": ids[:, :5]}
            made[name] = peftfx.capture(Translator().eval(), kwargs=kwargs)
        elif name == "parallel" and name not in made:
            made[name] = peftfx.capture(Parallel().eval(), kwargs={"input_ids": ids})
        elif name in ("chain", "names") and name not in made:
            model = Chain() if name == "chain" else Names()
            made[name] = peftfx.capture(model.eval(), kwargs={"x": torch.randn(3, 8)})
        return made.get(name) or captured[name][1]

    return program


def drawn(program: peftfx.Program, where: str | None) -> tuple[Canvas, list[Any]]:
    chosen = program.sites.select(where) if where else list(program.sites)
    return picture(program, where, chosen), chosen


def texts(canvas: Canvas) -> list[str]:
    return [s.text for s in canvas.shapes if isinstance(s, Text)]


@pytest.mark.parametrize(("name", "where"), CASES)
def test_every_site_is_drawn_and_every_hit_stands_out(
    programs: Any, name: str, where: str | None, tmp_path: Path
) -> None:
    program = programs(name)
    count = peftfx.draw_sites(program, tmp_path / "a.svg", where)
    root = ET.parse(tmp_path / "a.svg").getroot()
    shown: dict[str, list[str]] = {"site": [], "hit": []}
    for rect in root.iter(f"{SVG}rect"):
        if title := rect.findtext(f"{SVG}title"):
            shown[rect.attrib["class"]] += title.split("\n")
    chosen = {s.id for s in program.sites.select(where)} if where else set[str]()
    assert set(shown["hit"]) == chosen and (not where or count == len(chosen))
    everything = shown["site"] + shown["hit"]
    assert sorted(everything) == sorted(s.id for s in program.sites)


@pytest.mark.parametrize(("name", "where"), CASES)
def test_no_texts_overlap_and_none_leaves_the_picture(
    programs: Any, name: str, where: str | None
) -> None:
    canvas, _ = drawn(programs(name), where)
    boxes = [s for s in canvas.shapes if isinstance(s, Text) and s.text]
    assert len(boxes) > 8
    for index, one in enumerate(boxes):
        left, top, right, bottom = one.box
        assert left >= 0 and top >= 0 and right <= canvas.width and bottom <= canvas.height
        for two in boxes[index + 1 :]:
            apart = two.box[0] >= right or two.box[2] <= left
            assert apart or two.box[1] >= bottom or two.box[3] <= top, (one.text, two.text)
    plates = [s for s in canvas.shapes if isinstance(s, Rect) and s.mark]
    for index, one in enumerate(plates):
        for two in plates[index + 1 :]:
            apart = two.x >= one.x + one.w or two.x + two.w <= one.x
            assert apart or two.y >= one.y + one.h or two.y + two.h <= one.y, (one, two)


def test_alike_layers_are_one_unless_the_selector_tells_them_apart() -> None:
    program = peftfx.capture(Decoder(layers=6).eval(), kwargs=batch())
    plain = texts(drawn(program, None)[0])
    assert plain.count("layers 0 to 5") == 1 and plain.count("q") == 1
    some = texts(drawn(program, "q and layer in [2,3]")[0])
    assert [t for t in some if t.startswith("layer")] == [
        "layers 0 and 1", "layers 2 and 3", "layers 4 and 5",
    ]  # fmt: skip
    odd = texts(drawn(program, "q and layer in [1,3,5]")[0])
    assert "layers 0, 2, … 4" in odd and "layers 1, 3, … 5" in odd and odd.count("q") == 2
    assert runs("aabcbcbcd", 2) == [(0, 1, 2), (2, 2, 3), (8, 1, 1)]


def test_what_a_newcomer_reads(programs: Any) -> None:
    decoder = texts(drawn(programs("decoder"), None)[0])
    assert {"4 heads of 8", "2 key/value heads", "32 → 16", "silu, gated", "2 alike; layers.*"} <= {
        *decoder
    }
    fused = texts(drawn(programs("fused"), "k")[0])
    assert "32 → 96" in fused and fused.count("k") == 1
    translator = texts(drawn(programs("translator"), None)[0])
    assert "from stream s0" in translator and "cross" in translator
    assert "tied to embed" in texts(drawn(programs("tied"), None)[0])
    assert texts(drawn(programs("parallel"), None)[0]).count("norm1") == 1


def test_the_title_counts_the_parameters_of_the_hits(programs: Any) -> None:
    program = programs("fused")
    total = sum(p.numel() for p in program.module.parameters())
    assert parameters(program, program.sites.select("q")) == 2 * 32 * 32
    assert parameters(program, program.sites.select("q|k|v")) == 2 * 96 * 32
    title = texts(drawn(program, "q")[0])[1]
    share = 100 * 2048 / total
    assert title == (
        f"where=q hits 2 of {len(program.sites)} sites; their weights hold 2,048 of {total:,} "
        f"parameters ({share:.1f} %)"
    )


def test_png_shows_the_same_picture(programs: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    program = programs("encoder")
    peftfx.draw_sites(program, tmp_path / "a.PNG", "q")
    peftfx.draw_sites(program, tmp_path / "a.svg", "q")
    root = ET.parse(tmp_path / "a.svg").getroot()
    painted = image.open(tmp_path / "a.PNG")
    assert painted.size == (int(root.attrib["width"]), int(root.attrib["height"]))
    fills = {
        rect.attrib["class"]: rect for rect in root.iter(f"{SVG}rect") if "class" in rect.attrib
    }
    for rect in fills.values():  # the pixel beside the left edge has the box's colour
        x, y, h = (float(rect.attrib[k]) for k in ("x", "y", "height"))
        pixel = painted.getpixel((int(x + 5), int(y + h / 2)))
        assert "#" + bytes(pixel).hex() == rect.attrib["fill"]
    assert len(painted.getcolors(100_000)) > 20


def test_text_fits_its_measure_in_pillow() -> None:
    font = pytest.importorskip("PIL.ImageFont").load_default(1000)
    letters = "".join(chr(c) for c in range(32, 127))
    for letter in letters + "…·":
        assert text_width(letter, 1000) == pytest.approx(font.getlength(letter), abs=6)
    assert shorten("encoder.layer.query", 60, 12) == "…yer.query"
    assert text_width(shorten("x" * 99, 60, 12), 12) <= 60
    assert common(["h.1.fc2", "h.10.fc2"]) == "h.*.fc2"


def test_the_svg_is_self_contained(programs: Any, tmp_path: Path) -> None:
    peftfx.draw_sites(programs("names"), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "&lt;b&gt;&amp;" in text and "<script" not in text
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    peftfx.draw_sites(programs("names"), tmp_path / "b.svg")
    assert text == (tmp_path / "b.svg").read_text()


def test_an_adapted_program_is_drawn_as_captured(programs: Any) -> None:
    program = programs("decoder")
    adapted = peftfx.run(program, "lora{rank=2}")
    assert drawn(adapted.base, "q")[0].svg("", "#fff") == drawn(program, "q")[0].svg("", "#fff")


def test_errors(programs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = programs("encoder")
    with pytest.raises(OptionError, match=r"ends in \.svg or \.png"):
        peftfx.draw_sites(program, tmp_path / "a.gif")
    with pytest.raises(ArtifactError, match="cannot be written"):
        peftfx.draw_sites(program, tmp_path / "missing" / "a.svg")
    with pytest.raises(ExportError, match="too large"):
        Canvas(100_000, 100_000).png("#ffffff")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ExportError, match=r"pip install 'peftfx\[draw\]'"):
        peftfx.draw_sites(program, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "tiny.svg"
    assert main(["sites", TINY, "--where", "q|v", "--draw", str(target)]) == 0
    assert f"drawn to {target}" in capsys.readouterr().out
    assert target.read_text().count('class="hit"') == 2
    assert ET.parse(io.StringIO(target.read_text())).getroot().tag == f"{SVG}svg"
    assert main(["sites", TINY, "--draw", str(tmp_path / "tiny.jpg")]) == 2
    error = capsys.readouterr().err
    assert "ends in .svg or .png" in error and len(error.strip().splitlines()) == 1
    assert main(["sites", TINY, "--draw", str(tmp_path / "no" / "tiny.svg")]) == 2
    assert "cannot be written" in capsys.readouterr().err
