"""CRIU: its dump, its restore, its page daemon, and the gate at which it waits."""
