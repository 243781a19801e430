"""Somebody who has a tiny checkpoint and a text, and types what the pages say."""

from __future__ import annotations

import shlex
import shutil
import string
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from typer.testing import CliRunner

from search.cli.main import app
from ssm_mp import PrecisionMap, Scheme, convert, find_components, load_model, save_artifact
from ssm_mp.families.mamba import MambaConfig
from tests.docs.pages import ROOT
from tests.tiny import LENGTH, VOCABULARY, repetitive_tokens, write_checkpoint

MODEL = MambaConfig(vocabulary=VOCABULARY, d_model=32, d_inner=64, d_state=16, dt_rank=32, d_conv=4, n_layers=1)
"""Rows that blocks of 32 divide, and twice as wide inside, as other runtimes have it."""

CHANGED = {
    'choices = ["fp16", "int8", "nf4", "nf3"]': 'choices = ["fp16", "int8"]',
    "trials = 64": "trials = 10\nseeds = 4",
    "budget_percent = 5.0": "budget_percent = 8.0",
}
"""What the newcomer changes in the study that is drafted; the tiny model is random, so it gets a budget of its own."""


def _write_text(folder: Path, ids: np.ndarray) -> None:
    """A text of these tokens, each a character, and the tokenizer for it, which other runtimes know."""
    characters = [*string.ascii_letters, *string.digits, "Ġ", "Ċ"]  # the last ones stand for a space and a new line
    tokenizer = Tokenizer(BPE({character: i for i, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text(tokenizer.decode(ids.tolist()), encoding="utf-8")


class Newcomer:
    """A folder with the templates, a tiny model under the names that the pages use, and what the lines leave there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = folder / "path" / "to" / "model"
        reference = folder / "studies" / "reference"
        for made in (model, reference):
            made.mkdir(parents=True)
            write_checkpoint(made / "model.safetensors", MODEL)
        shutil.copy(model / "model.safetensors", model.parent)
        for template in (ROOT / "studies").glob("*.toml"):
            shutil.copy(template, folder / "studies")
        ids = repetitive_tokens(LENGTH * 1000)
        np.save(folder / "tokens.npy", ids)
        self._write_reference(reference)
        _write_text(model.parent, ids)
        shutil.copy(model.parent / "tokenizer.json", model)

    def _write_reference(self, reference: Path) -> None:
        """A study, a tokenizer and an artifact in the places of the reference's."""
        words = Tokenizer(WordLevel({"def": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}, unk_token="w1"))
        words.pre_tokenizer = Whitespace()
        words.save(str(reference / "tokenizer.json"))
        (reference.parent / "reference.toml").write_text(
            f'[checkpoint]\npath = "reference/model.safetensors"\n[data]\ntext = "../tokens.npy"\nwindow = {LENGTH}\n'
            'tokenizer = "reference/tokenizer.json"\ncalibration_windows = 4\nsearch_windows = 32\n'
            "certify_windows = 32\n",
            encoding="utf-8",
        )
        model = load_model(reference / "model.safetensors")
        chosen = PrecisionMap.uniform("int8", find_components(model))
        (self.folder / "exports").mkdir()
        smaller = convert(model, chosen, Scheme("dynamic"))
        save_artifact(self.folder / "exports" / "reference", smaller, chosen, Scheme("dynamic"), {})

    def run(self, line: str) -> None:
        """Type a line in the folder; what fails there fails here."""
        program, *arguments = shlex.split(line)
        assert program.removeprefix(".venv/bin/") == "ssm-mp", line
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, f"{line}\n{done.output}"
        if arguments[0] == "init" and "--out" in arguments:
            self._change(Path(arguments[arguments.index("--out") + 1]))

    def _change(self, study: Path) -> None:
        text = study.read_text(encoding="utf-8")
        for found, wanted in CHANGED.items():
            assert text.count(found) == 1, found
            text = text.replace(found, wanted)
        study.write_text(text, encoding="utf-8")
