"""The keys of a cell by subject: each is checked, and brought into the one form in which equal cells are equal."""
