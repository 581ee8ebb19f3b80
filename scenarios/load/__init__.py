"""What is asked? From YAML files and options to checked scenarios."""
