"""Pure functions on tensors: grids, bit layouts, ranges and exact integer products."""
