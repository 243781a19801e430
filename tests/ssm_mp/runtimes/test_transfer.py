"""A model in another runtime's file: whole or not at all, nothing widened silently, nothing that its runtime denies."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssm_mp.conversion.convert import Converter
from ssm_mp.conversion.embedding_blocks import split_embedding
from ssm_mp.errors import DisagreementError, ExportError, MissingError
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.runtimes.capability import not_worth, sized, table
from ssm_mp.runtimes.exportable import Exportable, twin, with_inputs
from ssm_mp.runtimes.transfer import planned, transfer
from ssm_mp.runtimes.verify import divergences, fitting, ours, perplexity
from ssm_mp.scheme import Scheme
from tests.ssm_mp.runtimes.plain_format import Plain
from tests.tiny import HUGGING_FACE, random_model, some_windows

WINDOWS = some_windows(3)
IDS = WINDOWS.ids.numpy()
PLAIN = Plain(IDS)


def item(*rules: tuple[str, str]) -> Exportable:
    converter = Converter(random_model(HUGGING_FACE), Scheme(activations="none"))
    precision_map = PrecisionMap.from_rules({"*": "fp16", **dict(rules)}, converter.components)
    return Exportable("tiny", converter.convert(precision_map), precision_map)


EIGHT = (("*.in_proj", "int8"), ("embedding", "int8"))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_what_is_written_is_confirmed_and_told_beside_it(tmp_path: Path) -> None:
    done = transfer(
        PLAIN, item(*EIGHT), tmp_path / "x.npz", windows=IDS, further=lambda plan: {"trial": 3, "planned": plan.bytes}
    )
    assert done.verdict is not None
    assert done.verdict.agrees
    assert done.verdict.perplexity == pytest.approx(evaluate(done.item.model, WINDOWS).perplexity, rel=1e-4)
    told = json.loads((tmp_path / "x.npz.metrics.json").read_text())
    assert told["verified"] is True
    assert told["trial"] == 3
    assert told["planned"] == told["bytes"]
    assert told["bytes"] == done.plan.bytes
    assert told["file_bytes"] == (tmp_path / "x.npz").stat().st_size
    assert left(tmp_path) == ["x.npz", "x.npz.metrics.json"]


def test_a_map_that_is_not_held_is_refused_by_name_and_written_wider_only_when_asked(tmp_path: Path) -> None:
    asked = item(("*.dt_proj", "int8"), ("*.out_proj", "nf4"), *EIGHT)  # rows of 2; no book
    with pytest.raises(
        ExportError, match=r"cannot hold layers\.0\.ssm\.dt_proj at int8, layers\.0\.ssm\.out_proj at nf4"
    ):
        transfer(PLAIN, asked, tmp_path / "x.npz")
    assert left(tmp_path) == []
    done = transfer(PLAIN, asked, tmp_path / "x.npz", widen=True, windows=IDS)
    assert done.plan.widened["layers.0.ssm.dt_proj"] == ("int8", "fp16")
    assert done.plan.widened["layers.1.ssm.out_proj"] == ("nf4", "int8")
    assert "layers.0.ssm.in_proj" not in done.plan.widened
    assert done.item.precision("layers.1.ssm.out_proj") == "int8"
    assert json.loads((tmp_path / "x.npz.metrics.json").read_text())["widened"]["layers.0.ssm.dt_proj"] == [
        "int8",
        "fp16",
    ]


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("fails", "failed with exit code 4; it said:\n  no such operator"),
        ("dies", "died of SIGSEGV"),
        ("says nothing", "ended without an answer"),
        ("answers in another shape", r"answered float32 \[3, 16\] to \[3, 16\] token ids"),
        ("answers for other tokens", "knows 63 tokens, the model 64"),
    ],
)
def test_nothing_is_kept_of_a_file_that_its_runtime_cannot_read(tmp_path: Path, ending: str, said: str) -> None:
    with pytest.raises(DisagreementError, match=said):
        transfer(replace(PLAIN, ending=ending), item(*EIGHT), tmp_path / "new" / "x.npz", windows=IDS)
    assert left(tmp_path) == []


def test_of_a_runtime_that_disagrees_the_twin_tells_whether_names_are_at_fault(tmp_path: Path) -> None:
    with pytest.raises(
        DisagreementError, match=r"not confirmed by numpy .*names or arrangement is at fault; it was not"
    ):
        transfer(replace(PLAIN, off=20.0), item(*EIGHT), tmp_path / "x.npz", windows=IDS)
    assert left(tmp_path) == []


def test_a_disagreement_is_told_where_there_can_be_no_twin(tmp_path: Path) -> None:
    with pytest.raises(
        DisagreementError, match=r"not confirmed by .* a float32 twin .*: plain holds none: no room; it"
    ):
        transfer(replace(PLAIN, off=20.0, twins=False), item(*EIGHT), tmp_path / "x.npz", windows=IDS)


def test_what_went_wrong_is_told_of_the_name_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DisagreementError) as found:
        transfer(replace(PLAIN, ending="dies"), item(*EIGHT), tmp_path / "x.npz", windows=IDS)
    assert str(found.value).startswith(f"{tmp_path / 'x.npz'}: numpy")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("64 requested and 32 written"), r"\(64 requested and 32 written; the disk may be full\); nothing"),
        (OSError(errno.EACCES, "Permission denied"), r"\(\[Errno 13\] Permission denied\); nothing"),
    ],
)
def test_what_the_disk_refuses_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, said: str
) -> None:
    def refused(self: Plain, one: Exportable, path: Path) -> None:
        raise error

    monkeypatch.setattr(Plain, "write", refused)
    with pytest.raises(ExportError, match=said):
        transfer(PLAIN, item(*EIGHT), tmp_path / "x.npz")


def test_a_distribution_that_is_not_a_number_is_never_confirmed(tmp_path: Path) -> None:
    with pytest.raises(DisagreementError, match="not confirmed"):
        transfer(replace(PLAIN, off=math.nan), item(*EIGHT), tmp_path / "x.npz", windows=IDS)


def test_weights_that_are_not_read_back_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DisagreementError, match="what was read back is not the model: embedding.weight: .* values differ"
    ):
        transfer(replace(PLAIN, spoils=True), item(*EIGHT), tmp_path / "x.npz", windows=IDS)
    assert left(tmp_path) == []


def test_without_the_runtime_a_file_is_written_not_verified_with_the_install_line(tmp_path: Path) -> None:
    lacking = replace(PLAIN, modules=("no_such_runtime",))
    done = transfer(lacking, item(*EIGHT), tmp_path / "x.npz", windows=IDS)
    assert done.verdict is None
    assert done.unverified == (
        "not verified: this Python lacks no_such_runtime; pip install -c constraints.txt '.[plain]'"
    )
    assert (tmp_path / "x.npz").is_file()
    with pytest.raises(MissingError, match="plain needs no_such_writer"):
        transfer(replace(PLAIN, writer=("no_such_writer",)), item(*EIGHT), tmp_path / "y.npz")


def test_what_is_in_the_way_stays(tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    out.write_text("mine")
    for force, said in ((False, "already exists; replace it with --force"), (True, "was not written by this tool")):
        with pytest.raises(ExportError, match=said):
            transfer(PLAIN, item(*EIGHT), out, replace=force)
    assert out.read_text() == "mine"
    with pytest.raises(ExportError, match=r"ends with \.npz"):
        transfer(PLAIN, item(*EIGHT), tmp_path / "x.gguf")
    out.unlink()
    transfer(PLAIN, item(*EIGHT), out)
    first = out.stat().st_ino
    transfer(PLAIN, item(), out, replace=True)
    assert out.stat().st_ino != first


def test_a_refused_model_is_never_written(tmp_path: Path) -> None:
    model = split_embedding(random_model(HUGGING_FACE), torch.arange(64), (16, 48))
    converter = Converter(model, Scheme(activations="none"))
    precision_map = PrecisionMap.from_rules({"*": "fp16"}, converter.components)
    blocked = Exportable("blocked", converter.convert(precision_map), precision_map)
    with pytest.raises(ExportError, match="plain: an embedding in blocks is one table here"):
        transfer(PLAIN, blocked, tmp_path / "x.npz")


def test_a_search_for_a_format_leaves_out_what_is_no_smaller_there() -> None:
    by_name = {component.name: component for component in item().components}
    asked = ("fp16", "int8", "int4")
    out = not_worth(PLAIN, by_name["layers.0.ssm.conv1d"], asked, HUGGING_FACE)
    assert list(out) == ["int8", "int4"]
    assert "stores it as float32, which is no smaller than fp16" in out["int8"]
    assert list(not_worth(PLAIN, by_name["layers.0.ssm.dt_proj"], asked, HUGGING_FACE)) == ["int8", "int4"]
    assert list(not_worth(PLAIN, by_name["layers.0.ssm.in_proj"], asked, HUGGING_FACE)) == ["int4"]


@given(st.lists(st.sampled_from(["fp16", "int8"]), min_size=4, max_size=4))
def test_predicted_sizes_are_the_plans(chosen: list[str]) -> None:
    kinds = ("*.in_proj", "*.x_proj", "*.out_proj", "embedding")
    one = item(*zip(kinds, chosen, strict=True))
    assert one.precision_map is not None
    components = sized(PLAIN, one.components, one.config)
    assert one.precision_map.bytes(components, "none") == planned(PLAIN, one, widen=False).bytes


def test_the_table_says_what_is_held_of_each_kind() -> None:
    rows = {row.kind: row for row in table(PLAIN, item().components, HUGGING_FACE)}
    held = dict(rows["in_proj"].encodings)
    assert rows["in_proj"].row == 16
    assert rows["in_proj"].components == 2
    assert held["int8"] is not None
    assert held["int8"].word == "int8"
    assert held["int8"].bytes == 2 * (64 * 16 + 2 * 64)
    assert held["nf4"] is None


def test_a_twin_has_the_dequantised_weights_and_the_same_answers() -> None:
    one = item(*EIGHT)
    whole = twin(one)
    assert {stored.arrays()[""].dtype for _, stored in whole.stored().values()} == {torch.float32}
    np.testing.assert_allclose(
        ours(whole.model, IDS).log_probabilities, ours(one.model, IDS).log_probabilities, atol=1e-4
    )


def test_calibrated_inputs_do_not_travel() -> None:
    from ssm_mp.conversion.calibrate import calibrate

    model = random_model(HUGGING_FACE)
    converter = Converter(model, Scheme(), calibrate(model, WINDOWS))
    precision_map = PrecisionMap.uniform("int8", converter.components)
    static = Exportable("static", converter.convert(precision_map), precision_map)
    plain = Converter(model, Scheme(activations="none")).convert(precision_map)
    found = evaluate(with_inputs(static, "none").model, WINDOWS).perplexity
    assert found == evaluate(plain, WINDOWS).perplexity
    assert found != evaluate(static.model, WINDOWS).perplexity


def test_windows_are_cut_to_what_can_be_compared() -> None:
    ids = np.zeros((10, 100), np.int64)
    assert fitting(ids, 100).shape == (10, 100)
    assert fitting(ids, 1 << 20).shape == (1, 64)
    assert fitting(ids, 1 << 18).shape == (2, 100)


def test_perplexity_and_divergence_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 2, 5, 7))
    one, other = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    ids = rng.integers(7, size=(2, 5))
    nll = [-one[w, t, ids[w, t + 1]] for w in range(2) for t in range(4)]
    assert perplexity(one, ids) == pytest.approx(math.exp(np.mean(nll)))
    expected = sum(math.exp(p) * (p - q) for p, q in zip(one[1, 3], other[1, 3], strict=True))
    assert divergences(one, other)[1, 3] == pytest.approx(expected)
