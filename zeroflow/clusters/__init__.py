"""Clusters before they are started: what is wrong with their files, what they cost, and the data on their machines."""
