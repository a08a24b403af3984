"""Data: a batch is a function of (seed, step); sources with random access, one a file."""
