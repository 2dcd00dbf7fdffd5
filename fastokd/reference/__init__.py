"""The papers' training loops, eager and unoptimised: what tests and benchmarks compare with."""

from fastokd.reference.baseline import ReferenceIndependent
from fastokd.reference.cl_ilr import ReferenceCLILR
from fastokd.reference.common import ReferenceCohort, ReferenceLosses
from fastokd.reference.divergences import ReferenceDIST, ReferenceDKD
from fastokd.reference.dml import ReferenceDML
from fastokd.reference.ffsd import (
    Lambdas,
    ReferenceFFSD,
    ffsd_losses,
    ffsd_optimizers,
    ffsd_step,
)
from fastokd.reference.kd import ReferenceKD, ReferenceOKDDipKD
from fastokd.reference.kdcl import ReferenceKDCL
from fastokd.reference.mcl import ReferenceMCL
from fastokd.reference.okddip import ReferenceOKDDip
from fastokd.reference.okddip_ablations import (
    ReferenceEntropy,
    ReferenceMean,
    ReferenceNoTwoLevel,
    ReferenceRandom,
    ReferenceSymmetric,
)
from fastokd.reference.okdph import ReferenceOKDPH
from fastokd.reference.one import ReferenceONE
from fastokd.reference.pcl import ReferencePCL

__all__ = [
    "Lambdas",
    "ReferenceCLILR",
    "ReferenceCohort",
    "ReferenceDIST",
    "ReferenceDKD",
    "ReferenceDML",
    "ReferenceEntropy",
    "ReferenceFFSD",
    "ReferenceIndependent",
    "ReferenceKD",
    "ReferenceKDCL",
    "ReferenceLosses",
    "ReferenceMCL",
    "ReferenceMean",
    "ReferenceNoTwoLevel",
    "ReferenceOKDDip",
    "ReferenceOKDDipKD",
    "ReferenceOKDPH",
    "ReferenceONE",
    "ReferencePCL",
    "ReferenceRandom",
    "ReferenceSymmetric",
    "ffsd_losses",
    "ffsd_optimizers",
    "ffsd_step",
]
