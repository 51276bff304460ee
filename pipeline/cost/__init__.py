"""What a row costs, measured or estimated."""
