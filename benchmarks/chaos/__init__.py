"""Workers are killed and stopped under streams, which must not notice; see `__main__`."""
