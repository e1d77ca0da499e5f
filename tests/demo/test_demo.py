"""The demo's parts: corpus, evaluation and report."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import peftfx
from peftfx.demo import _examples, _page, experiment, report  # pyright: ignore[reportPrivateUsage]
from peftfx.demo.corpus import CorpusError, Pair, Split, make_splits, read_corpus
from peftfx.demo.encoder import load_tokenizer
from peftfx.demo.evaluation import mrr, paired_bootstrap, ranks, recall
from peftfx.training.loop import rate

FUNCTION = '''
def {name}(path):
    """{text}

    More text that is not part of the query.
    """
    handle = open(path)
    data = handle.read()
    return data.{name}()
'''


def tree(folder: Path, modules: int, each: int) -> Path:
    for m in range(modules):
        lines = [
            FUNCTION.format(name=f"f{m}_{i}", text=f"Reads thing number {m} {i} from a file.")
            for i in range(each)
        ]
        (folder / f"mod{m}.py").write_text("\n".join(lines))
    return folder


def test_pairs_are_paragraph_and_source_without_docstring(tmp_path: Path) -> None:
    corpus = read_corpus(tree(tmp_path, 2, 3))
    assert len(corpus.pairs) == 6
    pair = corpus.pairs[0]
    assert pair.query == "Reads thing number 0 0 from a file."
    assert "More text" not in pair.code and "handle.read()" in pair.code


def test_bad_files_are_skipped_with_a_reason(tmp_path: Path) -> None:
    tree(tmp_path, 2, 3)
    (tmp_path / "broken.py").write_text("def f(:\n")
    corpus = read_corpus(tmp_path)
    assert len(corpus.skipped) == 1 and "broken.py" in corpus.skipped[0][0]
    with pytest.raises(CorpusError, match="too small"):
        make_splits(corpus)
    with pytest.raises(CorpusError):
        read_corpus(tmp_path / "nowhere")


def test_splits_share_no_module(tmp_path: Path) -> None:
    splits = make_splits(read_corpus(tree(tmp_path, 40, 12)))
    again = make_splits(read_corpus(tmp_path))
    assert splits == again and len(splits) == 3
    for split in splits:
        train, test, chosen = (
            {p.module for p in part} for part in (split.train, split.test, split.validation)
        )
        assert not train & test and not train & chosen and not test & chosen


def test_ranks_and_scores() -> None:
    queries = torch.eye(3)
    answers = torch.tensor([[0.9, 0.1, 0.0], [0.95, 0.5, 0.0], [0.0, 0.0, 1.0]])
    found = ranks(queries, answers)
    assert found.tolist() == [2, 1, 1]
    assert recall(found) == pytest.approx(2 / 3) and mrr(found) == pytest.approx(2.5 / 3)
    interval = paired_bootstrap(np.full(50, 0.7), np.full(50, 0.5))
    assert (interval.low, interval.high) == pytest.approx((0.2, 0.2))


def small_model() -> nn.Module:
    """One block in place of the pretrained model, for the same tokens."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                        num_attention_heads=2)  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def test_a_method_that_moves_the_outputs_is_scored_before_training_too(tmp_path: Path) -> None:
    """And the page has what they reached, without columns that say nothing."""
    corpus = read_corpus(tree(tmp_path, 10, 4))
    pairs = corpus.pairs
    splits = [Split(0, pairs[:16], pairs[16:24], pairs[24:40])]
    ids = torch.arange(32).view(2, 16)
    model = small_model().requires_grad_(False)
    base = peftfx.capture(model, kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    tokenizer = load_tokenizer()
    outcomes = [experiment.zero_shot(base, tokenizer, splits)]
    for name in ("BitFit", "CoDA"):
        method = next(m for m in experiment.METHODS if m.name == name)
        method = replace(method, rates=method.rates[:1])
        program = experiment.prepare(method, base)
        found = experiment.compare(method, program, tokenizer, splits, 1, lambda text: None)
        before = mrr(experiment.score(program, tokenizer, splits[0].test))
        assert found.untrained == (None if name == "BitFit" else before)
        assert len(found.ranks) == 16 and len(found.runs[0].losses) == 1
        outcomes.append(found)
    for shown, columns in ((outcomes, 10), (outcomes[:2], 9)):
        page = _page(corpus, splits, shown, {"text": "folded"}, _examples(shown[1], splits[0]), 1.0)
        assert page.split("</thead>")[0].count("<th") == columns + 1  # and the head itself
        assert "<th class=wide>zero-shot</th><th class=wide>BitFit</th>" in page
    (tmp_path / "page.html").write_text(page)


def test_the_rate_warms_up_and_decays() -> None:
    rates = [rate(s, 20, 1.0, 0.1) for s in range(20)]
    assert rates[0] == 0.5 and max(rates) == 1.0 and rates[-1] == pytest.approx(1 / 18)


def test_the_page_is_self_contained() -> None:
    plots = report.quality_plot([("LoRA", 300_000, 0.69), ("(IA)3", 9_000, 0.66)], 0.64)
    plots += report.loss_plot([("LoRA", [0.5, 0.4, 0.3]), ("(IA)3", [0.6, 0.5, 0.5])])
    page = report.page(
        "T", "lead", [("a < b", plots), ("diff", report.diff_block("+<x>\n-y"))], "env"
    )
    assert page.count("<svg") == 3 and "a &lt; b" in page and "+&lt;x&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page


def test_losses_are_smoothed_on_one_scale() -> None:
    noisy = [1.0 if i % 2 else 0.5 for i in range(30)]
    line = report.smoothed(noisy)
    assert len(line) == 30 and max(line) - min(line) < 0.1
    falling = [1 - i / 30 for i in range(30)]
    assert report.smoothed(falling) == sorted(report.smoothed(falling), reverse=True)
    plots = report.loss_plot([("a", noisy), ("b", falling)])
    assert "a<br>" in plots and "b<br>0.92 → 0.12" in plots and plots.count("<polyline") == 4
    axes = [part.split("<polyline")[0].split("<svg")[1] for part in plots.split("</div>")[:2]]
    assert axes[0] == axes[1]


def test_tables_have_no_empty_columns() -> None:
    table = report.table(("a", "b", "c"), [("1", "", ""), ("2", "", "3")])
    assert "<th>a</th><th>c</th>" in table and "<td>1</td><td></td>" in table


def test_answers_before_and_after_stand_side_by_side() -> None:
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    ids = torch.arange(32).view(2, 16)
    base = peftfx.capture(
        BertModel(config).eval(), kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    )
    query = "Returns the path of the file that holds {} settings of users."
    pairs = [Pair("m", n, 1, query.format(n), f"def {n}(): return 1") for n in ("all", "no", "my")]
    rows = experiment.side_by_side(base, base, tokenizer, pairs, 2)
    assert [r[0] for r in rows] == [pairs[0].query, "", pairs[1].query, ""]
    assert all(before == after and "m." in before for _, before, after in rows)
    best = experiment.side_by_side(base, base, tokenizer, pairs, 3)
    assert sum(row[1].startswith("✓ m.") for row in best) == 3


def test_names_of_close_points_do_not_cover_each_other() -> None:
    crowd = [(f"method {i}", 10.0 ** (3 + i % 3), 0.65 + i / 1000) for i in range(12)]
    plot = report.Plot([100, 1e7], [0.6, 0.7], ("x", "y"), log=True)
    plot.points(crowd)
    dots, names = plot.taken[:12], plot.taken[12:]
    assert len(names) == 12
    pairs = itertools.combinations(names, 2)
    assert not any(report.overlap(a, b) for a, b in [*pairs, *itertools.product(dots, names)])
