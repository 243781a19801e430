from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.checkpoints.wrappers import find_weights
from ssm_mp.config import Config
from ssm_mp.errors import CheckpointError
from ssm_mp.files.record import Record
from tests.ssm_mp.files.written import hugging_face, prefixed, write
from tests.tiny import HUGGING_FACE, ITERA, MAMBA, in_layout, random_tensors

HF = hugging_face()
BARE = {name.removeprefix("backbone."): tensor for name, tensor in HF.items()}
MINIMAL = {name.replace("embeddings.", "embedding."): tensor for name, tensor in BARE.items()}
EMA = {name: tensor + 1 for name, tensor in HF.items()}


def nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The same tensors with a dictionary for each module."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *above, leaf = name.split(".")
        inside = tree
        for part in above:
            inside = inside.setdefault(part, {})
        inside[leaf] = tensor
    return tree


WRAPPED = {
    "bare backbone": BARE,
    "mamba-minimal": MINIMAL,
    "a dictionary a module": nested(HF),
    "Lightning": {
        "state_dict": prefixed("model.", HF), "epoch": 3, "optimizer_states": [{"state": {0: torch.zeros(3)}}],
        "hyper_parameters": {"lr": 1e-3},
    },
    "Lightning, compiled": {"state_dict": prefixed("model._orig_mod.", HF)},
    "DeepSpeed": {"module": HF, "optimizer": None, "ds_config": {"zero": 1}},
    "nested": {"model": {"state_dict": HF}, "step": torch.tensor(3)},
    "PEFT, merged": prefixed("base_model.model.", HF),
    "EMA alone": {"ema": HF},
    "FSDP in every layer": {n.replace(".mixer.", "._fsdp_wrapped_module.mixer."): t for n, t in HF.items()},
    "compiled layers": {n.replace(".mixer.", "._orig_mod.mixer."): t for n, t in HF.items()},
    "optimizer beside": {**HF, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3, 3)}}}},
    "MLX": {n: t.transpose(1, 2).contiguous() if "conv1d.weight" in n else t for n, t in HF.items()},
    "[I, K]": {n: t.squeeze(1) if "conv1d.weight" in n else t for n, t in HF.items()},
    "buffers": {**HF, "backbone.position_ids": torch.arange(4), "n_averaged": torch.tensor(3)},
    "head of a tied pair alone": {n.replace("backbone.embeddings", "lm_head"): t for n, t in HF.items()},
}  # fmt: skip


@pytest.mark.parametrize("content", WRAPPED.values(), ids=WRAPPED)
def test_what_tools_wrap_weights_in_is_taken_off(tmp_path: Path, content: dict[str, Any]) -> None:
    found = load_checkpoint(write(tmp_path / "m.ckpt", content))
    tensors = random_tensors(HUGGING_FACE)
    assert found.config == HUGGING_FACE
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)


prefixes = st.lists(
    st.sampled_from(["model", "module", "_orig_mod", "net", "base_model", "backbone_", "ema", "my_lm", "0", "é"]),
    max_size=6,
)  # fmt: skip
LAYOUTS: list[tuple[Config, tuple[str, ...]]] = [
    (HUGGING_FACE, ("huggingface",)), (HUGGING_FACE, ("original",)), (MAMBA, ("positions",)), (ITERA, ("moe.moe",)),
]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(LAYOUTS), prefixes, st.lists(st.sampled_from(["model", "state_dict", "ema", "x.y"]), max_size=4))
def test_names_with_any_wrapper_in_any_nesting_are_the_same_tensors(
    layout: tuple[Config, tuple[str, ...]], before: list[str], around: list[str]
) -> None:
    config, layouts = layout
    tensors = random_tensors(config)
    content: object = prefixed("".join(f"{part}." for part in before), in_layout(tensors, *layouts))
    for key in around:
        content = {key: content, "step": 3, "note": torch.tensor(1.0)}
    with tempfile.TemporaryDirectory() as folder:
        found = load_checkpoint(write(Path(folder) / "m.pt", content))
    assert found.config == config
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)


def test_objects_of_unknown_classes_are_as_good_as_dictionaries() -> None:
    module = Record("models.LM", {"_modules": {"model": Record("models.M", {"_parameters": {}, "_modules": HF})}})
    assert find_weights({"state": module}).tensors.keys() == HF.keys()


def seen(folder: Path, content: object, weights: str | None = None, suffix: str = ".pt") -> tuple[str, str]:
    """Which weights are taken, and the first note."""
    found = load_checkpoint(write(folder / f"m{suffix}", content), weights)
    ema = torch.equal(found.tensors["embedding.weight"], EMA["backbone.embeddings.weight"])
    return ("ema" if ema else "model"), (found.notes or ("",))[0]


@pytest.mark.parametrize("other", ["ema", "ema_model", "model_ema", "state_dict_ema", "teacher", "swa", "averaged"])
@pytest.mark.parametrize("first", ["model", "state_dict", "net", "whatever"])
def test_averaged_weights_beside_the_model_are_named_and_taken_on_request(
    tmp_path: Path, other: str, first: str
) -> None:
    content = {other: EMA, first: HF}
    assert seen(tmp_path, content) == ("model", f"the weights read are those at {first}; also in the file: {other}; "
                                       f"--weights {other} takes it")  # fmt: skip
    assert seen(tmp_path, content, other)[0] == "ema"
    assert seen(tmp_path, content, first)[0] == "model"


def test_weights_are_asked_for_by_their_path(tmp_path: Path) -> None:
    flat = prefixed("model.", HF) | prefixed("ema_model.module.", EMA)
    for suffix in (".safetensors", ".pt"):
        assert seen(tmp_path, flat, None, suffix)[0] == "model"
        for path in ("ema_model", "ema_model.module", "ema_model.module.", "ema_model.module._orig_mod"):
            assert seen(tmp_path, flat, path, suffix)[0] == "ema"
    assert seen(tmp_path, {"callbacks": {"EMA": {"weights": EMA}}, "state_dict": HF}, "EMA")[0] == "ema"
    with pytest.raises(CheckpointError, match=r"no model at --weights emma; there are: ema_model\.module, model$"):
        seen(tmp_path, flat, "emma")
    with pytest.raises(CheckpointError, match="there are: the top of the file"):
        seen(tmp_path, HF, "ema")


def test_several_models_without_a_rule_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no rule which is meant: left, right; say which with --weights left"):
        seen(tmp_path, {"left": HF, "right": EMA})
    assert seen(tmp_path, {"left": HF, "right": EMA}, "right")[0] == "ema"


def test_optimizer_states_are_no_models(tmp_path: Path) -> None:
    content = {"optimizer": {"exp_avg": EMA, "exp_avg_sq": EMA}, "weights": HF}
    assert seen(tmp_path, content) == ("model", "tensors that are not read, beside the model: optimizer")


@pytest.mark.parametrize("suffix", ["", "backbone."])
def test_a_head_outside_of_what_wraps_the_layers_is_the_models_own(tmp_path: Path, suffix: str) -> None:
    head = torch.randn(64, 16)
    for content in ({**prefixed("model.", BARE), "lm_head.weight": head}, {"model": BARE, "lm_head": {"weight": head}}):
        found = load_checkpoint(write(tmp_path / "m.pt", content))
        assert not found.config.tied
        assert torch.equal(found.tensors["lm_head.weight"], head)


def test_a_prefix_comes_off_only_where_all_names_have_it(tmp_path: Path) -> None:
    content = {**prefixed("model.", HF), "loss.weight": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"1 tensor does not fit[^:]*:\n  unknown: loss\.weight \[3\]"):
        load_checkpoint(write(tmp_path / "m.pt", content))


def test_an_unknown_layout_is_told_by_its_keys_and_names(tmp_path: Path) -> None:
    content = {"encoder": {"block.0.attn.weight": torch.zeros(3)}, "step": 3}
    with pytest.raises(CheckpointError, match=r"attention; top-level keys: encoder, step; 1 tensor: encoder\.block\.0"):
        load_checkpoint(write(tmp_path / "m.pt", content))
    with pytest.raises(CheckpointError, match="no tensors in it.*top-level keys: a, step"):
        load_checkpoint(write(tmp_path / "m.pt", {"a": {"b": [1]}, "step": 3}))


def test_containers_that_hold_each_other_are_read_in_bounded_work() -> None:
    around: dict[str, Any] = {"model": HF}
    around["itself"] = [around]
    shared: dict[str, Any] = {"t": torch.zeros(3)}
    deep: dict[str, Any] = {"t": torch.zeros(3)}
    for _ in range(50):
        shared = {"a": shared, "b": shared}  # 2^50 paths
    for _ in range(100_000):
        deep = {"a": deep}
    found = find_weights({"around": around, "shared": shared, "deep": deep})
    assert found.tensors.keys() == HF.keys()
