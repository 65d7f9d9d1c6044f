"""The parts of `luthier serve`: what requests say, the thread that owns the engine, and the answers."""
