"""Evaluators: a measurement of a state; `run(state)` yields (name, value), every example counted once."""
