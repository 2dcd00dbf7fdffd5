"""S students as one module, and the engines that run them."""

from fastokd.cohort.choice import Choice
from fastokd.cohort.cohort import ENGINES, Cohort
from fastokd.cohort.output import CohortOutput, CohortShape
from fastokd.cohort.streams import Streams, side_by_side

__all__ = [
    "ENGINES",
    "Choice",
    "Cohort",
    "CohortOutput",
    "CohortShape",
    "Streams",
    "side_by_side",
]
