"""Time and memory of Sparseout, other implementations and whole models."""
