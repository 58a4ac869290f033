"""The surfaces of the two upstream implementations."""
