"""What a step will cost on machines that are not there: the compiler's own program, read."""
