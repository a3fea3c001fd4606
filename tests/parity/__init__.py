"""Every baseline against the reference implementation of the field, kvpress. See `__main__`."""
