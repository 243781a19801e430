"""Save and load a converted model: a folder that is as small as it says, and loads.

`model.safetensors` holds the packed tensors, `precision_map.json` the resolved map with its scheme, pins and the
checksums of the tensors and further files, `metrics.json` what was measured, `tokenizer.json` the tokenizer where
there is one. How the folder is written, and replaced, is in `artifact_folder`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ssm_mp.artifact_folder import (
    ACCOMPANYING,
    MAP,
    METRICS,
    SOURCE,
    TENSORS,
    TOKENIZER,
    is_artifact,
    say_where,
    sha256,
    state_of,
    write_folder,
)
from ssm_mp.artifact_folder import require_free as require_free_folder
from ssm_mp.components import Component, find_components
from ssm_mp.config import Config
from ssm_mp.errors import ArtifactError, PrecisionMapError, SsmMpError
from ssm_mp.families.registry import config_from_json, config_to_json
from ssm_mp.files.safetensors_file import write_safetensors
from ssm_mp.model import AfterLayer, LanguageModel, assemble
from ssm_mp.modules.inputs import StaticInput, input_quantizer
from ssm_mp.modules.parameter import held_by
from ssm_mp.precision_map import PrecisionMap, require_pins
from ssm_mp.precisions.registry import get_precision
from ssm_mp.precisions.stored import ArraySpec, ScaledColumns
from ssm_mp.scheme import Scheme

__all__ = [
    "ACCOMPANYING",
    "FORMAT",
    "MAP",
    "METRICS",
    "SOURCE",
    "TENSORS",
    "TOKENIZER",
    "Artifact",
    "add_metrics",
    "is_artifact",
    "load_artifact",
    "read_artifact",
    "require_free",
    "save_artifact",
    "stored_arrays",
    "tensor_bytes",
]

FORMAT = "ssm-mp/1"
EXPONENT = "weight.exponent"
"""Suffix of a component's array that says that its inputs are scaled each for itself; see `Component.scaled`."""
_LOOKS = 5
"""How often an artifact is read that is replaced meanwhile, before that is an error."""


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact folder. `tensor_bytes` is what the tensors take, `file_bytes` the file with its header.

    tokenizer: the file, verified; None where the artifact has none. source: the `config.json` of its checkpoint.
    """

    path: Path
    model: LanguageModel
    precision_map: PrecisionMap
    scheme: Scheme
    metrics: Mapping[str, Any]
    tensor_bytes: int
    file_bytes: int
    tokenizer: Path | None = None
    source: Mapping[str, Any] = field(default_factory=dict)


def stored_arrays(model: LanguageModel) -> dict[str, Tensor]:
    """Every array that a model holds, by the name it has in a file: weights, scales and input scales."""
    arrays: dict[str, Tensor] = {}
    for component in find_components(model):
        module = model.component(component.name)
        for parameter in component.parameters:
            for suffix, array in held_by(module, parameter.leaf).arrays().items():
                arrays[_joined(parameter.name, suffix)] = array
        inputs = getattr(module, "inputs", None)
        if isinstance(inputs, StaticInput):
            arrays[f"{component.name}.input_scale"] = inputs.scale
    return arrays


def tensor_bytes(model: LanguageModel) -> int:
    """Bytes of everything that `stored_arrays` lists."""
    return sum(array.numel() * array.dtype.itemsize for array in stored_arrays(model).values())


def save_artifact(
    path: str | Path,
    model: LanguageModel,
    precision_map: PrecisionMap,
    scheme: Scheme,
    metrics: Mapping[str, Any],
    *,
    pins: frozenset[str] = frozenset(),
    extra: Mapping[str, bytes] | None = None,
    replace: bool = False,
    verify: Callable[[Path], None] | None = None,
) -> Path:
    """Write an artifact folder, whole or not at all.

    extra: further files by name, e.g. `tokenizer.json`. verify: is given the written folder before it is put in its
    place; where it raises, nothing is. replace: an existing artifact at `path` gives way, file by file: other files in
    its folder stay as they are. Anything else there never gives way.
    Raises ArtifactError where the folder cannot be written or something is in the way.
    """
    path = Path(path)
    further = extra or {}
    wrong = [name for name in further if not name or Path(name).name != name or name in (TENSORS, MAP, METRICS)]
    if wrong:
        raise ArtifactError(f"{path}: {', '.join(wrong)} cannot be the name of a further file in an artifact")

    def fill(folder: Path) -> None:
        _write(folder, model, precision_map, scheme, metrics, pins, further)
        if verify is not None:
            verify(folder)

    try:
        write_folder(path, fill, replace=replace)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: the artifact could not be written ({error}); nothing was left behind") from None
    return path


def require_free(path: str | Path, replace: bool) -> None:
    """Raise ArtifactError where something other than an empty folder, or an artifact to replace, is in the way."""
    require_free_folder(Path(path), replace)


def _write(
    folder: Path, model: LanguageModel, precision_map: PrecisionMap, scheme: Scheme,
    metrics: Mapping[str, Any], pins: frozenset[str], extra: Mapping[str, bytes],
) -> None:  # fmt: skip
    said = {"scheme": scheme.to_json(), "pins": sorted(pins), "map": precision_map.to_json()}
    metadata = {"format": FORMAT, "config": json.dumps(config_to_json(model.config)), "precision_map": json.dumps(said)}
    write_safetensors(folder / TENSORS, stored_arrays(model), metadata)
    (folder / TENSORS).chmod(0o644)
    for name, data in extra.items():
        (folder / name).write_bytes(data)
    content = {
        "format": FORMAT,
        "checksum": sha256(folder / TENSORS),
        "files": {name: sha256(folder / name) for name in sorted(extra)},
        **said,
    }
    _write_json(folder / MAP, content)
    file_bytes = (folder / TENSORS).stat().st_size
    _write_json(folder / METRICS, {**metrics, "bytes": tensor_bytes(model), "file_bytes": file_bytes})


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def add_metrics(folder: Path, more: Mapping[str, Any]) -> None:
    """Add to the metrics of a folder that is being written: for `verify` of `save_artifact`."""
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    _write_json(folder / METRICS, {**metrics, **more})


def read_artifact(path: str | Path, device: str = "cpu", after_layer: AfterLayer | None = None) -> Artifact:
    """Load an artifact folder and verify its checksums and the shape and type of every array.

    Where replacing it was interrupted, the artifact that is whole is read, and a warning says from where.
    after_layer: of its model, as in `assemble`.
    Raises ArtifactError for anything missing, changed or of another format.
    """
    path = Path(path)
    for _ in range(_LOOKS):
        before = state_of(path)
        failure, found = None, None
        try:
            found = _read(before[0], device, after_layer)
        except ArtifactError as error:
            failure = error
        if state_of(path) == before:
            break
    else:
        raise ArtifactError(f"{path}: it is being replaced again and again by another process")
    if found is None:
        assert failure is not None
        raise failure
    say_where(path, found.path)
    return found


def _read(path: Path, device: str, after_layer: AfterLayer | None) -> Artifact:
    if not (path / MAP).is_file():
        raise ArtifactError(f"{path}: not an artifact folder, it has no {MAP}")
    try:
        content = json.loads((path / MAP).read_text(encoding="utf-8-sig"))
        metrics = json.loads((path / METRICS).read_text(encoding="utf-8-sig"))
        if content["format"] != FORMAT:
            raise ArtifactError(f"{path}: format {content['format']!r}, this version reads {FORMAT!r}")
        _require_unchanged(path / TENSORS, content["checksum"])
        tokenizer = _listed(path, TOKENIZER, content.get("files", {}))
        source = _listed(path, SOURCE, content.get("files", {}))
        values = {} if source is None else json.loads(source.read_text(encoding="utf-8"))
        with safe_open(path / TENSORS, framework="pt", device=device) as file:
            config = config_from_json(json.loads(file.metadata()["config"]))
            said = json.loads(file.metadata()["precision_map"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        changed = [key for key in said if content.get(key) != said[key]]
        if changed:
            raise ArtifactError(
                f"{path / MAP}: its {', '.join(changed)} is not what {TENSORS} was made with; it was changed"
            )
        scheme = Scheme.from_json(content["scheme"])
        model, precision_map = _restore(config, content["map"], scheme, arrays, after_layer)
    except ArtifactError as error:
        raise error if str(path) in str(error) else ArtifactError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, SsmMpError) as error:
        raise ArtifactError(f"{path}: not a readable artifact ({type(error).__name__}: {error})") from None
    file_bytes = (path / TENSORS).stat().st_size
    size = tensor_bytes(model)
    return Artifact(path, model, precision_map, scheme, metrics, size, file_bytes, tokenizer, values)


def _require_unchanged(path: Path, checksum: str) -> None:
    if sha256(path) != checksum:
        raise ArtifactError(f"{path}: its checksum is not the one in {MAP}; the file was changed or damaged")


def _listed(path: Path, name: str, checksums: Mapping[str, str]) -> Path | None:
    """A further file of the artifact's own; one that it does not list is somebody else's."""
    file = path / name
    if name not in checksums or not file.exists():
        return None
    _require_unchanged(file, checksums[name])
    return file


def load_artifact(path: str | Path, device: str = "cpu") -> LanguageModel:
    """The converted model of an artifact folder, verified: token ids `[b, l]` → logits `[b, l, V]`, eval mode.

    >>> import tempfile
    >>> from ssm_mp import PrecisionMap, Scheme, convert, find_components, load_artifact, load_model, save_artifact
    >>> model, scheme = load_model("studies/reference/model.safetensors"), Scheme(activations="none")
    >>> everywhere = PrecisionMap.uniform("int8", find_components(model))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_artifact(f"{folder}/small", convert(model, everywhere, scheme), everywhere, scheme, {})
    ...     load_artifact(path).config.n_layers
    4
    """
    return read_artifact(path, device).model


@dataclass(frozen=True)
class _Skeleton:
    """Just a config, to list the components of."""

    config: Config


def _restore(
    config: Config,
    precisions: Mapping[str, str],
    scheme: Scheme,
    arrays: Mapping[str, Tensor],
    after_layer: AfterLayer | None,
) -> tuple[LanguageModel, PrecisionMap]:
    components = tuple(
        replaced(one, scaled=f"{one.name}.{EXPONENT}" in arrays) for one in find_components(_Skeleton(config))
    )
    if {component.name for component in components} != precisions.keys():
        raise PrecisionMapError("the map and the config name different components")
    precision_map = PrecisionMap(tuple((component.name, precisions[component.name]) for component in components))
    require_pins(precision_map, components)
    found = {name: ArraySpec(tuple(array.shape), array.dtype) for name, array in arrays.items()}
    expected = _expected(components, precisions, scheme)
    wrong = [
        f"{name}: expected {_described(expected.get(name))}, found {_described(found.get(name))}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        raise ArtifactError("arrays that do not fit the map: " + "; ".join(wrong[:5]))
    modules = {
        component.name: _restored(component, precisions[component.name], scheme, arrays, config)
        for component in components
    }
    return assemble(config, modules, after_layer=after_layer), precision_map


def _restored(
    component: Component, name: str, scheme: Scheme, arrays: Mapping[str, Tensor], config: Config
) -> nn.Module:
    """The module of one component, from its arrays in the file."""
    precision = get_precision(name)
    tensors = {}
    for parameter in component.parameters:
        suffixes = component.arrays(parameter, name, scheme.activations)
        held = {suffix: arrays[_joined(parameter.name, suffix)] for suffix in suffixes}
        exponent = held.pop("exponent", None)
        restored = precision.restore(held, parameter.shape, parameter.role)
        tensors[parameter.leaf] = restored if exponent is None else ScaledColumns(restored, exponent)
    how = component.input_scheme(name, scheme.activations)
    exponents = arrays.get(f"{component.name}.{EXPONENT}")
    static = StaticInput(arrays[f"{component.name}.input_scale"], exponents) if how == "static" else None
    return component.form.module(tensors, static or input_quantizer(how, name))


def _expected(components: tuple[Component, ...], precisions: Mapping[str, str], scheme: Scheme) -> dict[str, ArraySpec]:
    """Every array that a map implies, by its name in the file."""
    expected: dict[str, ArraySpec] = {}
    for component in components:
        for parameter in component.parameters:
            for suffix, spec in component.arrays(parameter, precisions[component.name], scheme.activations).items():
                expected[_joined(parameter.name, suffix)] = spec
        if component.input_scheme(precisions[component.name], scheme.activations) == "static":
            expected[f"{component.name}.input_scale"] = ArraySpec((1,), torch.float16)
    return expected


def _joined(name: str, suffix: str) -> str:
    return f"{name}.{suffix}" if suffix else name


def _described(spec: ArraySpec | None) -> str:
    return "nothing" if spec is None else f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"
