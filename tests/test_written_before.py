"""What earlier versions wrote, loaded by this one: the outputs are those that they gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import peftfx

from .models import Decoder
from .write_corpus import RECIPES, first, inputs

WRITTEN = Path(__file__).parent / "corpus" / "written"
VERSIONS = sorted(p.name for p in WRITTEN.iterdir() if p.is_dir())


def decoder() -> Decoder:
    model = Decoder().eval()
    model.load_state_dict(safetensors.torch.load_file(WRITTEN / "decoder.safetensors"))
    return model


@pytest.fixture(scope="module")
def base() -> peftfx.Program:
    return peftfx.capture(decoder(), kwargs=inputs())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_artifacts(base: peftfx.Program, version: str, recipe: str) -> None:
    expected = safetensors.torch.load_file(WRITTEN / version / "outputs.safetensors")[recipe]
    program = peftfx.load(base, WRITTEN / version / recipe)
    outputs = first(program(**inputs()))
    torch.testing.assert_close(outputs, expected)
    moved = (outputs[:, -3:] - first(base(**inputs()))[:, -3:]).abs().max()
    assert moved > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("version", VERSIONS)
def test_onto_the_model_itself(version: str) -> None:
    expected = safetensors.torch.load_file(WRITTEN / version / "outputs.safetensors")["lora"]
    program = peftfx.load(decoder(), WRITTEN / version / "lora")
    torch.testing.assert_close(first(program(**inputs())), expected)


@pytest.mark.parametrize("version", VERSIONS)
def test_program_files(version: str) -> None:
    expected = safetensors.torch.load_file(WRITTEN / version / "outputs.safetensors")["two"]
    program = peftfx.load_program(WRITTEN / version / "program")
    torch.testing.assert_close(first(program(**inputs())), expected)


def test_the_corpus_holds_every_format() -> None:
    formats = {
        json.loads((WRITTEN / v / "lora" / "manifest.json").read_text())["format_version"]
        for v in VERSIONS
    }
    assert formats == set(range(1, max(formats) + 1))
