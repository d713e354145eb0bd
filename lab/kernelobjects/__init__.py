"""A program that holds one of each kernel object and checks, when asked, that all are there."""
