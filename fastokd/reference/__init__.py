"""The papers' loops, eager and unoptimised: the oracle and the yardstick."""

from fastokd.reference.ffsd import (
    Lambdas,
    ReferenceFFSD,
    ffsd_losses,
    ffsd_optimizers,
    ffsd_step,
)
from fastokd.reference.okddip import ReferenceOKDDip, okddip_losses, okddip_step

__all__ = [
    "Lambdas",
    "ReferenceFFSD",
    "ReferenceOKDDip",
    "ffsd_losses",
    "ffsd_optimizers",
    "ffsd_step",
    "okddip_losses",
    "okddip_step",
]
