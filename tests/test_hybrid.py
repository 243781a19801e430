"""The second reference, a hybrid: a checkpoint as users have them, and as its training left it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

STUDIES = Path(__file__).parents[1] / "studies"
FOLDER = STUDIES / "hybrid"
TRAINING = json.loads((FOLDER / "training.json").read_text())


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The training script as a module."""
    spec = importlib.util.spec_from_file_location("studies_hybrid_train", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_hybrid_is_the_one_that_was_trained() -> None:
    found = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert TRAINING["checkpoint_sha256"] == found
    assert sum(t.numel() for t in load_file(FOLDER / "model.safetensors").values()) == TRAINING["parameters"]["total"]


def test_the_hybrid_is_good_enough() -> None:
    assert TRAINING["perplexity"]["search"] <= 23
    assert TRAINING["perplexity"]["certify"] <= 32


def test_the_hybrid_has_every_kind_of_block() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["model_type"] == "granitemoehybrid"
    assert config["layer_types"].count("full_attention") == 1
    assert config["layer_types"].count("linear_attention") == config["num_hidden_layers"] - 1
    assert 1e6 < TRAINING["parameters"]["total"] < 2e6
    assert min(TRAINING["parameters"].values()) > 0


def test_its_tokenizer_is_the_first_references() -> None:
    text = "def main(arguments: list[str]) -> None:\n    print('a text')\n"
    first = Tokenizer.from_file(str(STUDIES / "reference" / "tokenizer.json"))
    assert AutoTokenizer.from_pretrained(FOLDER)(text)["input_ids"] == first.encode(text).ids


@pytest.mark.slow
def test_transformers_finds_the_perplexity_that_training_wrote_down(script: ModuleType) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    written = TRAINING["first_windows"]
    tokens = script.tokens_of("certify", Tokenizer.from_file(str(FOLDER / "tokenizer.json")))
    found = script.perplexity(model, tokens[: written["count"] * script.LENGTH])
    same_library = platform.python_version() == TRAINING["python"]  # other Pythons have other texts
    assert found == pytest.approx(written["certify"], rel=1e-4 if same_library else 0.5)


def test_the_loss_that_was_trained_is_transformers_own(script: ModuleType) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER)
    ids = torch.randint(0, 8000, (2, script.LENGTH + 1))
    script.check_forward(model, ids)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    script.check_forward(model, ids)
