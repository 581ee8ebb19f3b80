"""Text on a terminal: control characters from outside are escaped, and tables fit its width."""
