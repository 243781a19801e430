from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.config import Config
from ssm_mp.errors import CheckpointError
from ssm_mp.families.registry import FAMILIES, recognise
from ssm_mp.files.stored_config import StoredConfig
from tests.tiny import HUGGING_FACE, ITERA, in_layout, random_tensors

NOTHING = StoredConfig("config.json", {})
NUMBERS = ["3", "7", "99999999", "99999999999", "9" * 5000, "00", "01", "-1", "1.5", "٣", "1e9"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", ["layers.{}.ssm.D", "layers.1.moe.layer.experts.{}.w1.weight"])
def test_a_number_in_a_name_is_no_count(tmp_path: Path, number: str, name: str) -> None:
    torch.save({**random_tensors(ITERA), name.format(number): torch.zeros(3)}, tmp_path / "m.pt")
    with pytest.raises(
        CheckpointError, match=r"missing, though number|unknown: |missing: |no tensor shows|a key of"
    ) as caught:
        load_checkpoint(tmp_path / "m.pt")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("config", [HUGGING_FACE, ITERA], ids=["mamba", "itera"])
def test_a_gap_between_layers_is_said(config: Config) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in random_tensors(config).items()}
    shapes = {name.replace("layers.1.", "layers.4."): shape for name, shape in shapes.items()}
    with pytest.raises(CheckpointError, match=r"layers? (is|are) missing, though number 4 is there: 1"):
        FAMILIES[config.family].config(shapes, NOTHING)


def test_a_gap_between_experts_is_said() -> None:
    shapes = {n: tuple(t.shape) for n, t in random_tensors(ITERA).items() if ".experts.1." not in n}
    with pytest.raises(CheckpointError, match="1 expert of layer 1 is missing, though number 2 is there: 1"):
        FAMILIES["itera"].config(shapes, NOTHING)


def test_many_layers_are_sized_in_linear_work() -> None:
    one = {n.removeprefix("layers.0."): t for n, t in random_tensors(ITERA).items() if n.startswith("layers.0.")}
    shapes = {f"layers.{i}.{name}": tuple(tensor.shape) for i in range(1000) for name, tensor in one.items()}
    whole = {name: tuple(tensor.shape) for name, tensor in random_tensors(ITERA).items() if "layers" not in name}
    assert FAMILIES["itera"].config({**shapes, **whole}, NOTHING)[0].n_layers == 1000


digits = st.integers(0, 10**12).map(str) | st.text("0123456789٣-", min_size=1, max_size=30)
STEMS = [
    "layers.{}.ssm.D", "layers.{}.ssm.ssm.B", "layers.0.moe.layer.experts.{}.w1.weight",
    "layers.{}.mixer.x_proj.weight", "backbone.layers.{}.norm.weight", "model.layers.{}.ssm.x_proj.weight", "{}",
    "layers.{}",
]  # fmt: skip
shapes = st.lists(st.sampled_from([0, 1, 2, 16, 64]), max_size=4)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([HUGGING_FACE, ITERA]), st.dictionaries(st.tuples(st.sampled_from(STEMS), digits), shapes))
def test_names_with_any_numbers_give_a_checkpoint_or_one_error(
    config: Config, more: dict[tuple[str, str], list[int]]
) -> None:
    tensors = in_layout(random_tensors(config), "huggingface")
    tensors |= {stem.format(number): torch.zeros(shape) for (stem, number), shape in more.items()}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(tensors, Path(folder) / "m.pt")
        try:
            found = load_checkpoint(Path(folder) / "m.pt")
        except CheckpointError:
            return
    assert found.tensors.keys() == {parameter.name for parameter in found.config.parameters()}


def test_names_of_two_layouts_are_recognised_as_one_family() -> None:
    names = [name.removeprefix("backbone.") for name in in_layout(random_tensors(HUGGING_FACE), "huggingface")]
    assert recognise(names, NOTHING).layout == "huggingface"
    assert recognise((name.replace("embeddings.", "embedding.") for name in names), NOTHING).layout == "original"
