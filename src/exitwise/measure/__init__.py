"""Computes figures of a run from its verdicts and scores: metrics per exit, statistics, calibration, Pareto front."""
