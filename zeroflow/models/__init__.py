"""Backbones, adapters and heads."""
