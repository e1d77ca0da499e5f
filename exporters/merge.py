"""Whole checkpoints as one, tensor by tensor over their shards, by mergekit's configurations.

What is computed is what mergekit computes (`passes/merging/merge_formulas`), in float32 at least
and with one rounding; `dtype` is that of the result. What is random is drawn for each tensor by its
name and a seed, so that neither shards nor the order of tensors matter. A merge that was killed
goes on where it was, with the same bytes as in one go.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..passes.merging import merge_formulas
from ..rewriter.errors import NonFiniteError, OptionError, PathError, WeightsError
from ..rewriter.files.files import JSON_LIMIT, parse_json, read_file, tensor_head, write_json
from ..rewriter.files.identity import write_tensor
from ..rewriter.files.job import finished, job
from ..rewriter.measure.compare import all_finite
from ..rewriter.pipeline.syntax import Node
from ..rewriter.storage.artifact import VERSION
from ..rewriter.storage.card import CARD, whole_card
from ..rewriter.storage.safetensors_checkpoint import Entry, header_size
from ..rewriter.storage.stream import WEIGHT_FORMATS
from .merge_plan import Model, Origin, shards, stack_of
from .mergekit import Config, read_config

RECORD = "peftfx_merge.json"
"""Says which merge a directory holds."""
_GIVEN = "mergekit_config.yml"
_OWN_FILES = (RECORD, _GIVEN, CARD)


@dataclass
class Merged:
    """What `merge` wrote.

    Attributes:
        directory: the new checkpoint.
        tensors: how many were merged, and how many of them a killed run had written.
        notes: what to know about it.
    """

    directory: Path
    tensors: int = 0
    resumed: int = 0
    notes: list[str] = field(default_factory=list[str])


def merge(
    config: str | Path,
    target: str | Path,
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Merged:
    """Merges checkpoints into a new one.

    Args:
        config: path of a mergekit configuration, whose models are directories with safetensors
            files: as the path says, else beside the configuration.
        target: a new or empty directory; it appears complete, or not at all. Where it holds just
            this merge already, nothing is done.
        seed: of methods that draw.
        progress: called with the name of each file before it is written.

    Raises:
        OptionError: the configuration says what is unknown, or not done here.
        WeightsError: the models have other tensors, or of other shapes.
        NonFiniteError: a merged tensor holds NaN or infinity.
        ArtifactError: a model is no checkpoint, or damaged; or the target cannot be written.
    """
    path = Path(config)
    try:
        text = read_file(path, JSON_LIMIT).decode()
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is no text.") from error
    asked = read_config(text, str(path))
    models = {name: _model(name, path.parent) for name in asked.models}
    lead = models[asked.base] if asked.base else models[asked.models[0]]
    work = _Work(asked, models, lead, seed)
    result = Merged(Path(target), len(work.names), notes=work.notes)
    about = {
        "version": VERSION,
        "config": text,
        "seed": seed,
        "models": {n: _identity(m) for n, m in models.items()},
    }
    if finished(target, RECORD, about) is not None:
        result.resumed = len(work.names)
        result.notes.append(f"{target} holds this merge already: nothing to do")
        return result
    with job(target, RECORD, about, lambda _: {"notes": result.notes}) as mine:
        for file, names in work.files().items():
            if file in mine.done:
                result.resumed += len(names)
                continue
            if progress is not None:
                progress(file)
            with mine.file(file) as (new, _):
                new.write(tensor_head(work.entries(names), {"format": "pt"}))
                for name in names:
                    write_tensor(new, work.value(name))
        work.copy_others(mine.folder, text)
    return result


def _model(name: str, beside: Path) -> Model:
    folder = Path(name) if Path(name).exists() else beside / name
    if not folder.is_dir():
        more = " Adapters (model+adapter) are folded first: peftfx fold." if "+" in name else ""
        raise PathError(f"{name} is no directory with a model. Give one that is here.{more}")
    return Model.read(name, folder)


def _identity(model: Model) -> str:
    """A hash of a model's files, as far as their headers, sizes and times tell."""
    digest = hashlib.sha256()
    for file in model.files.shards:
        path = model.files.directory / file
        with open(path, "rb") as handle:
            digest.update(handle.read(header_size(path)))
        about = path.stat()
        digest.update(f"{file} {about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()


class _Work:
    """What is merged, checked before anything is written."""

    def __init__(self, config: Config, models: Mapping[str, Model], lead: Model, seed: int) -> None:
        self.config, self.models, self.lead, self.seed = config, models, lead, seed
        self.notes: list[str] = []
        self.stack = stack_of(config, models, lead)
        self.origins = self.stack.origins
        self.names = list(self.origins)
        for name, origin in self.origins.items():
            self._require_everywhere(name, origin)
            if self._floats(name):
                self._check(name, origin)
        self._require_filters()
        self._compare_tokenizers()

    def _require_filters(self) -> None:
        """Raises OptionError for a filter that no tensor's name holds."""
        configs = {id(o.config): o.config for o in self.origins.values()}.values()
        nodes = [n for c in configs for own in c.settings.values() for n in own.values()]
        for wanted, line in dict.fromkeys(f for node in nodes for f in _filters(node)):
            if not any(wanted in name for name in self.names):
                raise OptionError(
                    f"{self.config.where}, line {line}: no tensor's name holds the filter "
                    f"{wanted!r}; the first is {self.names[0]}."
                )

    def _require_everywhere(self, name: str, origin: Origin) -> None:
        """Raises WeightsError where a model lacks a tensor, or has it in another shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        for model, own in origin.names.items():
            if not self.models[model].has(own):
                raise WeightsError(
                    f"{model} has no tensor {own!r}, which another model has. Merge models of one "
                    "architecture."
                )
            shapes[model] = self._entry(model, own).shape
        if len(set(shapes.values())) > 1:
            said = ", ".join(f"{list(s)} in {m}" for m, s in shapes.items())
            raise WeightsError(f"{name!r} is {said}. Merge models whose tensors have one shape.")
        kinds = {self._entry(*each).dtype.is_floating_point for each in origin.names.items()}
        if len(kinds) > 1:
            raise WeightsError(f"{name!r} is of numbers in one model and of integers in another.")

    def _entry(self, model: str, tensor: str) -> Entry:
        """Where a model's files hold a tensor."""
        files = self.models[model]
        return files.files.entries[files.stored(tensor)]

    def _entries(self, name: str) -> list[Entry]:
        """Of what a merged tensor is made."""
        return [self._entry(*each) for each in self.origins[name].names.items()]

    def _floats(self, name: str) -> bool:
        return self._entries(name)[0].dtype.is_floating_point

    def _check(self, name: str, origin: Origin) -> None:
        """What the method says of a tensor is possible; nothing is computed."""
        values = origin.config.values(name, origin.place)
        for model in origin.config.others:
            own = values[model]
            if "density" in own:
                self._trim(own).check(self._recipe(values[""]).trim)

    def dtype(self, name: str) -> torch.dtype:
        """Of a merged tensor: what the configuration says, else what holds all models' numbers."""
        kinds = [entry.dtype for entry in self._entries(name)]
        if self.config.dtype and kinds[0].is_floating_point:
            return getattr(torch, self.config.dtype)
        found = kinds[0]
        for kind in kinds[1:]:
            found = torch.promote_types(found, kind)
        return found

    def size(self, name: str) -> int:
        """Bytes of a merged tensor."""
        return torch.Size(self._entries(name)[0].shape).numel() * self.dtype(name).itemsize

    def entries(self, names: Sequence[str]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtypes and shapes of merged tensors, in the order of their file."""
        return {n: (self.dtype(n), self._entries(n)[0].shape) for n in names}

    def files(self) -> dict[str, list[str]]:
        """File -> the tensors that go into it: as in the lead, what it lacks in the last one; of
        stacked layers, files as large as the lead's largest."""
        held = self.lead.files
        if self.stack.layers is not None:
            largest = max((held.directory / f).stat().st_size for f in held.shards)
            return shards({n: self.size(n) for n in self.names}, largest)
        found = {file: list(names) for file, names in held.shards.items()}
        found[list(found)[-1]] += [n for n in self.names if n not in held.entries]
        return found

    def value(self, name: str) -> Tensor:
        """A merged tensor."""
        origin = self.origins[name]
        held = {m: self.models[m] for m in origin.names}
        given = {m: held[m].files.mapped(held[m].stored(n)) for m, n in origin.names.items()}
        dtype = self.dtype(name)
        if not self._floats(name):
            first, *rest = given.values()
            if any(not torch.equal(first, r) for r in rest):
                raise WeightsError(f"{name!r} holds integers, which differ. They cannot be merged.")
            return first
        wide = torch.promote_types(torch.float32, dtype)
        for kind in {t.dtype for t in given.values()}:
            wide = torch.promote_types(wide, kind)
        with torch.no_grad():
            wider = {m: t.to(wide) for m, t in given.items()}
            result = self._merged(name, origin, wider).to(dtype)
        if not all_finite(result):
            raise NonFiniteError(
                f"{name}: merged, it holds NaN or infinity in {str(dtype)[6:]}. Look at the models "
                "for broken tensors, or choose a wider dtype."
            )
        return result

    def _merged(self, name: str, origin: Origin, given: Mapping[str, Tensor]) -> Tensor:
        config = origin.config
        values = config.values(name, origin.place)
        shared = values[""]
        if config.method == "linear":
            weights = [values[m]["weight"] for m in config.models]
            if shared["normalize"] and not sum(weights):
                raise OptionError(f"{config.where}: the weights of {name} sum to 0. Set normalize "
                                  "to false.")  # fmt: skip
            return merge_formulas.weighted(list(given.values()), weights, shared["normalize"])
        if config.method == "passthrough":
            scale = values[config.models[0]]["scale"]
            tensor = given[config.models[0]]
            return tensor if scale is None else tensor * scale
        base = given[config.base]
        if config.method == "slerp":
            return merge_formulas.slerp(base, given[config.others[0]], shared["t"])
        own = [values[m] for m in config.others]
        drawn = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return base + merge_formulas.merged(
            [given[m] - base for m in config.others], [o["weight"] for o in own],
            self._recipe(shared), [self._trim(o) for o in own], shared["lambda"], drawn,
        )  # fmt: skip

    def _recipe(self, shared: Mapping[str, Any]) -> merge_formulas.Recipe:
        name = {"dare_linear": "dare"}.get(self.config.method, self.config.method)
        rescale = "l1" if shared["rescale"] else "none"
        recipe = merge_formulas.RECIPES[name]
        return replace(recipe, normalize=shared["normalize"], rescale=rescale)

    @staticmethod
    def _trim(own: Mapping[str, Any]) -> merge_formulas.Trim:
        return merge_formulas.Trim(own["density"], own.get("gamma", 0.01), own.get("epsilon", 0.15))

    # Other files.

    def _compare_tokenizers(self) -> None:
        """Raises WeightsError where a token is another one in another model."""
        vocabularies = {m.name: _vocabulary(m.files.directory) for m in self.models.values()}
        known = {n: v for n, v in vocabularies.items() if v is not None}
        for name, words in known.items():
            first = next(iter(known))
            if words != known[first]:
                raise WeightsError(
                    f"the tokenizers of {first} and {name} give other ids to words, so rows of "
                    "their embeddings are of other words, and tokenizer_source moves no rows here. "
                    "Merge models of one tokenizer."
                )

    def copy_others(self, fresh: Path, text: str) -> None:
        """The index, the configuration and the tokenizer."""
        files = self.files()
        if len(files) > 1 or self.lead.files.index:
            listed = {n: file for file, names in files.items() for n in names}
            total = sum(map(self.size, listed))
            index = {"metadata": {"total_size": total}, "weight_map": listed}
            name = self.lead.files.index or "model.safetensors.index.json"
            (fresh / name).write_bytes(write_json(index))
        (fresh / _GIVEN).write_bytes(text.encode())
        (fresh / CARD).write_text(self._card(text), encoding="utf-8")
        for path in sorted(self.lead.files.directory.iterdir()):
            skipped = path.name in files or path.name in _OWN_FILES or path.is_dir()
            if skipped or path.name.endswith(WEIGHT_FORMATS) or _is_tokenizers(path.name):
                continue
            self._copy(path, fresh)
        source = self.models[self.config.tokenizer] if self.config.tokenizer else self.lead
        for path in sorted(source.files.directory.iterdir()):
            if _is_tokenizers(path.name) and path.is_file():
                self._copy(path, fresh)

    def _card(self, text: str) -> str:
        """What the merged model says of itself, in the place of the cards of its parts."""
        config, names = self.config, {m: Path(m).name for m in self.models}
        layers = "" if self.stack.layers is None else f", {len(self.stack.layers)} layers stacked"
        others = [names[m] for m in config.models if m != config.base]
        onto = f", onto {names[config.base]}" if config.base else ""
        said = (
            f"{len(self.names)} tensors of {', '.join(others)}, merged by `{config.method}`{onto}"
            f"{layers}; "
            f"computed in float32 at least, rounded once, and finite. Seed of what is drawn: "
            f"{self.seed}. `{RECORD}` says of which files.",
            f"```yaml\n{text.strip()}\n```",
        )
        return whole_card(f"Merge of {', '.join(names.values())}", [*names.values()], said)

    def _copy(self, path: Path, fresh: Path) -> None:
        if path.name != "config.json":
            shutil.copyfile(path, fresh / path.name)
            return
        config: Any = parse_json(read_file(path, JSON_LIMIT), str(path))
        if isinstance(config, dict):
            self.stack.configured(config, self.models)
            kinds = {self.dtype(n) for n in self.names if self._floats(n)}
            if len(kinds) == 1:
                key = "dtype" if "dtype" in config else "torch_dtype"
                config[key] = str(kinds.pop())[6:]
            if any(n in self.lead.tied for n in self.names):
                config["tie_word_embeddings"] = False
                self.notes.append(
                    "the models' heads are not all tied to the embedding, so the merged head is a "
                    "tensor of its own, and config.json says so"
                )
        (fresh / path.name).write_bytes(json.dumps(config, indent=2).encode() + b"\n")


def _filters(node: Node) -> Iterator[tuple[str, int]]:
    """The filters inside a parameter, with their lines."""
    if isinstance(node.value, dict):
        given = node.value.get("filter")
        if given is not None and given.value not in (None, "*"):
            yield given.value, given.line
    elif isinstance(node.value, tuple):
        for each in node.value:
            yield from _filters(each)


def _is_tokenizers(name: str) -> bool:
    return name.startswith(("tokenizer", "vocab.", "merges.")) or name in (
        "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "spiece.model",
        "sentencepiece.bpe.model",
    )  # fmt: skip


def _vocabulary(folder: Path) -> Any:
    """What tells a tokenizer's ids: those of tokenizer.json, else the bytes of its tables; None if
    there is none."""
    path = folder / "tokenizer.json"
    if path.is_file():
        held: Any = parse_json(read_file(path, 2**28), str(path), 2**28)
        added = [(t.get("id"), t.get("content")) for t in held.get("added_tokens", ())]
        return held.get("model", {}).get("vocab"), added
    tables = [folder / n for n in ("tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")]
    return [read_file(t, 2**28) for t in tables if t.is_file()] or None
