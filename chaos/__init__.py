"""``make chaos``: real migrations, and at every step something breaks."""
