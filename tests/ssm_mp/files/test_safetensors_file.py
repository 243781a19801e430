from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ssm_mp.files.safetensors_file import read_safetensors, write_safetensors

TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    ),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.text(max_size=9), max_size=3),
)
def test_the_library_reads_what_we_write_and_would_write_as_many_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    specs: dict[str, tuple[torch.dtype, list[int]]],
    metadata: dict[str, str],
) -> None:
    folder = tmp_path_factory.mktemp("files")
    arrays = {name: (9 * torch.randn(shape)).to(dtype) for name, (dtype, shape) in specs.items()}
    write_safetensors(folder / "ours", arrays, metadata)
    found = load_file(folder / "ours")
    assert found.keys() == arrays.keys()
    assert all(found[name].dtype == array.dtype and torch.equal(found[name], array) for name, array in arrays.items())
    with safe_open(folder / "ours", framework="pt") as file:
        assert (file.metadata() or {}) == metadata
    save_file(arrays, folder / "theirs", metadata=metadata)
    ours, theirs = ((folder / name).stat().st_size for name in ("ours", "theirs"))
    assert abs(ours - theirs) <= 64  # escapes in the header


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    arrays = {"a": torch.arange(12.0).reshape(3, 4).t()[1:], "b": torch.arange(9)[::2].to(torch.int8)}
    write_safetensors(tmp_path / "a.safetensors", arrays, {"format": "x"})
    found = read_safetensors(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], array) for name, array in arrays.items())


def test_every_tensor_begins_where_its_type_may(tmp_path: Path) -> None:
    arrays = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5, dtype=torch.float16), "c": torch.ones(7)}
    write_safetensors(tmp_path / "a.safetensors", arrays, {})
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % array.dtype.itemsize == 0 for name, array in arrays.items())
