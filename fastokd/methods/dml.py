"""DML (Zhang et al., CVPR 2018), in OKDDip's form: each student learns from all the others.

Scores: 0 off the diagonal, -inf on it. The target is the mean of the others' logits
(``mix="logits"``), or each other student in turn (``mix="pairwise"``: the KLs divided by S - 1).
All students are updated together; the authors update one network after another.
"""

from __future__ import annotations

from dataclasses import replace

from fastokd.methods.scored import Mutual


class DML(Mutual):
    """CE + T^2 KL(softmax(mean of the others' logits / T) || student), without a ramp.

    ``mix="pairwise", detach_targets=True`` is FFSD's form; with ``temperature=1`` Zhang et al.'s.
    """

    needs = replace(Mutual.needs, sharing=("network", "branch"))
    ramped = False
