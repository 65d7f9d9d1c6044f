"""Sampling: engines that turn prompts into completions, and what scores completions."""
