"""Parts that stand on torch alone: validation, module selection, activations, the compiler."""
