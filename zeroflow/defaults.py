"""Defaults that several rooms share."""

CACHE_BYTES = 50 * 2**30
"""The most that decoded images, and the most that features of frozen backbones, take on a machine's disk."""
