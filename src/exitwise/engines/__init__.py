"""Engines turn requests (a sample at an exit) into completions, with the models of transformers."""
