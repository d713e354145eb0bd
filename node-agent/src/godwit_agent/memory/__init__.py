"""Pure parts of the memory path: ranges, pagemap images, rounds. No I/O."""
