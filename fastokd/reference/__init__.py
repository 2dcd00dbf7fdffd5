"""The papers' loops, eager and unoptimised: the oracle and the yardstick."""

from fastokd.reference.okddip import ReferenceOKDDip, okddip_losses, okddip_step

__all__ = ["ReferenceOKDDip", "okddip_losses", "okddip_step"]
