"""Godwit's node agent: moves processes of pods to and from its node."""
