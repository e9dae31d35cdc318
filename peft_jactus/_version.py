"""The version, read by the build and written into saved configs."""

__version__ = "0.1.0"
