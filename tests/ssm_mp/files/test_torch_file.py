from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import gc
import io
import pickle
import sys
import types
import typing
import weakref
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.errors import CheckpointError
from ssm_mp.files.record import Record
from ssm_mp.files.torch_file import TorchFile, read_torch_file
from tests.ssm_mp.files.foreign import archive, classes, entries_of, old_format, save
from tests.tiny import MAMBA, random_tensors

PROTOCOLS = [(2, True), (3, True), (4, True), (5, True), (2, False), (5, False)]


def read(path: Path) -> TorchFile:
    return read_torch_file(path)


def bits(tensor: Tensor) -> bytes:
    whole = tensor.detach().contiguous().resolve_conj().resolve_neg()
    return whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""


def assert_equal(one: Any, other: Any) -> None:
    """Equal as torch.load's content is: types of containers aside, bit for bit."""
    if isinstance(other, Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.stride() == other.stride() or other.is_neg()  # these are copied
        assert one.device.type == "cpu"
        assert bits(one) == bits(other)
    elif isinstance(other, dict):
        assert list(one) == list(other)
        for key in other:
            assert_equal(one[key], other[key])
    elif isinstance(other, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    else:
        assert type(one) is type(other)
        assert one == other


def tensors(newer: bool) -> dict[str, Tensor]:
    """Tensors of every kind; the newer types are such that torch.load cannot read them back from its old format."""
    base = torch.randn(4, 6)
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
    kinds += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    kinds += [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32] if newer else []
    made = {str(kind): torch.arange(12).reshape(3, 4).to(kind) for kind in kinds}
    return made | {
        "transposed": base.T,
        "part": base[1:, ::2],
        "row": base[2],
        "empty": torch.zeros(0, 3),
        "empty part": base[4:],
        "scalar": torch.tensor(1.5),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "conjugated": torch.tensor([1 + 2j, 3 - 1j]).conj(),
        "negated": torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
    }


@pytest.mark.parametrize(("protocol", "zipped"), PROTOCOLS)
def test_values_are_those_of_torch_load(tmp_path: Path, protocol: int, zipped: bool) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(), "tensors": tensors(zipped), "optimizer": optimizer.state_dict(), "epoch": 3,
        "numbers": [1, -1, 255, 65536, 2**31, -(2**70), 1.5, 1 + 2j, None, True, False], "text": "Überé\udc80",
        "more": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {1, 2}, {"a": {}}, []], 5: b"bytes", (1, "a"): 2,
    }  # fmt: skip
    path = save(tmp_path / "m.pt", content, protocol, zipped=zipped)
    found = read(path)
    assert_equal(found.content, torch.load(path, weights_only=False))
    assert found.left_out == ()


def test_tied_tensors_share_their_memory(tmp_path: Path) -> None:
    weight = torch.randn(5, 3)
    content = {"a": weight, "b": weight.detach(), "c": weight.T, "d": weight[2:], "alone": torch.randn(2)}
    for zipped in (True, False):
        found: Any = read(save(tmp_path / "m.pt", content, zipped=zipped)).content
        assert found["a"] is found["b"]
        assert len({found[name].untyped_storage().data_ptr() for name in "abcd"}) == 1
        found["a"][3, 1] = 7.0
        assert found["c"][1, 3] == found["d"][1, 1] == 7.0
    assert torch.equal(torch.load(tmp_path / "m.pt")["a"], weight)  # the file is as it was


def test_tensors_are_freed_with_the_content(tmp_path: Path) -> None:
    for zipped in (True, False):
        found: Any = read(save(tmp_path / "m.pt", {"a": torch.ones(3)}, zipped=zipped)).content
        gc.disable()
        try:
            held = weakref.ref(found["a"])
            del found
            assert held() is None
        finally:
            gc.enable()


def test_cuda_tensors_are_read_on_the_cpu(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"a": torch.arange(3.0)})
    entries = entries_of(path)
    pickled = next(data for name, data in entries.items() if name.endswith("data.pkl"))
    assert b"X\x03\0\0\0cpu" in pickled
    archive(path, pickled.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:1"), data_0=entries["m/data/0"])
    found: Any = read(path).content
    assert torch.equal(found["a"], torch.arange(3.0))


def test_the_byte_order_of_another_machine_is_turned(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.complex64, torch.int64):
        path = save(tmp_path / "m.pt", [torch.arange(5).to(dtype)])
        entries = entries_of(path)
        other = {"little": b"big", "big": b"little"}[sys.byteorder]
        archive(path, entries["m/data.pkl"], data_0=entries["m/data/0"], byteorder=other, version=b"3")
        assert_equal(read(path).content, torch.load(path))


def test_pickles_that_torch_did_not_write_are_read(tmp_path: Path) -> None:
    content = {"a": torch.ones(3, 2), "b": torch.nn.Parameter(torch.zeros(2)), "c": np.arange(3.0)}
    for protocol in (2, 4, 5):
        (tmp_path / "m.pt").write_bytes(pickle.dumps(content, protocol))
        found: Any = read(tmp_path / "m.pt").content
        assert torch.equal(found["a"], content["a"])  # type: ignore[arg-type]
        assert torch.equal(found["b"], torch.zeros(2))
        assert torch.equal(found["c"], torch.arange(3.0, dtype=torch.float64))


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_of_python_is_read(tmp_path: Path, protocol: int) -> None:
    content: dict[str, Any] = {
        "numbers": [0, 1, -1, 10**5, -(2**40), 2**100, 0.1, -1e300, True, False, None, 1j],
        "texts": ["", "a'\"\n\\", "é", "\U0001f600", "x" * 300, b"", b"\0\xff\n'", b"y" * 300],
        "containers": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [[]], {}, {1}, frozenset({2}), bytearray(b"ab")],
        "kinds": [collections.OrderedDict(a=1), collections.Counter("aab"), collections.deque([1, 2], 3)],
    }
    shared = ["twice"]
    content["shared"] = [shared, shared]
    found: Any = read(archive(tmp_path / "m.pt", pickle.dumps(content, protocol))).content
    expected = {**content, "kinds": [{"a": 1}, {"a": 2, "b": 1}, [1, 2]]}
    expected["containers"] = [*content["containers"][:-1], b"ab"]
    assert_equal(found, expected)
    assert found["shared"][0] is found["shared"][1]


def test_numpy_values_become_plain_ones(tmp_path: Path) -> None:
    scalars = [np.float32(1.5), np.float64(2.5), np.float16(0.5), np.int64(-3), np.uint8(7), np.bool_(True)]
    scalars += [np.complex64(1 + 2j), np.str_("hé"), np.bytes_(b"ab")]
    grid = np.arange(6.0).reshape(2, 3)
    arrays = [grid, grid.astype(">f4"), np.asfortranarray(grid), grid[:, ::2], np.array(3), np.zeros((0, 2)), grid > 2]
    for protocol, zipped in PROTOCOLS:
        found: Any = read(save(tmp_path / "m.pt", [scalars, arrays], protocol, zipped=zipped)).content
        assert found[0] == [1.5, 2.5, 0.5, -3, 7, True, 1 + 2j, "hé", b"ab"]
        assert [type(value) for value in found[0]] == [float, float, float, int, int, bool, complex, str, bytes]
        for tensor, array in zip(found[1], arrays, strict=True):
            assert np.array_equal(tensor.numpy(), array)
    others: Any = read(save(tmp_path / "m.pt", [np.array(["a"]), np.array([None]), np.datetime64("2020-01-01")]))
    assert [record.kind for record in others.content] == ["numpy.ndarray", "numpy.ndarray", "numpy.datetime64"]


def test_python_values_are_plain(tmp_path: Path) -> None:
    content = [
        Path("/a/b"), torch.Size([2, 3]), torch.device("cuda", 1), torch.device("cpu"), torch.bfloat16, np.dtype("f4"),
        collections.defaultdict(list, a=[1]), frozenset({"a"}), bytearray(b"xy"), torch.arange(3).untyped_storage(),
    ]  # fmt: skip
    for protocol, zipped in PROTOCOLS:
        found: Any = read(save(tmp_path / "m.pt", content, protocol, zipped=zipped)).content
        assert found[:6] == ["/a/b", (2, 3), "cuda:1", "cpu", "torch.bfloat16", "<f4"]
        assert found[6:9] == [{"a": [1]}, frozenset({"a"}), b"xy"]
        assert torch.equal(found[9].view(torch.int64), torch.arange(3))


class Config:
    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class Attributes(dict):  # type: ignore[type-arg]
    def __init__(self, *given: Any, **fields: Any) -> None:
        super().__init__(*given, **fields)
        self.__dict__["frozen"] = True


class Slots:
    __slots__ = ("__dict__", "a", "b")

    def __init__(self) -> None:
        self.a, self.b, self.c = 1, [2], 3


class Pair(typing.NamedTuple):
    left: int
    right: str


class Mode(enum.Enum):
    FAST = "fast"


class Items(list):  # type: ignore[type-arg]
    pass


class WithNew:
    def __getnewargs_ex__(self) -> tuple[tuple[int], dict[str, int]]:
        return (1,), {"size": 2}

    def __new__(cls, first: int = 1, *, size: int = 2) -> WithNew:
        return super().__new__(cls)


@pytest.mark.parametrize("protocol", range(6))
def test_objects_of_classes_that_are_not_there_are_records(tmp_path: Path, protocol: int) -> None:
    data = dataclasses.make_dataclass("Data", [("d_model", int), ("inner", object)])
    kinds = {one.__name__: one for one in (Config, Attributes, Pair, Mode, Items, data, Slots, WithNew)}
    with classes("models.config", **kinds):
        made = [
            Config(d_model=16, layers=[1, 2]), Attributes(d_model=16), Pair(1, "b"), Mode.FAST, Items([1, 2]),
            data(16, data(8, None)), argparse.Namespace(d_model=16), types.SimpleNamespace(d_model=16),
        ]  # fmt: skip
        made += [Slots()] if protocol >= 2 else []
        made += [WithNew()] if protocol >= 4 else []
        pickled = pickle.dumps(made, protocol)
    found: Any = read(archive(tmp_path / "m.pt", pickled))
    fields = [record.fields for record in found.content]
    assert all(type(record) is Record for record in found.content)
    assert fields[0] == {"d_model": 16, "layers": [1, 2]}
    assert fields[1] == {"d_model": 16, "frozen": True}
    assert fields[2] == {"0": 1, "1": "b"} or fields[2] == {"0": (1, "b")}
    assert fields[3] in ({"0": "fast"}, {})  # the first releases of Python 3.11 pickle a member by its name
    assert fields[4] == {"items": [1, 2]}
    assert (fields[5]["d_model"], fields[5]["inner"].fields) == (16, {"d_model": 8, "inner": None})
    assert fields[6] == fields[7] == {"d_model": 16}
    if protocol >= 2:
        assert fields[8] == {"a": 1, "b": [2], "c": 3}
    if protocol >= 4:
        assert fields[9] == {"0": 1, "size": 2}
    kinds_found = {record.kind for record in found.content}
    assert kinds_found >= {"models.config.Config", "models.config.Data", "argparse.Namespace", "types.SimpleNamespace"}
    assert found.left_out == tuple(sorted(kinds_found))
    assert "models.config" not in sys.modules


def test_an_omegaconf_is_a_plain_dictionary(tmp_path: Path) -> None:
    with (
        classes("omegaconf.dictconfig", DictConfig=type("DictConfig", (Config,), {})),
        classes("omegaconf.listconfig", ListConfig=type("ListConfig", (Config,), {})),
        classes("omegaconf.nodes", AnyNode=type("AnyNode", (Config,), {})),
    ):
        kinds: Any = sys.modules
        dictionary, node = kinds["omegaconf.dictconfig"].DictConfig, kinds["omegaconf.nodes"].AnyNode
        whole, part = dictionary(_parent=None), dictionary()
        sizes = kinds["omegaconf.listconfig"].ListConfig(_parent=part, _content=[node(_val=3)], _metadata=1)
        part._content, part._parent, part._metadata = {"d": node(_val=16, _parent=part), "sizes": sizes}, whole, 2
        whole._content = {"model": part, "lr": node(_val=0.1, _parent=whole)}
        pickled = [pickle.dumps({"config": one}, 2) for one in (whole, part)]
    inner = {"d": 16, "sizes": [3]}
    assert read(archive(tmp_path / "m.pt", pickled[0])) == TorchFile({"config": {"model": inner, "lr": 0.1}}, ())
    assert read(archive(tmp_path / "m.pt", pickled[1])) == TorchFile({"config": inner}, ())


def test_nested_classes_and_what_refers_to_its_owner_are_read(tmp_path: Path) -> None:
    with classes("models", Config=Config):
        outer = Config(name="outer")
        outer.part = Config(owner=outer)  # type: ignore[attr-defined]
        loop: list[object] = [1]
        loop.append(loop)
        pickled = pickle.dumps([outer, loop], 2)
    found: Any = read(archive(tmp_path / "m.pt", pickled)).content
    assert found[0].fields["part"].fields["owner"] == found[0].fields["part"].fields["owner"]
    assert found[0].fields["part"].fields["owner"].fields == {}
    assert found[1][0] == 1
    assert found[1][1].kind == "list"
    nested = b"\x80\x02cbuiltins\ngetattr\ncmodels\nOuter\nX\5\0\0\0Inner\x86R)\x81}X\1\0\0\0aK\1sb."
    inner: Any = read(archive(tmp_path / "m.pt", nested)).content
    assert (inner.kind, inner.fields) == ("models.Outer.Inner", {"a": 1})


@pytest.mark.filterwarnings("ignore:.*(quantize|Sparse CSR)")
def test_tensors_that_are_no_plain_ones_are_records(tmp_path: Path) -> None:
    unusual = {
        "quantised": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
        "sparse": torch.eye(2).to_sparse(),
        "rows": torch.eye(2).to_sparse_csr(),
        "meta": torch.empty(2, 2, device="meta"),
    }
    for zipped in (True, False):
        found: Any = read(save(tmp_path / "m.pt", unusual, zipped=zipped))
        assert [record.kind.removeprefix("torch._utils._rebuild_") for record in found.content.values()] == [
            "qtensor", "sparse_tensor", "sparse_tensor", "meta_tensor_no_storage"
        ]  # fmt: skip
        assert {record.fields["shape"] for record in found.content.values()} == {(2, 2)}
        assert found.content["meta"].fields["dtype"] == "torch.float32"


def test_a_subclass_of_tensor_is_a_tensor(tmp_path: Path) -> None:
    kind = type("Weight", (torch.Tensor,), {})
    with classes("layers", Weight=kind):
        path = save(tmp_path / "m.pt", [torch.arange(3.0).as_subclass(kind)])
    assert_equal(read(path).content, [torch.arange(3.0)])


def test_a_config_object_serves_as_configuration(tmp_path: Path) -> None:
    with classes("models.config", IteraLiteConfig=type("IteraLiteConfig", (Config,), {})):
        config = sys.modules["models.config"].IteraLiteConfig(norm_eps=0.5)
        save(tmp_path / "m.ckpt", {"state_dict": random_tensors(MAMBA), "config": config, "loss": np.float64(1.0)})
    assert load_checkpoint(tmp_path / "m.ckpt").config.final_norm.eps == 0.5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_and_other_archives_are_named(tmp_path: Path) -> None:
    module = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(module, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"m\.pt: a TorchScript program.*state_dict\(\)"):
        read(tmp_path / "m.pt")
    np.savez(tmp_path / "m.npz", a=np.ones(2))
    with pytest.raises(CheckpointError, match=r"not one that torch\.save wrote: it holds 'a\.npy'"):
        read(tmp_path / "m.npz")


def test_an_archive_that_was_packed_again_is_refused(tmp_path: Path) -> None:
    entries = entries_of(save(tmp_path / "m.pt", [torch.zeros(1000)]))
    archive(tmp_path / "m.pt", entries["m/data.pkl"], data_0=entries["m/data/0"], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        read(tmp_path / "m.pt")


def test_a_tar_file_is_named(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "m.pt", "w") as file:
        file.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(CheckpointError, match="a tar file"):
        read(tmp_path / "m.pt")


def test_views_beyond_their_storage_are_refused(tmp_path: Path) -> None:
    def rebuilt(offset: int, size: tuple[int, ...], stride: tuple[int, ...], count: int = 4) -> bytes:
        held = pickle.dumps((offset, size, stride, False, collections.OrderedDict()), 2)[2:-1]
        numel = pickle.dumps(count, 2)[2:-1]
        identity = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu" + numel + b"tQ"
        opened = b"ctorch._utils\n_rebuild_tensor_v2\n(" + identity
        return b"\x80\x02" + opened + held.replace(b"(", b"", 1)[: -3 if held[-3:-1] == b"tq" else -1] + b"tR."

    good = archive(tmp_path / "m.pt", rebuilt(1, (3,), (1,)), data_0=np.arange(4, dtype="<f4").tobytes())
    assert_equal(read(good).content, torch.arange(1.0, 4.0))
    beyond, sizes, negative, saved = "ends at element", "a tensor of", "no whole numbers", "elements were saved"
    for given, reason in (
        ((2, (3,), (1,)), beyond), ((0, (2, 3), (2, 1)), beyond), ((2**61, (1,), (1,)), beyond),
        ((-1, (3,), (1,)), negative), ((0, (-1,), (1,)), negative), ((0, (2,), (-1,)), negative),
        ((0, (2, 2), (1,)), sizes), ((0, (5,), (0,)), "refused: a tensor of 5 elements in a storage of 4"),
        ((0, (2**40, 2**40), (0, 0)), sizes), ((0, (2**61, 2**61, 0), (1, 1, 1)), sizes),
        ((0, (4,), (1,), 5), saved), ((0, (4,), (1,), 2**61), saved), ((0, (4,), (1,), 3), saved),
    ):  # fmt: skip
        archive(tmp_path / "m.pt", rebuilt(*given), data_0=np.arange(4, dtype="<f4").tobytes())
        with pytest.raises(CheckpointError, match=reason):
            read(tmp_path / "m.pt")


def test_storages_of_the_old_format_are_no_larger_than_the_file(tmp_path: Path) -> None:
    whole = old_format([torch.arange(4.0)])
    count, size = b"K\4Ntq", b"K\4\x85q"
    assert (whole.count(count), whole.count(size)) == (1, 1)
    for old, new, reason in (
        (count, b"J\0\0\0\x10Ntq", "is larger than the file"),
        (count, b"K\5Ntq", "has 4 elements, and 5 were saved"),
        (count, b"K\4X\1\0\0\0vK\2K\3\x87tq", "a part that ends at element 5"),
        (count, b"K\4X\1\0\0\0vK\1K\3\x87tq", "a tensor that ends at element 4 of a storage of 3"),
        (size, b"K\5\x85q", "a tensor that ends at element 5"),
    ):
        (tmp_path / "m.pt").write_bytes(whole.replace(old, new))
        with pytest.raises(CheckpointError, match=reason):
            read(tmp_path / "m.pt")
    smaller = whole.replace(count, b"K\4X\1\0\0\0vK\1K\3\x87tq").replace(size, b"K\3\x85q")
    (tmp_path / "m.pt").write_bytes(smaller)
    assert_equal(read(tmp_path / "m.pt").content, [torch.arange(1.0, 4.0)])
