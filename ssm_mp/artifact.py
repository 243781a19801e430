"""Save and load a converted model: a folder that is as small as it says, and loads.

`model.safetensors` holds the packed tensors, `precision_map.json` the resolved map with its scheme, pins and the
checksum of the tensors, `metrics.json` what was measured. The folder is written under a temporary name beside
its place and renamed when complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ssm_mp.components import Component, find_components
from ssm_mp.config import Config, config_from_json, config_to_json
from ssm_mp.errors import ArtifactError, PrecisionMapError, SsmMpError
from ssm_mp.layers import DynamicInput, InputQuantizer, StaticInput, component_module
from ssm_mp.models import LanguageModel, assemble
from ssm_mp.precision import get_precision
from ssm_mp.precision_map import PrecisionMap, require_pins
from ssm_mp.scheme import Scheme
from ssm_mp.stored import ArraySpec, Stored

FORMAT = "ssm-mp/1"
TENSORS, MAP, METRICS = "model.safetensors", "precision_map.json", "metrics.json"


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact folder. `tensor_bytes` is what the tensors take, `file_bytes` the file with its header."""

    path: Path
    model: LanguageModel
    precision_map: PrecisionMap
    scheme: Scheme
    metrics: Mapping[str, Any]
    tensor_bytes: int
    file_bytes: int


def stored_arrays(model: LanguageModel) -> dict[str, Tensor]:
    """Every array that a model holds, by the name it has in a file: weights, scales and input scales."""
    arrays: dict[str, Tensor] = {}
    for component in find_components(model):
        module = model.get_submodule(component.name)
        for parameter in component.parameters:
            held = module if isinstance(module, Stored) else getattr(module, parameter.leaf)
            for suffix, array in held.arrays().items():
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

    extra: further files by name. verify: is given the written folder before it is put in its place; where it
    raises, nothing is. replace: an existing artifact at `path` gives way; anything else there never does.
    Raises ArtifactError where the folder cannot be written or something is in the way.
    """
    path = Path(path)
    require_free(path, replace)
    new_parents = [parent for parent in path.parents if not parent.exists()]
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
        _write(partial, model, precision_map, scheme, metrics, pins, extra or {})
        partial.chmod(0o755)
        if verify is not None:
            verify(partial)
        _put_in_place(partial, path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: the artifact could not be written ({error}); nothing was left behind") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if not path.exists():
            for parent in new_parents:
                with suppress(OSError):
                    parent.rmdir()
    return path


def require_free(path: str | Path, replace: bool) -> None:
    """Raise ArtifactError where something other than an empty folder, or an artifact to replace, is in the way."""
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if (path / MAP).exists():
        if not replace:
            raise ArtifactError(f"{path} already exists; replace it with --force, or choose another folder")
        return
    raise ArtifactError(f"{path} already exists and is no artifact; remove it, or choose another folder")


def _write(
    folder: Path, model: LanguageModel, precision_map: PrecisionMap, scheme: Scheme,
    metrics: Mapping[str, Any], pins: frozenset[str], extra: Mapping[str, bytes],
) -> None:  # fmt: skip
    said = {"scheme": scheme.to_json(), "pins": sorted(pins), "map": precision_map.to_json()}
    metadata = {"format": FORMAT, "config": json.dumps(config_to_json(model.config)), "precision_map": json.dumps(said)}
    arrays = {name: array.detach().cpu().contiguous() for name, array in stored_arrays(model).items()}
    save_file(arrays, folder / TENSORS, metadata=metadata)
    (folder / TENSORS).chmod(0o644)  # safetensors makes it the owner's alone
    content = {
        "format": FORMAT,
        "checksum": f"sha256:{_sha256(folder / TENSORS)}",
        **said,
    }
    _write_json(folder / MAP, content)
    file_bytes = (folder / TENSORS).stat().st_size
    _write_json(folder / METRICS, {**metrics, "bytes": tensor_bytes(model), "file_bytes": file_bytes})
    for name, data in extra.items():
        (folder / name).write_bytes(data)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename; an artifact in the way is moved aside first and put back if the renaming fails."""
    if not path.exists():
        partial.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    path.rename(aside / path.name)
    try:
        partial.rename(path)
    except OSError:
        (aside / path.name).rename(path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_artifact(path: str | Path, device: str = "cpu") -> Artifact:
    """Load an artifact folder and verify its checksum and the shape and type of every array.

    Raises ArtifactError for anything missing, changed or of another format.
    """
    path = Path(path)
    if not (path / MAP).is_file():
        raise ArtifactError(f"{path}: not an artifact folder, it has no {MAP}")
    try:
        content = json.loads((path / MAP).read_text(encoding="utf-8-sig"))
        metrics = json.loads((path / METRICS).read_text(encoding="utf-8-sig"))
        if content["format"] != FORMAT:
            raise ArtifactError(f"{path}: format {content['format']!r}, this version reads {FORMAT!r}")
        if content["checksum"] != f"sha256:{_sha256(path / TENSORS)}":
            raise ArtifactError(
                f"{path / TENSORS}: its checksum is not the one in {MAP}; the file was changed or damaged"
            )
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
        model, precision_map = _restore(config, content["map"], scheme, arrays)
    except ArtifactError as error:
        raise error if str(path) in str(error) else ArtifactError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, SsmMpError) as error:
        raise ArtifactError(f"{path}: not a readable artifact ({type(error).__name__}: {error})") from None
    return Artifact(path, model, precision_map, scheme, metrics, tensor_bytes(model), (path / TENSORS).stat().st_size)


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
    config: Config, precisions: Mapping[str, str], scheme: Scheme, arrays: Mapping[str, Tensor]
) -> tuple[LanguageModel, PrecisionMap]:
    components = find_components(_Skeleton(config))
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
    return assemble(config, modules), precision_map


def _restored(
    component: Component, name: str, scheme: Scheme, arrays: Mapping[str, Tensor], config: Config
) -> nn.Module:
    """The module of one component, from its arrays in the file."""
    precision = get_precision(name)
    tensors = {}
    for parameter in component.parameters:
        suffixes = precision.arrays(parameter.shape, parameter.role)
        held = {suffix: arrays[_joined(parameter.name, suffix)] for suffix in suffixes}
        tensors[parameter.leaf] = precision.restore(held, parameter.shape, parameter.role)
    inputs: InputQuantizer | None = None
    match component.input_scheme(name, scheme.activations):
        case "static":
            inputs = StaticInput(arrays[f"{component.name}.input_scale"])
        case "dynamic":
            inputs = DynamicInput()
    return component_module(component.kind, tensors, config, inputs)


def _expected(components: tuple[Component, ...], precisions: Mapping[str, str], scheme: Scheme) -> dict[str, ArraySpec]:
    """Every array that a map implies, by its name in the file."""
    expected: dict[str, ArraySpec] = {}
    for component in components:
        precision = get_precision(precisions[component.name])
        for parameter in component.parameters:
            for suffix, spec in precision.arrays(parameter.shape, parameter.role).items():
                expected[_joined(parameter.name, suffix)] = spec
        if component.input_scheme(precisions[component.name], scheme.activations) == "static":
            expected[f"{component.name}.input_scale"] = ArraySpec((1,), torch.float16)
    return expected


def _joined(name: str, suffix: str) -> str:
    return f"{name}.{suffix}" if suffix else name


def _described(spec: ArraySpec | None) -> str:
    return "nothing" if spec is None else f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
