"""Reading with a size limit and with errors that name line and key; atomic writing."""
