"""Published laws and fits of one's own: numbers only, no JAX; scipy is imported late."""
