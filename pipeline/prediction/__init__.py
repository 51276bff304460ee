"""Anybody's pictures and videos through a trained network: found, predicted, written and shown."""
