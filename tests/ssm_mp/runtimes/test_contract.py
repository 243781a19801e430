"""What every format of the registry keeps, on a dense hybrid that each of them holds."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from ssm_mp.components import find_components
from ssm_mp.conversion.convert import Converter
from ssm_mp.conversion.regroup import regrouped
from ssm_mp.errors import DisagreementError, ExportError
from ssm_mp.model import build
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.precisions.registry import PRECISIONS, get_precision
from ssm_mp.runtimes.capability import not_worth, sized, table
from ssm_mp.runtimes.exportable import Exportable, twin
from ssm_mp.runtimes.format import Arrays, Format
from ssm_mp.runtimes.placing import remove
from ssm_mp.runtimes.registry import FORMATS, get_format
from ssm_mp.runtimes.running import cannot_verify
from ssm_mp.runtimes.transfer import planned, transfer
from ssm_mp.runtimes.verify import unequal_weights
from ssm_mp.scheme import Scheme
from tests.ssm_mp.runtimes.checking import checked, ids_of, item_of, mixed_rules
from tests.ssm_mp.runtimes.gguf.models import checkpoint_of

MODEL = "granitemoehybrid"
every = pytest.mark.parametrize("word", FORMATS)
every_runtime = pytest.mark.parametrize(
    "word", [word if word == "gguf" else pytest.param(word, marks=pytest.mark.slow) for word in FORMATS]
)
"""A test that lets runtimes answer, which take long to start."""


def mixed(format_: Format, *precisions: str) -> Exportable:
    checkpoint = checkpoint_of(MODEL)
    return item_of(checkpoint, mixed_rules(format_, checkpoint, *(precisions or ("int8", "int5", "int4", "fp16"))))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@every
def test_names_and_packages_are_those_of_the_registry(word: str) -> None:
    format_ = get_format(word)
    assert format_.word == word
    assert format_.inputs == FORMATS[word].inputs
    assert all(version(package) for package in format_.packages)
    assert cannot_verify(format_) == ""  # the extra is installed where the tests run


@every_runtime
def test_a_mixed_map_is_written_read_back_equal_and_confirmed(word: str, tmp_path: Path) -> None:
    format_ = get_format(word)
    item = mixed(format_)
    assert {precision for _, precision in item.precision_map or ()} == {"int8", "int5", "int4", "fp16"}
    done = checked(format_, item, tmp_path)
    assert done.plan.widened == {}
    assert item.precision_map is not None
    components = sized(format_, item.components, item.config)
    assert done.plan.bytes == item.precision_map.bytes(components, "none") == format_.tensor_bytes(done.path)


@every_runtime
def test_scales_of_either_sign_and_other_groups_are_confirmed(word: str, tmp_path: Path) -> None:
    item = mixed(get_format(word), "int3", "int3g128", "int4g32")
    scales = [held.arrays()["scale"] for _, held in item.stored().values() if "scale" in held.arrays()]
    assert any(bool((scale < 0).any()) for scale in scales)
    checked(get_format(word), item, tmp_path)


@every
@pytest.mark.parametrize("bits", ["int4", "int3"])
def test_groups_of_every_size_are_read_back_equal(word: str, bits: str, tmp_path: Path) -> None:
    format_ = get_format(word)
    item = mixed(format_, f"{bits}g32", bits, f"{bits}g128")
    assert {precision for _, precision in item.precision_map or ()} >= {f"{bits}g32", bits, f"{bits}g128"}
    path = tmp_path / f"model{format_.suffix}"
    format_.write(item, path)
    assert unequal_weights(format_, item, path) == []
    assert format_.tensor_bytes(path) == planned(format_, item, widen=False).bytes


@every
def test_the_same_model_is_the_same_file(word: str, tmp_path: Path) -> None:
    format_ = get_format(word)
    item = mixed(format_)
    for name in "ab":
        (tmp_path / name).mkdir()
        format_.write(item, tmp_path / name / f"model{format_.suffix}")
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "a", tmp_path / "b")
    )
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


class Elsewhere(torch.Tensor):
    """A tensor that, as one of a GPU, has to be brought to the CPU before numpy sees it; what is computed of it too."""

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)

    def numpy(self, *, force: bool = False) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


@every
def test_a_model_on_a_gpu_is_the_same_file(word: str, tmp_path: Path) -> None:
    format_ = get_format(word)
    item, files = mixed(format_), []
    for name in "ab":
        path = tmp_path / name / f"model{format_.suffix}"
        path.parent.mkdir()
        format_.write(item, path)
        assert unequal_weights(format_, item, path) == []
        weights = path / "model.safetensors" if path.is_dir() else path
        files.append(weights.read_bytes())
        for module in item.model.modules():
            for key, tensor in module._buffers.items():
                module._buffers[key] = None if tensor is None else tensor.as_subclass(Elsewhere)
    assert any(isinstance(tensor, Elsewhere) for tensor in item.model.buffers())
    assert files[0] == files[1]


@every
def test_another_model_is_seen_in_what_is_read_back(word: str, tmp_path: Path) -> None:
    format_ = get_format(word)
    item, path = mixed(format_), tmp_path / f"model{format_.suffix}"
    format_.write(item, path)
    checkpoint = checkpoint_of(MODEL)
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    tensors["layers.0.mamba.in_proj.weight"][3, 5] += 1.0
    other = item_of(replace(checkpoint, tensors=tensors), dict(item.precision_map or ()))
    assert unequal_weights(format_, item, path) == []
    assert len(unequal_weights(format_, other, path)) == 1


@every_runtime
def test_the_runtimes_answers_are_held_against_ours(word: str, tmp_path: Path) -> None:
    """A format whose reader is deceived is still found out by its runtime."""

    class Spoilt(type(get_format(word))):  # type: ignore[misc]  # a class that is found at run time
        def write(self, item: Exportable, path: Path) -> None:
            checkpoint = checkpoint_of(MODEL)
            tensors = {**checkpoint.tensors, "norm.weight": -checkpoint.tensors["norm.weight"]}
            spoilt = item_of(replace(checkpoint, tensors=tensors), dict(item.precision_map or {"*": "fp16"}))
            super().write(twin(spoilt) if item.precision_map is None else spoilt, path)

        def read(self, path: Path) -> Arrays:
            found: Arrays = self.expected(twin(told) if path.name.startswith("twin") else told)
            return found

    format_ = Spoilt()
    told = mixed(format_)
    out = tmp_path / f"model{format_.suffix}"
    with pytest.raises(DisagreementError, match=r"not confirmed by .* names or arrangement is at fault"):
        transfer(format_, told, out, windows=ids_of(told.config.vocabulary).numpy())
    assert left(tmp_path) == []


@every
def test_every_precision_is_held_or_refused_and_the_table_says_which(word: str) -> None:
    format_, checkpoint = get_format(word), checkpoint_of(MODEL)
    converter = Converter(build(checkpoint.config, checkpoint.tensors), Scheme(activations="none"))
    rows = table(format_, converter.components, checkpoint.config)
    assert sum(row.components for row in rows) == len(converter.components)
    for name in PRECISIONS:
        precision_map = PrecisionMap.uniform(name, converter.components)
        item = Exportable("tiny", converter.convert(precision_map), precision_map, checkpoint.source)
        missing = [
            component.name
            for component in converter.components
            if format_.encoding(component, precision_map[component.name], checkpoint.config) is None
        ]
        if missing:
            with pytest.raises(ExportError, match=f"{word} cannot hold {missing[0]} at {name}"):
                planned(format_, item, widen=False)
        wide = planned(format_, item, widen=True)
        assert sorted(wide.widened) == sorted(missing)
        for asked, stored in wide.widened.values():  # nf4 as int5 would be rounded twice, about as coarsely
            assert get_precision(stored).bits >= get_precision(asked).bits + 3


@every
def test_parts_of_one_tensor_are_stored_as_the_widest_of_them_when_asked(word: str, tmp_path: Path) -> None:
    format_, checkpoint = get_format(word), regrouped(checkpoint_of("granitemoehybrid/experts"), "each", ("in_proj",))
    rules = {"*": "int8", "*.experts.1.*": "fp16", "*.in_proj.B": "int4", "*.in_proj.z": "fp16"}
    item = item_of(checkpoint, rules)
    out = tmp_path / f"model{format_.suffix}"
    parts = {part for group in format_.joined(item.config) for part in group}
    if not parts:
        assert planned(format_, item, widen=False).widened == {}
        return
    with pytest.raises(ExportError, match="one tensor .*--widen stores all as the widest"):
        transfer(format_, item, out)
    done = transfer(format_, item, out, widen=True)
    for group in format_.joined(item.config):
        assert {done.item.precision(part) for part in group} == {"fp16"}
    named = [name for name in parts if item.precision(name) != "fp16"]
    assert {done.plan.widened[name] for name in named} == {("int8", "fp16"), ("int4", "fp16")}
    assert format_.tensor_bytes(out) == done.plan.bytes


@every
def test_what_a_search_may_choose_is_ever_smaller(word: str) -> None:
    format_, checkpoint = get_format(word), checkpoint_of(MODEL)
    for component in find_components(checkpoint):
        out = not_worth(format_, component, tuple(PRECISIONS), checkpoint.config)
        held = [format_.encoding(component, name, checkpoint.config) for name in PRECISIONS if name not in out]
        sizes = [encoding.bytes for encoding in held if encoding is not None]
        assert sizes == sorted(set(sizes), reverse=True)
        assert sizes


@every
def test_a_full_disk_leaves_nothing_behind(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    format_ = get_format(word)
    item = mixed(format_)
    write = type(format_).write

    def full(self: Format, item: Exportable, path: Path) -> None:
        write(self, item, path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(format_), "write", full)
    with pytest.raises(ExportError, match="could not be written .*No space left on device.*nothing was left behind"):
        transfer(format_, item, tmp_path / "new" / f"model{format_.suffix}")
    assert left(tmp_path) == []


@every
def test_what_is_written_is_told_beside_it_and_may_be_replaced(word: str, tmp_path: Path) -> None:
    format_ = get_format(word)
    out = tmp_path / f"model{format_.suffix}"
    done = transfer(format_, mixed(format_), out, unverified="not asked")
    beside = tmp_path / f"model{format_.suffix}.metrics.json" if format_.suffix else out / "metrics.json"
    told = json.loads(beside.read_text())
    assert told["written_by"] == "ssm-mp"
    assert told["bytes"] == done.plan.bytes
    assert told["verdict"] == "not asked"
    assert str(out) in done.command
    with pytest.raises(ExportError, match="already exists; replace it with --force"):
        transfer(format_, mixed(format_), out)
    again = transfer(format_, mixed(format_, "fp16"), out, replace=True)
    assert json.loads(beside.read_text())["bytes"] == again.plan.bytes > done.plan.bytes


@every
def test_the_next_command_of_a_file_without_a_tokenizer_takes_token_ids(word: str) -> None:
    format_, item = get_format(word), mixed(get_format(word))
    out = Path(f"x/model{format_.suffix}")
    alone, with_one = format_.command(out, item), format_.command(out, replace(item, tokenizer=b"{}"))
    assert str(out) in alone
    assert "token ids" in alone or "--skip-tokenizer-init" in alone or "from_pretrained" in alone
    assert "token ids" not in with_one
    assert "--skip-tokenizer-init" not in with_one


@every
def test_what_the_tool_did_not_write_is_never_replaced_or_removed(word: str, tmp_path: Path) -> None:
    format_ = get_format(word)
    out = tmp_path / f"model{format_.suffix}"
    transfer(format_, mixed(format_), out)
    if format_.suffix:
        beside = tmp_path / f"model{format_.suffix}.metrics.json"
        beside.write_text('{"mine": 1}')
        said, kept = "model.*metrics.json was not written by this tool", beside
        others = [out.name, beside.name]
    else:
        kept = out / "mine.txt"
        kept.write_text("mine")
        said, others = "holds what this tool did not write: mine.txt; move", ["mine.txt"]
    before = kept.read_bytes()
    with pytest.raises(ExportError, match=said):
        transfer(format_, mixed(format_), out, replace=True)
    remove(out, format_.suffix)
    assert kept.read_bytes() == before
    assert set(others) <= set(left(tmp_path))


@every
def test_what_was_written_is_removed_whole(word: str, tmp_path: Path) -> None:
    format_ = get_format(word)
    out = tmp_path / f"model{format_.suffix}"
    transfer(format_, mixed(format_), out)
    remove(out, format_.suffix)
    assert left(tmp_path) == []


@every
def test_a_twin_is_all_float32(word: str, tmp_path: Path) -> None:
    format_ = get_format(word)
    whole = twin(mixed(format_))
    path = tmp_path / f"twin{format_.suffix}"
    format_.write(whole, path)
    assert unequal_weights(format_, whole, path) == []
    sizes = [np.asarray(read()).size for read in format_.read(path).values()]
    assert format_.tensor_bytes(path) >= 4 * sum(sizes)
