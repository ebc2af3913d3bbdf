"""Clients of a server, in a process of their own, so that they do not take turns with the server's threads.

Run as a file: it imports nothing that takes long. A line of JSON comes in, `{"port": P, "bodies": [...]}`; all ask at
once and read their streams; a line goes out when each has its first token, or one that says what went wrong. They go
away when the input ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading


async def main() -> None:
    """Ask, and read until nobody wants to know any more."""
    job = json.loads(sys.stdin.readline())
    streams = await asyncio.gather(*(ask(job["port"], body) for body in job["bodies"]))
    say("reading")
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    await asyncio.gather(*(drain(reader) for reader, _ in streams))


async def ask(port: int, body: dict) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send one request; its stream from behind the first token on, and the writer, without which it would be closed."""
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    status = await reader.readline()
    if b" 200 " not in status:
        say(f"the server answered {status!r}: {(await reader.read(2000))!r}")
        os._exit(1)
    await reader.readuntil(b"data: ")
    return reader, writer


def say(line: str) -> None:
    """To who started this."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def drain(reader: asyncio.StreamReader) -> None:
    """Read a stream to its end."""
    while await reader.read(1 << 16):
        pass


if __name__ == "__main__":
    asyncio.run(main())
