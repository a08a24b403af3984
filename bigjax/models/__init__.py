"""Models: one architecture a file, built by `make(..., rngs)`; they know nothing of devices, configs, files or losses."""
