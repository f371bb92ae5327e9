"""A TCP proxy that breaks what it is told to: the nth request, before the server sees it or before its answer comes back."""

import contextlib
import socket
import threading


class Proxy:
    """Forwards to (host, port); `break_at(n, when)` resets the connection at the nth message of a client from now on."""

    def __init__(self, host, port, listen_port=0):
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", listen_port))
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._left, self._when, self.broken, self._closed = 0, "", 0, False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def break_at(self, number, when):
        """`when`: "request" loses the message itself, "answer" lets it through and loses what comes back."""
        with self._lock:
            self._left, self._when, self.broken = number, when, 0

    def close(self):
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _hit(self):
        with self._lock:
            if self._left == 0:
                return ""
            self._left -= 1
            self.broken += self._left == 0
            return self._when if self._left == 0 else ""

    def _serve(self, client):
        """One connection: a message is what the client sends after the server has answered."""
        with client, socket.create_connection(self._target) as server:
            client.settimeout(0.05)
            server.settimeout(0.05)
            answered, drop_answer = True, False
            while not self._closed:
                data = _receive(client)
                if data == b"":
                    return
                if data:
                    if answered:
                        verdict = self._hit()
                        if verdict == "request":
                            return
                        drop_answer = verdict == "answer"
                    answered = False
                    server.sendall(data)
                back = _receive(server)
                if back == b"":
                    return
                if back:
                    if drop_answer:
                        return
                    answered = True
                    client.sendall(back)


def _receive(connection):
    """Bytes, b"" at the end, None if nothing came yet."""
    try:
        return connection.recv(1 << 16)
    except TimeoutError:
        return None
    except OSError:
        return b""
