"""One run, its seeds and its workers."""
