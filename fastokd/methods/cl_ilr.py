"""CL-ILR (Song and Chai, NeurIPS 2018): each branch learns from the mean of the others.

Scores: 0 off the diagonal, -inf on it. It differs from DML in the gradient into the shared trunk,
which the cohort divides by the number of branches (``needs.divide_trunk_gradient``).
"""

from __future__ import annotations

from dataclasses import replace

from fastokd.methods.scored import Mutual


class CLILR(Mutual):
    """CE + w T^2 KL(softmax(mean of the others' logits / T) || student), w the recipe's ramp."""

    needs = replace(Mutual.needs, sharing=("branch",), divide_trunk_gradient=True)
