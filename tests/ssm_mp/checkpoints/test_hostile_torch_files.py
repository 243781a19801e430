"""No file imports, runs or writes anything, or takes more than a bounded multiple of its size."""

from __future__ import annotations

import builtins
import functools
import importlib
import os
import subprocess
import sys
import tracemalloc
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from ssm_mp.checkpoints.record import Record
from ssm_mp.checkpoints.torch_file import TorchFile, read_torch_file
from ssm_mp.errors import CheckpointError
from tests.ssm_mp.checkpoints.foreign import archive, save, watched

_SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Runs:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


CALLS: dict[str, Runs] = {
    "os.system": Runs(os.system, "touch ran"),
    "os.mkdir": Runs(os.mkdir, "ran"),
    "builtins.eval": Runs(eval, "open('ran', 'w')"),
    "builtins.exec": Runs(exec, "open('ran', 'w')"),
    "builtins.open": Runs(open, "ran", "w"),
    "io.open": Runs(open, "ran", "w"),
    "builtins.getattr": Runs(getattr, Path, "touch"),
    "builtins.__import__": Runs(builtins.__import__, "antigravity"),
    "importlib.import_module": Runs(importlib.import_module, "antigravity"),
    "functools.partial": Runs(functools.partial, os.system, "touch ran"),
    "subprocess.Popen": Runs(subprocess.Popen, "touch ran"),
    "webbrowser.open": Runs(webbrowser.open, "file:///ran"),
    "torch.serialization.load": Runs(torch.load, "ran"),
    "numpy.load": Runs(np.load, "ran"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("protocol", "zipped"), [(2, True), (4, True), (2, False), (4, False)])
def test_a_call_is_refused_with_its_name_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, protocol: int, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "m.pt", {"weight": torch.ones(2), "x": [CALLS[name]]}, protocol, zipped=zipped)
    with watched() as seen, pytest.raises(CheckpointError) as caught:
        read_torch_file(path)
    assert seen == []
    assert not (tmp_path / "ran").exists()
    message = str(caught.value)
    function = name.rsplit(".", maxsplit=1)[-1]
    assert f".{function} " in message or f".{function}," in message
    assert message.startswith(f"{path}: refused: reading it would call ")
    assert "state_dict()" in message
    assert "weights_only" not in message


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cos\nsystem\n(X\1\0\0\0atR.",  # REDUCE
        b"(cos\nsystem\nX\1\0\0\0ao.",  # OBJ
        b"(X\1\0\0\0aios\nsystem\n.",  # INST
        b"cos\nsystem\nX\1\0\0\0a\x85\x81.",  # NEWOBJ
        b"cos\nsystem\nX\1\0\0\0a\x85}\x92.",  # NEWOBJ_EX
        b"X\2\0\0\0osX\6\0\0\0system\x93X\1\0\0\0a\x85R.",  # STACK_GLOBAL
        b"ccopyreg\n__newobj__\ncos\nsystem\nX\1\0\0\0a\x86R.",
        b"ccopyreg\n_reconstructor\ncos\nsystem\ncbuiltins\nobject\nN\x87R.",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\nX\1\0\0\0a\x85}tR.",
        b"csite\nos.system\nX\1\0\0\0a\x85R.",
        b"cmodels\nos.system\nX\1\0\0\0a\x85R.",
    ],
)
def test_every_way_to_call_is_refused(tmp_path: Path, opcodes: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"refused: reading it would call .*system"):
        read_torch_file(archive(tmp_path / "m.pt", b"\x80\x04" + opcodes))


def test_a_name_alone_is_inert(tmp_path: Path) -> None:
    found = read_torch_file(archive(tmp_path / "m.pt", b"\x80\x02cos\nsystem\n."))
    assert isinstance(found.content, Record)
    assert found.left_out == ("os.system",)


@pytest.mark.parametrize("opcodes", [b"\x82\1.", b"\x83\1\0.", b"\x84\1\0\0\0.", b"Pid\n.", b"X\2\0\0\0idQ.", b"NQ."])
def test_what_refers_to_the_outside_is_refused(tmp_path: Path, opcodes: bytes) -> None:
    for path in (archive(tmp_path / "m.pt", b"\x80\2" + opcodes), tmp_path / "plain.pt"):
        if path.name == "plain.pt":
            path.write_bytes(b"\x80\2" + opcodes)
        with pytest.raises(CheckpointError, match="refused: it (refers to something outside|names objects by numbers)"):
            read_torch_file(path)


def _le(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


BOMBS = {
    "text of 2⁶⁰ bytes": b"\x8d" + _le(1 << 60, 8) + b"a.",
    "bytes of 2⁶⁰": b"\x8e" + _le(1 << 60, 8) + b"a.",
    "bytearray of 2⁶⁰": b"\x96" + _le(1 << 60, 8) + b"a.",
    "negative length": b"T" + _le(0xFFFFFFFF, 4) + b"a.",
    "frame of 2⁶⁰": b"\x95" + _le(1 << 60, 8) + b"N.",
    "integer of 2 GB": b"\x8b" + _le(1 << 31, 4) + b"\1.",
    "integer of 20,000 digits": b"L" + b"9" * 20_000 + b"L\n.",
    "integer of 10⁴ bytes": b"\x8b" + _le(10_000, 4) + b"\1" * 10_000 + b".",
    "memo of 2³²": b"Nr" + _le(0xFFFFFFFF, 4) + b"j" + _le(0xFFFFFFFE, 4) + b".",
    "memo of text": b"Np" + b"9" * 600 + b"\ng1\n.",
    "deep": b"]" * 20_000 + b"a" * 19_999 + b".",
    "deep tuples": b"N" + b"\x85" * 20_000 + b".",
    "deep marks": b"(" * 20_000 + b"t" * 20_000 + b".",
    "doubling": b"]\x94K\1a" + b"".join(b"]\x94h" + bytes([i]) + b"ah" + bytes([i]) + b"a" for i in range(60)) + b".",
    "doubling tuple": b"K\1" + b"2\x86" * 60 + b".",
    "hash of a doubling tuple": b"}K\1" + b"2\x86" * 60 + b"Ns.",
    "hash of a deep tuple": b"}N" + b"\x85" * 20_000 + b"Ns.",
    "copies of one list": b"]q\0(" + b"K\1" * 9_000 + b"e" + b"cbuiltins\nset\nh\0\x85R0" * 9_000 + b".",
    "copies of one text": b"X" + _le(60_000, 4) + b"a" * 60_000 + b"q\0"
    + b"c_codecs\nencode\nh\0X\6\0\0\0latin1\x86R0" * 5_000 + b"h\0.",
    "a dictionary as the state of many": b"}q\0(" + b"".join(b"M" + _le(i, 2) + b"N" for i in range(3_000)) + b"u]("
    + b"cmodels\nConfig\n)\x81h\0b" * 3_000 + b"e.",
    "colliding keys": b"}("
    + b"".join(b"\x8a\x0c" + _le(((1 << 61) - 1) * i, 12) + b"N" for i in range(1, 12_000)) + b"u.",
    "long equal keys": b"}" + (b"X" + _le(50_000, 4) + b"a" * 50_000 + b"Ns") * 2 + b".",
    "many of nothing": b"\x8f" * 300_000 + b".",
    "bytes of a number": b"cbuiltins\nbytes\nM\xff\xff\x85R.",
    "array of 2⁴⁰": b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R(K\1\x8a\6"
    + _le(1 << 40, 6)
    + b"\x85cnumpy\ndtype\nX\2\0\0\0f4\x89\x88\x87R\x89C\4aaaatb.",
}  # fmt: skip


def _outcome(path: Path) -> TorchFile | CheckpointError:
    try:
        return read_torch_file(path)
    except CheckpointError as error:
        return error


def _steps(path: Path) -> int:
    """Calls of functions, Python's and C's, that reading takes."""
    counted = 0

    def count(*_: object) -> None:
        nonlocal counted
        counted += 1

    sys.setprofile(count)
    try:
        _outcome(path)
    finally:
        sys.setprofile(None)
    return counted


def _peak(path: Path) -> int:
    """Most bytes that reading holds at a time."""
    tracemalloc.start()
    try:
        _outcome(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_bombs_bodies_are_what_they_say(tmp_path: Path) -> None:
    harmless = b"]q\0(K\1K\2ecbuiltins\nset\nh\0\x85R."
    assert read_torch_file(archive(tmp_path / "m.pt", b"\x80\4" + harmless)).content == {1, 2}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("zipped", [True, False])
def test_bombs_are_refused_for_little(tmp_path: Path, name: str, zipped: bool) -> None:
    data, path = b"\x80\4" + BOMBS[name], tmp_path / "m.pt"
    if zipped:
        archive(path, data)
    else:
        path.write_bytes(data)
    outcome = _outcome(path)
    assert isinstance(outcome, CheckpointError)
    assert "m.pt: " in str(outcome)
    assert _peak(path) < 60 * len(data) + (1 << 26)
    assert _steps(path) < 100 * len(data) + 50_000
