"""Readers with one wrong line each: what PEFT computes tells."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from torch import Tensor

from peftfx.exporters.hf_peft.adapter import read_peft
from peftfx.passes.interchange.imported import Imported
from peftfx.rewriter.errors import RewriteError
from peftfx.rewriter.run.run import apply_plan

from ..mutants import Case, Mutation, applied
from ..temporary import lasting
from .peft_cases import CASES, inputs, output, program, write

pytestmark = pytest.mark.filterwarnings("ignore")

LORA, CHANGES = "exporters/hf_peft/lora.py", "exporters/hf_peft/changes.py"
FORMULAS, PRODUCTS = "exporters/hf_peft/formulas.py", "exporters/hf_peft/products.py"
FORMULA_PARTS = "passes/interchange/formula_parts.py"
LOKR, OFT, BOFT = (f"passes/reparameterized/{n}.py" for n in ("lokr", "oft", "boft"))
CONFIG, IMPORTED = "exporters/hf_peft/config.py", "passes/interchange/imported.py"

WRONG = (
    ("scale forgotten", f"{LORA}:_Scales.of", "float(alpha) /", "1.0 /", "lora"),
    ("alpha pattern ignored", f"{LORA}:_Scales.of", "self.alphas, path", "{}, path", "patterns"),
    ("root ignored", f"{LORA}:_Scales.of", "if self.root", "if False", "rslora"),
    ("root always", f"{LORA}:_Scales.of", "if self.root", "if True", "lora"),
    ("patterns backwards", f"{CONFIG}:resolved", "patterns.items()", "reversed(patterns.items())",
     "overlapping"),
    ("patterns anywhere", f"{CONFIG}:resolved", "({pattern})$", "({pattern})", "part of a path"),
    ("factors of the next", f"{LORA}:_product", "a, b = a.flatten(1), b.flatten(1)",
     "a, b = a.flatten(1).flip(0), b.flatten(1)", "lora"),
    ("magnitude dropped", f"{LORA}:_product", "scale, magnitude, False", "scale, None, False",
     "dora"),
    ("groups interleaved", f"{LORA}:_product", "b.unflatten(0, (site.groups, -1))",
     "b.unflatten(0, (-1, site.groups)).transpose(0, 1)", "convolutions"),
    ("once for twice", f"{LORA}:_product", "TWICE if", "1 if", "attention"),
    ("experts by rank", f"{LORA}:_experts", "a.unflatten(0, (site.experts, -1))",
     "a.unflatten(0, (-1, site.experts)).transpose(0, 1)", "experts"),
    ("ranks by expert", f"{LORA}:_experts", "second.permute(2, 0, 1)",
     "second.flatten(1).unflatten(1, (site.experts, -1)).permute(1, 0, 2)", "experts"),
    ("wrappers outside in", f"{LORA}:_wrapped", "paths.index(path)", "-1 - paths.index(path)",
     "experts"),
    ("eigenvalues dropped", f"{LORA}:_adalora", "a * e", "a", "adalora"),
    ("divided by the rank left", f"{LORA}:_adalora", "(start + 1e-5)", "(start + 1)", "adalora"),
    ("residual added", f"{LORA}:_residual", "[part.b.float(), -b]", "[part.b.float(), b]", "pissa"),
    ("residual forgotten", f"{LORA}:lora_parts", "if start not in _PLAIN", "if False", "pissa"),
    ("residual unscaled", f"{LORA}:_residual", "rank, part.scale)", "rank, 1.0)", "pissa"),
    ("diagonal dropped", f"{LORA}:_truncated", 'part.b.float() * leaves["lora_diag"]',
     "part.b.float()", "kasa"),
    ("base not truncated", f"{LORA}:lora_parts", "elif truncated", "elif False", "kasa"),
    ("blocks repeated", f"{LORA}:_blocks", "torch.block_diag(*a.chunk(count))",
     "a.repeat(1, count)", "blocks"),
    ("behind the invocation", f"{IMPORTED}:Invocation.forward", "places >= last", "places > last",
     "invocation"),
    ("invocation ignored", f"{LORA}:lora_parts", "if tokens else part", "if False else part",
     "invocation"),
    ("bias unscaled", f"{LORA}:lora_parts", "bias.float() * part.scale", "bias.float()",
     "lora bias"),
    ("bias alone", f"{CHANGES}:bias_with", "own.float() + change", "change", "lora bias"),
    ("outputs for inputs", f"{CHANGES}:scalings", '("out", "in")', '("out", "out")', "square ia3"),
    ("values for keys", f"{CHANGES}:prefixes", "stack[:, p, 0], stack[:, p, 1]",
     "stack[:, p, 1], stack[:, p, 0]", "prefix"),
    ("layers backwards", f"{CHANGES}:prefixes", "stack[:, p, 1], i,",
     "stack[:, p, 1], layers - 1 - i,", "prefix"),
    ("a pair a layer", f"{CHANGES}:prefixes", "2 * i % layers", "i", "prefix of bart"),
    ("positions as they are", f"{IMPORTED}:Imported.apply", "if shifted:", "if False:", "prefix"),
    ("rows at no distance", "rewriter/edits/prompts/positions.py:_widen_bias", "(-length, 0)",
     "(0, length)", "prefix of t5"),
    ("scales of rows dropped", f"{FORMULA_PARTS}:branches_of", "part.s is None", "True", "boft"),
    ("no skew part", f"{BOFT}:BOFTBranch.rotations", "(self.blocks - self.blocks.mT) / 2",
     "self.blocks", "boft"),
    ("one task's columns", f"{CHANGES}:prompts", "rows * (columns[0] @ wide[0])", "rows", "multitask"),
    ("rows added", f"{CHANGES}:token_rows", "torch.tensor(ids)", "torch.tensor(ids).flip(0)",
     "token rows"),
    ("sum without its norms", f"{FORMULAS}:_delora", "(len(a) * sizes)", "len(a)", "delora"),
    ("columns of one norm", f"{FORMULAS}:_delora", "a * columns", "a", "delora"),
    ("factors alone", f"{FORMULAS}:_hira", "_numbers(config, path, matrix) * ", "", "hira"),
    ("reflections backwards", f"{FORMULAS}:_hra", "norm(dim=0)).mT", "norm(dim=0)).mT.flip(0)", "hra"),
    ("circulant the other way", f"{FORMULAS}:_c3a", "places - places[:, None]",
     "places[:, None] - places", "c3a"),
    ("vectors for rows", f"{CHANGES}:biases", "vector.float()", "vector.float().flip(0)", "beft"),
    ("one product twice", f"{PRODUCTS}:_loha", "*factors, scale", "*factors[:2], *factors[:2], scale",
     "loha"),
    ("alpha of full lokr", f"{PRODUCTS}:_rank_and_scale", 'config.take("alpha", 8, int, float)', "2",
     "lokr"),
    ("kron the other way", f"{LOKR}:LoKrBranch.branch", 'self._factor("w1") * self.scale, self._factor("w2")',
     'self._factor("w2") * self.scale, self._factor("w1")', "lokr"),
    ("columns backwards", f"{FORMULAS}:_vera", 'shared["vera_A"], ', 'shared["vera_A"].flip(1), ',
     "narrow vera"),
    ("entries at their transpose", f"{FORMULAS}:_shira", "(rows, columns), own",
     "(columns, rows), own", "square shira"),
    ("blocks in a row", f"{FORMULAS}:_miss", "block.repeat(-(-matrix.shape[1] // len(block)), 1)",
     "block.repeat_interleave(-(-matrix.shape[1] // len(block)), 0)", "miss"),
    ("rotated back", f"{OFT}:OFTBranch.mapped", "self.rotation()", "self.rotation().mT", "oft"),
    ("an exact rotation", f"{PRODUCTS}:_oft", 'config.take("use_cayley_neumann", True)', "False",
     "oft"),
    ("features of the first", f"{IMPORTED}:_own", "stack[:, list(site.features)]",
     "stack[:, : len(site.features)]", "fused"),
    ("lookups for products", f"{LORA}:_lookup", "magnitude, True)", "magnitude, False)", "table"),
)  # fmt: skip

CASES.update({
    "overlapping": ("llama", ("LoraConfig", {
        "r": 4, "target_modules": ["q_proj"],
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "q_proj": 9},
    })),
    "part of a path": ("llama", ("LoraConfig", {
        "target_modules": ["q_proj"], "alpha_pattern": {"layers.0.self_attn": 3},
    })),
    "square ia3": ("llama", ("IA3Config", {"target_modules": ["q_proj"],
                                           "feedforward_modules": ["q_proj"]})),
    "narrow vera": ("llama", ("VeraConfig", {"r": 4, "target_modules": ["q_proj", "down_proj"]})),
    "square shira": ("llama", ("ShiraConfig", {"r": 2, "target_modules": ["q_proj"]})),
})  # fmt: skip


@functools.cache
def stored(case: str) -> tuple[Path, Tensor]:
    folder = lasting("peft")
    return folder, write(case, folder)


def gap(case: str) -> float:
    """The largest difference to PEFT, of its largest output; infinite where we refuse."""
    folder, want = stored(case)
    name, _ = CASES[case]
    item = Imported(name="theirs")
    try:
        plan = item.plan(program(name), sources=[read_peft(program(name), folder)])
        read = apply_plan(program(name), item, plan, check=False)
    except (RewriteError, RuntimeError):
        return float("inf")
    return float((output(read(**inputs(name))) - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("case", sorted({case for *_, case in WRONG}))
def test_the_readers_are_right(case: str) -> None:
    assert gap(case) < 1e-5


@pytest.mark.parametrize("kind", [kind for kind, *_ in WRONG])
def test_a_wrong_reader_is_seen(kind: str) -> None:
    where, old, new, case = next(rest for k, *rest in WRONG if k == kind)

    def probe(_: Case) -> None:
        """The mutation's own is `gap`."""

    with applied(Mutation(kind, where, old, new, probe)):
        assert gap(case) > 1e-4
