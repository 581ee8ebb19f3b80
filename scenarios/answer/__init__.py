"""Answers in words, tables and CSV."""
