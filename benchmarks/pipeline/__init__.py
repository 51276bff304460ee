"""What the pipeline costs around the network."""
