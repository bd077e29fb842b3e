"""The service: Ray Serve deployments, the OpenAI-compatible HTTP API, metrics and the command line."""

from importlib.metadata import version

__version__ = version("attendant")
