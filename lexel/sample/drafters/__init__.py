"""Who proposes tokens for the target to verify: one file per way of drafting.

All of them propose text and codes alike, under the grammar and with guidance, and clip their drafts to what
the grammar still allows. Whatever they propose, under exact acceptance the output's distribution is the
target's.
"""

from lexel.sample.drafters.base import Drafter
from lexel.sample.drafters.chain import ModelDrafter, NestedDrafter
from lexel.sample.drafters.eagle import EagleDrafter, EagleStaticDrafter, EagleTreeDrafter
from lexel.sample.drafters.heads import HeadsDrafter
from lexel.sample.drafters.jacobi import JacobiDrafter
from lexel.sample.drafters.lookup import LookupDrafter
from lexel.sample.drafters.neighbours import TableDrafter, TableGuess
from lexel.sample.drafters.pac import PacDrafter

__all__ = [
    "Drafter",
    "EagleDrafter",
    "EagleStaticDrafter",
    "EagleTreeDrafter",
    "HeadsDrafter",
    "JacobiDrafter",
    "LookupDrafter",
    "ModelDrafter",
    "NestedDrafter",
    "PacDrafter",
    "TableDrafter",
    "TableGuess",
]
