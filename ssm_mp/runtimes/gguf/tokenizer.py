"""The tokenizer's part of a file: a byte-level BPE `tokenizer.json` as llama.cpp has it, or no vocabulary at all.

llama.cpp does not read how a text is cut into words; it has names for the ways that it knows. A tokenizer whose way has
no name is refused: any other name would give other tokens, and nothing would say so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ssm_mp.errors import ExportError
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.gguf.keys import Value

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Of `llama_token_type`."""

_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_UPPER, _LOWER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]", "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
_CASED = f"[^\\r\\n\\p{{L}}\\p{{N}}]?{_UPPER}*{_LOWER}+", f"[^\\r\\n\\p{{L}}\\p{{N}}]?{_UPPER}+{_LOWER}*"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SLASHES = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_GPT2, _DIGITS, _NUMBERS, _PUNCTUATION = "ByteLevel", "Digits", "Numbers", "Punctuation"
"""The regular expression within `ByteLevel`, that of GPT-2; each digit for itself; numbers; runs of punctuation."""

NAMES: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "starcoder",
    ((_PUNCTUATION, _GPT2, _NUMBERS, "[0-9][0-9][0-9]"), False): "falcon",
    ((f"{_WORDS}\\p{{N}}{{1,3}}{_REST}",), True): "llama-bpe",
    ((f"{_WORDS}\\p{{N}}{{1,3}}{_REST}",), False): "dbrx",
    ((f"{_WORDS}\\p{{N}}{_REST}",), False): "qwen2",
    ((
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*"
        "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
    ), False): "qwen35",
    ((f"{_CASED[0]}{_CONTRACTIONS}|{_CASED[1]}{_CONTRACTIONS}|\\p{{N}}{{1,3}}{_SLASHES}",), False): "gpt-4o",
    ((f"{_CASED[0]}|{_CASED[1]}|\\p{{N}}{_SLASHES}",), True): "tekken",
}  # fmt: skip
"""How words are cut, one step after another, and whether whole words are taken without merges → llama.cpp's name.

Of the last two, llama.cpp cuts off combining marks, which the tokenizers leave with their letters; that of Falcon cuts
numbers off the blank before them, which comes to the same where no token has both.
"""


def require_known(tokenizer: bytes, vocabulary: int) -> None:
    """Raise ExportError where llama.cpp has no way for a `tokenizer.json`, whatever stands beside it."""
    said = _parsed(tokenizer)
    pre_tokenizer(said)
    _around(said)
    _vocabulary(said, _section(said, "model"), vocabulary)


def tokenizer_keys(item: Exportable) -> Iterator[tuple[str, Value]]:
    """The keys of a file's vocabulary. Raises ExportError for a tokenizer that llama.cpp has no way for."""
    if item.tokenizer is None:
        yield "tokenizer.ggml.model", "none"
        return
    said = _parsed(item.tokenizer)
    model = _section(said, "model")
    pre = pre_tokenizer(said)
    tokens, types = _vocabulary(said, model, item.config.vocabulary)
    yield "tokenizer.ggml.model", "gpt2"
    yield "tokenizer.ggml.pre", pre
    yield "tokenizer.ggml.tokens", tokens
    yield "tokenizer.ggml.token_type", types
    yield "tokenizer.ggml.merges", [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    beside = _beside(item)
    for key, added in zip(("bos", "eos"), _around(said), strict=True):
        token = tokens.index(added) if added in tokens else _special(item, beside, f"{key}_token", tokens, types)
        if token is not None:
            yield f"tokenizer.ggml.{key}_token_id", token
        yield f"tokenizer.ggml.add_{key}_token", added is not None
    template = _template(item, beside)
    if template is not None:
        yield "tokenizer.chat_template", template


def pre_tokenizer(said: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a `tokenizer.json` cuts a text into words. Raises ExportError where it has none."""
    model = _section(said, "model")
    if model.get("type") != "BPE" or not isinstance(model.get("merges"), list):
        raise _refused("a model of type 'BPE'", model.get("type"))
    if model.get("byte_fallback") or _section(said, "decoder").get("type") != "ByteLevel":
        raise _refused("a byte-level BPE (decoder 'ByteLevel')", _section(said, "decoder").get("type"))
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"no {key}", model[key])
    normalizer = said.get("normalizer")
    # llama.cpp leaves NFC out, and so do the tokenizers that its own converter takes
    if normalizer is not None and _section(said, "normalizer").get("type") != "NFC":
        raise _refused("no normalizer, or NFC", normalizer)
    steps = tuple(_steps(said.get("pre_tokenizer")))
    name = NAMES.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        merges = " and ignore_merges" if model.get("ignore_merges") else ""
        raise _refused(
            f"a pre-tokenizer that llama.cpp has a name for ({', '.join(NAMES.values())})", f"{list(steps)}{merges}"
        )
    return name


def _steps(spec: Any) -> Iterator[str]:
    """The ways in which a pre-tokenizer cuts, one after another."""
    kind = spec.get("type") if isinstance(spec, dict) else None
    if kind == "Sequence" and isinstance(spec.get("pretokenizers"), list):
        for part in spec["pretokenizers"]:
            yield from _steps(part)
    elif kind == "ByteLevel" and not spec.get("add_prefix_space"):
        if spec.get("use_regex", True):
            yield _GPT2
    elif kind == "Digits":
        yield _DIGITS if spec.get("individual_digits") else _NUMBERS
    elif kind == "Punctuation" and spec.get("behavior") == "Contiguous":
        yield _PUNCTUATION
    elif kind == "Split" and spec.get("behavior") == "Isolated" and not spec.get("invert"):
        pattern = spec.get("pattern")
        yield str(pattern["Regex"] if isinstance(pattern, dict) and "Regex" in pattern else pattern)
    else:
        yield json.dumps(spec)


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        said = json.loads(content)
    except ValueError as error:
        raise ExportError(f"tokenizer.json is not JSON ({error})") from None
    if not isinstance(said, dict):
        raise _refused("an object", type(said).__name__)
    return said


def _section(said: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = said.get(key)
    return found if isinstance(found, dict) else {}


def _refused(expected: str, found: object) -> ExportError:
    return ExportError(f"tokenizer.json: expected {expected}, found {found!r}")


def _vocabulary(said: Mapping[str, Any], model: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types in the order of the ids, as many as the model has rows."""
    ids: dict[int, tuple[str, int]] = {i: (token, NORMAL) for token, i in _section(model, "vocab").items()}
    for added in said.get("added_tokens") or ():
        ids[added["id"]] = (added["content"], CONTROL if added.get("special") else USER_DEFINED)
    beyond = sorted(i for i in ids if i >= size)
    if beyond:
        raise _refused(f"at most the {size} tokens that the model has", f"{ids[beyond[0]][0]!r} with id {beyond[0]}")
    filled = [ids.get(i, (f"[PAD{i}]", UNUSED)) for i in range(size)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _beside(item: Exportable) -> Mapping[str, Any]:
    """What `tokenizer_config.json` says, if there is one."""
    content = item.files.get("tokenizer_config.json")
    try:
        said = json.loads(content) if content is not None else {}
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _special(item: Exportable, beside: Mapping[str, Any], name: str, tokens: list[str], types: list[int]) -> int | None:
    """The id of the first or last token of a text: as the tokenizer's config says, else the model's, else the first
    special token. Without one llama.cpp would take token 11, whatever it is."""
    said = beside.get(name)
    content = said.get("content") if isinstance(said, dict) else said
    if isinstance(content, str) and content in tokens:
        return tokens.index(content)
    inside = _section(item.source, "text_config")  # of a model of text and images
    stated = item.source.get(f"{name}_id", inside.get(f"{name}_id"))
    first = stated[0] if isinstance(stated, list) and stated else stated
    if isinstance(first, int) and 0 <= first < len(tokens):
        return first
    return types.index(CONTROL) if CONTROL in types else None


def _around(said: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The token that is added before every text, and the one after it. Raises ExportError where that is another."""
    processor = _section(said, "post_processor")
    steps = processor.get("processors") if processor.get("type") == "Sequence" else [processor]
    found: tuple[str | None, str | None] = None, None
    for step in steps or ():
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "TemplateProcessing":
            found = _of_template(step)
        elif kind not in (None, "ByteLevel"):
            raise _refused("a post_processor of type 'TemplateProcessing' or 'ByteLevel'", kind)
    return found


def _of_template(step: Mapping[str, Any]) -> tuple[str | None, str | None]:
    pieces = step.get("single") or []
    tokens = [piece["SpecialToken"]["id"] if "SpecialToken" in piece else None for piece in pieces]
    if tokens.count(None) != 1 or len(tokens) > 3 or tokens.index(None) > 1 or len(tokens) - tokens.index(None) > 2:
        raise _refused("at most one token before a text and one after it", tokens)
    at = tokens.index(None)
    return (tokens[0] if at else None), (tokens[-1] if at < len(tokens) - 1 else None)


def _template(item: Exportable, beside: Mapping[str, Any]) -> str | None:
    """The chat template, if there is one."""
    content = item.files.get("chat_template.jinja")
    if content is not None:
        return content.decode(errors="replace")
    said = beside.get("chat_template")
    return said if isinstance(said, str) else None
