"""The step of one token of every family in ONNX Runtime: weights bit for bit, distributions as ours."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from ssm_mp import generate
from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.components import find_components
from ssm_mp.conversion.embedding_blocks import with_blocks
from ssm_mp.errors import DisagreementError, ExportError
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.precisions.stored import FloatTensor
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.onnx import format as onnx_format
from ssm_mp.runtimes.onnx.format import ONNX
from ssm_mp.runtimes.onnx.generate import generate as generate_there
from ssm_mp.runtimes.onnx.run import Loop
from ssm_mp.runtimes.running import run
from ssm_mp.runtimes.transfer import planned
from ssm_mp.runtimes.verify import ours, require_equal_weights, unequal_weights
from tests.families.models import checkpoint_of
from tests.ssm_mp.runtimes.checking import checked, ids_of, item_of, mixed_rules
from tests.tiny import MAMBA, MAMBAS, write_checkpoint

ALL = ("int8", "int4", "int6", "nf4", "int3", "int5", "fp16")
FAMILIES = (
    "falcon_mamba/plain", "bamba/plain", "nemotron_h/experts-latent-together", "falcon_h1/norm-then-gate",
    "jamba/experts", "lfm2_moe/plain", "qwen3_next/many-experts", "itera", "mamba2/biases-split",
)  # fmt: skip
"""Every block with every option that its graph depends on, between them."""


@pytest.fixture(scope="module")
def positions(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Mamba-1 with LayerNorm and learned positions, as the reference checkpoint is."""
    return load_checkpoint(write_checkpoint(tmp_path_factory.mktemp("positions") / "model.safetensors", MAMBA))


@pytest.fixture(scope="module")
def item(positions: Checkpoint) -> Exportable:
    return item_of(positions, mixed_rules(ONNX, positions, *ALL))


@pytest.fixture
def file(item: Exportable, tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    ONNX.write(item, path)
    return path


def close(path: Path, item: Exportable, ids: np.ndarray) -> None:
    """The runtime's log-probabilities are ours."""
    there = run(ONNX, path, ids, item.config.vocabulary).log_probabilities
    np.testing.assert_allclose(there, ours(item.model, ids).log_probabilities, rtol=0, atol=3e-4)


def test_positions_and_layer_norms(item: Exportable, tmp_path: Path) -> None:
    ids = ids_of(MAMBA.vocabulary, windows=3, length=16)
    done = checked(ONNX, item, tmp_path, ids)
    assert done.plan.widened == {}
    one = ids[:1].numpy()  # a single sequence
    close(done.path, item, one)


def test_attention_scan_and_experts(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("granitemoehybrid/experts")
    done = checked(ONNX, item_of(checkpoint, mixed_rules(ONNX, checkpoint, *ALL)), tmp_path)
    assert done.plan.widened == {}
    ids = ids_of(checkpoint.config.vocabulary).numpy()
    close(done.path, done.item, ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(name)
    ids = ids_of(checkpoint.config.vocabulary, length=min(24, checkpoint.config.max_tokens or 24))
    done = checked(ONNX, item_of(checkpoint, mixed_rules(ONNX, checkpoint, *ALL)), tmp_path, ids)
    assert done.plan.widened == {}
    close(done.path, done.item, ids.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("study", ["reference/model.safetensors", "hybrid"])
def test_the_real_checkpoints_at_eight_bits(study: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(Path("studies") / study)
    done = checked(ONNX, item_of(checkpoint, mixed_rules(ONNX, checkpoint, "int8", "int4", "fp16")), tmp_path)
    assert done.verdict is not None
    assert done.verdict.perplexity == pytest.approx(done.verdict.perplexity_here, rel=1e-4)


@pytest.mark.slow
def test_a_state_that_holds_nothing(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "model.safetensors", MAMBAS["untied"]))
    done = checked(ONNX, item_of(checkpoint, mixed_rules(ONNX, checkpoint, *ALL)), tmp_path, ids_of(64, length=12))
    assert "layers.0.ssm.state.0" not in [value.name for value in onnx.load(done.path).graph.input]


def test_the_metadata_tells_how_to_write_the_loop(file: Path, item: Exportable) -> None:
    model = onnx.load(file)
    said = {prop.key: prop.value for prop in model.metadata_props}
    assert said["ssm_mp.family"] == "mamba"
    assert said["ssm_mp.max_tokens"] == "16"
    assert item.precision_map is not None
    assert json.loads(said["ssm_mp.map"]) == item.precision_map.to_json()
    states = json.loads(said["ssm_mp.states"])
    assert {"name": "layers.1.ssm.state.1", "new": "layers.1.ssm.state.1.new", "shape": ["b", 32, 4]} in states
    names = [value.name for value in model.graph.input]
    assert names == ["ids", "position", *(state["name"] for state in states)]
    assert [value.name for value in model.graph.output] == ["logits", *(state["new"] for state in states)]
    onnx.checker.check_model(model)


def test_no_product_has_its_inputs_rounded_and_no_path_is_told(file: Path) -> None:
    """ONNX Runtime rounds the inputs of a product whose weight comes from `DequantizeLinear`."""
    model = onnx.load(file)
    operators = {node.op_type for node in model.graph.node}
    assert "DequantizeLinear" not in operators
    assert {"MatMulNBits", "MatMulBnb4"} <= operators
    assert all(attribute.name != "accuracy_level" for node in model.graph.node for attribute in node.attribute)
    assert str(Path(__file__).parents[4]).encode() not in file.read_bytes()


def test_a_byte_that_is_wrong_is_found(file: Path, item: Exportable) -> None:
    model = onnx.load(file)
    names = [name for name, (_, stored) in item.stored().items() if not isinstance(stored, FloatTensor)]
    assert len(names) >= 3
    for name in names:
        array = next(a for a in model.graph.initializer if a.name in (f"{name}.codes", f"{name}.int8"))
        changed = numpy_helper.to_array(array).copy()
        changed.flat[0] ^= 1
        array.CopyFrom(numpy_helper.from_array(changed, array.name))
    onnx.save(model, file)
    assert [problem.split(":")[0] for problem in unequal_weights(ONNX, item, file)] == names
    with pytest.raises(DisagreementError, match=names[0]):
        require_equal_weights(ONNX, item, file)


def test_uses_of_a_tensor_that_differ_are_found(tmp_path: Path, positions: Checkpoint) -> None:
    path = tmp_path / "model.onnx"
    ONNX.write(item_of(positions, {"*": "fp16", "embedding": "int4"}), path)
    model = onnx.load(path)
    for node in model.graph.node:  # the tied head with the codes of nothing
        if node.op_type == "MatMulNBits":
            node.input[1] = "zeros"
    held = next(a for a in model.graph.initializer if a.name == "embedding.weight.codes")
    model.graph.initializer.append(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(held)), "zeros"))
    onnx.save(model, path)
    with pytest.raises(DisagreementError, match=r"embedding\.weight differs between .*rows.* and logits"):
        ONNX.read(path)["embedding.weight"]()


def test_the_capability_table_is_full(positions: Checkpoint) -> None:
    for component in find_components(positions):
        for precision in PRECISIONS:
            encoding = ONNX.encoding(component, precision, positions.config)
            assert (encoding is None) == precision.startswith(("nf3", "nf2"))
            if encoding is None:
                continue
            assert encoding.note == ""
            if precision.partition("g")[0] not in ("int6", "int5", "int3"):
                assert encoding.bytes <= component.bytes(precision, "none")


def test_an_embedding_in_blocks_is_refused(positions: Checkpoint) -> None:
    config = with_blocks(positions.config, [8])
    refused = ONNX.refusal(config)
    assert refused is not None
    assert "2 blocks of rows" in refused
    first = next(c for c in find_components(replace(positions, config=config)) if c.name == "embedding.blocks.0")
    assert ONNX.encoding(first, "fp16", config) is None


def test_more_than_a_file_holds_is_refused(item: Exportable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_format, "LARGEST", 4000)
    with pytest.raises(ExportError, match=r"onnx: the tensors take .* GB, and one file holds"):
        planned(ONNX, item, widen=False)


def test_a_step_that_torch_cannot_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def scan(a: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        return a if bool((a > 0).any()) else -a, a

    monkeypatch.setattr(Mamba1, "differentiable", staticmethod(scan))
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "model.safetensors", replace(MAMBA, d_inner=30)))
    with pytest.raises(ExportError, match=r"torch .* cannot trace TracedBranch .* layers\.0\.ssm\.norm\.weight"):
        ONNX.write(item_of(checkpoint, {"*": "fp16"}), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_an_old_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(torch.onnx, "ops")
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "model.safetensors", replace(MAMBA, d_inner=28)))
    with pytest.raises(ExportError, match=r"torch 2\.8 or later .* found"):
        ONNX.write(item_of(checkpoint, {"*": "fp16"}), tmp_path / "model.onnx")


def test_files_that_are_not_ours(file: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model at all")
    with pytest.raises(ExportError, match=r"text\.onnx: not an ONNX file"):
        ONNX.read(tmp_path / "text.onnx")
    model = onnx.load(file)
    next(prop for prop in model.metadata_props if prop.key == "ssm_mp.version").value = "0"
    onnx.save(model, file)
    with pytest.raises(ExportError, match=r"ssm_mp\.version: expected '1', found '0'"):
        ONNX.read(file)


def test_the_command_says_what_we_would_say(file: Path, item: Exportable) -> None:
    command = ONNX.command(file, item).split("  #")[0].replace("'0 1 2' 64", "'5 9 2' 6")
    module = command.removeprefix("python ").split(" ", 2)
    done = subprocess.run(
        [sys.executable, *module[:2], str(file), "5 9 2", "6"], capture_output=True, text=True, check=True
    )
    expected = generate(item.model, torch.tensor([[5, 9, 2]]), 6)[0].tolist()
    assert [int(word) for word in done.stdout.split()] == expected


def test_text_goes_in_and_out_where_the_file_has_a_tokenizer(positions: Checkpoint, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(MAMBA.vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    item = item_of(positions, {"*": "fp16"}, tokenizer.to_str().encode())
    ONNX.write(item, tmp_path / "model.onnx")
    expected = generate(item.model, torch.tensor([[5, 9, 2]]), 4)[0].tolist()
    assert generate_there(str(tmp_path / "model.onnx"), "w5 w9 w2", 4) == " ".join(f"w{i}" for i in expected)


def test_sequences_go_side_by_side(file: Path) -> None:
    ids = np.array([[3, 1, 4, 1], [2, 7, 1, 8]])
    together, apart = Loop(str(file), 2), [Loop(str(file), 1) for _ in ids]
    for column in ids.T:
        logits = together.step(column)
        for i, loop in enumerate(apart):
            np.testing.assert_allclose(logits[i], loop.step(column[i : i + 1])[0], rtol=0, atol=1e-4)
