"""What others publish, to batches."""
