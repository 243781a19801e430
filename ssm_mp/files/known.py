"""What a pickle may call by name, and what is made in its place: nothing of the file's choice ever runs.

A name of the table below is made by functions of our own. Any other that looks like a class becomes an inert object.
What is left would run something, a function or what the standard library has, and is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath

from torch import Tensor

from ssm_mp.errors import CheckpointError
from ssm_mp.files import numpy_values
from ssm_mp.files.allowance import Allowance
from ssm_mp.files.inert import DamagedError, Instance, Symbol
from ssm_mp.files.numpy_values import NumpyArray, NumpyType
from ssm_mp.files.storages import DTYPES, Marked, Storage, Tensors, without_values

_EACH_MEMBER = 64
"""Bytes of memory that a member of a copied container takes, about."""

_INSTEAD = "Save its state_dict() alone, best as .safetensors"
_LONGEST_NAME = 1000
_ENCODINGS = ("latin1", "latin-1", "iso-8859-1", "utf-8", "utf8", "ascii")

_INERT = frozenset(
    f"{module}.{name}"
    for module, names in {
        "argparse": "Namespace",
        "builtins": "object range slice",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "enum": "auto",
        "fractions": "Fraction",
        "ipaddress": "IPv4Address IPv6Address",
        "logging": "getLogger",
        "re": "_compile",
        "types": "SimpleNamespace",
        "uuid": "UUID SafeUUID",
        "zoneinfo": "ZoneInfo ZoneInfo._unpickle",
        "numpy.random._pickle": "__bit_generator_ctor __generator_ctor __randomstate_ctor",
        "numpy.random.bit_generator": "__pyx_unpickle_SeedSequence",
        "numpy.random.mtrand": "__RandomState_ctor",
    }.items()
    for name in names.split()
)
"""Names that hold nothing but values though they are functions, or of the standard library."""

_VALUELESS = {
    "_rebuild_qtensor": 2,
    "_rebuild_nested_tensor": 1,
    "_rebuild_sparse_csr_tensor": 1,
    "_rebuild_meta_tensor_no_storage": 1,
    "_rebuild_wrapper_subclass": 2,
}
"""Functions of `torch._utils` that make no dense tensor → which argument is the shape."""

_PLAIN_TENSORS = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")

_GENERIC = ("typing", "collections.abc", "builtins", "collections", "types")
"""Modules of types with parameters, `typing.Dict[str, int]`, of which only the name is kept."""


class Known:
    """Makes what the pickles of one file ask for. `stored`: the storage in a whole torch file of the given bytes."""

    def __init__(self, tensors: Tensors, allowance: Allowance, stored: Callable[[bytes], object]) -> None:
        self._tensors, self._allowance, self._stored = tensors, allowance, stored
        self._table = self._torch() | self._numpy() | self._python()

    def call(self, function: object, arguments: tuple[object, ...]) -> object:
        """What `function(*arguments)` gives. Raises CheckpointError for what would run, DamagedError for nonsense."""
        if not isinstance(function, Symbol):
            raise DamagedError(f"a call of a {type(function).__name__}")
        made = self._table.get(function.full)
        if made is not None:
            self._allowance.take(8 * len(arguments))
            try:
                return made(*arguments)
            except (TypeError, ValueError, LookupError, StopIteration) as error:
                raise DamagedError(f"{function.full} with other arguments ({type(error).__name__})") from None
        fault = function.module == "builtins" and function.name.endswith(("Error", "Exception", "Warning"))
        if function.full in _INERT or fault or (function.like_a_class and not function.of_python):
            return Instance(function, arguments)
        raise CheckpointError(
            f"refused: reading it would call {function.full}, which is not known to be harmless and could run any "
            f"code. {_INSTEAD}"
        )

    def make(self, kind: object, arguments: tuple[object, ...], named: dict[object, object] | None = None) -> object:
        """What `kind.__new__(kind, *arguments, **named)` gives: an inert object, where the class is not known.

        Raises as `call` does, for what is not known in the standard library too.
        """
        if type(arguments) is not tuple or (isinstance(kind, Symbol) and kind.module == "copyreg"):
            raise DamagedError("a construction of nothing")
        if not isinstance(kind, Symbol) or kind.full in self._table or kind.of_python:
            return self.call(kind, arguments)
        return Instance(kind, arguments, states=[named] if named else [])

    def build(self, target: object, state: object) -> None:
        """What `target.__setstate__(state)` does."""
        if isinstance(target, Instance):
            target.states.append(state)
        elif isinstance(target, NumpyType):
            numpy_values.set_type(target, state)
        elif isinstance(target, NumpyArray):
            numpy_values.set_array(target, state)
        elif not isinstance(
            target, dict | list | set | Tensor
        ):  # these have attributes, such as _metadata, that are left
            raise DamagedError(f"a state for a {type(target).__name__}")

    def _torch(self) -> dict[str, Callable[..., object]]:
        made: dict[str, Callable[..., object]] = {
            "_utils._rebuild_tensor": self._tensor,
            "_utils._rebuild_tensor_v2": self._tensor,
            "_utils._rebuild_tensor_v3": self._tensor_of_type,
            "_utils._rebuild_parameter": lambda data, *_: data,
            "_utils._rebuild_parameter_with_state": lambda data, *_: data,
            "_utils._rebuild_device_tensor_from_cpu_tensor": self._tensor_of_device,
            "_utils._rebuild_device_tensor_from_numpy": self._tensor_of_device,
            "_utils._rebuild_xla_tensor": self._tensor_of_device,
            "_utils._rebuild_sparse_tensor": lambda _, parts: self._valueless(
                "_rebuild_sparse_tensor", next(part for part in parts if isinstance(part, tuple))
            ),
            "_tensor._rebuild_from_type": self._of_type,
            "_tensor._rebuild_from_type_v2": self._of_type,
            "nn.parameter.Parameter": lambda data, *_: data,
            "nn.parameter.Buffer": lambda data, *_: data,
            "autograd.variable.Variable": lambda data, *_: data,
            "storage._load_from_bytes": self._stored_alone,
            "serialization._get_layout": lambda name: name,
            "Size": lambda sizes=(): tuple(self._members(sizes)),
            "device": lambda kind, index=None: _text(kind) if index is None else f"{_text(kind)}:{int(index)}",
        }
        for name, at in _VALUELESS.items():
            made[f"_utils.{name}"] = lambda *given, name=name, at=at: self._valueless(name, given[at], given[0])
        return {f"torch.{name}": function for name, function in made.items()}

    def _numpy(self) -> dict[str, Callable[..., object]]:
        made: dict[str, Callable[..., object]] = {"numpy.dtype": lambda code, *_: numpy_values.numpy_type(code)}
        for core in ("numpy.core", "numpy._core"):
            kind = Symbol("numpy", "ndarray")
            made[f"{core}.multiarray.scalar"] = numpy_values.scalar
            made[f"{core}.multiarray._reconstruct"] = lambda *_, kind=kind: NumpyArray(kind)
            made[f"{core}.numeric._frombuffer"] = lambda data, dtype, shape, order, kind=kind: NumpyArray(
                kind, dtype, shape, order == "F", data
            )
        return made

    def _python(self) -> dict[str, Callable[..., object]]:
        posix = dict.fromkeys(("Path", "PosixPath", "PurePosixPath", "PurePath"), self._posix_path)
        windows = dict.fromkeys(("WindowsPath", "PureWindowsPath"), self._windows_path)
        paths = {f"{at}.{name}": f for at in ("pathlib", "pathlib._local") for name, f in (posix | windows).items()}
        return paths | {
            "collections.OrderedDict": self._ordered,
            "collections.Counter": lambda counts=None: self._ordered(counts),
            "collections.defaultdict": lambda factory=None, held=None: self._ordered(held),
            "collections.deque": lambda items=(), longest=None: self._members(items),
            "builtins.dict": self._ordered,
            "builtins.list": lambda items=(): self._members(items),
            "builtins.tuple": lambda items=(): tuple(self._members(items)),
            "builtins.set": lambda items=(): set(map(self._allowance.key, self._members(items))),
            "builtins.frozenset": lambda items=(): frozenset(map(self._allowance.key, self._members(items))),
            "builtins.bytes": self._bytes,
            "builtins.bytearray": self._bytes,
            "builtins.complex": lambda real=0.0, imaginary=0.0: complex(_number(real), _number(imaginary)),
            "builtins.bool": lambda value=False: bool(_number(value)),
            "builtins.int": lambda value=0: int(_number(value)),
            "builtins.float": lambda value=0.0: float(_number(value)),
            "builtins.str": lambda value="": _text(value),
            "builtins.getattr": self._member,
            "_codecs.encode": self._encoded,
            "copyreg._reconstructor": self._reconstructed,
            "copyreg.__newobj__": lambda kind, *given: self.make(kind, given),
            "copyreg.__newobj_ex__": self.make,
            "operator.getitem": self._parametrised,
            "types.GenericAlias": self._parametrised,
        }

    def _tensor(
        self, storage: object, offset: object, size: object, stride: object, *rest: object, dtype: object = None
    ) -> object:
        """`_rebuild_tensor_v2`; of the rest only the last counts, marks of conjugated or negated values."""
        marks = rest[2] if len(rest) > 2 else None
        kind = DTYPES[dtype.full] if isinstance(dtype, Symbol) else None
        tensor = self._tensors.view(storage, offset, size, stride, kind)
        if not isinstance(marks, dict) or not (marks.get("conj") is True or marks.get("neg") is True):
            return tensor
        return Marked(tensor, marks.get("conj") is True, marks.get("neg") is True)

    def _tensor_of_type(
        self, storage: object, offset: object, size: object, stride: object, grad: object, hooks: object,
        dtype: object, marks: object = None,
    ) -> object:  # fmt: skip
        """`_rebuild_tensor_v3`: the storage has bytes, the type stands beside it."""
        return self._tensor(storage, offset, size, stride, grad, hooks, marks, dtype=dtype)

    def _tensor_of_device(self, data: object, dtype: object, *_: object) -> object:
        """A tensor of a device that is not here, saved from its copy on the CPU or in NumPy."""
        return data

    def _valueless(self, name: str, shape: object, first: object = None) -> Instance:
        dtype = first if isinstance(first, Symbol) else Symbol("torch", "unknown")
        if isinstance(first, Storage):
            dtype = Symbol("torch", str(first.dtype).removeprefix("torch."))
        return without_values(Symbol("torch._utils", name), shape, dtype if dtype.full in DTYPES else None)

    def _of_type(self, function: object, kind: object, arguments: object, state: object) -> object:
        """A tensor of a subclass, as a tensor; where it holds others inside, an inert object of that class."""
        if not isinstance(arguments, tuple) or not isinstance(kind, Symbol) or not isinstance(function, Symbol):
            raise DamagedError("a tensor's subclass without arguments")
        if function.module == "torch._tensor":
            raise DamagedError("a tensor's subclass of a subclass")
        made = self.call(function, arguments)
        if not isinstance(made, Instance) or kind.full in _PLAIN_TENSORS:
            return made
        return Instance(kind, (), made.items, states=[state])

    def _stored_alone(self, data: object) -> object:
        if not isinstance(data, bytes):
            raise DamagedError("a storage without bytes")
        found = self._stored(data)
        if not isinstance(found, Storage):
            raise DamagedError("a storage that is something else")
        return found

    def _members(self, items: object) -> list[object]:
        if not isinstance(items, list | tuple | set | frozenset):
            raise DamagedError(f"members of a {type(items).__name__}")
        self._allowance.take(_EACH_MEMBER * len(items))
        return list(items)

    def _ordered(self, held: object = None) -> dict[object, object]:
        """A dictionary of another kind: from nothing, a dictionary, or pairs as Python 2 wrote them."""
        if held is None or isinstance(held, dict):
            self._allowance.take(_EACH_MEMBER * len(held or ()))
            return dict(held or {})
        pairs = self._members(held)
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise DamagedError("a dictionary of what are no pairs")
        return {self._allowance.key(pair[0]): pair[1] for pair in pairs}  # type: ignore[index]

    def _bytes(self, data: object = b"", encoding: object = None) -> bytes:
        if isinstance(data, str):
            return self._encoded(data, encoding)
        if isinstance(data, bytes):
            return data
        return bytes(self._members(data))  # type: ignore[arg-type]  # bytes() raises TypeError for other members

    def _encoded(self, text: object, encoding: object = "utf-8") -> bytes:
        if not isinstance(text, str) or encoding not in _ENCODINGS:
            raise DamagedError("bytes of what is no text")
        self._allowance.take(4 * len(text))
        return text.encode(str(encoding))

    def _posix_path(self, *parts: object) -> str:
        self._allowance.take(sum(len(_text(part)) for part in parts))
        return str(PurePosixPath(*map(_text, parts)))

    def _windows_path(self, *parts: object) -> str:
        self._allowance.take(sum(len(_text(part)) for part in parts))
        return str(PureWindowsPath(*map(_text, parts)))

    def _member(self, holder: object, name: object) -> Symbol:
        """`getattr` as pickles name nested classes and members of enums; of anything else it is refused."""
        if not isinstance(holder, Symbol) or not holder.like_a_class or holder.of_python or not _is_name(name):
            raise CheckpointError(
                "refused: reading it would call builtins.getattr on what is no class of its own: it could run any "
                "code. " + _INSTEAD
            )
        if len(holder.name) > _LONGEST_NAME:
            raise DamagedError("a class within too many classes")
        self._allowance.take(len(holder.name))
        return Symbol(holder.module, f"{holder.name}.{name}")

    def _reconstructed(self, kind: object, base: object, state: object) -> object:
        """`copyreg._reconstructor`, protocols 0 and 1: `base` is the built-in type that the class has inside."""
        if not isinstance(base, Symbol) or base.module != "builtins":
            raise DamagedError("an object of no base")
        made = self.make(kind, ())
        if isinstance(made, Instance) and base.name != "object":
            if isinstance(state, dict):
                made.items = state
            elif isinstance(state, list):
                made.listed = state
            else:
                made.arguments = (state,)
        return made

    def _parametrised(self, generic: object, parameters: object) -> object:
        """`typing.Dict[str, int]` in a class's description of itself: its name."""
        if not isinstance(generic, Symbol) or generic.module not in _GENERIC:
            raise CheckpointError(
                f"refused: reading it would call operator.getitem on what is no type: it could run any code. {_INSTEAD}"
            )
        return generic


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_NAME and value.isidentifier()


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _number(value: object) -> int | float:
    if type(value) not in (int, float, bool):
        raise TypeError("no number")
    return value  # type: ignore[return-value]
