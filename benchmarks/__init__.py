"""Measured claims: ``python -m benchmarks.NAME``. Results and their machine are in docs/benchmarks.md."""
