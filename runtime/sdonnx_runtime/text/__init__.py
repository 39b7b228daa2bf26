"""Prompts to conditioning: syntax, tokenizer, chunks, weights, text encoders."""
