"""The archive of a checkpoint: encrypted container, and what lies in it. Pure but for its file."""
