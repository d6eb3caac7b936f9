"""Grids of cells: what to run, what is missing, and running it with Ray. The only room that knows Ray."""
