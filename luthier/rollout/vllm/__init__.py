"""vLLM servers as the engine that completions are drawn by."""
