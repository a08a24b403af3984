"""Commands: one a file, imported only when asked for; `main(argv)` returns the exit code."""
