"""The two sides of a migration, on top of the ports."""
