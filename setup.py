"""For tools that still want a setup.py; everything is in pyproject.toml."""

from setuptools import setup

setup()
