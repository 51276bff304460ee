"""The network beside Hugging Face's and beside its own plain form: time, memory, parts of a step."""
