"""The code that runs on the machines of a slice."""
