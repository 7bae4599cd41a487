"""What is wrong with a pool of rows, found without a model: copies, near copies, defects and leaked test rows."""
