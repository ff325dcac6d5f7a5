"""What sparsity buys: units that never fire removed, zeros skipped, small values cut, and the cost counted."""

from sparseout.inference._compact import compact
from sparseout.inference._compact_plan import CompactedChain, CompactionPlan
from sparseout.inference._cost import CostReport, cost
from sparseout.inference._revert import revert_
from sparseout.inference._sparse_linear import sparse_linear_
from sparseout.inference._speed_report import LayerSpeed, SparseLinearReport
from sparseout.inference._threshold import ThresholdReport, threshold_

__all__ = [
    "CompactedChain",
    "CompactionPlan",
    "CostReport",
    "LayerSpeed",
    "SparseLinearReport",
    "ThresholdReport",
    "compact",
    "cost",
    "revert_",
    "sparse_linear_",
    "threshold_",
]
