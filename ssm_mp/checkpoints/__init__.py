"""Checkpoints as people have them: files and folders → `Checkpoint(config, tensors)`, and what is refused."""

from __future__ import annotations

from ssm_mp.checkpoints.loading import Checkpoint, load_checkpoint

__all__ = ["Checkpoint", "load_checkpoint"]
