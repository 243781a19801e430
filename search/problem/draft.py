"""A study file drafted from what was found: every choice with its reason beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from search.base.errors import StudyError
from search.problem.found import FoundModel, FoundText

_CHOICES = ("fp16", "int8", "nf4", "nf3")
_WINDOWS = (128, 128, 512)
"""Calibration, search and certify windows where a text has enough."""
_LEAST = (4, 8, 12)
"""… and where it has hardly any. Fewer say nothing."""
_MANY_PROBES = 600
"""Measured probes from which on gradients are the better use of time."""
_MANY_EXPERTS = 200
"""Components of single experts from which on all experts of a layer are better one."""
_COLUMN = 44
"""Where comments stand."""


@dataclass(frozen=True)
class Draft:
    """What a study file says where it is not silent. Paths as the file will hold them.

    tokenizer: None where it lies beside the checkpoint; found: of the text, None for the standard library.
    """

    checkpoint: str
    weights: str | None
    texts: tuple[str, ...]
    text_field: str
    tokenizer: str | None
    model: FoundModel
    found: FoundText | None
    device: str

    @property
    def windows(self) -> tuple[int, int, int]:
        """Calibration, search and certify windows. Raises StudyError where the text has too few of them."""
        if self.found is None or self.found.windows >= sum(_WINDOWS):
            return _WINDOWS
        if self.found.windows < sum(_LEAST):
            raise StudyError(
                f"the text gives {self.found.windows} different windows of {self.found.length} tokens, and a study "
                f"takes {sum(_LEAST)} at the least, {sum(_WINDOWS)} by default; give a longer text"
            )
        shares = [self.found.windows * count // sum(_WINDOWS) for count in _WINDOWS]
        calibration, search = (max(least, share) for least, share in zip(_LEAST, shares[:2], strict=False))
        return calibration, search, self.found.windows - calibration - search

    @property
    def together(self) -> bool:
        """Whether the experts of a layer are one component."""
        return self.model.experts > _MANY_EXPERTS

    @property
    def probe(self) -> str:
        """How sensitivities are found."""
        free = self.model.free - (self.model.experts if self.together else 0)
        return "gradient" if 2 * (len(_CHOICES) - 1) * free > _MANY_PROBES else "measured"


def drafted(draft: Draft, name: str) -> str:
    """The text of the study file `name`. Raises StudyError as `Draft.windows` does."""
    sections = (_head(draft, name), _checkpoint(draft), _data(draft), _precision(draft), _search(draft), _rest())
    return "\n".join(line for section in sections for line in (*section, "")).rstrip("\n") + "\n"


def _head(draft: Draft, name: str) -> Iterator[str]:
    model = draft.model
    checkpoint, study = (text if text.isprintable() else _quoted(text) for text in (draft.checkpoint, name))
    yield f"# A study of {checkpoint}, drafted by `ssm-mp init`. What follows a # is a default, or a reason."
    yield "#"
    yield f"#     ssm-mp search {study} --dry-run    # what it will take"
    yield f"#     ssm-mp search {study}"
    yield "#"
    yield (
        f"# Found: family {model.family}, {model.parameters:,} parameters in {model.components} components, "
        f"{model.free} of them free"
    )
    yield "# to move; the others stay fp16. Paths are relative to this file."


def _checkpoint(draft: Draft) -> Iterator[str]:
    yield "[checkpoint]"
    yield f"path = {_quoted(draft.checkpoint)}"
    if draft.weights is not None:
        yield f"weights = {_quoted(draft.weights)}"


def _data(draft: Draft) -> Iterator[str]:
    found, (calibration, search, certify) = draft.found, draft.windows
    yield "[data]"
    names = [_quoted(name) for name in draft.texts]
    yield f"text = {names[0] if len(names) == 1 else '[' + ', '.join(names) + ']'}"
    if draft.text_field != "text":
        yield f"text_field = {_quoted(draft.text_field)}"
    if draft.tokenizer is not None:
        yield f"tokenizer = {_quoted(draft.tokenizer)}"
    else:
        yield _line("# tokenizer", '"…"', "the one beside the checkpoint; token ids need none")
    begins = found is not None and found.begins
    said = (
        "each window begins with the token that begins texts, as the tokenizer says" if begins else "or true, or an id"
    )
    yield _line("bos" if begins else "# bos", "true" if begins else "false", said)
    if found is not None:
        yield _line("# window", str(found.length), "tokens: the model's positions, or the default")
        more = "" if found.whole else "at least "
        has = f"the text has {more}{found.windows:,} different ones, in {more}{found.documents:,} document"
        yield _line("# cross_documents", "true", "false: no window begins in one document and ends in the next")
        yield f"# {has}{'' if found.documents == 1 else 's'}:"
    yield _line("calibration_windows", str(calibration), "ranges of inputs, and what rounding is compensated on")
    yield _line("search_windows", str(search), "probes and trials: more, narrower error bars, longer search")
    yield _line("certify_windows", str(certify), "the winner, on text that the search never saw")


def _precision(draft: Draft) -> Iterator[str]:
    yield "[precision]"
    yield _line("choices", json.dumps(_CHOICES), "fp16 and int8; 4 and 3 bits in groups of 64, weights only")
    yield _line("# activations", '"static"', 'inputs of int8 products; "dynamic", or "none" for weights only')
    if draft.together:
        yield _line("experts", '"together"', f"{draft.model.experts:,} components of single experts would be too many")
    yield "# for llama.cpp, MLX, vLLM: int4 in place of nf4 and nf3, and [export] target (`ssm-mp formats` says which)"


def _search(draft: Draft) -> Iterator[str]:
    yield "[search]"
    yield _line("trials", "64", "raise it later, and the search adds to what is there")
    yield _line("budget_percent", "5.0", "largest allowed perplexity increase over FP32")
    if draft.probe != "measured":
        yield _line("probe", _quoted(draft.probe), "sensitivities without evaluating a map for each of so many")
    else:
        yield _line("# probe", '"measured"', '"gradient" is quicker where layers are many')
    if draft.device == "cpu":
        yield _line("# device", '"cpu"', 'no GPU was found here; or "cuda"')
    else:
        yield _line("device", _quoted(draft.device), "a GPU was found here")


def _rest() -> Iterator[str]:
    yield _line("# [slurm]", "", "for `ssm-mp launch`: any option of sbatch")
    yield '# partition = "gpu"'


def _line(key: str, value: str, why: str) -> str:
    said = f"{key} = {value}" if value else key
    return said.ljust(_COLUMN) + f"# {why}"


def _quoted(text: str) -> str:
    """A TOML string. Raises StudyError for bytes that are no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise StudyError(
            f"{text!r}: a study file is UTF-8 and cannot hold this name; rename it, or link to it by another"
        ) from None
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
