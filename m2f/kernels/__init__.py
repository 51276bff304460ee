"""Compiled loops for what PyTorch's own operations do in many passes over memory, where a compiler is found."""
