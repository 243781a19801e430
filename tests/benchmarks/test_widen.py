"""A widened reference says what the reference says, at any size, and is written as Hugging Face writes models."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as TokenizerFile
from torch import Tensor

from benchmarks.widen import (
    SIZES,
    Widener,
    Widening,
    compare,
    kept_layers,
    make,
    shards_of,
    weight_files,
    widened_config,
)
from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.data import Windows
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.model import build

REFERENCE = Path(__file__).parents[2] / "studies" / "reference" / "model.safetensors"
WIDER = Widening(layers=4, width=256, rank=24)
DEEPER = Widening(layers=10, width=256, rank=16, dtype="bfloat16")


@pytest.fixture(scope="module")
def reference() -> Checkpoint:
    return load_checkpoint(REFERENCE)


@pytest.fixture(scope="module")
def windows() -> Windows:
    """Python of the library: `[8, 128]`."""
    tokenizer = TokenizerFile.from_file(str(REFERENCE.with_name("tokenizer.json")))
    ids = tokenizer.encode(Path(argparse.__file__).read_text(encoding="utf-8")).ids
    return Windows(torch.tensor(ids[: 8 * 128]).view(8, 128))


def tensors_of(reference: Checkpoint, asked: Widening) -> tuple[MambaConfig, dict[str, Tensor]]:
    widener = Widener(reference, asked)
    return widener.config, {p.name: widener.tensor(p) for p in widener.config.parameters()}


def logits(config: MambaConfig, tensors: dict[str, Tensor], windows: Windows) -> Tensor:
    with torch.inference_mode():
        found: Tensor = build(config, tensors)(windows.ids[:2])
    return found


@pytest.mark.parametrize("noise", [0.0, 1e-9], ids=["repeated", "weights that cancel"])
@pytest.mark.parametrize(("width", "rank"), [(256, 24), (640, 8)])
def test_wider_alone_the_logits_are_the_references(
    reference: Checkpoint, windows: Windows, noise: float, width: int, rank: int
) -> None:
    asked = Widening(layers=4, width=width, rank=rank, noise=noise)
    assert isinstance(reference.config, MambaConfig)
    expected = logits(reference.config, dict(reference.tensors), windows)
    found = logits(*tensors_of(reference, asked), windows)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_noise_and_layers_in_bfloat16_cost_at_most_three_percent_of_perplexity(
    tmp_path: Path, windows: Windows
) -> None:
    make(DEEPER, tmp_path / "model", reference=REFERENCE)
    theirs, ours, increase = compare(tmp_path / "model", windows, REFERENCE)
    assert theirs < 40
    assert 0 < abs(increase) < 3
    assert ours == pytest.approx(theirs * (1 + increase / 100))


def test_each_projection_has_the_spread_of_a_trained_one_of_its_width(reference: Checkpoint) -> None:
    asked = Widening(layers=6, width=512, rank=16)
    _, tensors = tensors_of(reference, asked)
    kept = kept_layers(4, 6)
    for place in range(6):
        source = kept[max(p for p in kept if p <= place)]
        for leaf, copies in (("in_proj", 4), ("x_proj", 4), ("dt_proj", 2), ("out_proj", 4)):
            spread = reference.tensors[f"layers.{source}.ssm.{leaf}.weight"].std() / math.sqrt(copies)
            small = math.sqrt(2) if leaf == "out_proj" and place not in kept else 1.0
            found = tensors[f"layers.{place}.ssm.{leaf}.weight"].std()
            assert float(found * small / spread) == pytest.approx(1, abs=0.03), (place, leaf)


def test_no_copies_agree(reference: Checkpoint) -> None:
    config, tensors = tensors_of(reference, WIDER)
    for parameter in config.parameters():
        values = tensors[parameter.name]
        # float32 has few enough values that some meet by chance
        assert values.unique().numel() > 0.97 * values.numel(), parameter.name


def test_tensors_follow_from_seed_and_name_alone(reference: Checkpoint) -> None:
    config, tensors = tensors_of(reference, DEEPER)
    again, other = Widener(reference, DEEPER), Widener(reference, replace(DEEPER, seed=1))
    for parameter in reversed(list(config.parameters())):
        assert torch.equal(again.tensor(parameter), tensors[parameter.name])
        assert not torch.equal(other.tensor(parameter), tensors[parameter.name])


def test_shards_hold_what_one_file_holds_and_the_index_names_them(tmp_path: Path) -> None:
    make(DEEPER, tmp_path / "whole", reference=REFERENCE)
    make(DEEPER, tmp_path / "parts", shards_gb=0.003, reference=REFERENCE)
    assert [path.name for path in weight_files(tmp_path / "whole")] == ["model.safetensors"]
    files = weight_files(tmp_path / "parts")
    assert len(files) > 2
    assert [path.name for path in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16}
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for path in files:
        held = load_file(path)
        assert all(index["weight_map"][name] == path.name and torch.equal(held[name], whole[name]) for name in held)
    assert index["weight_map"].keys() == whole.keys()
    one, other = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "parts")
    assert one.config == other.config
    assert one.digest == other.digest


def test_a_shard_is_no_larger_than_asked_unless_one_tensor_is(reference: Checkpoint) -> None:
    assert isinstance(reference.config, MambaConfig)
    config = widened_config(reference.config, DEEPER)
    for most in (1, 1_000_000, 3_000_000):
        for shard in shards_of(config, 2, most):
            assert len(shard) == 1 or sum(2 * math.prod(p.shape) for p in shard) <= most
    assert [p for shard in shards_of(config, 2, 1_000_000) for p in shard] == list(config.parameters())


def test_a_model_that_is_there_is_left_and_anything_else_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make(WIDER, folder, reference=REFERENCE)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    make(WIDER, folder, reference=REFERENCE)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="expected a new folder or the same model"):
        make(DEEPER, folder, reference=REFERENCE)


def test_the_tokenizer_is_beside_it(tmp_path: Path) -> None:
    make(WIDER, tmp_path / "model", reference=REFERENCE)
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == REFERENCE.with_name("tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("changed", "said"), [({"width": 200}, "width = 200"), ({"rank": 20}, "rank = 20"), ({"layers": 3}, "layers = 3")]
)
def test_sizes_that_are_no_multiples_are_refused(reference: Checkpoint, changed: dict[str, int], said: str) -> None:
    assert isinstance(reference.config, MambaConfig)
    with pytest.raises(ValueError, match=said):
        widened_config(reference.config, replace(WIDER, **changed))  # type: ignore[arg-type]


def test_the_largest_has_the_shape_of_falcon_mamba(reference: Checkpoint) -> None:
    assert isinstance(reference.config, MambaConfig)
    config = widened_config(reference.config, SIZES["7b"])
    assert (config.n_layers, config.d_model, config.d_inner) == (64, 4096, 8192)
    assert (config.dt_rank, config.d_state, config.d_conv) == (256, 16, 4)
    assert sum(math.prod(p.shape) for p in config.parameters()) == pytest.approx(6.8e9, rel=0.01)


def test_the_references_layers_are_spread_evenly() -> None:
    assert kept_layers(4, 4) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert kept_layers(4, 10) == {0: 0, 2: 1, 5: 2, 7: 3}
