"""Optimizers that optax has not, one a file; every other name is looked up in optax and optax.contrib."""
