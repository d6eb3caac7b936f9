"""Running the cells of a grid with Ray. The only package of zeroflow that imports Ray."""
