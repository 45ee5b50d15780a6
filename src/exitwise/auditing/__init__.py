"""Audits a model at its exits: generates answers, judges them, and writes the report."""
