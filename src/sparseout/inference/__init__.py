"""What sparsity buys: units that never fire removed, and the cost of inference counted."""

__all__: list[str] = []
