"""How far a map's predictions are from FP32's, beside perplexity: divergence, changed top tokens, the worst windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Fidelity:
    """Means over windows, with their standard errors over windows; tokens of a window are not independent.

    kl_nats: KL(FP32 ‖ map) a token. changed: the share of tokens whose most probable next token is another.
    worst_increase_percent: the rise of perplexity on the tenth of windows where it is the largest, `worst_windows` of
    them, and worst_kl_nats the divergence there. documents: that the windows come from, and how far 95 % of both means
    reach for other documents like these; None where nobody knows them, or there are too few.
    """

    windows: int
    tokens: int
    kl_nats: float
    kl_stderr_nats: float
    changed: float
    changed_stderr: float
    worst_windows: int
    worst_increase_percent: float
    worst_kl_nats: float
    documents: int | None = None
    kl_reach_documents_nats: float | None = None
    changed_reach_documents: float | None = None

    @property
    def changed_interval(self) -> tuple[float, float]:
        """95 % of the share, within 0 and 1; for other documents where these are known."""
        of_documents = self.changed_reach_documents
        reach = 1.96 * self.changed_stderr if of_documents is None else of_documents
        return max(0.0, self.changed - reach), min(1.0, self.changed + reach)

    def to_json(self) -> dict[str, Any]:
        """Without infinities, which JSON does not know, and without what is not known of documents."""
        values = {**asdict(self), "changed_interval": list(self.changed_interval)}
        return {name: None if value == math.inf else value for name, value in values.items() if value is not None}

    def lines(self) -> list[str]:
        """For people, a line a figure."""
        low, high = self.changed_interval
        of_documents = self.kl_reach_documents_nats
        reach = 1.96 * self.kl_stderr_nats if of_documents is None else of_documents
        of = "" if self.documents is None else f" of {self.documents} documents"
        return [
            f"KL to FP32: {self.kl_nats:.5f} ± {reach:.5f} nats a token, {self.windows} windows{of}",
            f"another most probable next token: {self.changed:.2%} of {self.tokens:,} ({low:.2%} to {high:.2%})",
            f"the worst tenth, {self.worst_windows} windows: perplexity {self.worst_increase_percent:+.2f} %, KL "
            f"{self.worst_kl_nats:.5f} nats a token",
        ]


def fidelity_from_json(values: Mapping[str, Any]) -> Fidelity:
    """Inverse of `Fidelity.to_json`."""
    held: dict[str, Any] = {name: math.inf if value is None else value for name, value in values.items()}
    return Fidelity(**{name: held[name] for name in Fidelity.__dataclass_fields__ if name in held})
