"""What happens beside a training step: averaging, checkpoints, pictures, codebook use, throughput,
progress."""

from lexel.train.callbacks.checkpoint import AtomicCheckpoint
from lexel.train.callbacks.codebook import CodebookUsage
from lexel.train.callbacks.ema import EMA
from lexel.train.callbacks.metrics_file import MetricsFile
from lexel.train.callbacks.pictures import SamplePictures
from lexel.train.callbacks.progress import Progress
from lexel.train.callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "AtomicCheckpoint",
    "CodebookUsage",
    "MetricsFile",
    "Progress",
    "SamplePictures",
    "Throughput",
]
