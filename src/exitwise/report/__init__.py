"""The report of a run, and the tables of the paper. Needs neither the model nor torch."""
