"""What students may share."""

from __future__ import annotations

from collections.abc import Sequence

from fastokd.errors import UserError

SHARINGS = ("branch", "network")


def check_sharing(
    sharing: str,
    models: Sequence[str],
    instead: str = "use one model, or sharing='network'",
) -> None:
    """Raises unless students of these models can share so; ``instead`` is what an error offers.

    Raises:
        UserError: an unknown word, or branches of several models.
    """
    if sharing not in SHARINGS:
        raise UserError(f"sharing is {sharing!r}: choose {' or '.join(SHARINGS)}")
    if sharing == "branch" and len(set(models)) > 1:
        raise UserError(
            f"a branch cohort shares one trunk, but its students are {', '.join(models)}: {instead}"
        )
