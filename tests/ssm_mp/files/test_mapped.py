from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ssm_mp.files.mapped import let_go, spilled
from ssm_mp.files.safetensors_file import read_safetensors

SMAPS = Path("/proc/self/smaps")
linux = pytest.mark.skipif(not SMAPS.exists(), reason="another system: nothing is let go")


def resident(tensor: Tensor) -> int:
    """Resident bytes of the part of memory that a tensor lies in."""
    found, inside = 0, False
    for line in SMAPS.read_text(encoding="utf-8").splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(at, 16) for at in first.split("-"))
            inside = begin <= tensor.data_ptr() < end
        elif inside and first == "Rss:":
            found += 1024 * int(line.split()[1])
    return found


@linux
def test_pages_of_a_mapped_tensor_are_let_go_and_its_values_stay(tmp_path: Path) -> None:
    values = torch.randn(1000, 1000)
    save_file({"a": values}, tmp_path / "a.safetensors")
    mapped = read_safetensors(tmp_path / "a.safetensors")["a"]
    assert torch.equal(mapped, values)
    touched = resident(mapped)
    let_go([mapped])
    assert touched > 3_900_000
    assert resident(mapped) < 100_000
    assert torch.equal(mapped, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8])
def test_memory_that_is_nobodys_file_is_never_dropped(dtype: torch.dtype) -> None:
    values = (100 * torch.randn(700, 900)).to(dtype)
    kept = values.clone()
    let_go([values, values[100:], values.t()])
    assert torch.equal(values, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8])
@pytest.mark.parametrize("shape", [(3, 5), (1,), (0, 4), (100, 1000)])
def test_a_spilled_tensor_has_the_same_values_and_leaves_no_name_behind(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    values = (100 * torch.randn(shape)).to(dtype)
    found = spilled(values, tmp_path)
    assert found.dtype == dtype
    assert torch.equal(found, values)
    assert not any(tmp_path.iterdir())
    let_go([found])
    assert torch.equal(found, values)


def test_a_tensor_that_is_a_view_is_spilled_as_it_looks(tmp_path: Path) -> None:
    values = torch.randn(40, 30)
    assert torch.equal(spilled(values.t()[3:], tmp_path), values.t()[3:])


def test_a_folder_that_cannot_take_it_is_an_error_and_stays_empty(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        spilled(torch.ones(4), tmp_path / "missing")
