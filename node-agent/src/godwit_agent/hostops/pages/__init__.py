"""Memory of the pod's processes: what was written, read on the source, kept on the target."""
