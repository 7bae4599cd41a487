"""A run: load, loop, validate, checkpoint, export; and what it will need before it starts."""
