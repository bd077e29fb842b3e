"""The HTTP API: what a body may say, what an answer looks like, and the routes between the two."""
