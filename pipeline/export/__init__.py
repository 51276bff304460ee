"""A trained network becomes a file that other programs run."""
