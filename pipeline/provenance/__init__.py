"""Where a number came from: digests of code, the keys that name a training, and the environment recorded beside it."""
