"""What the operation costs: time and memory of Sparseout, of its peers and of whole models, as rows and tables."""
