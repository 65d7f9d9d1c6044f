"""Checkpoints: Hugging Face folders and GGUF files in, Hugging Face folders out, and the train state between."""
