"""A dataset to be looked at: its pictures as stored, as a training sees them, and where a network does worst."""
