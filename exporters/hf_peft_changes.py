"""Parts of PEFT's other tensors: scalings, prompts, prefixes, whole parameters, and the exact
change of what no method here computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..passes.interchange.imported import prefix_sites
from ..rewriter.branches.parts import Change, LowRank, Part, Prefix, Prompt, Rows, Scaling, Trained
from ..rewriter.errors import ArtifactError, BaseMismatchError, BaseNeededError, RewriteError
from ..rewriter.program.sites import ConvSite, LinearSite, WeightSite
from .base import GIVE_BASE, Base
from .hf_peft_config import Config, by_module, resolved

Leaves = dict[str, Tensor]
Formula = Callable[[Config, str, Leaves, Tensor], Tensor]


def scalings(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """IA3: `ia3_l [out, 1]` times the outputs, or `[1, in]` the inputs of feedforward modules."""
    inputs = config.take("feedforward_modules", [], list, str)
    parts: list[Part] = []
    for path, leaves in by_module(tensors, ["ia3_l"]).items():
        vector = leaves["ia3_l"]
        del tensors[f"{path}.ia3_l"]
        at_input = vector.dim() > 1 and vector.shape[0] == 1 and vector.shape[1] > 1
        if vector.numel() == 1:
            at_input = _targeted(inputs, path)
        parts.append(
            Scaling(_weight(program, path, config), vector.flatten(), ("out", "in")[at_input])
        )
    return parts


def _targeted(modules: list[str] | str, path: str) -> bool:
    """Whether PEFT takes a module for one of these."""
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return any(path == m or path.endswith(f".{m}") for m in modules)


def prompts(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """PROMPT_TUNING and P_TUNING: `prompt_embeddings [length, width]`, the encoder's output.
    MULTITASK_PROMPT_TUNING: times a matrix a task, `sum over ranks of cols x rows`."""
    rows = _embeddings(config, tensors)
    length = int(config.take("num_virtual_tokens", 0))
    submodules = int(config.take("num_transformer_submodules", 1))
    tasks = int(config.take("num_tasks", 1))
    if config.type == "MULTITASK_PROMPT_TUNING":
        columns, wide = (tensors.pop(f"prefix_task_{n}", None) for n in ("cols", "rows"))
        if columns is None or wide is None or tasks != 1:
            raise ArtifactError(
                f"{config.where}: it holds prompts of {tasks} tasks, and a program one. Write the "
                "prompt of one task with the library that made it."
            )
        rows = rows * (columns[0] @ wide[0])
    if submodules != 1 or len(rows) != length:
        raise ArtifactError(
            f"{config.where}: {len(rows)} rows for {length} tokens in {submodules} submodules: "
            "only prompts of models with one stack are read."
        )
    return [Prompt("", rows)]


def prefixes(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """PREFIX_TUNING: `[length, layers * 2 * kv_heads * width]`, keys, values by layer.

    Of an encoder-decoder PEFT 0.21 makes two copies, of which every other pair goes to the
    decoder's own attention, the rest nowhere: layer l has pair `2 l` modulo the number of layers.
    """
    rows = _embeddings(config, tensors)
    decoder = int(config.take("num_transformer_submodules", 1)) == 2
    place = "decoder" if decoder else "stack"
    sites = prefix_sites(program.sites)[place]
    length, layers = int(config.take("num_virtual_tokens", 0)), int(config.take("num_layers", 0))
    heads = int(config.data.get("num_attention_heads") or 0)
    if layers < 1 or heads < 1 or rows.shape[0] != length or rows.shape[1] % (2 * layers * heads):
        raise ArtifactError(
            f"{config.where}: prompt_embeddings is {tuple(rows.shape)}, which is not {length} "
            f"tokens of {layers} layers and {heads} heads."
        )
    stack = rows.view(length, layers, 2, heads, -1)
    if decoder and len(sites) > layers:
        raise BaseMismatchError(
            f"{config.where}: the prefix is of {layers} layers, and this model's decoder has "
            f"{len(sites)}. Use the base that the adapter was trained on."
        )
    count = len(sites) or layers if decoder else layers
    pairs = [2 * i % layers if decoder else i for i in range(count)]
    return [Prefix("", stack[:, p, 0], stack[:, p, 1], i, place=place) for i, p in enumerate(pairs)]


def _embeddings(config: Config, tensors: dict[str, Tensor]) -> Tensor:
    rows = tensors.pop("prompt_embeddings", None)
    if rows is None or rows.dim() != 2:
        raise ArtifactError(f"{config.where}: prompt_embeddings is missing, or no matrix.")
    return rows


def token_rows(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """Trained rows of a table: `trainable_tokens_delta [count, width]`, no differences."""
    said = config.take("token_indices", None, list)
    said = said or config.take("trainable_token_indices", None, list, dict)
    parts: list[Part] = []
    leaf = "trainable_tokens_delta"
    for path, leaves in by_module(tensors, [f"token_adapter.{leaf}", leaf]).items():
        ((name, rows),) = leaves.items()
        del tensors[f"{path}.{name}"]
        ids = _ids(said, path) if isinstance(said, Mapping) else said
        if not ids or len(ids) != len(rows):
            raise ArtifactError(
                f"{config.where}: {path} has {len(rows)} trained rows, and the config names "
                f"{len(ids or ())} tokens."
            )
        name = _weight(program, path, config)
        stored = program.tensors.stored(name)
        known = next((p for p in parts if p.target == stored), None)
        if isinstance(known, Rows):
            if not torch.equal(known.values, rows):
                raise ArtifactError(
                    f"{config.where}: {path} has other rows than {stored}, its tie."
                )
            continue
        parts.append(Rows(stored, torch.tensor(ids), rows))
    return parts


def _ids(said: Mapping[str, list[int]], path: str) -> list[int]:
    return next((i for k, i in said.items() if path == k or path.endswith(f".{k}")), [])


def norms(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """LN_TUNING: whole copies of what a normalisation learns."""
    parts: list[Part] = []
    for key in [k for k in tensors if ".ln_tuning_layers." in k]:
        parts.append(Trained(key.replace(".ln_tuning_layers.", "."), tensors.pop(key)))
    return parts


def changes(config: Config, tensors: dict[str, Tensor], program: Base) -> list[Part]:
    """LOHA, LOKR, VERA, SHIRA, MISS, OFT, BOFT: the exact change of each weight."""
    formula, leaves = _FORMULAS[config.type]
    shared = {k: tensors.pop(k) for k in ("vera_A", "vera_B") if k in tensors}
    parts: list[Part] = []
    for path, own in by_module(tensors, leaves).items():
        for leaf in own:
            del tensors[f"{path}.{leaf}"]
        name = _weight(program, path, config)
        site = _site(program, name, config)
        matrix = _matrix(program, site)
        if config.type == "VERA":
            parts.append(_vera(config, name, own, shared, matrix))
            continue
        delta = _computed(formula, config, path, own, matrix)
        if delta.numel() != matrix.numel():
            raise BaseMismatchError(
                f"{config.where}: the change of {path} has {delta.numel()} numbers, its weight "
                f"{matrix.numel()}. Use the base that the adapter was trained on."
            )
        parts.append(Change(name, delta.reshape(matrix.shape), config.type))
    return parts


def _computed(formula: Formula, config: Config, path: str, own: Leaves, matrix: Tensor) -> Tensor:
    """The change of one weight, float32."""
    try:
        return formula(config, path, {k: t.float() for k, t in own.items()}, matrix)
    except RewriteError:
        raise
    except KeyError as error:
        raise ArtifactError(
            f"{config.where}: {path}.{error.args[0]} is missing beside {', '.join(sorted(own))}. "
            "The file is not whole; save the adapter again."
        ) from error
    except (ArithmeticError, RuntimeError, ValueError, IndexError) as error:
        raise _misfit(config, path, own) from error


def _require(fits: bool, config: Config, path: str, own: Leaves) -> None:
    if not fits:
        raise _misfit(config, path, own)


def _misfit(config: Config, path: str, own: Leaves) -> ArtifactError:
    sizes = ", ".join(f"{k} {list(t.shape)}" for k, t in own.items())
    return ArtifactError(
        f"{config.where}: the tensors of {path} ({sizes}) do not belong together, or to this base. "
        "Use the base that the adapter was trained on, or save it again."
    )


def _scale(config: Config, path: str) -> float:
    rank = resolved(config.take("rank_pattern", {}), path, config.take("r", 8), config.where)
    if not isinstance(rank, int) or rank < 1:
        raise ArtifactError(f"{config.where}: the rank of {path} is {rank!r}. Save it again.")
    alphas = config.take("alpha_pattern", {})
    return float(resolved(alphas, path, config.take("alpha", 8, int, float), config.where)) / rank


def _through(tensor: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`a b`, or of a convolution's core tensor `[rank, rank, *kernel]`."""
    return a @ b if tensor is None else torch.einsum("ijkl,ip,jr->prkl", tensor, a, b)


def _loha(config: Config, path: str, own: Leaves, matrix: Tensor) -> Tensor:
    one, two = (
        _through(own.get(f"hada_t{i}"), own[f"hada_w{i}_a"], own[f"hada_w{i}_b"]) for i in (1, 2)
    )
    return one * two * _scale(config, path)


def _lokr(config: Config, path: str, own: Leaves, matrix: Tensor) -> Tensor:
    w1 = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    w2 = own["lokr_w2"] if "lokr_w2" in own else _through(
        own.get("lokr_t2"), own["lokr_w2_a"], own["lokr_w2_b"]
    )  # fmt: skip
    w1 = w1[..., None, None] if w2.dim() == 4 else w1
    return torch.kron(w1, w2.contiguous()) * _scale(config, path)


def _shira(config: Config, path: str, own: Leaves, matrix: Tensor) -> Tensor:
    config.take("r", 32)
    rows, columns = own["shira_indices"].long()
    _require(len(rows) == own["shira_weight"].numel(), config, path, own)
    if len(rows) and (int(rows.max()) >= matrix.shape[0] or int(columns.max()) >= matrix.shape[1]):
        raise ArtifactError(f"{config.where}: an index of {path} is beyond its weight.")
    delta = torch.zeros(matrix.shape)
    return delta.index_put((rows, columns), own["shira_weight"], accumulate=True)


def _miss(config: Config, path: str, own: Leaves, matrix: Tensor) -> Tensor:
    config.take("r", 64), config.take("mini_r", 1)
    start = config.data.get("init_weights", True)
    if start not in (True, False):
        raise ArtifactError(f"{config.where}: MISS with init_weights={start!r} is not read.")
    block = own["miss_block"]
    return block.repeat(-(-matrix.shape[1] // len(block)), 1)[: matrix.shape[1]].mT


_TERMS = 100
"""Most terms of a series in OFT: PEFT takes 5, and more add nothing long before that."""


def _oft(config: Config, path: str, own: Leaves, matrix: Tensor) -> Tensor:
    """`W (R^T - 1)`, R block-diagonal, of skew matrices Q: `(1 - Q)(1 + Q)^-1`, or the first
    terms of its series, which are no exact rotation."""
    config.take("r", 0), config.take("oft_block_size", 32), config.take("eps", 6e-5)
    terms = config.take("num_cayley_neumann_terms", 5)
    if not 2 <= terms <= _TERMS:
        raise ArtifactError(
            f"{config.where}: num_cayley_neumann_terms={terms}, and 2 to {_TERMS} are read. Save "
            "the adapter again, with use_cayley_neumann=false."
        )
    vector = own["oft_R.weight"]
    size = round((1 + (1 + 8 * vector.shape[1]) ** 0.5) / 2)
    upper = torch.triu_indices(size, size, 1)
    q = torch.zeros(len(vector), size, size)
    q[:, upper[0], upper[1]] = vector
    q = q - q.mT
    one = torch.eye(size)
    if config.take("use_cayley_neumann", True):
        powers = [torch.linalg.matrix_power(q, i) for i in range(1, terms)]
        rotation = one + 2 * sum(powers[:-1], torch.zeros(1)) + powers[-1]
    else:
        rotation = torch.linalg.solve(one + q, one - q, left=False)
    if config.take("block_share", False):
        rotation = rotation.repeat(matrix.shape[1] // size, 1, 1)
    turned = torch.block_diag(*rotation).mT - torch.eye(matrix.shape[1])
    return _numbers(config, path, matrix) @ turned


def _boft(config: Config, path: str, own: Leaves, matrix: Tensor) -> Tensor:
    """`diag(s) W M^T - W`, M the product of factors `P R P^T`: R block-diagonal, of rotations
    `(1 - Q)(1 + Q)^-1` with Q the skew part of what is stored, P a permutation."""
    blocks, scale = own["boft_R"], own["boft_s"].flatten()
    config.take("bias", "none"), config.take("boft_n_butterfly_factor", 1)
    factors, count, size, _ = blocks.shape
    said = config.take("boft_block_size", 4), config.take("boft_block_num", 0)
    if said not in ((size, 0), (0, count)) or count * size != matrix.shape[1]:
        raise ArtifactError(
            f"{config.where}: {path} has {count} blocks of {size} for {matrix.shape[1]} inputs, "
            f"and the config says boft_block_size={said[0]}, boft_block_num={said[1]}. The files "
            "do not belong together; save the adapter again."
        )
    _require(len(scale) == len(matrix), config, path, own)
    q, one = (blocks - blocks.mT) / 2, torch.eye(size)
    rotations = torch.linalg.solve(one + q, one - q, left=False)
    turned = _numbers(config, path, matrix).mT
    for index in range(factors):
        order = torch.arange(count * size)
        if index > 0:
            order = _butterfly(order, size * 2**index, size // 2)
        turned = (torch.block_diag(*rotations[index]) @ turned[order.argsort()])[order]
    return scale[:, None] * turned.mT - matrix.float()


def _butterfly(order: Tensor, width: int, step: int) -> Tensor:
    """Of each `width` features, every other `step` first."""
    pieces = order.view(-1, width // step, step)
    return torch.cat([pieces[:, 0::2], pieces[:, 1::2]], 1).flatten()


def _vera(config: Config, name: str, own: Leaves, shared: Leaves, matrix: Tensor) -> Part:
    """`diag(b) B diag(d) A`, of which each weight has the first rows and columns."""
    config.take("r", 256)
    if len(shared) != 2:
        raise ArtifactError(
            f"{config.where}: vera_A and vera_B are not in the file (save_projection=False), and "
            "no generator makes them again on every machine. Save it with save_projection=True."
        )
    if len(own) != 2:
        raise ArtifactError(f"{config.where}: {name} has {', '.join(own)} alone. Save it again.")
    out, size = matrix.shape
    sides = own["vera_lambda_d"].numel(), own["vera_lambda_b"].numel()
    _require(sides == (len(shared["vera_A"]), out), config, name, own)
    a, b = shared["vera_A"][:, :size], shared["vera_B"][:out]
    return LowRank(name, own["vera_lambda_d"][:, None] * a, own["vera_lambda_b"][:, None] * b, 1.0)


def _none(config: Config, path: str, own: Leaves, matrix: Tensor) -> Tensor:
    raise ArtifactError(f"{config.where}: {path} has no formula.")


_FORMULAS: dict[str, tuple[Formula, list[str]]] = {
    "LOHA": (_loha, ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"]),
    "LOKR": (_lokr, ["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
                     "lokr_t2"]),
    "VERA": (_none, ["vera_lambda_b", "vera_lambda_d"]),
    "SHIRA": (_shira, ["shira_weight", "shira_indices"]),
    "MISS": (_miss, ["miss_block"]),
    "OFT": (_oft, ["oft_R.weight"]),
    "BOFT": (_boft, ["boft_R", "boft_s"]),
}  # fmt: skip


def _weight(program: Base, path: str, config: Config) -> str:
    plain = re.sub(r"(^|\.)base_layer(?=\.|$)", "", path)
    names = program.base.base_tensors().keys() | program.tensors.aliases.keys()
    if f"{plain}.weight" not in names:
        raise BaseMismatchError(
            f"{config.where}: the adapter changes {plain!r}, and this model has no such module "
            "with a weight. Use the base that it was trained on."
        )
    return f"{plain}.weight"


def _numbers(config: Config, path: str, matrix: Tensor) -> Tensor:
    if matrix.is_meta:
        raise BaseNeededError(
            f"{config.where}: the change of {path} depends on its weight's numbers. {GIVE_BASE}"
        )
    return matrix.float()


def _site(program: Base, name: str, config: Config) -> WeightSite:
    stored = program.tensors.stored(name)
    for site in program.sites.by_weight.get(stored, []):
        if isinstance(site, ConvSite) and site.transposed:
            raise ArtifactError(
                f"{config.where}: {name} is of a transposed convolution, for which these files "
                "have no form. Fold it, or use peftfx.save."
            )
        if isinstance(site, LinearSite | ConvSite):
            return site
    raise ArtifactError(f"{config.where}: no call of this model multiplies by {name!r}.")


def _matrix(program: Base, site: WeightSite) -> Tensor:
    """The base's weight as `[out, in]`; on meta, where only its size is known."""
    weight = program.base.base_tensors()[site.weight]
    return weight.mT if getattr(site, "in_out", False) else weight.flatten(1)
