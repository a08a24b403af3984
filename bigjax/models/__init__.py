"""Models: one architecture a file, built by `make(..., rngs)`; they know no devices, configs, files or losses."""
