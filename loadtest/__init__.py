"""Load tests for text generation over HTTP. They know the service by its API alone."""
