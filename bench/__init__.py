"""Measurements; every run is kept as one line of JSON beside the figures made from it."""
