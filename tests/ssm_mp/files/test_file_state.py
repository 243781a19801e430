from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.errors import CheckpointError
from ssm_mp.kernels import calls
from tests.tiny import MAMBA, write_checkpoint


def test_a_checkpoint_knows_that_its_file_is_still_the_one_it_read(tmp_path: Path) -> None:
    load_checkpoint(write_checkpoint(tmp_path / "model.safetensors", MAMBA)).require_files()


@pytest.mark.parametrize("how", ["gone", "replaced", "written to"])
def test_a_file_that_is_gone_or_another_one_is_an_error_that_names_it(tmp_path: Path, how: str) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", MAMBA)
    checkpoint = load_checkpoint(path)
    if how == "written to":
        with path.open("ab") as file:
            file.write(b"\0")
    else:
        path.unlink()
        if how == "replaced":
            write_checkpoint(path, MAMBA, seed=1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: it was there .* restore it and start the same"):
        checkpoint.require_files()


_CUT_SHORT = """
import os, sys, torch
from ssm_mp.files.mapped import end_clearly
end_clearly("error: it went away\\n", 7)
mapped = torch.from_file(sys.argv[1], shared=False, size=1 << 20, dtype=torch.uint8)
os.truncate(sys.argv[1], 0)
print(int(mapped.sum()))
"""


@pytest.mark.skipif(not calls.compiled() or sys.platform != "linux", reason="no compiled kernels, or another system")
def test_a_mapped_file_that_is_cut_short_ends_the_process_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    command = [sys.executable, "-c", _CUT_SHORT, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "error: it went away\n")
