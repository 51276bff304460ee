"""The mirror of runs in MLflow."""
