"""CONGO, a Nevergrad optimizer for many variables of which few matter at a time.

Importing this package adds ``CONGO``, ``CONGO_B``, ``CONGO_Z`` and ``CONGO_E`` to
``nevergrad.optimizers.registry``.
"""

from .congo import CONGO, CONGO_B, CONGO_E, CONGO_Z, ParametrizedCONGO, Round
from .recovery import Recovery, basis_pursuit, cosamp

__all__ = [
    "CONGO",
    "CONGO_B",
    "CONGO_E",
    "CONGO_Z",
    "ParametrizedCONGO",
    "Recovery",
    "Round",
    "basis_pursuit",
    "cosamp",
]
