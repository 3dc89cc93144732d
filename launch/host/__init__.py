"""What runs on the machines of a slice."""
