"""One file an engine: it loads a model, then answers rounds over a pipe, in a process and a Python of its own."""
