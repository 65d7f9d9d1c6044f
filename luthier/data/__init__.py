"""Rows of a dataset -> batches of tokens: source, schemas, chat, packing."""
