"""Judging a fine-tune: two models row by row, by people, and by what users did."""
