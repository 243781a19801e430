"""Compression told against the checkpoint's own bytes, where they are not those of FP32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from search.cli.answers import fronted
from search.measure.objective import measure_baseline
from search.problem.run_directory import RunDirectory
from search.problem.source import Source, source_of
from search.problem.spec import load_spec
from search.problem.workspace import open_workspace
from search.results.export import export
from search.results.report import render
from search.run.finish import answer
from search.run.one_process import run_search
from search.run.stored import stored_baseline
from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.components import find_components, fp32_bytes
from ssm_mp.precision_map import PrecisionMap
from tests.tiny import MAMBA, random_tensors, write_study

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64, "float32": torch.float32}


def held_in(path: Path, kind: torch.dtype, *, norms: torch.dtype | None = None) -> Path:
    tensors = random_tensors(MAMBA)
    save_file({name: tensor.to(norms or kind if "norm" in name else kind) for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("kind", TYPES)
def test_a_checkpoints_own_bytes_are_those_of_its_types(tmp_path: Path, kind: str) -> None:
    checkpoint = load_checkpoint(held_in(tmp_path / "model.safetensors", TYPES[kind]))
    full = fp32_bytes(find_components(checkpoint))
    assert checkpoint.file_bytes == full * TYPES[kind].itemsize // 4
    assert checkpoint.file_types == {kind: full // 4}
    assert source_of(checkpoint) == (None if kind == "float32" else Source(checkpoint.file_bytes, (kind,)))


def test_mixed_types_are_all_named(tmp_path: Path) -> None:
    path = held_in(tmp_path / "model.safetensors", torch.bfloat16, norms=torch.float32)
    source = source_of(load_checkpoint(path))
    assert source is not None
    assert source.told(source.bytes) == "1.00× of the file's own bfloat16 and float32"


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_an_export_says_both_ratios_where_they_differ(tmp_path: Path, kind: str) -> None:
    study = write_study(tmp_path)
    held_in(tmp_path / "model.safetensors", TYPES[kind])
    workspace = open_workspace(load_spec(study))
    chosen = PrecisionMap.uniform("fp16", workspace.space.components)
    exported = export(workspace, measure_baseline(workspace), chosen, tmp_path / "out")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["compression"] == exported.compression == 2
    if kind == "float32":
        assert not {"source_bytes", "source_types", "source_compression"} & metrics.keys()
        assert exported.source_compression is None
    else:
        assert (metrics["source_bytes"], metrics["source_types"]) == (metrics["fp32_bytes"] // 2, [kind])
        assert metrics["source_compression"] == exported.source_compression == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_a_search_reports_both_ratios_where_they_differ(tmp_path: Path, kind: str) -> None:
    study = write_study(tmp_path, windows=(4, 32, 32), extra="[search]\nbudget_percent = 30\ntrials = 6\nseeds = 2\n")
    held_in(tmp_path / "model.safetensors", TYPES[kind])
    run = RunDirectory(tmp_path / "run")
    result = run_search(load_spec(study), run, lambda line: None)
    assert result.winner is not None
    size, full = result.winner.bytes, result.baseline_bytes
    report, said = render(result), fronted(answer(result))
    baseline = stored_baseline(run)
    assert baseline == answer(result)["baseline"]
    if kind == "float32":
        assert f"**Winner: trial {result.winner.trial}, {full / size:.2f}× smaller ({size:,} bytes)" in report
        assert "of the file" not in report + said
        assert baseline.keys() == {"perplexity", "bytes"}
        return
    assert f"{full / size:.2f}× of FP32, {full / 2 / size:.2f}× of the file's own float16 ({size:,} bytes)" in report
    assert f"{full:,} bytes in FP32 and {full // 2:,} in the file's own float16" in report
    assert f"| {full / size:.3f}× | {full / 2 / size:.3f}× | {size:,} |" in report
    assert f"{full:,} bytes ({full // 2:,} in the file's own float16)" in said
    row = next(line for line in said.splitlines() if line.startswith(f"* {result.winner.trial}"))
    assert f" {full / size:.3f}× {full / 2 / size:.3f}× {size:,} " in " ".join(row.split())
    assert baseline["source_bytes"] == full // 2
