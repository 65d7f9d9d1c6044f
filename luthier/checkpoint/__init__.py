"""Checkpoints: Hugging Face folders, adapters and GGUF files in and out, and the train state between."""
