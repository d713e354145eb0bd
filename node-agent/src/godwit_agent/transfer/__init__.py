"""The bulk stream between two agents."""
