"""The HTTP server that serve.py runs: uvicorn, with a few limits that it lacks.

    server = Server(application, "127.0.0.1", 8000)   # listens
    server.serve_forever()                            # until SIGTERM, SIGINT or stop()

uvicorn reads HTTP with h11, so bad request lines, chunks, pipelines and lengths are its work. Added
here are: a time limit for a whole request, and not only for the silence between its bytes; replies
to clients that close their own side and still read; and an end that prints nothing.

This file needs the extra `serve`. `Connection` is for one client, `Server` for all.
"""

from __future__ import annotations

import contextlib
import logging
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from inference.job_queue import Refused

REQUEST_SECONDS = 60  # how long a request may take to arrive, and a connection may be idle
LINGER_SECONDS = 2  # how long a client is given to read why its bytes are no HTTP
SHUTDOWN_SECONDS = 3  # how long answers may go on when the server is told to end


class Connection(H11Protocol):
    """A client's connection, with one request after another.

    uvicorn calls the methods without an underscore. `self.cycle` is the last request; its scope's
    state["cut"] becomes the Refused of a request whose body ended before its time.
    """

    deadline = None  # the timer of the request that is arriving
    refused = False  # whether its bytes were no HTTP: nothing is read any more

    def connection_made(self, transport):
        super().connection_made(transport)
        self._restart()

    def connection_lost(self, exc):
        self.deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data):
        if self.refused:
            return
        super().data_received(data)

        # A request that is whole has no deadline: from now on its client waits for us.
        if self.cycle is not None and not self.cycle.more_body:
            self.deadline.cancel()

    def on_response_complete(self):
        super().on_response_complete()
        if not self.transport.is_closing():
            self._restart()
            # A pipelined request may lie here whole.
            if not self._is_idle() and not self.cycle.more_body:
                self.deadline.cancel()

    def eof_received(self) -> bool:
        """Answer a client that has closed its side: it may still read. True keeps this side open.

        uvicorn would close at once. A client that has left for good looks the same until something
        is written to it.
        """
        # Between two requests it is a client's usual way to leave.
        if self.refused or (self._is_idle() and not self._has_part_of_head()):
            return False
        if self._is_idle():
            self.send_400_response("The request ended early.")
            return True

        self.cycle.keep_alive = False
        if self.cycle.more_body:
            self._cut(Refused(400, "the body ended before its time", "cut_body"))
        # Whoever waits for the client to leave is told.
        self.cycle.message_event.set()
        return True

    def send_400_response(self, msg: str):
        """Reply to bytes that are no HTTP, and give the client time to read that.

        If the connection were closed with unread bytes, the reply would be lost.
        """
        self.refused = True
        self.deadline.cancel()
        if not self._is_idle():
            # The body of a request went wrong. Its application must not reply as well.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.close()
                return

        body = msg.encode()
        head = "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        with contextlib.suppress(OSError):
            self.transport.write_eof()
        self.deadline = self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _is_idle(self) -> bool:
        """Say whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _has_part_of_head(self) -> bool:
        """Say whether a request has begun, and its head has not ended."""
        received, _ = self.conn.trailing_data
        return received != b""

    def _restart(self):
        """Start the time of the next request."""
        if self.deadline is not None:
            self.deadline.cancel()
        self.deadline = self.loop.call_later(REQUEST_SECONDS, self._too_late)

    def _too_late(self):
        """End a request that did not arrive in time."""
        if self._is_idle():
            self.transport.close()
        elif self.cycle.more_body:
            why = f"the body did not come within {REQUEST_SECONDS} seconds"
            self._cut(Refused(408, why, "slow_body"))

    def _cut(self, why: Refused):
        """End the body of the current request here, and the connection with its reply."""
        self.cycle.scope["state"]["cut"] = why
        self.cycle.more_body = False
        self.cycle.keep_alive = False
        self.cycle.message_event.set()


class Server(uvicorn.Server):
    """A server that has its port from the beginning, and serves in any thread."""

    def __init__(self, application, host: str, port: int, lifespan: str = "off"):
        """Take an ASGI application and listen; port 0 is a free one. Raises OSError.

        lifespan: "on" for an application that has to be started and stopped.
        """
        self.socket = listen(host, port)
        self.server_port = self.socket.getsockname()[1]
        config = uvicorn.Config(
            application,
            http=Connection,
            ws="none",
            lifespan=lifespan,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=REQUEST_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        # The application prints its own errors. uvicorn's other messages are about clients.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().__init__(config)

    def serve_forever(self):
        """Serve until `stop`, or in the main thread until SIGTERM or SIGINT."""
        self.run(sockets=[self.socket])

    def stop(self):
        """Make `serve_forever` end soon. May be called from another thread."""
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises OSError, for a name that is not known too."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)

    # "localhost" is both: IPv4 is what most clients try.
    found.sort(key=lambda address: address[0] != socket.AF_INET)
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # A port whose connections have just ended can be taken again.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(512)
    except BaseException:
        listener.close()
        raise
    return listener
