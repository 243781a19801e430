"""Scores layer by layer with recomputation are those of one backward pass through the whole model, to rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from search.measure import backward, weighing
from search.measure.backward import Scores, chunk_windows, joined, keys_of, layer_by_layer, whole_graph
from search.problem.spec import load_spec
from search.problem.workspace import Workspace, open_workspace
from ssm_mp.config import Config
from ssm_mp.data import Windows
from tests.tiny import CONFIGS, MAMBAS, write_study

PRECISION = '[precision]\nchoices = ["fp16", "int8", "nf4", "int3"]\n'
KINDS: dict[str, Config] = {**CONFIGS, **MAMBAS}


def open_tiny(folder: Path, config: Config, *overrides: str, extra: str = PRECISION) -> Workspace:
    return open_workspace(load_spec(write_study(folder, config=config, extra=extra), overrides))


def assert_close(found: Scores, expected: Scores) -> None:
    for ours, theirs in ((found.weights, expected.weights), (found.inputs, expected.inputs)):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(np.abs(theirs).max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_layer_by_layer_is_the_whole_graph(tmp_path: Path, kind: str, activations: str) -> None:
    workspace = open_tiny(tmp_path, KINDS[kind], f"precision.activations={activations}")
    windows = workspace.splits.calibration
    expected = whole_graph(workspace, windows)
    assert_close(layer_by_layer(workspace, windows), expected)
    assert np.abs(expected.weights).max() > 0
    assert np.abs(expected.inputs).max() > 0


def test_a_blocked_embedding_whose_head_is_tied_gets_both_of_its_gradients(tmp_path: Path) -> None:
    extra = PRECISION + "embedding_blocks = [8, 24]\n"
    workspace = open_tiny(tmp_path, CONFIGS["mamba"], extra=extra)
    windows = workspace.splits.calibration
    assert_close(layer_by_layer(workspace, windows), whole_graph(workspace, windows))


def test_errors_that_are_unpacked_for_every_window_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = open_tiny(tmp_path, CONFIGS["itera"])
    kept = layer_by_layer(workspace, workspace.splits.calibration)
    monkeypatch.setattr(weighing, "_ERRORS", 0)
    assert_close(layer_by_layer(workspace, workspace.splits.calibration), kept)


def test_chunks_of_windows_together_are_all_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = open_tiny(tmp_path, CONFIGS["huggingface"])
    windows = workspace.splits.calibration
    whole = layer_by_layer(workspace, windows)
    parts = joined([layer_by_layer(workspace, Windows(part)) for part in windows.ids.split(3)])
    assert_close(parts, whole)
    assert chunk_windows(workspace) == 16
    monkeypatch.setattr(backward, "_INPUTS", 4 * 2 * 16 * 16 * 3)  # three windows of two layers
    assert chunk_windows(workspace) == 3


def test_each_layer_is_let_go_after_it_and_nothing_keeps_a_gradient(tmp_path: Path) -> None:
    workspace = open_tiny(tmp_path, CONFIGS["huggingface"])
    model, gone = workspace.model, list[int]()
    expected = layer_by_layer(workspace, workspace.splits.calibration)
    model.after_layer = lambda part: gone.append(id(part))
    found = layer_by_layer(workspace, workspace.splits.calibration)
    assert np.array_equal(found.weights, expected.weights)
    held = {id(model.component(component.name)) for component in workspace.space.components}
    assert held <= set(gone)
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())


def test_scores_have_a_column_for_each_choice_of_each_free_component(tmp_path: Path) -> None:
    workspace = open_tiny(tmp_path, CONFIGS["mamba"])
    found = layer_by_layer(workspace, workspace.splits.calibration)
    keys = keys_of(workspace)
    assert len(keys) == len(set(keys)) == sum(len(workspace.space.choices[c.name]) for c in workspace.space.free)
    assert found.weights.shape == (len(workspace.splits.calibration), len(keys))


def test_a_model_that_its_file_holds_in_bfloat16_is_differentiated_in_float32(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    study = write_study(tmp_path, config=CONFIGS["huggingface"], extra=PRECISION)
    path = tmp_path / "model.safetensors"
    halved = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(halved, path)
    small = open_workspace(load_spec(study))
    found = layer_by_layer(small, small.splits.calibration)
    save_file({name: tensor.float() for name, tensor in halved.items()}, path)
    wide = open_workspace(load_spec(study))
    assert_close(found, whole_graph(wide, wide.splits.calibration))
    assert any(p.dtype == torch.bfloat16 for p in small.model.parameters())
