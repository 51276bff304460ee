"""A project of the user's own, in a folder without this package's code: what `m2f init` writes."""
