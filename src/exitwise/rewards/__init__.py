"""Reward models: a score for an answer, higher where it is better."""
