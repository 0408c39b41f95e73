"""Checking published systems against numbers that their own implementations produced, and downloaded
checkpoints against what their row needs (`lexel verify`)."""

from lexel.verify.checkpoint import CheckpointReport, verify_checkpoint
from lexel.verify.compare import Comparison, Report, verify

__all__ = ["CheckpointReport", "Comparison", "Report", "verify", "verify_checkpoint"]
