"""Answers from a tuned model."""
