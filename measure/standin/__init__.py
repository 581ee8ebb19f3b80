"""A stand-in server: an engine of `sim` in real time behind the HTTP interface of the real one."""
