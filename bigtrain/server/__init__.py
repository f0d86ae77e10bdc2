"""Parameter-server mode: parameters are owned by processes of their own, for workers that fail.

`protocol`, `rounds`, `shares`, `placement` and `chaos` are pure; `link` moves frames; `table` holds
parameters, `board` decides what counts, `server` is one server, `client` a worker's side.
"""
