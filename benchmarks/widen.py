"""A model of any size with a real perplexity: the reference checkpoint, made wider and deeper.

    python -m benchmarks.widen OUT --size 94m                              # or 370m, 1.3b, 7b
    python -m benchmarks.widen OUT --layers 12 --width 512 --dtype bfloat16 --shards-gb 1 --compare 16

Wider: the states of all layers are those of the reference, repeated r times side by side (LayerNorm's mean and variance
survive that). A product over repeated inputs is divided by r, and the final norm too, as the tied head multiplies r
copies. Copies that agree would make a strange model, whose rounding errors agree as well: each matrix also gets random
weights that cancel over the copies of an input, so many that its spread is that of a trained matrix of its width
(reference's / √r); all else gets a little noise, relative to its spread, which averages out. Deeper: between the
reference's layers stand layers of random weights of the same spread, whose output is small. What noise and layers cost
in perplexity is printed by `--compare`, on so many windows of the text that the reference's search uses.

Layers are made one by one and written shard by shard: no more than one shard is in memory. Every tensor has a generator
of its own, seeded by its name, so that the same command writes the same bytes.

Dimensions: `d` model, `I` inner, `N` state, `R` step rank, `K` convolution kernel, `r` copies.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.huggingface import REFERENCE
from search.problem.spec import load_spec
from search.problem.workspace import load_splits
from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import evaluate, paired_increase
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.model import build
from ssm_mp.modules.parameter import Parameter
from studies.reference.train import third_layout

STUDY = Path("studies/reference.toml")
DESCRIPTION = "widened.json"
"""Beside the weights, written last: what they were made of, so that a folder that has it is whole."""

_NOISE = 0.01

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Widening:
    """What to make of the reference: its size, and how far from an exact repetition.

    noise: of what is repeated, relative to each tensor's spread; with 0 there are no random weights but in extra
    layers.
    """

    layers: int
    width: int
    rank: int
    dtype: str = "float32"
    noise: float = _NOISE
    seed: int = 0


SIZES = {
    "94m": Widening(24, 768, 8),
    "370m": Widening(48, 1024, 64),
    "1.3b": Widening(48, 2048, 128, "bfloat16"),
    "7b": Widening(64, 4096, 256, "bfloat16"),
}
"""Width and layers of the published sizes of Mamba, and of Falcon-Mamba 7B; the vocabulary is the reference's."""


def widened_config(source: MambaConfig, asked: Widening) -> MambaConfig:
    """The config of the widened model. Raises ValueError for what is no multiple of the source's sizes."""
    for name, size, of in (("width", asked.width, source.d_model), ("rank", asked.rank, source.dt_rank)):
        if size < of or size % of:
            raise ValueError(f"{name} = {size}: expected a multiple of the reference's {of}")
    if asked.layers < source.n_layers:
        raise ValueError(f"layers = {asked.layers}: expected at least the reference's {source.n_layers}")
    copies = asked.width // source.d_model
    return replace(
        source, d_model=asked.width, d_inner=copies * source.d_inner, dt_rank=asked.rank, n_layers=asked.layers
    )  # fmt: skip


def kept_layers(source: int, layers: int) -> dict[int, int]:
    """Where the source's layers stand among all, evenly spread: place → layer of the source."""
    return {i * layers // source: i for i in range(source)}


class Widener:
    """Makes the tensors of a widened model one at a time, float32, by canonical name."""

    def __init__(self, source: Checkpoint, asked: Widening) -> None:
        config = source.config
        assert isinstance(config, MambaConfig)
        self._source = source.tensors
        self._asked = asked
        self._kept = kept_layers(config.n_layers, asked.layers)
        self._extra_layers = asked.layers - config.n_layers
        self._rank = config.dt_rank
        self._copies = asked.width // config.d_model
        self._rank_copies = asked.rank // config.dt_rank
        self.config = widened_config(config, asked)

    def tensor(self, parameter: Parameter) -> Tensor:
        """One tensor of the widened model."""
        name, generator = parameter.name, self._generator(parameter.name)
        source, is_extra = self._source_of(name)
        if parameter.role == "weight" and parameter.kind.endswith("_proj"):
            return self._matrix(parameter.kind, source, is_extra, generator)
        wide = self._repeated(parameter.kind, source)
        if name in ("norm.weight", "norm.bias"):
            wide = wide / self._copies
            source = source / self._copies
        return wide + self._asked.noise * _spread(source) * torch.randn(wide.shape, generator=generator)

    def _source_of(self, name: str) -> tuple[Tensor, bool]:
        """The tensor of the source that one is made of, and whether its layer is an extra one."""
        if not name.startswith("layers."):
            return self._source[name], False
        _, place, leaf = name.split(".", 2)
        before = max(kept for kept in self._kept if kept <= int(place))
        return self._source[f"layers.{self._kept[before]}.{leaf}"], int(place) not in self._kept

    def _repeated(self, kind: str, source: Tensor) -> Tensor:
        """A tensor that is no projection, with so many copies of its channels."""
        copies = self._copies
        if "embedding" in kind:
            return source.repeat(1, copies)  # [V, d] or [T, d]
        return source.repeat(copies, *(1,) * (source.dim() - 1))  # [d], [I], [I, N] or [I, 1, K]

    def _matrix(self, kind: str, source: Tensor, is_extra: bool, generator: torch.Generator) -> Tensor:
        """A projection `[out, in]`: the source's blocks repeated, and random weights that cancel over the copies.

        In an extra layer there are only random weights, of the same spread; but all extra layers together add as
        much as one with the source's output projection would.
        """
        copies = self._rank_copies if kind == "dt_proj" else self._copies  # of each input
        inputs, parts = source.shape[1], self._rows(kind, source)
        outputs = sum(len(part) for part in parts)
        spread = _spread(source) / math.sqrt(copies)
        if is_extra:
            spread /= math.sqrt(self._extra_layers) if kind == "out_proj" else 1.0
            return spread * torch.randn(outputs, copies * inputs, generator=generator)
        wide = torch.empty(outputs, copies, inputs)
        if self._asked.noise:
            torch.randn(wide.shape, generator=generator, out=wide)
            wide -= wide.mean(dim=1, keepdim=True)
            wide *= spread
        else:
            wide.zero_()
        wide += torch.cat(parts)[:, None, :] / copies
        return wide.flatten(1)

    def _rows(self, kind: str, source: Tensor) -> list[Tensor]:
        """The source's rows in blocks, each repeated as often as the outputs that it makes."""
        if kind == "in_proj":  # a and z
            return [half.repeat(self._copies, 1) for half in source.chunk(2)]
        if kind == "x_proj":  # step, then B and C, of which there are no copies
            return [source[: self._rank].repeat(self._rank_copies, 1), source[self._rank :]]
        return [source.repeat(self._copies, 1)]

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._asked.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _spread(tensor: Tensor) -> float:
    return tensor.std().item()


def shards_of(config: MambaConfig, width: int, most: int) -> list[list[Parameter]]:
    """The parameters in shards of at most `most` bytes at `width` bytes a value; a larger one stands alone."""
    shards: list[list[Parameter]] = [[]]
    held = 0
    for parameter in config.parameters():
        size = width * math.prod(parameter.shape)
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(parameter)
        held += size
    return shards


def write(widener: Widener, dtype: torch.dtype, folder: Path, most: int) -> None:
    """Weights and index as `transformers` writes them; the names are those of the reference's layout."""
    shards = shards_of(widener.config, dtype.itemsize, most)
    weight_map: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = third_layout({p.name: widener.tensor(p).to(dtype) for p in shard})
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def make(asked: Widening, folder: Path, *, shards_gb: float = 1.0, reference: Path = REFERENCE) -> None:
    """Write the widened model into a folder, with the reference's tokenizer; leave it as it is where it is there whole.

    Raises ValueError for sizes that are no multiples, and for a folder that holds something else.
    """
    description = {**asdict(asked), "reference": hashlib.sha256(reference.read_bytes()).hexdigest()}
    said = folder / DESCRIPTION
    if said.is_file() and json.loads(said.read_text(encoding="utf-8")) == description:
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: expected a new folder or the same model; remove it, or name another")
    widener = Widener(load_checkpoint(reference), asked)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(widener, DTYPES[asked.dtype], partial, int(shards_gb * 1e9))
    shutil.copyfile(reference.with_name("tokenizer.json"), partial / "tokenizer.json")
    (partial / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder)


def weight_files(folder: Path) -> list[Path]:
    """The weights of a folder, all shards."""
    return sorted(folder.glob("model*.safetensors"))


def search_windows(count: int) -> Windows:
    """Windows that the reference's search sees, or as many of them."""
    spec = load_spec(STUDY, [f"data.search_windows={count}", "data.calibration_windows=1", "data.certify_windows=2"])
    return load_splits(spec, load_checkpoint(REFERENCE).config).search


def compare(folder: Path, windows: Windows, reference: Path = REFERENCE) -> tuple[float, float, float]:
    """Perplexity of the reference and of a widened model on the same windows, and the increase in percent."""
    ours, theirs = (load_checkpoint(path) for path in (folder, reference))
    found, reference_found = (evaluate(build(one.config, one.tensors), windows) for one in (ours, theirs))
    return reference_found.perplexity, found.perplexity, paired_increase(found, reference_found).percent


def main() -> None:
    """Make one model."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--size", choices=SIZES, help="a published size; the options below change it")
    arguments.add_argument("--layers", type=int)
    arguments.add_argument("--width", type=int, help="a multiple of the reference's 128")
    arguments.add_argument("--rank", type=int, help="of the step sizes, a multiple of 8; default: width / 16")
    arguments.add_argument("--dtype", choices=DTYPES)
    arguments.add_argument("--noise", type=float, help=f"relative to each tensor's spread; default {_NOISE}")
    arguments.add_argument("--seed", type=int)
    arguments.add_argument("--shards-gb", type=float, default=1.0)
    arguments.add_argument("--compare", type=int, default=0, metavar="WINDOWS")
    given = arguments.parse_args()
    if given.size is None and (given.layers is None or given.width is None):
        arguments.error("expected --size, or --layers and --width")
    asked = SIZES[given.size] if given.size else Widening(given.layers, given.width, given.width // 16)
    changed = {name: value for name in asdict(asked) if (value := getattr(given, name, None)) is not None}
    try:
        make(replace(asked, **changed), given.out, shards_gb=given.shards_gb)
    except ValueError as error:
        arguments.error(str(error))
    files = weight_files(given.out)
    print(f"{given.out}: {sum(path.stat().st_size for path in files):,} bytes in {len(files)} files")
    if given.compare:
        theirs, ours, increase = compare(given.out, search_windows(given.compare))
        print(f"perplexity {ours:.4f}, the reference's {theirs:.4f} on {given.compare} windows: {increase:+.3f} %")


if __name__ == "__main__":
    main()
