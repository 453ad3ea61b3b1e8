"""Robust distillation: data, networks, attacks, methods, training and verification."""

__version__ = "0.1.0"
