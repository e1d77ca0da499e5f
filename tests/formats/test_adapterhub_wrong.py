"""Readers of AdapterHub's files with one wrong line each: what the library computed tells."""

from __future__ import annotations

import pytest

from peftfx.exporters.adapterhub.files import read_adapterhub
from peftfx.passes.interchange.imported import Imported
from peftfx.rewriter.errors import RewriteError
from peftfx.rewriter.run.run import apply_plan

from ..mutants import Case, Mutation, applied
from .adapterhub_models import output
from .test_adapterhub import HERE, program, said

READING, LORA = "exporters/adapterhub/reading.py", "exporters/adapterhub/lora.py"
PLACES, CONFIG = "exporters/adapterhub/places.py", "exporters/adapterhub/config.py"
HYPER, KRONECKER = "exporters/adapterhub/hypercomplex.py", "rewriter/products/kronecker.py"
BRANCH, INSERT = "rewriter/branches/bottleneck.py", "passes/interchange/sublayer_parts.py"

LIMIT = 1e-5
"""What the right readers stay below: `test_read_as_the_library_has_it`."""

WRONG = (
    ("non-linearity ignored", f"{READING}:_plan", "options.take_activation()", '"linear"',
     "bert-seq_bn"),
    ("another gelu", f"{CONFIG}:Options.take_activation", "return name",
     'return name.removesuffix("_new")', "bert-normed_inside"),
    ("read before the norm", f"{READING}:_values", 'return ("stream" if normed else "output")',
     'return ("output" if normed else "output")', "bert-seq_bn"),
    ("read behind the norm", f"{READING}:_values", 'return ("stream" if normed else "output")',
     'return ("stream" if normed else "stream")', "bert-double_seq_bn"),
    ("residual before the norm", f"{READING}:_values", "normed and not residual", "False",
     "bert-residual_after"),
    ("residual behind the norm", f"{READING}:_values", "normed and not residual", "normed",
     "bert-seq_bn"),
    ("parallel reads the output", f"{READING}:_values", '"residual", "output"',
     '"output", "output"', "bert-par_bn"),
    ("scale of parallel forgotten", f"{READING}:_plan", "else float(scale)", "else 1.0",
     "bert-par_bn"),
    ("learnt scale forgotten", f"{BRANCH}:BottleneckBranch.update", "if self.factor is None",
     "if True", "bert-scaled_par_bn"),
    ("down for up", f"{READING}:_with_tensors", '("up", "adapter_up")', '("up", "adapter_down.0")',
     "bert-seq_bn"),
    ("norm before forgotten", f"{BRANCH}:BottleneckBranch.units",
     "self.before_weight is not None", "False", "bert-normed"),
    ("norm outside", f"{BRANCH}:BottleneckBranch.transform", 'self.options["inside"]', "False",
     "bert-normed_inside"),
    ("gate ignored", f"{INSERT}:gate_of", "part.gate is None or", "True or", "bert-unipelt"),
    ("gate without bias", f"{INSERT}:gate_of", "copy_(part.gate_bias)", "zero_()", "bert-unipelt"),
    ("gate beside the scale", f"{LORA}:_product", '1.0 if gate else scale', 'scale',
     "bert-unipelt"),
    ("kron the other way", f"{KRONECKER}:hypercomplex_matrix", "->apbq", "->paqb", "bert-phm_whole"),
    ("rules of the next", f"{HYPER}:dense", "rule.float(), weight", "rule.float().flip(0), weight",
     "bert-phm_whole"),
    ("rules transposed", f"{HYPER}:dense", "rule.float(), weight", "rule.float().mT, weight",
     "bert-phm_shared"),
    ("up's matrices for down's", f"{HYPER}:dense", 'f"W_{name}"',
     """f"W_{'up' if name == 'down' else 'down'}\"""", "bert-phm_shared"),
    ("values the other way", f"{KRONECKER}:hypercomplex", "(rule.shape[1], left.shape[1]))",
     "(left.shape[1], rule.shape[1])).mT", "bert-compacter"),
    ("rules of factors transposed", f"{HYPER}:factored", 'needed(rules, "phm_rule", where)',
     'needed(rules, "phm_rule", where).mT', "bert-compacter"),
    ("an activation forgotten", f"{HYPER}:factored", "plain.activation", '"linear"',
     "llama-compacter"),
    ("alpha for the scale", f"{LORA}:_factors", "float)) / rank", "float)) / 1", "bert-lora"),
    ("groups interleaved", f"{LORA}:_product", "*b.chunk(groups)",
     "*b.unflatten(0, (-1, groups)).unbind(1)", "gpt2-lora"),
    ("k for v", f"{LORA}:_enabled", "if kind in chosen", "if kind in (*chosen,)[:1] or kind == 'k'",
     "gpt2-lora"),
    ("norm with the scale", f"{LORA}:_magnitudes", "if part.scale != 1", "if False",
     "llama-dora_scaled"),
    ("bias of the paper", f"{LORA}:_magnitudes", "if site.bias is None", "if True", "bert-dora"),
    ("values for keys", f"{READING}:prefixes", "stack[:, i, 0], stack[:, i, 1]",
     "stack[:, i, 1], stack[:, i, 0]", "bert-prefix_flat"),
    ("layers backwards", f"{READING}:prefixes", "stack[:, i, 0], stack[:, i, 1]",
     "stack[:, -1 - i, 0], stack[:, -1 - i, 1]", "bert-prefix"),
    ("positions behind", f"{READING}:prefixes", "False, place", "True, place",
     "bert-prefix_flat"),
    ("keys not moved", f"{READING}:prefixes", "keys_moved=relative", "keys_moved=False",
     "t5-prefix_flat"),
    ("tokens' keys not moved", "rewriter/edits/prompts/positions.py:_widen_bias",
     "(keys[0], length)", "(keys[0], 0)", "t5-prefix_flat"),
    ("rows before the first", "rewriter/edits/prompts/positions.py:_widen_bias",
     "(0, length) if moved", "(-length, 0) if moved", "t5-prefix_flat"),
    ("first layers for left out", f"{PLACES}:Places.located", "not in left_out", "!= 1",
     "bert-prefix_left_out"),
    ("self for cross", f"{PLACES}:Places.located", '"cross_prefix": [s for s in every if s.cross]',
     '"cross_prefix": [s for s in every if not s.cross][-1:]', "bart-prefix"),
    ("halves exchanged", "rewriter/branches/coupling.py:CouplingBranch.transform",
     "h[..., :half], h[..., half:]", "h[..., half:], h[..., :half]", "bert-seq_bn_inv"),
    ("second half from the old first", "rewriter/branches/coupling.py:CouplingBranch.transform",
     "first = first + self._inner(second, \"first\")\n        return torch.cat([first,",
     "return torch.cat([first + self._inner(second, \"first\"),", "gpt2-seq_bn_inv"),
    ("behind the table alone", "rewriter/edits/edit.py:Editor.after",
     "start = stream_start(self.program, site, self._nodes)",
     "start = self._nodes[site.nodes[0]]", "bert-seq_bn_inv"),
    ("tokens moved behind a prompt", "rewriter/edits/edit.py:Editor.prepend_tokens",
     "if start is not None", "if False", "bert-prompt"),
    ("prompt in front of the embeddings", "exporters/adapterhub/embeddings.py:prompts",
     "place = PLACES.get(options.take(\"combine\", str))", "place = \"input\"", "bert-prompt"),
    ("prompt before the first token", "exporters/adapterhub/embeddings.py:prompts",
     "place = PLACES.get(options.take(\"combine\", str))", "place = \"stream\"",
     "bert-prompt_behind_first"),
    ("gate looks back", f"{INSERT}:gate_of", 'hidden.axes, "all")', "hidden.axes, hidden.reach)",
     "llama-unipelt"),
    ("no activation", f"{READING}:_rows", "activation(F.linear(", "(F.linear(", "bert-prefix"),
    ("today's alpha", f"{CONFIG}:_today", "if old and", "if False and", "bert-lora_old"),
    ("today's gelu", f"{CONFIG}:_today", "if not version and", "if False and", "bert-gelu_old"),
)  # fmt: skip


def gap(case: str) -> float:
    """The largest difference to the library, of its largest output; infinite where we refuse."""
    name, item = case.partition("-")[0], Imported(name="theirs")
    try:
        plan = item.plan(program(name), sources=[read_adapterhub(program(name), HERE / case)])
        read = apply_plan(program(name), item, plan, check=False)
    except (RewriteError, RuntimeError):
        return float("inf")
    return float((output(read, name) - said(case)).abs().max() / said(case).abs().max())


@pytest.mark.parametrize("kind", [kind for kind, *_ in WRONG])
def test_a_wrong_reader_is_seen(kind: str) -> None:
    where, old, new, case = next(rest for k, *rest in WRONG if k == kind)

    def probe(_: Case) -> None:
        """The mutation's own is `gap`."""

    with applied(Mutation(kind, where, old, new, probe)):
        assert gap(case) > 2 * LIMIT
