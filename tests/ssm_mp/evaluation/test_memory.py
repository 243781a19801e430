"""What a process keeps of the memory that it freed."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from ssm_mp.evaluation.memory import keep_freed_memory

ASK = "from ssm_mp.evaluation.memory import keep_freed_memory; print(keep_freed_memory())"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_glibc_can_be_told() -> None:
    # in a process of its own: the setting lasts
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
