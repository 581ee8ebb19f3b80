"""One self-contained page with curves, tables, provenance and warnings."""
