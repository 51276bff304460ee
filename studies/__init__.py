"""Simulations and long runs behind what the docs say; nothing imports them."""
