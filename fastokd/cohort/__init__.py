"""S students as one module, and the engines that run them."""

from fastokd.cohort.choice import Choice
from fastokd.cohort.cohort import ENGINES, Cohort
from fastokd.cohort.output import CohortOutput, CohortShape

__all__ = ["ENGINES", "Choice", "Cohort", "CohortOutput", "CohortShape"]
