"""How LoRA's factors begin: against the papers' equations, and against Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftfx
from peftfx.passes.reparameterized.initial_factors import StartedBranch, principal
from peftfx.rewriter.errors import MetaTensorError, OptionError, PassError
from peftfx.rewriter.run.run import apply_plan

from ..formats.peft_cases import base, inputs, output, program
from ..models import batch, first, randomise

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

PLACES = "q|ffn.down"
MODULES = ["q_proj", "down_proj"]
Factors = Mapping[str, Mapping[str, Tensor]]


def samples(count: int = 3, rows: int = 1) -> list[dict[str, Tensor]]:
    return [batch(rows, 24, seed=i) for i in range(count)]


def power(outputs: Any) -> Tensor:
    """A loss whose gradients have full rank."""
    return output(outputs).pow(2).mean()


def losses() -> list[tuple[dict[str, Tensor], Callable[[Any], Tensor]]]:
    return [(b, power) for b in samples()]


def ours(adapted: peftfx.Program) -> dict[str, dict[str, Tensor]]:
    """Module -> branch tensors, the constants among them."""
    branches = {a.site.removesuffix(".weight"): adapted.branch(a) for a in adapted.attachments}
    named: dict[str, dict[str, Tensor]] = {}
    for site, branch in branches.items():
        own = (*branch.named_parameters(), *branch.named_buffers())
        named[site] = {n: t.detach() for n, t in own}
    return named


def theirs(model: Any) -> dict[str, dict[str, Tensor]]:
    """The same of a model of PEFT: `a`, `b`, and the weight that is left."""
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}
    return {
        n.removeprefix("base_model.model."): {
            "a": m.lora_A["default"].weight.detach(), "b": m.lora_B["default"].weight.detach(),
            "left": m.base_layer.weight.detach(),
        }
        for n, m in layers.items()
    }  # fmt: skip


def adapter(init: Any, **options: Any) -> Any:
    import peft

    more: dict[str, Any] = {"target_modules": MODULES, **options}
    return peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, **more)


def close(got: Tensor, want: Tensor, share: float = 1e-4) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=share * float(want.abs().max()))


def same_start(adapted: peftfx.Program, model: Any, signs: bool = False) -> None:
    """Equal factors (up to the signs of singular vectors), an equal residual, equal outputs."""
    mine, its = ours(adapted), theirs(model)
    assert mine.keys() == its.keys() and len(mine) == 4
    weights = dict(base("llama").named_parameters())
    for name, want in its.items():
        a, b = mine[name]["a"], mine[name]["b"]
        if signs:
            turn = (a * want["a"]).sum(1).sign()
            a, b = turn[:, None] * a, b * turn
        close(a, want["a"]), close(b, want["b"])
        close(weights[f"{name}.weight"] - 1.5 * b @ a, want["left"])
        assert (1.5 * b @ a).abs().max() > 0.01 * weights[f"{name}.weight"].abs().max()
    before = output(program("llama")(**inputs("llama")))
    assert torch.equal(output(adapted(**inputs("llama"))), before)
    with torch.no_grad():
        close(output(model(**inputs("llama"))), before)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_by_the_weight_are_those_of_peft(init: str) -> None:
    import peft

    made = peftfx.run(program("llama"), f"lora{{rank=4,alpha=6,where={PLACES},init={init}}}")
    same_start(made, peft.get_peft_model(base("llama"), adapter(init)).eval())


@pytest.mark.parametrize("init", ["corda", "corda_kpm"])
def test_corda_is_that_of_peft(init: str) -> None:
    import peft
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    method = "kpm" if init == "corda_kpm" else "ipm"
    config = adapter("corda", corda_config=CordaConfig(corda_method=method))
    model = base("llama")

    def run_model() -> None:
        for inputs_ in samples():
            model(**inputs_)

    preprocess_corda(model, config, run_model=run_model)
    text = f"lora{{rank=4,alpha=6,where={PLACES},init={init}}}"
    made = peftfx.run(program("llama"), text, data=samples())
    same_start(made, peft.get_peft_model(model, config).eval(), signs=True)


def reads(model: nn.Module, data: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """What the linears of a model read, a batch each, without padding."""
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str, real: Tensor) -> Callable[..., None]:
        return lambda _m, i, _o: seen.setdefault(name, []).append(i[0].detach()[real])

    for inputs_ in data:
        real = inputs_["attention_mask"].bool()
        linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        handles = [m.register_forward_hook(hook(n, real)) for n, m in linears]
        model(**inputs_)
        for handle in handles:
            handle.remove()
    return seen


def test_corda_is_its_equation() -> None:
    """`W C = U S V^T`, with C of real tokens alone."""
    data = [batch(3, 9, seed=i, pad=4) for i in range(2)]
    model = base("llama")
    weights, seen = dict(model.named_parameters()), reads(model, data)
    made = peftfx.run(program("llama"), "lora{rank=3,alpha=6,where=ffn.down,init=corda}", data=data)
    for name, factors in ours(made).items():
        rows = [(x / x.max().abs()).double() for x in seen[name]]
        c = torch.stack([x.T @ x for x in rows]).mean(0)
        c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c))
        u, s, v = torch.linalg.svd(weights[f"{name}.weight"].double() @ c)
        want = u[:, :3] * s[:3] @ v[:3] @ torch.linalg.inv(c)
        close(2 * (factors["b"] @ factors["a"]).double(), want)
        close(factors["b"].norm(dim=0).double(), (s[:3] / 2).sqrt())


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_is_that_of_peft(rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft
    from peft.utils.incremental_pca import IncrementalPCA

    exact = IncrementalPCA._svd_fn_full  # in the place of their randomised decomposition
    monkeypatch.setattr(IncrementalPCA, "_svd_fn_lowrank", exact)
    data = samples(1, rows=16)
    config = adapter("eva", eva_config=peft.EvaConfig(rho=rho))
    model = peft.get_peft_model(base("llama"), config)
    peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    text = f"lora{{rank=4,alpha=6,where={PLACES},init=eva,rho={rho}}}"
    made = peftfx.run(program("llama"), text, data=data)
    mine, its = ours(made), theirs(model)
    assert mine.keys() == its.keys() and sum(len(t["a"]) for t in mine.values()) == 16
    ranks = {len(t["a"]) for t in mine.values()}
    assert ranks == {4} if rho == 1.0 else len(ranks) > 1
    for name, want in its.items():
        close(mine[name]["a"], want["a"], 1e-3)
        assert not mine[name]["b"].any()
    scales = {made.branch(a).scale for a in made.attachments}
    assert scales == {1.5}
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and len(m.lora_A)]
    assert {m.scaling["default"] for m in layers} == {1.5}


def test_eva_explains_the_most_variance() -> None:
    """Directions and ranks by an eigenvalue decomposition of all centred real rows at once."""
    data = [batch(3, 12, seed=i, pad=5) for i in range(3)]
    seen = reads(base("llama"), data)
    text = "lora{rank=3,where=q|o|ffn.down,init=eva,rho=3.0}"
    made = ours(peftfx.run(program("llama"), text, data=data))
    known: dict[str, tuple[Tensor, Tensor]] = {}
    for name in [n for n in seen if n.endswith(("q_proj", "o_proj", "down_proj"))]:
        rows = torch.cat(seen[name]).double()
        _, s, v = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        known[name] = s.square() / s.square().sum(), v
    shares = sorted(((float(x), n) for n, (s, _) in known.items() for x in s[:9]), reverse=True)
    taken = [n for _, n in shares[: 3 * len(known)]]
    assert {n: len(t["a"]) for n, t in made.items()} == {n: taken.count(n) for n in made}
    assert len({len(t["a"]) for t in made.values()}) > 1
    for name, factors in made.items():
        cosines = (factors["a"].double() * known[name][1][: len(factors["a"])]).sum(1).abs()
        close(cosines, torch.ones_like(cosines))


def test_a_site_whose_inputs_say_least_gets_no_rank() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.flat = nn.Linear(8, 8), nn.Linear(64, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.wide(x) + self.flat(y).mean(1, keepdim=True)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=generator) * torch.tensor([9.0, 5, 3, 1, 1, 1, 1, 1])
    given = {"x": x, "y": torch.randn(40, 64, generator=generator)}
    made = peftfx.run(
        peftfx.capture(Two(), kwargs=given), "lora{rank=1,where=linear,init=eva}", data=[given]
    )
    assert [a.site for a in made.attachments] == ["wide.weight"]
    assert len(ours(made)["wide"]["a"]) == 2
    assert ("flat.weight", "its inputs vary too little for a rank") in made.history[-1].skipped


def test_inputs_of_products_from_the_left_are_read_by_column() -> None:
    """`W x` with features on the last axis but one; two calls of one weight are read together."""

    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.weight @ x.mT + self.weight @ y.mT

    generator = torch.Generator().manual_seed(0)
    given = {n: torch.randn(3, 7, 8, generator=generator) for n in "xy"}
    before = peftfx.capture(Left(), kwargs=given)
    made = peftfx.run(before, "lora{rank=2,where=linear,init=eva,rho=1.0}", data=[given])
    assert made.sites[made.attachments[0].site].left  # pyright: ignore
    rows = torch.cat([given["x"], given["y"]]).flatten(0, 1).double()
    v = torch.linalg.svd(rows - rows.mean(0)).Vh[:2]
    a: Any = made.branch(made.attachments[0]).a
    close((a.double() * v).sum(1).abs(), torch.ones(2, dtype=torch.float64))


def test_principal_directions_of_constant_inputs_are_finite() -> None:
    directions, shares = principal(torch.ones(5, 5, dtype=torch.float64), 2)
    assert torch.isfinite(directions).all() and not shares.any()


def test_lora_ga_is_its_equation() -> None:
    """Theorem 3.1 and section 3.4 of the paper, by autograd on the plain model."""
    model = base("llama").requires_grad_(False)
    weights = {
        n: p
        for n, p in model.named_parameters()
        if n.endswith(("q_proj.weight", "down_proj.weight"))
    }
    for weight in weights.values():
        weight.requires_grad_(True)
    torch.stack([power(model(**b)) for b in samples()]).sum().backward()
    made = peftfx.run(
        program("llama"), f"lora{{rank=4,alpha=6,where={PLACES},init=lora_ga}}", data=losses()
    )
    for name, factors in ours(made).items():
        weight = weights[f"{name}.weight"]
        u, s, v = torch.linalg.svd(weight.grad.double())
        assert float(s[7] / s[0]) > 1e-4
        size = weight.shape[0] ** 0.25 / 16**0.5
        for got, want in ((factors["a"], v[:4]), (factors["b"].mT, u[:, 4:8].mT)):
            turn = (got * want).sum(1).sign()[:, None]
            close((turn * got).double(), size * want, 1e-3)


def test_lora_ga_of_peft_multiplies_by_the_gradient_where_the_paper_does_not() -> None:
    import peft
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    config = adapter("lora_ga", lora_ga_config=LoraGAConfig())
    model = base("llama")

    def train_step() -> None:
        for inputs_ in samples():
            power(model(**inputs_)).backward()

    preprocess_loraga(model, config, train_step)
    grads = {
        n: m._peft_loraga_grad.clone()
        for n, m in model.named_modules()
        if hasattr(m, "_peft_loraga_grad")
    }
    its = theirs(peft.get_peft_model(model, config))
    made = peftfx.run(
        program("llama"), f"lora{{rank=4,alpha=6,where={PLACES},init=lora_ga}}", data=losses()
    )
    for name, factors in ours(made).items():
        size, s = len(grads[name]) ** 0.25 / 4, torch.linalg.svdvals(grads[name])[4:8]
        mine_a, mine_b = factors["a"] / size, factors["b"] * s
        for got, want in ((mine_a, its[name]["a"]), (mine_b.mT, its[name]["b"].mT)):
            turn = (got * want).sum(1).sign()[:, None]
            close(turn * got, want, 0.02)  # theirs is a randomised decomposition


def test_gaussian_and_randomised_starts(captured: Any) -> None:
    _, before = captured["llama"]
    made = ours(peftfx.run(before, "lora{rank=4,where=linear and not head,init=gaussian}"))
    drawn = torch.cat([t["a"].flatten() for t in made.values()])
    assert abs(float(drawn.std()) * 4 - 1) < 0.05 and not any(t["b"].any() for t in made.values())

    text = "lora{{rank=4,where=ffn.down,init={},seed={}}}"
    exact, *rounds = (
        ours(peftfx.run(before, text.format(init, seed)))
        for init, seed in [
            ("pissa", 0),
            ("pissa_niter_30", 0),
            ("pissa_niter_30", 0),
            ("pissa_niter_1", 1),
        ]
    )
    for name, factors in exact.items():
        one, again, rough = (r[name]["b"] @ r[name]["a"] for r in rounds)
        share = (one.norm() / (factors["b"] @ factors["a"]).norm()).item()
        assert 0.99 < share < 1 + 1e-5
        assert torch.equal(one, again) and not torch.equal(one, rough)


PLACED = {
    "fused": ("lora{rank=3,where=v,init=pissa}", {}),
    "tied": ("lora{rank=3,where=head|q,init=olora}", {}),
}


@pytest.mark.parametrize("name", list(PLACED))
def test_parts_of_fused_and_tied_weights(captured: Any, name: str) -> None:
    model, before = captured[name]
    made = peftfx.run(before, PLACED[name][0])
    inputs_ = {"input_ids": batch(4, 11)["input_ids"]}
    if name != "fused":
        inputs_ = batch(4, 11)
    assert torch.equal(first(made(**inputs_)), first(before(**inputs_)))
    weights = dict(model.named_parameters())
    for attachment in made.attachments:
        site: Any = made.sites[attachment.site]
        branch: Any = made.branch(attachment)
        rows = (
            weights[site.weight]
            if site.features is None
            else weights[site.weight][list(site.features)]
        )
        left = rows - branch.scale * branch.b0 @ branch.a0
        u, s, v = torch.linalg.svd(rows.detach())
        if name == "fused":
            close(left, u[:, 3:] * s[3:] @ v[3 : len(s)])
        else:
            q, r = torch.linalg.qr(rows.detach())
            close(left, rows.detach() - branch.scale * q[:, :3] @ r[:3])
    randomise(made)
    folded = peftfx.run(made, "fold{tied=untie}")
    torch.testing.assert_close(first(folded(**inputs_)), first(made(**inputs_)))


def test_convolutions_and_experts_start_by_matrix(tmp_path: Path) -> None:
    """Each group and each expert has a decomposition of its own."""
    for name, text in (("convolutions", "lora{rank=2,where=conv,init=pissa}"),
                       ("qwen3_moe", "lora{rank=2,where=experts,init=olora}")):  # fmt: skip
        made = peftfx.run(program(name), text)
        assert torch.equal(output(made(**inputs(name))), output(program(name)(**inputs(name))))
        for attachment in made.attachments:
            site: Any = made.sites[attachment.site]
            branch: Any = made.branch(attachment)
            stored = dict(base(name).named_parameters())[site.weight].detach()
            stack = branch.shape.matrix(stored).unflatten(0, (branch.shape.count, -1))
            stack = stack if site.features is None else stack[:, list(site.features)]
            product = (branch.b0 @ branch.a0).reshape(len(stack), -1, stack.shape[-1])
            for matrix, own in zip(stack, product, strict=True):
                if "pissa" in text:
                    u, s, v = torch.linalg.svd(matrix)
                    close(branch.scale * own, u[:, :2] * s[:2] @ v[:2])
                else:
                    q, r = torch.linalg.qr(matrix)
                    close(own, q[:, :2] @ r[:2])


def test_bfloat16_starts_as_the_base_and_keeps_small_steps() -> None:
    """Where PEFT's residual is rounded, a change of 1 in 1000 of a factor is not lost here."""
    model = base("llama").bfloat16()
    before = peftfx.capture(model, kwargs=inputs("llama"))
    made = peftfx.run(before, "lora{rank=8,where=ffn.down,init=pissa}")
    assert torch.equal(output(made(**inputs("llama"))), output(before(**inputs("llama"))))
    branch: Any = made.branch(made.attachments[0])
    with torch.no_grad():
        branch.b.mul_(1.001)
    x = torch.randn(5, branch.a.shape[1], generator=torch.Generator().manual_seed(0))
    want = branch.scale * (x @ branch.a.mT) @ (branch.b - branch.b0).mT
    close(branch.branch(x.bfloat16()).float(), want, 0.02)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_other_libraries_get_a_lora_of_twice_the_rank(init: str, tmp_path: Path) -> None:
    """The file is the one that PEFT makes with `path_initial_model_for_weight_conversion`."""
    import peft

    model = peft.get_peft_model(base("llama"), adapter(init)).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = init
    made = peftfx.run(program("llama"), f"lora{{rank=4,alpha=6,where={PLACES},init={init}}}")
    generator = torch.Generator().manual_seed(3)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules()}
    with torch.no_grad():
        for attachment in made.attachments:
            branch: Any = made.branch(attachment)
            layer: Any = layers[attachment.site.removesuffix(".weight")]
            pairs = (
                (branch.a, layer.lora_A["default"].weight),
                (branch.b, layer.lora_B["default"].weight),
            )
            for one, other in pairs:
                other.add_(torch.randn(one.shape, generator=generator) * 0.1)
                one.copy_(other)
    model.save_pretrained(
        str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    peftfx.save_peft(made, tmp_path / "ours")
    files = [load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    for key, tensor in files[0].items():
        close(tensor, files[1][key], 1e-6)
    again = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        want = output(model(**inputs("llama")))
        close(output(again(**inputs("llama"))), want, 1e-5)
    close(output(made(**inputs("llama"))), want, 1e-5)
    read = peftfx.load_peft(program("llama"), tmp_path / "theirs")
    close(output(read(**inputs("llama"))), want, 1e-5)


def test_it_is_saved_with_where_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading decomposes nothing: another machine's factors would be others."""
    made = randomise(peftfx.run(program("llama"), "lora{rank=4,init=pissa}"))
    want = output(made(**inputs("llama")))
    peftfx.save(made, tmp_path / "a")
    monkeypatch.setattr(torch.linalg, "svd", None)
    again = peftfx.load(program("llama"), tmp_path / "a")
    assert torch.equal(output(again(**inputs("llama"))), want)
    assert all(isinstance(again.branch(a), StartedBranch) for a in again.attachments)
    renamed = peftfx.load(program("llama"), tmp_path / "a", name="other")
    assert torch.equal(output(renamed(**inputs("llama"))), want)
    peftfx.save_program(made, tmp_path / "whole")
    whole = peftfx.load_program(tmp_path / "whole")
    assert torch.equal(output(whole(**inputs("llama"))), want)


@pytest.mark.parametrize("init", ["pissa", "eva"])
def test_a_plan_without_its_factors_is_refused(captured: Any, init: str) -> None:
    _, before = captured["llama"]
    made = peftfx.run(before, f"lora{{rank=4,init={init}}}", data=samples())
    assert all(p.is_contiguous() for p in made.trainable_parameters())  # safetensors asks for it
    record = made.history[-1]
    with pytest.raises(PassError, match="the plan has no factors"):
        apply_plan(before, record.applied, replace(record.plan, tensors={}))


def test_it_is_lowered_banked_and_cut(captured: Any) -> None:
    _, before = captured["llama"]
    made = randomise(peftfx.run(before, "lora{rank=3,where=q|v|ffn.down,init=pissa}"))
    want = first(made(**batch(3, 9)))
    lowered = peftfx.run(made, "lower")
    torch.testing.assert_close(first(lowered(**batch(3, 9))), want, rtol=1e-4, atol=1e-5)
    two = randomise(peftfx.run(made, "lora{name=two,rank=2}"), seed=1)
    alone = first(two.without("two")(**batch(3, 9)))
    banked = peftfx.run(two, "bank{names=[lora,two]}")
    got = first(banked(**batch(3, 9), adapter=torch.tensor([0, 0, 0])))
    torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)
    cut = peftfx.run(made, "channel_pruning{ratio=0.5}")  # measures itself
    assert cut.history[-1].certificate.holds


REFUSED = {
    "lora{init=pisa}": "init='pisa', but it must be kaiming",
    "lora{init=pissa,alpha=-1}": "alpha=-1.0, but it must be above 0",
    "lora{init=eva,rho=0.5}": "rho=0.5, but it must be at least 1",
    "lora{init=eva}": "there are no batches",
    "lora{init=corda}": "there are no batches",
    "lora{init=lora_ga}": "there are no batches",
    "dora{init=pissa}": "init='pissa', but it must be kaiming or gaussian",
    "lora{init=olora,where=embedding.token}": "is for products, not for tables",
    "lora{init=lora_ga,rank=12,where=v}": "so rank may be 8 at most",
}


@pytest.mark.parametrize("text", list(REFUSED))
def test_what_cannot_begin_so_is_refused(captured: Any, text: str) -> None:
    with pytest.raises(OptionError, match=REFUSED[text]):
        peftfx.run(captured["llama"][1], text)


def test_bad_batches_and_weights_without_values_are_refused(captured: Any) -> None:
    model, before = captured["llama"]
    with pytest.raises(PassError, match="a batch must be a mapping"):
        peftfx.run(before, "lora{init=eva}", data=[torch.ones(2, 3)])
    with pytest.raises(OptionError, match="returns no loss"):
        peftfx.run(before, "lora{init=lora_ga,rank=2}", data=[batch()])
    with pytest.raises(OptionError, match="stored in few bits"):
        few = peftfx.run(before, "quantise{format=int8,group=16}")
        peftfx.run(few, "lora{init=lora_ga,rank=2}", data=losses())
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(MetaTensorError, match="has no values"):
        peftfx.run(peftfx.capture(empty, kwargs=batch()), "lora{init=pissa}")


@pytest.mark.parametrize("init", ["eva", "corda", "corda_kpm"])
def test_convolutions_have_no_start_of_data(init: str) -> None:
    """As in the papers and in PEFT: they are left out, with the reason, or all that was selected."""
    given = {"x": torch.randn(2, 4, 6, 6)}
    before = program("convolutions")
    made = peftfx.run(before, f"lora{{rank=2,where=conv|linear,init={init}}}", data=[given])
    assert f"conv: init={init} is for linears. Leave init= out there" in str(made.history[-1])
    assert {a.site for a in made.attachments} == {"c.weight"}
    with pytest.raises(OptionError, match=f"init={init} is for linears"):
        peftfx.run(before, f"lora{{rank=2,where=conv,init={init}}}", data=[given])
