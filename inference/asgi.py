"""One HTTP request and its reply, between an ASGI server and serve.py.

    exchange = Exchange(scope, receive, send, held)
    check_origin(exchange, names)                      # Refused for pages of other sites
    await exchange.read_body(most=20_000_000)          # Refused if it is too much or too slow
    answer = await exchange.while_there(make_answer()) # cancelled when the client leaves
    await exchange.reply(200, {"answer": answer})

ASGI is what Python's web servers speak (https://asgi.readthedocs.io). connections.py is the server
that serve.py uses; this file knows nothing of it.

In this order: which hosts and origins are answered, the memory that bodies may take, and Exchange.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import socket
from collections.abc import Awaitable, Callable, Iterable

from inference.job_queue import Refused

# A client reads no reply while it is still sending, so the rest of a refused body is read: up to
# this many bytes.
MOST_DISCARDED = 100 * 2**20

# Bodies of all requests that arrive, or wait for a seat, may take so much memory together.
MOST_HELD = 256 * 2**20

SEND_SECONDS = 60  # how long a client may take nothing of its reply

# -- which hosts and origins are answered ----------------------------------------------------------

# What a Host header may look like: a name, an IPv4 address, or an IPv6 address in brackets.
HOST = re.compile(r"(?P<name>[a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")

LOCAL = ("localhost", "127.0.0.1", "[::1]")
ALL_INTERFACES = ("0.0.0.0", "::")


class Names:
    """The names that a server answers to.

    A web page of any site can make a reader's browser send requests here: by a form, or under the
    site's own name, which its owner lets point to 127.0.0.1 (DNS rebinding). Both show in the
    request's headers Origin and Host.
    """

    def __init__(self, bound: str, others: Iterable[str] = ()):
        """Take the address that is listened at, and other names that the server is known by."""
        self.others = {in_brackets(name.lower()) for name in others}
        self.everywhere = bound in ALL_INTERFACES
        self.known = {*LOCAL, *self.others, in_brackets(bound.lower())}
        if self.everywhere:
            self.known.add(socket.gethostname().lower())

    def answers_to(self, host: str, local_address: str) -> bool:
        """Say whether a Host header is one of this server's names.

        local_address: what the client has connected to. No site can have an address as its name,
        so a server that listens everywhere answers to every address.
        """
        match = HOST.fullmatch(host.lower())
        if match is None:
            return False
        name = match["name"]
        if name in self.known or name == in_brackets(local_address):
            return True
        return self.everywhere and is_address(name)

    def is_own_origin(self, origin: str, host: str) -> bool:
        """Say whether an Origin header is that of a page that came from this server."""
        scheme, _, site = origin.lower().partition("://")
        if scheme not in ("http", "https"):
            return False
        if site == host.lower():
            return True

        # Behind a proxy the Host may be another name than the one that the browser knows.
        match = HOST.fullmatch(site)
        return match is not None and match["name"] in self.others


def in_brackets(name: str) -> str:
    """Return a name as it stands in a Host header, where IPv6 addresses have brackets."""
    if ":" in name and not name.startswith("["):
        return f"[{name}]"
    return name


def is_address(name: str) -> bool:
    """Say whether a name in a Host header is an IP address."""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def check_origin(exchange: Exchange, names: Names):
    """Raise Refused (403) for a request that was meant for another host, or sent by its page."""
    host = exchange.header("host")
    local_address = (exchange.scope.get("server") or ("",))[0]
    if not names.answers_to(host, local_address):
        what = f"the Host {host[:100]!r} is not served here"
        raise Refused(403, f"{what}; name it: --host ADDRESS NAME", "unknown_host")

    origin = exchange.header("origin")
    if origin and not names.is_own_origin(origin, host):
        raise Refused(403, f"pages of {origin[:100]!r} may not send requests", "foreign_origin")


# -- the memory of bodies --------------------------------------------------------------------------


class Held:
    """The bytes of all bodies that are being received, or whose requests wait for a seat.

    If they become too many, the body that has been arriving for longest gives way. So clients that
    send slowly cannot keep others out.
    """

    def __init__(self, most: int):
        self.most = most
        self.bytes = 0
        self.arriving: dict[Exchange, asyncio.Timeout] = {}  # the oldest first

    def add(self, length: int):
        """Count bytes that have come."""
        self.bytes += length

        # Bodies that are whole stay: their clients have done all that they can.
        if self.bytes > self.most and self.arriving:
            oldest = next(iter(self.arriving))
            give_way = self.arriving.pop(oldest)
            give_way.reschedule(asyncio.get_running_loop().time())

    def remove(self, length: int):
        """Count bytes that are not held any more."""
        self.bytes -= length


# -- an exchange -----------------------------------------------------------------------------------


class Gone(Exception):
    """The client has left, or at least sends nothing more. It may still hear a reply."""


class Exchange:
    """A request, as far as it has been read, and its reply, as far as it has been sent."""

    def __init__(self, scope: dict, receive: Callable, send: Callable, held: Held):
        """Take what an ASGI application is called with, and who counts the bytes of bodies."""
        self.scope = scope
        self.receive_message = receive
        self.send = send
        self.held = held
        self.body = bytearray()  # what `read_body` has read
        self.body_ended = False
        self.started = False  # whether the reply has begun
        self.left = False  # whether the client is known to be gone

    def header(self, name: str) -> str:
        """Return a header's value, or "" if there is none."""
        for key, value in self.scope["headers"]:
            if key == name.encode():
                return value.decode("latin-1").strip()
        return ""

    async def receive(self) -> dict:
        """Return the next message of the ASGI server: a piece of the body, or that it has ended."""
        message = await self.receive_message()
        if message["type"] == "http.disconnect":
            self.left = True
        return message

    async def _read_piece(self) -> bytes:
        """Return the next bytes of the body. Raises Gone."""
        message = await self.receive()
        if self.left:
            raise Gone
        self.body_ended = not message.get("more_body", False)
        return message.get("body", b"")

    async def read_body(self, most: int):
        """Read the whole body into `self.body`. Its memory counts as held until `release`.

        Raises Refused for one that has more than `most` bytes (413), that had to give way to others
        (429), that did not come in time (408), or that the client broke off (400); and Gone.
        """
        # What is too much by its own word is not kept. h11 has checked that it is a number.
        length = self.header("content-length")
        if length and int(length) > most:
            too_large = f"the request has {length} bytes, at most {most} are taken"
            raise Refused(413, too_large, "request_too_large")

        try:
            async with asyncio.timeout(None) as deadline:
                self.held.arriving[self] = deadline
                while not self.body_ended:
                    piece = await self._read_piece()
                    self.body += piece
                    self.held.add(len(piece))
                    if len(self.body) > most:
                        too_large = f"the request has over {most} bytes, at most {most} are taken"
                        raise Refused(413, too_large, "request_too_large")
        except TimeoutError:
            busy = "too many requests arrive at once; try again later"
            raise Refused(429, busy, "server_busy", retry_after=2) from None
        finally:
            self.held.arriving.pop(self, None)

        # connections.py says so when a body has ended before its time.
        cut = self.scope.get("state", {}).get("cut")
        if cut is not None:
            raise cut

    def release(self):
        """Drop the body, which is not needed any more."""
        self.held.remove(len(self.body))
        self.body = bytearray()

    async def while_there(self, work: Awaitable):
        """Return what `work` returns. Cancels it and raises Gone if the client leaves before.

        The body must have been read: whatever comes then is the end of the connection.
        """
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(self.receive())
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Gone
            return working.result()

        # A task that is cancelled has to come to its end, where it gives back what it holds.
        finally:
            working.cancel()
            leaving.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def reply(self, status: int, body: dict | None, headers: dict[str, str] | None = None):
        """Send a whole JSON reply, or one without a body."""
        data = b""
        if body is not None:
            data = json.dumps(body).encode()
        fields = {"content-type": "application/json", "content-length": str(len(data))}
        await self.start(status, fields | (headers or {}))
        await self.write(data, last=True)

    async def refuse(self, refused: Refused, headers: dict[str, str] | None = None):
        """Send an error reply. Raises Gone if the client has left in the middle of its body."""
        headers = dict(headers or {})
        if refused.retry_after is not None:
            headers["retry-after"] = str(refused.retry_after)

        # First read what is left, up to a limit. Behind an unread rest no other request can come.
        self.release()
        discarded = 0
        while not self.body_ended and discarded <= MOST_DISCARDED:
            discarded += len(await self._read_piece())
        if not self.body_ended:
            headers["connection"] = "close"
        await self.reply(refused.status, refused.body, headers)

    async def start(self, status: int, headers: dict[str, str]):
        """Send the status and the headers of a reply."""
        self.started = True
        pairs = [(key.encode(), value.encode()) for key, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})

    async def write(self, data: bytes, last: bool = False):
        """Send a piece of the reply's body. Raises Gone if the client takes nothing for long."""
        message = {"type": "http.response.body", "body": data, "more_body": not last}
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self.send(message)
        except TimeoutError:
            raise Gone from None
