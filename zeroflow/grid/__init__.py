"""Grids of cells: the grid file, what of it is missing, where its cells go, and what they cost. Runs without Ray."""
