"""One cell of the grid: its configuration, its run, its result. Needs no Ray."""
