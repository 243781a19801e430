"""No file imports, runs or writes anything, or takes more than a bounded multiple of its size."""

from __future__ import annotations

import builtins
import copy
import functools
import importlib
import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tracemalloc
import webbrowser
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ssm_mp.errors import CheckpointError
from ssm_mp.files.record import Record
from ssm_mp.files.torch_file import TorchFile, read_torch_file
from tests.ssm_mp.files.foreign import archive, classes, entries_of, old_format, save, watched

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
    function = name.rpartition(".")[2]
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


def test_a_name_that_would_move_the_cursor_is_no_name(tmp_path: Path) -> None:
    opcodes = b"\x80\x04X\1\0\0\0mX\6\0\0\0\x1b[2J\nf\x93)R."
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(archive(tmp_path / "m.pt", opcodes))
    assert str(caught.value).isprintable()


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


def _doubling(wrapped: bytes, holder: bytes) -> bytes:
    """A value that two holders share, the pair of which two others share, and so on: 2²⁴ times in all."""
    levels = ((_le(at + 1, 4), wrapped) for at in range(24))
    return b"N" + b"".join(inner + b"r" + at + b"0" + 2 * (holder % at) + b"\x86" for at, inner in levels) + b"."


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
    "doubling by copies": _doubling(b"\x85", b"cbuiltins\nlist\nj%b\x85R"),
    "doubling by arguments": _doubling(b"\x85", b"cmodels\nConfig\nj%bR"),
    "doubling by states": _doubling(b"q\0N}X\1\0\0\0ah\0s\x86", b"cmodels\nConfig\n)\x81j%bb"),
    "copies of one list": b"]q\0(" + b"K\1" * 9_000 + b"e" + b"cbuiltins\nset\nh\0\x85R0" * 9_000 + b".",
    "copies of one text": b"X" + _le(60_000, 4) + b"a" * 60_000 + b"q\0"
    + b"c_codecs\nencode\nh\0X\6\0\0\0latin1\x86R0" * 5_000 + b"h\0.",
    "a dictionary as the state of many": b"}q\0(" + b"".join(b"M" + _le(i, 2) + b"N" for i in range(3_000)) + b"u]("
    + b"cmodels\nConfig\n)\x81h\0b" * 3_000 + b"e.",
    "colliding keys": b"}("
    + b"".join(b"\x8a\x0c" + _le(((1 << 61) - 1) * i, 12) + b"N" for i in range(1, 9_000)) + b"u.",
    "long equal keys": b"}" + (b"X" + _le(50_000, 4) + b"a" * 50_000 + b"Ns") * 2 + b".",
    "many of nothing": b"\x8f" * 240_000 + b".",
    "bytes of a number": b"cbuiltins\nbytes\nM\xff\xff\x85R.",
    "array of 2⁴⁰": b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R(K\1"
    + b"\x8a\6" + _le(1 << 40, 6) + b"\x85cnumpy\ndtype\nX\2\0\0\0f4\x89\x88\x87R\x89C\4aaaatb.",
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
def test_bombs_are_refused(tmp_path: Path, name: str) -> None:
    data = b"\x80\4" + BOMBS[name]
    (tmp_path / "alone.pt").write_bytes(data)
    for path in (archive(tmp_path / "m.pt", data), tmp_path / "alone.pt"):
        outcome = _outcome(path)
        assert isinstance(outcome, CheckpointError)
        assert str(outcome).startswith(f"{path}: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_little(tmp_path: Path, name: str) -> None:
    data = b"\x80\4" + BOMBS[name]
    path = archive(tmp_path / "m.pt", data)
    assert _peak(path) < 80 * len(data) + (1 << 26)
    assert _steps(path) < 100 * len(data) + 50_000


def test_storages_that_lie_over_each_other_are_refused(tmp_path: Path) -> None:
    """Many entries of the directory with the same bytes: each would be read into memory of its own."""
    entries = entries_of(save(tmp_path / "m.pt", [torch.full((10_000,), float(i)) for i in range(50)]))
    with zipfile.ZipFile(tmp_path / "over.pt", "w") as file:
        file.writestr("m/data.pkl", entries["m/data.pkl"])
        file.writestr("m/data/0", entries["m/data/0"])
        for number in range(1, 50):
            same = copy.copy(file.filelist[1])
            same.filename = f"m/data/{number}"
            file.filelist.append(same)
    with pytest.raises(CheckpointError, match="lie over each other"):
        read_torch_file(tmp_path / "over.pt")


def test_many_views_of_one_storage_are_no_larger_than_a_few_files(tmp_path: Path) -> None:
    whole = torch.zeros(100, 100)
    few = _outcome(save(tmp_path / "few.pt", [whole, whole.T, whole[1:]]))
    assert isinstance(few, TorchFile)
    many = _outcome(save(tmp_path / "many.pt", [whole[:, : 99 - i] for i in range(60)]))
    assert isinstance(many, CheckpointError)
    assert "times as large as the file" in str(many)
    same = _outcome(save(tmp_path / "same.pt", [whole.detach() for _ in range(60)]))
    assert isinstance(same, TorchFile)


def _plain(value: object, depth: int = 0) -> Iterator[torch.Tensor]:
    """The tensors in a content, which must be made of nothing but what TorchFile says."""
    assert depth <= 100
    if isinstance(value, torch.Tensor):
        assert type(value) is torch.Tensor
        assert value.device.type == "cpu"
        assert not value.requires_grad
        yield value
    elif type(value) is dict or type(value) is Record:
        held = value.fields if isinstance(value, Record) else value
        for key, inner in held.items():
            yield from _plain(key, depth + 1)
            yield from _plain(inner, depth + 1)
    elif type(value) in (list, tuple, set, frozenset):
        for inner in value:  # type: ignore[attr-defined]
            yield from _plain(inner, depth + 1)
    else:
        assert value is None or type(value) in (bool, int, float, complex, str, bytes)


def _assert_harmless(path: Path, data: bytes) -> None:
    """Whatever the bytes are: a content made of plain values, or one clear error; and nothing happens."""
    path.write_bytes(data)
    before = set(path.parent.iterdir())
    with watched() as seen:
        outcome = _outcome(path)
    assert seen == []
    assert set(path.parent.iterdir()) == before
    if isinstance(outcome, TorchFile):
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in _plain(outcome.content)}
        assert sum(storage.nbytes() for storage in storages.values()) <= 4 * len(data) + (1 << 16)
        for tensor in _plain(outcome.content):
            assert len(tensor.clone().reshape(-1)) == tensor.numel()
    else:
        assert str(outcome).startswith(f"{path}: ")
        assert "weights_only" not in str(outcome)
        assert "Traceback" not in str(outcome)


class Settings:
    def __init__(self) -> None:
        self.width, self.rows = 16, [1, 2]


def _samples() -> list[bytes]:
    """Small files of every format, with a bit of everything in them."""
    with classes("models.config", Settings=Settings):
        weight = torch.arange(6.0).reshape(2, 3)
        content = {
            "a": weight, "b": weight.T, "c": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), "d": Settings(),
            "e": [np.float32(1.5), np.arange(3), Path("a/b"), {1, 2}, 2**70, b"xy", (1, "z")],
            "f": torch.zeros(2, dtype=torch.uint16), "g": torch.empty(2, device="meta"),
        }  # fmt: skip
        held = [old_format(content)]
        for protocol in (2, 4):
            buffer = io.BytesIO()
            torch.save(content, buffer, pickle_protocol=protocol)
            held.append(buffer.getvalue())
        return [*held, *(pickle.dumps(content, protocol) for protocol in (2, 5))]


_SAMPLES = _samples()


def test_the_samples_are_read(tmp_path: Path) -> None:
    for data in _SAMPLES:
        _assert_harmless(tmp_path / "m.pt", data)
        found: Any = read_torch_file(tmp_path / "m.pt")
        assert torch.equal(found.content["b"], torch.arange(6.0).reshape(2, 3).T)
        assert found.left_out == ("models.config.Settings", "torch._utils._rebuild_meta_tensor_no_storage")


def _busy(data: bytes) -> list[int]:
    """Where in a sample changes matter: outside of the zip archive's padding."""
    if data[:2] != b"PK":
        return list(range(len(data)))
    start = data.index(b"\x80")
    end = data.index(b"PK\7\x08", start)
    return [*range(64), *range(start, end + 16), *range(data.index(b"PK\1\2"), len(data))]


@_SETTINGS
@given(data=st.data())
def test_a_file_with_changed_bytes_is_harmless(tmp_path: Path, data: st.DataObject) -> None:
    changed = bytearray(data.draw(st.sampled_from(_SAMPLES)))
    places = st.sampled_from(_busy(bytes(changed)))
    for at in data.draw(st.lists(places, min_size=1, max_size=3)):
        changed[at] = data.draw(st.integers(0, 255))
    _assert_harmless(tmp_path / "m.pt", bytes(changed))


@_SETTINGS
@given(data=st.data())
def test_a_file_with_parts_cut_or_put_in_is_harmless(tmp_path: Path, data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(_SAMPLES))
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    _assert_harmless(tmp_path / "m.pt", whole[:start] + data.draw(st.binary(max_size=40)) + whole[end:])


@pytest.mark.parametrize("which", range(len(_SAMPLES)))
def test_a_truncated_file_is_one_error(tmp_path: Path, which: int) -> None:
    whole = _SAMPLES[which]
    for end in sorted({*range(0, len(whole), 1 + len(whole) // 150), len(whole) - 1}):
        (tmp_path / "m.pt").write_bytes(whole[:end])
        with pytest.raises(
            CheckpointError, match=r"not a readable torch file, truncated or renamed\?|not a torch file"
        ):
            read_torch_file(tmp_path / "m.pt")


_NAMES = [
    "os system", "builtins eval", "builtins getattr", "builtins set", "builtins dict", "builtins bytes", "builtins int",
    "builtins object", "builtins complex", "_codecs encode", "copyreg _reconstructor", "copyreg __newobj__",
    "copyreg __newobj_ex__", "collections OrderedDict", "collections Counter", "collections deque", "torch Size",
    "torch device", "torch float32", "torch FloatStorage", "torch Tensor", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter", "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_qtensor", "torch._tensor _rebuild_from_type_v2", "torch.storage _load_from_bytes",
    "numpy dtype", "numpy ndarray", "numpy._core.multiarray scalar", "numpy._core.multiarray _reconstruct",
    "numpy._core.numeric _frombuffer", "pathlib PosixPath", "models Config", "operator getitem", "typing Dict",
    "omegaconf.nodes AnyNode", "omegaconf.dictconfig DictConfig", "argparse Namespace", "datetime datetime",
]  # fmt: skip


def _opcodes() -> st.SearchStrategy[bytes]:
    alone = [b"(", b"0", b"1", b"2", b"N", b"R", b"a", b"b", b"d", b"}", b"e", b"l", b"]", b"o", b"s", b"t", b")", b"u"]
    alone += [b"Q", b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x8f", b"\x90", b"\x91", b"\x92", b"\x93", b"\x94"]
    names = st.sampled_from(_NAMES).map(lambda name: b"c" + name.replace(" ", "\n").encode() + b"\n")
    texts = st.sampled_from(["", "storage", "0", "f4", "<", "latin1", "_val", "_content", "__dict__", "conj", "os"])
    small = st.integers(0, 5).map(lambda at: bytes([at]))
    return st.one_of(
        st.sampled_from(alone),
        names,
        small.map(lambda at: b"h" + at),
        small.map(lambda at: b"q" + at),
        small.map(lambda at: b"K" + at),
        st.binary(max_size=8).map(lambda data: b"C" + bytes([len(data)]) + data),
        texts.map(lambda text: b"X" + _le(len(text), 4) + text.encode()),
        st.integers(-(2**31), 2**31 - 1).map(lambda n: b"J" + n.to_bytes(4, "little", signed=True)),
        st.floats().map(lambda x: b"G" + struct.pack(">d", x)),
        st.sampled_from([code.code.encode("latin-1") for code in pickletools.opcodes]),
    )


_CALLS = st.builds(
    lambda name, arguments: b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR",
    st.sampled_from(_NAMES),
    st.lists(_opcodes(), max_size=6),
)


@_SETTINGS
@given(parts=st.lists(st.one_of(_opcodes(), _CALLS), max_size=40), protocol=st.integers(0, 5), zipped=st.booleans())
@example(parts=[b"]", b"q\0", b"h\0", b"a"], protocol=2, zipped=True)
@example(parts=[b"cm\nA\n)\x81", b"q\0", b"}", b"h\0", b"h\0", b"s", b"b"], protocol=2, zipped=True)
@example(
    parts=[b"}", b"q\0", b"(comegaconf.listconfig\nListConfig\n", b")\x81", b"X\x08\0\0\0_content]", b"}"],
    protocol=4,
    zipped=False,
)
def test_any_operations_are_harmless(tmp_path: Path, parts: list[bytes], protocol: int, zipped: bool) -> None:
    data = b"\x80" + bytes([protocol]) + b"".join(parts) + b"."
    path = tmp_path / "m.pt"
    _assert_harmless(path, archive(path, data, data_0=bytes(16)).read_bytes() if zipped else data)


@_SETTINGS
@given(
    start=st.sampled_from([b"", b"PK\3\4", b"\x80\2", b"\x80\5\x95", *(data[:200] for data in _SAMPLES)]),
    rest=st.binary(),
)
def test_any_bytes_are_harmless(tmp_path: Path, start: bytes, rest: bytes) -> None:
    _assert_harmless(tmp_path / "m.pt", start + rest)
