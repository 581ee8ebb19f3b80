"""Stand-ins for servers: an engine of `sim` in real time, behind the HTTP of the server it belongs to.

`realtime` drives the engine, `answer` is one request while it is answered, `faults` what is made to go wrong, `surface`
what every HTTP surface has in common; `tgi` and `vllm` are the surfaces. `server` starts one and is the entry point.
"""
