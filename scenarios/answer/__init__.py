"""Results as sentences, tables for a terminal, and CSV."""
