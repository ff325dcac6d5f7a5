"""What sparsity buys: units that never fire removed, and the cost of inference counted."""

from sparseout.inference._compact import CompactedChain, CompactionPlan, compact

__all__ = ["CompactedChain", "CompactionPlan", "compact"]
