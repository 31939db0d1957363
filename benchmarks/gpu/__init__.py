"""What someone with a GPU for ten minutes can measure: `make bench-gpu`."""
