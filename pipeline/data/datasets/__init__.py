"""The records of a dataset in the layout that it is published in: one file for each layout."""
