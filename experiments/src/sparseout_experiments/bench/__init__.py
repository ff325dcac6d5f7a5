"""What the operation costs: time and memory of Sparseout, other implementations and whole models."""
