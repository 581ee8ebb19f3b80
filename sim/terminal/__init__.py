"""Text on a terminal: nothing from outside can command it, and tables fit its width."""
