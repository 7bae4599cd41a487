"""Which rows of a pool to train on: scores by a model, diversity, and the rows that are picked, with every reason."""
