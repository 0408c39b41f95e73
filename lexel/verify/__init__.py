"""Checking published systems against numbers that their own implementations produced (`lexel verify`)."""

from lexel.verify.compare import Comparison, Report, verify

__all__ = ["Comparison", "Report", "verify"]
