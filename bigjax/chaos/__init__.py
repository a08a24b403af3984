"""Faults put into a run on purpose, and proof that it recovers: see `bigjax chaos`."""
