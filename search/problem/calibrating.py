"""What is measured, chosen or rounded on a study's calibration windows starts from this."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from search.problem.run_directory import GROUPING
from search.problem.spec import StudySpec
from ssm_mp.checkpoints import Checkpoint
from ssm_mp.conversion.prepare import Prepared, prepared_model
from ssm_mp.conversion.regroup import grouping_of
from ssm_mp.data import Windows
from ssm_mp.model import LanguageModel
from ssm_mp.modules.embedding import BlockedEmbedding

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Calibrating:
    """A study's FP32 model and its calibration windows.

    compute: what results depend on of the machine. folder: where what comes of it is kept, for other processes; None:
    nowhere. prepared: what was folded into the model.
    """

    spec: StudySpec
    checkpoint: Checkpoint
    model: LanguageModel
    windows: Windows
    compute: str
    say: Say
    folder: Path | None
    prepared: Prepared | None = None

    @property
    def depends(self) -> dict[str, Any]:
        """What all that comes of it depends on, for marks of files."""
        return {
            "checkpoint": self.checkpoint.digest,
            "windows": self.windows.digest,
            "blocks": blocks_digest(self.model) if self.spec.precision.embedding_blocks else None,
            GROUPING: grouping_of(self.checkpoint.config),
            "compute": self.compute,
            **({} if self.prepared is None else {"prepared": self.prepared.digest}),
        }

    def folded(self, prepared: Prepared) -> Calibrating:
        """The same with scales folded into the model."""
        return replace(self, model=prepared_model(self.model, prepared), prepared=prepared)


def blocks_digest(model: LanguageModel) -> str:
    """Which token is in which block of the embedding."""
    embedding = model.embedding
    assert isinstance(embedding, BlockedEmbedding)
    return hashlib.sha256(embedding.block_of.cpu().numpy().tobytes()).hexdigest()
