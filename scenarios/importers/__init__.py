"""What did another tool measure? Its results as runs."""
