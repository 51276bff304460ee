"""The report: every row of params.yaml beside its published figures."""
