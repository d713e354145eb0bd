"""Checkpoints: where their bytes lie until they are packed, and where archives are kept."""
