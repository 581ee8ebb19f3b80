"""Which replica answers a request? Balancers without a clock and without I/O: the time is an argument.

`balancer` has the interface. `nginx`, `haproxy` and `routers` (of vLLM and SGLang) choose as the real software does,
to every tie; the tests replay recordings of it.
"""
