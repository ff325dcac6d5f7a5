"""What sparsity buys: units that never fire removed, and the cost of inference counted."""

from sparseout.inference._compact import compact
from sparseout.inference._compact_plan import CompactedChain, CompactionPlan

__all__ = ["CompactedChain", "CompactionPlan", "compact"]
