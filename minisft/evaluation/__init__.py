"""Scores: text metrics, multiple choice, and a sweep over an adapter's scale."""
