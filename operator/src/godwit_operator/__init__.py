"""The operator: plans migrations and drives them, one step at a time."""
