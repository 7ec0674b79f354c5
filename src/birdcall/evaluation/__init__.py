"""Evaluation: scores on held-out sound, comparisons, and their pages."""
