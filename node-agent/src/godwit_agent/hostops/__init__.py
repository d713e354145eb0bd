"""The only package that touches kernel, runtime and CRIU; ``ports`` says what it offers."""
