"""Writes slim checkpoints, and finds the exit at which other runtimes run a checkpoint."""
