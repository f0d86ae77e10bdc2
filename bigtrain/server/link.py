"""Links between two processes, and the loop that moves frames over all links of a process.

A link is one TCP connection, so that the end of a peer, or of the network to it, is seen on that
link and nowhere else, and any link can be given up at any moment. (A process group of torch for
each link can do the first, but is built by a handshake that blocks when the peer dies in it, cannot
give up a message, and does not notice a peer that is stopped.) All of it happens on one thread, so
there is nothing to lock: other threads hand over functions to be called there.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import math
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from bigtrain.server.chaos import Event, suffer
from bigtrain.server.protocol import (
    HEADER_BYTES,
    Header,
    Kind,
    Malformed,
    Who,
    check_proof,
    nonce,
    proof,
    read_text,
    text_frame,
)

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.1
_PING_SECONDS = 0.5
_GREET_SECONDS = 10.0  # for a peer to show that it has the token
_MOST_STRANGERS = 64  # links of who has not shown that yet
_MOST_AT_ONCE = 8 << 20  # bytes that are read from a link before others have their turn
_MOST_PIECES = 64


class Handler(Protocol):
    """What is done with what comes; called on the loop's thread."""

    def greet(self, who: Who) -> dict[str, Any]:
        """Return what `who` is told when it is welcomed. Raises Malformed: it is not welcome."""

    def opened(self, link: Link, greeting: dict[str, Any]) -> None:
        """The peer has shown that it may be here; `greeting` is what it says, if it is a server."""

    def room(self, link: Link, header: Header) -> memoryview:
        """Return where the bytes of this tensor go. Raises Malformed: it is not wanted."""

    def frame(self, link: Link, header: Header, content: dict[str, Any]) -> None:
        """A frame is here; of a tensor, its bytes are in their room."""

    def closed(self, link: Link, why: str) -> None:
        """This link is no more."""

    def tick(self, now: float) -> None:
        """Called several times a second."""


@dataclass
class _Piece:
    """Bytes to be sent, not before `at`; `sent` is called once they are."""

    data: memoryview
    at: float
    sent: Callable[[], None] | None


class Link:
    """One connection. `who` is the peer, once it has shown who it is."""

    def __init__(
        self, loop: Loop, sock: socket.socket, calls: Who | None, target: int = -1
    ) -> None:
        self.loop, self.sock = loop, sock
        self.calls = calls  # who we say that we are, if it was we who called
        self.target = target  # the server that was called
        self.who: Who | None = None
        self.open, self.refused = True, False
        self.silent = False  # was nothing heard of the peer?
        self.ends = False  # has the peer refused us because it ends itself?
        self.connecting = calls is not None
        self.since = self.heard = self.said = time.monotonic()
        self.nonce = nonce()
        self._theirs: str | None = None  # the nonce of the other side
        self._out: deque[_Piece] = deque()
        self._head = bytearray(HEADER_BYTES)
        self._header: Header | None = None
        self._text = bytearray()
        self._body = memoryview(self._head)
        self._got = 0

    def __str__(self) -> str:
        if self.who is not None:
            return str(self.who)
        return f"server {self.target}" if self.calls is not None else "a stranger"

    # -- what others do with it (on the loop's thread) -----------------------------------------

    def say(self, kind: Kind, content: dict[str, Any] | None = None, **where: int) -> None:
        """Send JSON; `where` is key, step, part."""
        self._queue(memoryview(text_frame(kind, content, **where)))

    def send(
        self, kind: Kind, data: memoryview, sent: Callable[[], None] | None = None, **where: int
    ) -> None:
        """Send a tensor's bytes, which must stay as they are until `sent` is called, or the link is
        closed (then it is called, too)."""
        header = Header(kind, data.nbytes, **where)
        self._queue(memoryview(header.pack()))
        self._queue(data.cast("B"), sent)

    def close(self, why: str) -> None:
        """Give it up, and tell the handler."""
        if not self.open:
            return
        self.open = False
        self.loop.forget(self)
        with contextlib.suppress(OSError):
            self.sock.close()
        self._drop_what_waits()
        self.loop.handler.closed(self, why)

    def refuse(self, why: str, *, ends: bool = False) -> None:
        """Say why, as far as the peer still listens, and close. ends: we refuse everybody."""
        if self.open:
            self._drop_what_waits()
            self.say(Kind.REFUSE, {"why": why, "ends": ends})
            with contextlib.suppress(OSError):  # it does not listen any more
                self._write()
            self.close(why)

    def _drop_what_waits(self) -> None:
        for piece in self._out:
            if piece.sent is not None:
                piece.sent()
        self._out.clear()

    # -- what the loop does with it ------------------------------------------------------------

    def begin(self) -> None:
        """Say the first word, if it is ours."""
        if self.calls is None:
            self.say(Kind.CHALLENGE, {"nonce": self.nonce})

    def on_event(self, events: int) -> None:
        """Read and write what is possible."""
        try:
            if self.connecting:
                failed = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if failed:
                    raise OSError(failed, os.strerror(failed))
                self.connecting = False
            if events & selectors.EVENT_READ:
                self._read()
            if self.open and events & selectors.EVENT_WRITE:
                self._write()
        except Malformed as error:
            self._shut_out(error)
        except OSError as error:
            self.close(error.strerror or str(error))

    def _shut_out(self, error: Malformed) -> None:
        log.warning("the link with %s is closed: %s", self, error)
        self.refuse(str(error))

    def attempt(self, do: Callable[[], None]) -> None:
        """Do what the peer has asked for earlier; if that makes no sense, this link is closed."""
        try:
            self._make_sense(do, "what it has said")
        except Malformed as error:
            self._shut_out(error)

    def _make_sense(self, do: Callable[[], None], what: str) -> None:
        """Raise Malformed if `do` fails, since the peer says things that are odd."""
        try:
            do()
        except (Malformed, OSError):
            raise
        except Exception as error:  # it lacks something, or wants more memory than there is
            log.debug("a frame from %s", self, exc_info=True)
            raise Malformed(f"{what} makes no sense: {error!r}") from error

    @property
    def wants_to_write(self) -> bool:
        return self.connecting or bool(self._out and self._out[0].at <= time.monotonic())

    @property
    def waits_to_write(self) -> bool:
        return bool(self._out)

    def _queue(self, data: memoryview, sent: Callable[[], None] | None = None) -> None:
        if not self.open:
            if sent is not None:
                sent()
            return
        now = time.monotonic()
        late = self.loop.delay if now < self.loop.delay_until else 0.0
        self._out.append(_Piece(data, now + late, sent))
        self.loop.watch(self)

    def _write(self) -> None:
        now = time.monotonic()
        while self._out and self._out[0].at <= now:
            # One that waits longer, as in a drill, holds back those after it: frames are in order.
            due = itertools.takewhile(lambda piece: piece.at <= now, self._out)
            pieces = [piece.data for piece in itertools.islice(due, _MOST_PIECES)]
            try:
                count = self.sock.sendmsg(pieces)
            except (BlockingIOError, InterruptedError):
                break
            self.said = now
            while self._out and count >= self._out[0].data.nbytes:
                piece = self._out.popleft()
                count -= piece.data.nbytes
                if piece.sent is not None:
                    piece.sent()
            if count:
                self._out[0].data = self._out[0].data[count:]
        self.loop.watch(self)

    def _read(self) -> None:
        budget = _MOST_AT_ONCE
        while self.open and budget > 0:
            try:
                count = self.sock.recv_into(self._body[self._got :])
            except (BlockingIOError, InterruptedError):
                return
            if count == 0:
                self.close("it is gone")
                return
            budget -= count
            self.heard = time.monotonic()
            self._got += count
            while self.open and self._got == len(self._body):
                self._advance()

    def _advance(self) -> None:
        """What was being read is complete: a header, or a body."""
        header = self._header
        if header is None:
            header = Header.unpack(self._head, welcome=self.who is not None)
            if header.is_tensor:
                self._make_sense(lambda: self._make_room(header), header.kind.name)
                if self._body.nbytes != header.length:
                    raise Malformed(
                        f"{header.kind.name} of {header.length} bytes, not {self._body.nbytes}"
                    )
            else:
                self._text = bytearray(header.length)
                self._body = memoryview(self._text)
            self._header, self._got = header, 0
            return  # with an empty body, we are called again at once
        self._header, self._body, self._got = None, memoryview(self._head), 0
        content = {} if header.is_tensor else read_text(self._text)
        self._make_sense(lambda: self._take(header, content), header.kind.name)

    def _make_room(self, header: Header) -> None:
        self._body = self.loop.handler.room(self, header)

    def _take(self, header: Header, content: dict[str, Any]) -> None:
        if self.who is None or header.kind in (Kind.REFUSE, Kind.PING):
            self._greet(header, content)
        else:
            self.loop.handler.frame(self, header, content)

    def _greet(self, header: Header, content: dict[str, Any]) -> None:
        """Take part in the handshake."""
        kind, token = header.kind, self.loop.token
        if kind is Kind.PING:
            return
        if kind is Kind.REFUSE:
            self.refused, self.ends = True, content.get("ends") is True
            self.close(f"it says: {content.get('why', 'nothing')}")
        elif kind is Kind.CHALLENGE and self.calls is not None:
            self._theirs = str(content.get("nonce"))
            me = self.calls
            self.say(
                Kind.HELLO,
                {
                    **me.__dict__,
                    "nonce": self.nonce,
                    "proof": proof(token, "client", self._theirs, self.nonce, me),
                },
            )
        elif kind is Kind.HELLO and self.calls is None:
            who, theirs = Who.read(content), str(content.get("nonce"))
            check_proof(content.get("proof"), token, "client", self.nonce, theirs, who)
            greeting = self.loop.handler.greet(who)
            self.who = who
            own = proof(token, "server", theirs, self.nonce, who)
            self.say(Kind.WELCOME, {"proof": own, "greeting": greeting})
            self.loop.handler.opened(self, {})
        elif kind is Kind.WELCOME and self.calls is not None and self._theirs is not None:
            check_proof(content.get("proof"), token, "server", self.nonce, self._theirs, self.calls)
            self.who = Who("server", self.target)
            self.loop.handler.opened(self, content.get("greeting") or {})
        else:
            raise Malformed(f"{kind.name} at this moment")


class Loop:
    """Moves frames over all links of a process, on a thread of its own.

    token: the run's secret. lease_seconds: of silence after which a link is closed.
    """

    def __init__(self, handler: Handler, token: str, lease_seconds: float) -> None:
        self.handler, self.token, self.lease_seconds = handler, token, lease_seconds
        self.delay, self.delay_until = 0.0, 0.0  # seconds that each frame waits: a drill
        self.cut_until = 0.0  # nothing passes until then: a drill
        self.due = math.inf  # when the handler's tick is wanted before it is time for it
        self.links: list[Link] = []
        self.error: BaseException | None = None
        self._selector = selectors.DefaultSelector()
        self._calls: deque[Callable[[], None]] = deque()
        self._woken, self._wake = socket.socketpair()
        for end in (self._woken, self._wake):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._listeners: list[socket.socket] = []
        self._over = False
        self._thread = threading.Thread(target=self.run, name="bigtrain links", daemon=True)

    # -- from any thread -----------------------------------------------------------------------

    def start(self) -> None:
        """Begin, on a thread of its own."""
        self._thread.start()

    def suffer(self, event: Event) -> None:
        """Have a drill done to this process."""
        log.warning("drill: %s", event)
        now = time.monotonic()
        if event.what == "cut":
            self.cut_until = now + event.seconds
        elif event.what == "delay":
            self.delay, self.delay_until = event.ms / 1000, now + event.seconds
        else:
            suffer(event)

    def call(self, function: Callable[[], None]) -> None:
        """Have `function` called on the loop's thread."""
        self._calls.append(function)
        with contextlib.suppress(OSError):  # it is awake already, or closed
            self._wake.send(b"x")

    def stop(self, drain_seconds: float = 2.0) -> None:
        """Send what is queued, for that long at most; close all links and end the thread."""

        def end() -> None:
            self._over_at = time.monotonic() + drain_seconds
            self._over = True

        self.call(end)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(drain_seconds + 5.0)

    # -- on the loop's thread ------------------------------------------------------------------

    def listen(self, sock: socket.socket) -> None:
        """Take links from a socket that listens."""
        sock.setblocking(False)
        self._listeners.append(sock)
        self._selector.register(sock, selectors.EVENT_READ, sock)

    def connect(self, address: tuple[str, int], me: Who, target: int) -> Link | None:
        """Call server number `target`; None if that fails at once."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            failed = sock.connect_ex(address)
        except OSError:  # a name that does not resolve
            failed = errno.EHOSTUNREACH
        if failed not in (0, errno.EINPROGRESS):
            sock.close()
            return None
        return self._add(sock, me, target)

    def _add(self, sock: socket.socket, me: Who | None, target: int = -1) -> Link:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(self, sock, me, target)
        self.links.append(link)
        self._selector.register(sock, selectors.EVENT_READ, link)
        link.begin()
        self.watch(link)
        return link

    def watch(self, link: Link) -> None:
        """Wait for what this link can do next."""
        if link.open:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE * link.wants_to_write)
            if self._selector.get_key(link.sock).events != wanted:
                self._selector.modify(link.sock, wanted, link)

    def forget(self, link: Link) -> None:
        self.links.remove(link)
        self._selector.unregister(link.sock)

    def run(self) -> None:
        """Turn until `stop`."""
        try:
            ticked, self._seen = 0.0, time.monotonic()
            while not (self._over and self._is_drained()):
                ticked = self._turn(ticked)
        except BaseException as error:  # told by who waits for this thread
            self.error = error
            log.exception("the thread of the links has failed")
        finally:
            self._close()

    def _is_drained(self) -> bool:
        waiting = any(link.waits_to_write for link in self.links)
        return not waiting or time.monotonic() >= self._over_at

    def _turn(self, ticked: float) -> float:
        now = time.monotonic()
        if now < self.cut_until:
            time.sleep(_TICK_SECONDS / 2)
        else:
            slow = self.delay and any(link.waits_to_write for link in self.links)
            patience = min(0.005 if slow else _TICK_SECONDS, max(0.0, self.due - now))
            ready = self._selector.select(patience)
            self._see_whether_it_stood_still()
            for key, events in ready:
                self._on_event(key.data, events)
            if slow:
                for link in list(self.links):
                    self.watch(link)
        while self._calls:
            self._calls.popleft()()
        now = self._see_whether_it_stood_still()
        if now - ticked >= _TICK_SECONDS or now >= self.due:
            self.due = math.inf
            self._check(now)
            self.handler.tick(now)
            return now
        return ticked

    def _see_whether_it_stood_still(self) -> float:
        """If this process was stopped, or the machine, peers may have said what was not heard: they
        have that much longer. Returns the time."""
        now = time.monotonic()
        late, self._seen = now - self._seen - _TICK_SECONDS, now
        if late > self.lease_seconds / 4:
            log.warning("nothing was read for %.1f s: this process stood still, or was busy", late)
            for link in self.links:
                link.since, link.heard = (min(now, at + late) for at in (link.since, link.heard))
        return now

    def _on_event(self, data: Any, events: int) -> None:
        if data is None:
            with contextlib.suppress(OSError):
                while self._woken.recv(4096):
                    pass
        elif isinstance(data, Link):
            if data.open:
                data.on_event(events)
        else:
            with contextlib.suppress(OSError):
                sock, _ = data.accept()
                sock.setblocking(False)
                strangers = [x for x in self.links if x.who is None and x.calls is None]
                for link in strangers[: len(strangers) + 1 - _MOST_STRANGERS]:
                    link.close("others wait who may be no strangers")  # it has had its time
                self._add(sock, None)

    def _check(self, now: float) -> None:
        """Say that we are alive; give up who does not."""
        ping = min(_PING_SECONDS, self.lease_seconds / 5)
        for link in list(self.links):
            if link.who is None:
                if now - link.since > _GREET_SECONDS:
                    link.close("it did not say who it is")
            elif now - link.heard > self.lease_seconds:
                why = f"nothing was heard of it for {self.lease_seconds:g} s"
                link.silent = True
                link.close(why)
            elif now - link.said > ping and not link.waits_to_write:
                link.say(Kind.PING)

    def _close(self) -> None:
        for link in list(self.links):
            link.close("this process ends")
        for sock in self._listeners:
            sock.close()
        self._selector.close()
        self._woken.close()
        self._wake.close()
