"""`[precision]` of a study file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from search.problem.storage_section import Section, as_tuple
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.scheme import ActivationScheme, ScaleMethod, ScaleRule, Scheme


class PrecisionSection(Section):
    """`[precision]`: what a component may become, what quantised means, and which components move together.

    rounding: how weights below 8 bits are; where it is left out, compensated if calibration is from text.
    group: a rule, or `groups` patterns of components; `auto` makes at most `max_groups` of gradient probes.
    prepare: whether scales are moved between neighbouring tensors before anything is rounded.
    """

    choices: tuple[str, ...] = ("fp16", "int8")
    activations: ActivationScheme = "static"
    weight_scale: ScaleMethod = "mse"
    input_scale: ScaleMethod = "percentile"
    rounding: Literal["nearest", "compensated"] | None = None
    percentile: float = Field(default=99.99, gt=50, le=100)
    pin: tuple[str, ...] = ()
    unpin: tuple[str, ...] = ()
    embedding_blocks: tuple[int, ...] = ()
    experts: Literal["each", "together"] | None = None
    split: tuple[Literal["in_proj"], ...] = ()
    group: Literal["none", "layer", "kind", "auto"] = "none"
    groups: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = ()
    max_groups: int = Field(default=32, ge=2, le=4096)
    prepare: Literal["none", "scales"] = "none"

    _tuples = field_validator("choices", "pin", "unpin", "embedding_blocks", "split", "groups", mode="before")(as_tuple)

    @field_validator("choices")
    @classmethod
    def _known(cls, choices: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in choices if name not in PRECISIONS]
        if unknown:
            raise ValueError(f"unknown precision {unknown[0]!r}; known are {', '.join(map(repr, PRECISIONS))}")
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise ValueError(f"expected at least two different precisions, found {list(choices)}")
        widest_first = tuple(name for name in PRECISIONS if name in choices)
        if widest_first[0] != "fp16":
            raise ValueError("'fp16' must be among the choices: it is where the pinned components and the probes stand")
        return widest_first

    @field_validator("groups")
    @classmethod
    def _different(cls, groups: tuple[str, ...]) -> tuple[str, ...]:
        twice = [pattern for pattern in groups if groups.count(pattern) > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} stands there twice: keep one of them")
        return groups

    @property
    def scheme(self) -> Scheme:
        """The scheme that these keys describe."""
        return Scheme(
            activations=self.activations,
            weight_scales=ScaleRule(self.weight_scale, self.percentile),
            input_scales=ScaleRule(self.input_scale, self.percentile),
        )
