"""Models of every family on a GPU: the losses and logits that they have on a CPU, and a search to its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from search.problem.run_directory import WINNER, RunDirectory
from search.problem.spec import load_spec
from search.run.one_process import run_search
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import Converter
from ssm_mp.decoding.decode import generate, open_decoder, prefill
from ssm_mp.evaluation.evaluate import Evaluation, evaluate
from ssm_mp.model import LanguageModel
from ssm_mp.precision_map import PrecisionMap, pinned_names
from ssm_mp.scheme import ActivationScheme, Scheme
from tests.families.models import PLAIN, fp32_of, windows_of, write_family_study

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
every_family = pytest.mark.parametrize("name", PLAIN)


def _converted(model: LanguageModel, precision: str, activations: ActivationScheme, name: str) -> LanguageModel:
    """Everything that may be at a precision is, experts apart that no calibration token has reached."""
    converter = Converter(model, Scheme(activations), calibrate(model, windows_of(name, 32, seed=1)))
    pinned = pinned_names(converter.components)
    kept = {c.name for c in converter.components if c.name in pinned or converter.infeasible(c, precision)}
    held = {c.name: "fp16" if c.name in kept else precision for c in converter.components}
    return converter.convert(PrecisionMap(tuple(held.items())))


@every_family
def test_an_fp32_model_has_the_losses_that_it_has_on_a_cpu(name: str) -> None:
    windows = windows_of(name)
    expected, found = evaluate(fp32_of(name), windows), evaluate(fp32_of(name).cuda(), windows)
    np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-4)


@every_family
@pytest.mark.parametrize(
    ("precision", "activations"),
    [("fp16", "static"), ("int8", "static"), ("int8", "dynamic"), ("nf4", "static"), ("int3", "static")],
)
def test_a_converted_model_has_about_the_perplexity_that_it_has_on_a_cpu(
    name: str, precision: str, activations: ActivationScheme
) -> None:
    windows, found = windows_of(name), dict[str, Evaluation]()
    for device in ("cpu", "cuda"):
        found[device] = evaluate(_converted(fp32_of(name).to(device), precision, activations, name), windows)
    # float16 products are rounded to float16 there, and inputs between two steps of int8 may take the other one
    assert found["cuda"].perplexity == pytest.approx(found["cpu"].perplexity, rel=0.02)


@every_family
def test_a_decoder_goes_on_as_a_prompt_that_is_read_whole(name: str) -> None:
    model, ids = fp32_of(name).cuda(), windows_of(name, 2).ids
    decoder = open_decoder(model, prefill(model, ids[:, :-3]))
    for token in ids[:, -3:].cuda().unbind(dim=1):
        logits = decoder.step(token)
    expected = prefill(model, ids).logits
    assert (logits - expected).norm() < 1e-4 * expected.norm()
    assert generate(model, ids[:, :-3], 3).shape == ids.shape


_STUDIES: Mapping[str, tuple[str, str]] = {
    "mamba": ("mamba", ""),
    "mamba, measured": ("mamba", ""),
    "experts": ("granitemoehybrid/experts", ""),
    "prepared": ("mamba", '[precision]\nchoices = ["fp16", "int8", "nf4"]\nprepare = "scales"'),
    "itera in three precisions": ("itera", '[precision]\nchoices = ["fp16", "int8", "nf4"]\nactivations = "dynamic"'),
}
"""By name: a family, and what its study says besides."""


@pytest.mark.parametrize("study", _STUDIES)
def test_a_search_on_a_gpu_ends_with_a_winner(study: str, tmp_path: Path) -> None:
    source, extra = _STUDIES[study]
    overrides = ['search.device="cuda"', *(['search.probe="measured"'] if "measured" in study else [])]
    spec = load_spec(write_family_study(tmp_path, source, extra, length=16), overrides)
    run, said = RunDirectory(tmp_path / "run"), list[str]()
    result = run_search(spec, run, said.append)
    assert result.certificate is not None
    assert (run / WINNER).exists(), said
