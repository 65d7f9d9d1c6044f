"""Models as pure functions over trees of parameters."""
