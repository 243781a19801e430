"""The vocabulary in a GGUF file: the tokens that llama.cpp makes of texts, and the tokenizers that are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ssm_mp.errors import ExportError
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.gguf.format import GGUF
from ssm_mp.runtimes.gguf.tokenizer import CONTROL, NAMES, UNUSED, USER_DEFINED, pre_tokenizer, tokenizer_keys
from tests.ssm_mp.runtimes.checking import item_of
from tests.ssm_mp.runtimes.gguf.models import checkpoint_of

SIZE = 700
TEXTS = (
    "Hello, world! It's 2024 and I'VE got 12345 reasons, don't I?",
    "def f(x):\n\treturn x ** 2  # twice\n\n\n    pass\n",
    "naïve café — “quoted” … 日本語のテキスト 안녕하세요 Привет",
    "emoji 🙂🚀 and zero‍width, tabs\t\tand   blanks   \n  \n end ",
    "a/b\\c <|endoftext|> x<tool>y <|endoftext|>",
    "combining marks: e\u0301te\u0301, \u0915\u094d\u0937\u093f, and zzqq, a word without merges",
    "CamelCaseWORDS and ÀÉÎ, 3.14159e-10, $100.00; e.g. U.S.A.'s",
)


def trained(steps: tuple[str, ...], ignore_merges: bool = False, *, starts: bool = False) -> Tokenizer:
    """A byte-level BPE that cuts words by the steps of `NAMES`.

    It is learned from whole texts, so that it has tokens across words: one that cuts otherwise gives other tokens.
    """
    found: list[pre_tokenizers.PreTokenizer] = []
    own: dict[str, pre_tokenizers.PreTokenizer] = {
        "ByteLevel": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "Digits": pre_tokenizers.Digits(True),
        "Numbers": pre_tokenizers.Digits(False),
        "Punctuation": pre_tokenizers.Punctuation("contiguous"),
    }
    for step in steps:
        found.append(own[step] if step in own else pre_tokenizers.Split(Regex(step), "isolated"))
    if "ByteLevel" not in steps:
        found.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    way = pre_tokenizers.Sequence(found) if len(found) > 1 else found[0]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = way if "Numbers" in steps else whole  # Falcon's has no tokens across
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 20, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.pre_tokenizer = way
    said = json.loads(tokenizer.to_str())
    # only a tokenizer that ignores merges gives a word that has none
    said["model"]["vocab"].setdefault("Ġzzqq", len(said["model"]["vocab"]))
    tokenizer = Tokenizer.from_str(json.dumps(said))
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    if starts:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return tokenizer


def with_tokenizer(content: bytes, **files: bytes) -> Exportable:
    item = item_of(checkpoint_of("mamba2/plain", vocab_size=SIZE), {"*": "fp16"}, content)
    return Exportable(item.name, item.model, item.precision_map, {}, content, files)


def cut(item: Exportable, folder: Path) -> list[list[int]]:
    """The texts as llama.cpp cuts them."""
    file, texts = folder / "model.gguf", folder / "texts.json"
    GGUF.write(item, file)
    texts.write_text(json.dumps(TEXTS))
    script = Path(__file__).with_name("tokenise.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(file), str(texts)], capture_output=True, text=True, check=True
    )
    found: list[list[int]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("way", NAMES, ids=NAMES.values())
def test_llama_cpp_makes_the_same_tokens_of_a_text(tmp_path: Path, way: tuple[tuple[str, ...], bool]) -> None:
    tokenizer = trained(*way)

    found = cut(with_tokenizer(tokenizer.to_str().encode()), tmp_path)

    marks = NAMES[way] not in ("gpt-4o", "tekken")  # which llama.cpp cuts otherwise there
    for text, ids in zip(TEXTS, found, strict=True):
        assert ids == tokenizer.encode(text).ids or (not marks and "combining" in text)


def test_a_token_that_is_added_before_every_text_is_so_by_llama_cpp(tmp_path: Path) -> None:
    way = next(way for way, name in NAMES.items() if name == "llama-bpe")
    tokenizer = trained(*way, starts=True)

    found = cut(with_tokenizer(tokenizer.to_str().encode()), tmp_path)

    assert found == [tokenizer.encode(text).ids for text in TEXTS]
    assert all(ids[0] == 0 for ids in found)


def _said() -> dict[str, Any]:
    said: dict[str, Any] = json.loads(trained(("ByteLevel",)).to_str())
    return said


def _keys(said: Mapping[str, Any], **files: bytes) -> dict[str, Any]:
    return dict(tokenizer_keys(with_tokenizer(json.dumps(said).encode(), **files)))


def test_rows_without_a_token_have_one_that_is_never_used() -> None:
    said = _said()
    used = len(said["model"]["vocab"]) + 1

    keys = _keys(said)

    assert len(keys["tokenizer.ggml.tokens"]) == SIZE
    assert keys["tokenizer.ggml.token_type"][0] == CONTROL
    assert keys["tokenizer.ggml.token_type"][used - 1] == USER_DEFINED
    assert set(keys["tokenizer.ggml.token_type"][used:]) == ({UNUSED} if used < SIZE else set())


def test_the_first_and_last_token_of_a_text_are_those_that_the_tokenizers_config_names() -> None:
    said = _said()
    beside = json.dumps({"eos_token": {"content": "!"}, "bos_token": "<tool>", "chat_template": "{{ x }}"}).encode()

    keys = _keys(said, **{"tokenizer_config.json": beside})

    assert keys["tokenizer.ggml.tokens"][keys["tokenizer.ggml.eos_token_id"]] == "!"
    assert keys["tokenizer.ggml.tokens"][keys["tokenizer.ggml.bos_token_id"]] == "<tool>"
    assert keys["tokenizer.chat_template"] == "{{ x }}"


def test_without_such_a_config_it_is_the_models_and_else_the_first_special_token() -> None:
    item = with_tokenizer(json.dumps(_said()).encode())

    by_model = dict(tokenizer_keys(Exportable("x", item.model, None, {"eos_token_id": [7, 8]}, item.tokenizer)))
    alone = dict(tokenizer_keys(item))

    assert by_model["tokenizer.ggml.eos_token_id"] == 7
    assert alone["tokenizer.ggml.eos_token_id"] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated"}},
            r"\[a-z\]\+",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"decoder": {"type": "Metaspace"}}, "Metaspace"),
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused_with_what_it_does(
    change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ExportError, match=said):
        pre_tokenizer({**_said(), **change})

    refusal = GGUF.refusal_of(with_tokenizer(json.dumps({**_said(), **change}).encode()))
    assert refusal is not None
    assert "--no-tokenizer leaves it out" in refusal


def test_the_tokens_around_a_text_are_those_that_the_tokenizer_itself_adds() -> None:
    said = _said()
    said["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel"},
            {"type": "TemplateProcessing", "single": [_added("<tool>"), _TEXT, _added("<|endoftext|>")]},
        ],
    }

    keys = _keys(said, **{"tokenizer_config.json": b'{"bos_token": "!", "eos_token": "!"}'})

    assert keys["tokenizer.ggml.add_bos_token"] is keys["tokenizer.ggml.add_eos_token"] is True
    assert keys["tokenizer.ggml.tokens"][keys["tokenizer.ggml.bos_token_id"]] == "<tool>"
    assert keys["tokenizer.ggml.tokens"][keys["tokenizer.ggml.eos_token_id"]] == "<|endoftext|>"


_TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def _added(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


@pytest.mark.parametrize(
    ("processor", "said"),
    [
        ({"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]}, "found 'RobertaProcessing'"),
        ({"type": "TemplateProcessing", "single": [_added("<s>"), _added("<t>"), _TEXT]}, "at most one token before"),
        ({"type": "TemplateProcessing", "single": [_TEXT, _added("</s>"), _added("</t>")]}, "one after it"),
    ],
)
def test_tokens_that_llama_cpp_would_not_add_are_refused(processor: dict[str, Any], said: str) -> None:
    refusal = GGUF.refusal_of(with_tokenizer(json.dumps({**_said(), "post_processor": processor}).encode()))
    assert refusal is not None
    assert said in refusal


def test_the_last_token_of_a_model_of_text_and_images_is_that_of_its_text() -> None:
    item = with_tokenizer(json.dumps(_said()).encode())
    source = {"text_config": {"eos_token_id": 5}}
    keys = dict(tokenizer_keys(Exportable("x", item.model, None, source, item.tokenizer)))
    assert keys["tokenizer.ggml.eos_token_id"] == 5


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_by_the_token() -> None:
    said = _said()
    said["model"]["vocab"]["beyond"] = SIZE + 4

    with pytest.raises(ExportError, match=f"'beyond' with id {SIZE + 4}"):
        _keys(said)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_a_tokenizer_that_is_no_json_object_is_refused(content: bytes) -> None:
    assert "tokenizer.json" in str(GGUF.refusal_of(with_tokenizer(content)))
