"""The study file: TOML, validated, every key with a default except the checkpoint."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, field_validator

from search.base.errors import StudyError
from search.base.metric import METRICS, Metric
from search.base.paths import PathError, absolute
from search.problem.directives import SlurmSection
from search.problem.precision_section import PrecisionSection
from search.problem.storage_section import Section, StorageSection, as_tuple
from ssm_mp.runtimes.registry import FORMATS

STDLIB = "python-stdlib"
"""Name of the text that every user has: the standard library of the running interpreter."""


class CheckpointSection(Section):
    """`[checkpoint]`: what is searched; `weights` is the path of the ones to take in a file that holds several."""

    path: str = Field(min_length=1)
    weights: str | None = Field(default=None, min_length=1)


class DataSection(Section):
    """`[data]`: the text, and how many windows each split gets. Paths are relative to the study file.

    text: a file, a folder, a pattern as in "texts/*.txt", or several of them. cross_documents: whether a window may
    begin in one document and end in the next. bos: whether each window begins with the token that begins texts, or the
    id of that token.
    """

    text: str | tuple[str, ...] = STDLIB
    text_field: str = Field(default="text", min_length=1)
    cross_documents: bool = True
    tokenizer: str | None = None
    bos: bool | Annotated[int, Field(ge=0)] = False
    window: int | None = Field(default=None, ge=2, le=65536)
    calibration: Literal["text", "synthetic"] = "text"
    calibration_windows: int | None = Field(default=None, ge=1)
    search_windows: int = Field(default=128, ge=2)
    certify_windows: int = Field(default=512, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**32)

    _tuples = field_validator("text", mode="before")(as_tuple)

    @field_validator("text")
    @classmethod
    def _named(cls, text: str | tuple[str, ...]) -> str | tuple[str, ...]:
        names = (text,) if isinstance(text, str) else text
        if not names or not all(names):
            raise ValueError("expected a file, a folder or a pattern, or a list of them, found an empty one")
        if len(names) > 1 and STDLIB in names:
            raise ValueError(f'"{STDLIB}" is a text of its own; leave it out of the list, or the others')
        return names[0] if len(names) == 1 else text

    @property
    def texts(self) -> tuple[str, ...]:
        """What the text is put together of, one name at least."""
        return (self.text,) if isinstance(self.text, str) else self.text

    @property
    def is_ids(self) -> bool:
        """Whether the text is token ids, which need no tokenizer."""
        return all(Path(name).suffix == ".npy" for name in self.texts)

    @property
    def calibration_count(self) -> int:
        """64 windows of text, or 1000 synthetic sequences, unless the study says otherwise."""
        return self.calibration_windows or (1000 if self.calibration == "synthetic" else 64)


SAMPLERS = {
    "front": "search.sampling.front_sampler",
    "tpe": "search.sampling.tpe_sampler",
    "nsga2": "search.sampling.nsga2_sampler",
    "gp": "search.sampling.gp_sampler",
    "random": "search.sampling.random_sampler",
}
"""The samplers that a study may name, and the file of each, which is imported when one is made."""
OBJECTIVES = ("compression", "perplexity", "latency")
"""What maps are compared by, in the order of a trial's values; a study may leave out the last. The second is the
metric's word."""


class SearchSection(Section):
    """`[search]`: how many maps are tried, how, and what counts as good enough.

    metric: what a map must not lose. budget_percent: how much of it on the scale of `search/base/metric.py`, with KL
    that of budget_nats, whose default is what 5 % of perplexity is about, log 1.05 rounded.
    memory_gib: what the process may take at the most, where the default is too much or too little; scratch: the folder
    for what does not fit, TMPDIR by default, and scratch_gib what it may take.
    """

    metric: Literal["perplexity", "kl"] = "perplexity"
    objectives: tuple[str, ...] = OBJECTIVES[:2]
    latency_batch: int = Field(default=1, ge=1, le=4096)
    latency_length: int | None = Field(default=None, ge=1, le=65536)
    trials: int = Field(default=64, ge=1)
    sampler: str = "front"
    probe: Literal["measured", "gradient", "none"] = "measured"
    racing: bool = True
    racing_error: float = Field(default=0.01, gt=0, lt=0.5)
    stacked: int | str = "auto"
    shared_mib: int = Field(default=512, ge=0, le=1 << 20)
    seeds: int = Field(default=12, ge=0, le=1000)
    seed: int = Field(default=0, ge=0, lt=2**32)
    budget_percent: float = Field(default=5.0, gt=0, le=1000, allow_inf_nan=False)
    budget_nats: float = Field(default=0.05, gt=0, le=2, allow_inf_nan=False)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    force_baseline: bool = False
    memory_gib: float | None = Field(default=None, gt=0, le=1 << 20, allow_inf_nan=False)
    scratch: str | None = Field(default=None, min_length=1)
    scratch_gib: float | None = Field(default=None, gt=0, le=1 << 20, allow_inf_nan=False)
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")

    @property
    def asks_latency(self) -> bool:
        """Whether latency is an objective."""
        return self.objectives[2:] == OBJECTIVES[2:]

    @property
    def judged(self) -> Metric:
        """The metric."""
        return METRICS[self.metric]

    _tuples = field_validator("objectives", mode="before")(as_tuple)

    @field_validator("objectives")
    @classmethod
    def _known(cls, objectives: tuple[str, ...]) -> tuple[str, ...]:
        known = [(OBJECTIVES[0], word, *OBJECTIVES[2:]) for word in METRICS]
        if objectives not in (*known, *(each[:2] for each in known)):
            raise ValueError(f"expected {list(OBJECTIVES[:2])} or {list(OBJECTIVES)}, found {list(objectives)}")
        return objectives

    @field_validator("sampler")
    @classmethod
    def _registered(cls, sampler: str) -> str:
        if sampler not in SAMPLERS:
            *names, last = map(repr, SAMPLERS)
            raise ValueError(f"input should be {', '.join(names)} or {last}, found {sampler!r}")
        return sampler

    @field_validator("stacked")
    @classmethod
    def _counted(cls, stacked: int | str) -> int | str:
        if stacked != "auto" and (isinstance(stacked, str) or not 1 <= stacked <= 4096):
            raise ValueError(f'expected "auto" or a number of trials from 1 to 4096, found {stacked!r}')
        return stacked

    @field_validator("budget_percent", "budget_nats", "confidence", "memory_gib", "scratch_gib", mode="before")
    @classmethod
    def _as_float(cls, value: object) -> object:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


class ExportSection(Section):
    """`[export]`: the runtime that the search is for; without one, our own artifact."""

    target: str | None = None

    @field_validator("target")
    @classmethod
    def _known(cls, target: str | None) -> str | None:
        if target is not None and target not in FORMATS:
            raise ValueError(f"unknown format {target!r}; known are {', '.join(map(repr, FORMATS))}")
        return target


class StudySpec(Section):
    """A whole study file; `overrides` are those that were put in over it, as they were given."""

    checkpoint: CheckpointSection
    data: DataSection = DataSection()
    precision: PrecisionSection = PrecisionSection()
    search: SearchSection = SearchSection()
    storage: StorageSection = StorageSection()
    slurm: SlurmSection = SlurmSection()
    export: ExportSection = ExportSection()
    path: Path = Field(exclude=True)
    overrides: tuple[str, ...] = Field(default=(), exclude=True)

    @property
    def name(self) -> str:
        """The study's name: that of its file, without `.toml`."""
        return self.path.stem

    def resolve(self, path: str, key: str) -> Path:
        """A path of the study file, relative to the file itself, as an absolute one; `key` is where it stands.

        Raises StudyError for a variable or a home that is not known.
        """
        try:
            return absolute(path, self.path.parent)
        except PathError as error:
            raise StudyError(f"{self.path}: {key} = {path!r}: {error}") from None

    @property
    def text_paths(self) -> tuple[Path, ...]:
        """The files, folders and patterns of the text. Raises StudyError as `resolve` does."""
        return tuple(self.resolve(name, "[data] text") for name in self.data.texts)

    def with_checkpoint(self, path: Path, weights: str | None = None) -> Self:
        """This study for another checkpoint, and other weights in it where they are given.

        A name of any bytes will do, which a study file could not hold.
        """
        changed = {"path": str(path.absolute()), **({} if weights is None else {"weights": weights})}
        return self.model_copy(update={"checkpoint": self.checkpoint.model_copy(update=changed)})

    @property
    def checkpoint_path(self) -> Path:
        return self.resolve(self.checkpoint.path, "[checkpoint] path")

    def weights_of(self, path: Path) -> str | None:
        """The weights that the study takes, where `path` is its checkpoint; else None."""
        return self.checkpoint.weights if path.absolute() == self.checkpoint_path.absolute() else None


def load_spec(path: str | Path, overrides: Iterable[str] = ()) -> StudySpec:
    """Read a study file; `overrides` are `section.key=value` with a TOML value.

    Raises StudyError that says the file, the key, what was expected and what was found.
    """
    path = Path(path)
    if not path.is_file():
        raise StudyError(f"no study file at {path}: expected a .toml file, e.g. studies/reference.toml")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: not in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{path}: not a TOML file ({error})") from None
    overrides = list(overrides)
    content = _without_its_budget(content, overrides)
    for override in overrides:
        content = _overridden(content, override)
    if "path" in content:
        raise StudyError(f"{path}: unknown key 'path'; did you mean [checkpoint] path?")
    if "overrides" in content:
        raise StudyError(f"{path}: unknown key 'overrides'; they are given as --set section.key=value")
    try:
        found = StudySpec.model_validate({**content, "path": path, "overrides": tuple(overrides)})
        return _with_its_rounding(_with_its_groups(_for_its_target(_with_its_budget(found))))
    except ValidationError as error:
        lines = [_explained(detail) for detail in error.errors()]
        raise StudyError(f"{path}: " + "; ".join(lines)) from None


def _for_its_target(spec: StudySpec) -> StudySpec:
    """The study with inputs as its target's runtime has them. Raises StudyError for what travels into none of its
    files."""
    target, precision = spec.export.target, spec.precision
    if target is None:
        if precision.activations == "blocks":
            raise StudyError(f'{spec.path}: activations = "blocks" are those of [export] target = "gguf"; name that')
        return spec
    inputs = FORMATS[target].inputs
    if "activations" in precision.model_fields_set and precision.activations != inputs:
        raise StudyError(
            f'{spec.path}: [precision] activations = "{precision.activations}", but inputs quantised so travel into no '
            f'file of [export] target = "{target}"; leave the key out, or say "{inputs}"'
        )
    if precision.embedding_blocks:
        raise StudyError(
            f'{spec.path}: [precision] embedding_blocks, but no file of [export] target = "{target}" holds a table in '
            "blocks; leave the key out, or the target"
        )
    return spec.model_copy(update={"precision": precision.model_copy(update={"activations": inputs})})


def _without_its_budget(content: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A file's content without its budget, where an override puts another metric in the place of the budget's own."""
    asked: dict[str, Any] = {}
    for override in overrides:
        asked = _overridden(asked, override)
    metric, search = asked.get("search", {}).get("metric"), content.get("search")
    if metric is None or not isinstance(search, dict) or metric == search.get("metric", "perplexity"):
        return content
    return {**content, "search": {key: held for key, held in search.items() if not key.startswith("budget_")}}


def _with_its_budget(spec: StudySpec) -> StudySpec:
    """The study with its budget on the one scale. Raises StudyError for a budget or an objective of another metric."""
    search, given = spec.search, spec.search.model_fields_set
    metric, where = search.judged, f"{spec.path}: [search]"
    if "objectives" in given and search.objectives[1] != metric.word:
        raise StudyError(
            f'{where} objectives name "{search.objectives[1]}", and metric = "{metric.word}": say the same in both, or '
            "leave out objectives"
        )
    own, other = ("budget_percent", "budget_nats") if metric.word == "perplexity" else ("budget_nats", "budget_percent")
    if other in given:
        needed = "kl" if other == "budget_nats" else "perplexity"
        raise StudyError(
            f'{where} {other} = {getattr(search, other):g} is a budget for metric = "{needed}", and this study has '
            f'metric = "{metric.word}": give {own}, or set metric = "{needed}"'
        )
    if metric.word == "perplexity":
        return spec
    objectives = (search.objectives[0], metric.word, *search.objectives[2:])
    changed = {"budget_percent": metric.held(search.budget_nats), "objectives": objectives}
    return spec.model_copy(update={"search": search.model_copy(update=changed)})


def _with_its_rounding(spec: StudySpec) -> StudySpec:
    """The study itself. Raises StudyError where its rounding and its calibration contradict one another."""
    if spec.precision.rounding == "compensated" and spec.data.calibration != "text":
        raise StudyError(
            f'{spec.path}: [precision] rounding = "compensated" takes the inputs that text makes, found [data] '
            f'calibration = "{spec.data.calibration}"; set it to "text", or rounding = "nearest"'
        )
    return spec


def _with_its_groups(spec: StudySpec) -> StudySpec:
    """The study itself. Raises StudyError where its keys for groups contradict one another."""
    precision, given = spec.precision, spec.precision.model_fields_set
    where = f"{spec.path}: [precision]"
    if precision.groups and precision.group != "none":
        raise StudyError(f'{where} group = "{precision.group}" and groups say two things: keep one of them')
    if precision.group == "auto" and spec.search.probe != "gradient":
        raise StudyError(
            f'{where} group = "auto" makes groups of gradient probes: set [search] probe = "gradient" '
            f'(found "{spec.search.probe}"), or group = "layer" or "kind"'
        )
    if "max_groups" in given and precision.group != "auto":
        raise StudyError(f'{where} max_groups is for group = "auto" (found "{precision.group}"); leave one of them out')
    return spec


def _overridden(content: Mapping[str, Any], override: str) -> dict[str, Any]:
    """The content with one `section.key=value` put in."""
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot or not key:
        raise StudyError(f"--set {override}: expected section.key=value, e.g. --set search.trials=20")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    held = content.get(section, {})
    return {**content, section: {**held, key: value} if isinstance(held, dict) else {key: value}}


def _explained(detail: Any) -> str:
    """One pydantic finding in the words of a study file."""
    location = [str(part) for part in detail["loc"]]
    where = f"[{location[0]}] " + ".".join(location[1:]) if len(location) > 1 else f"[{location[0]}]"
    if detail["type"] == "extra_forbidden":
        return f"unknown key {where}; {_nearest(location)}"
    if detail["type"] == "missing":
        return f'missing {where}: every study needs [checkpoint] path = "…"'
    message = detail["msg"].removeprefix("Value error, ")
    found = detail.get("input")
    shown = "" if detail["type"] == "value_error" else f", found {found!r}"
    return f"{where}: {message[0].lower()}{message[1:]}{shown}"


def _nearest(location: list[str]) -> str:
    """The known key nearest to an unknown one, in its own section or in another."""
    sections = {
        name: list(field.annotation.model_fields)
        for name, field in StudySpec.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    if len(location) == 1:
        close = difflib.get_close_matches(location[0], sections, n=1, cutoff=0.0)
        return f"the nearest section is [{close[0]}]"
    known = sections.get(location[0], [])
    elsewhere = [name for name, keys in sections.items() if location[-1] in keys]
    if elsewhere:
        return f"it belongs to [{elsewhere[0]}]"
    close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
    return f"the nearest is {close[0]!r}"
