"""Reads and writes run directories: records, figures, timing and progress."""
