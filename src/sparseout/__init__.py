"""The sparsity dial for PyTorch."""
