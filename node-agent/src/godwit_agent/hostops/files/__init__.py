"""Files of the pod: writable layers and volumes, copied in passes."""
