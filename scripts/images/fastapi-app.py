"""A small service: a greeting, its health, and a counter that outlives it when /data is a volume."""

import fcntl
import os
import socket

from fastapi import FastAPI

app = FastAPI()
DATA = os.environ.get("DATA", "/data")


@app.get("/")
def greeting():
    return {"service": "fastapi", "host": socket.gethostname()}


@app.get("/health")
def health():
    return {"status": "ok"}


@app.get("/count")
def count():
    # Several workers may count at once.
    with open(os.path.join(DATA, "count"), "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        number = int(file.read() or 0) + 1
        file.seek(0)
        file.truncate()
        file.write(str(number))
    return {"count": number}
