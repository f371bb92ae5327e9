"""The clearing house of the demonstration: confirms every line it is sent.

    python -m demo.clearing --port-file FILE

Runs until its one client hangs up or it is told to stop.
"""

import argparse
import socket
import sys
from pathlib import Path

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Serve one connection: a line in, "ok" out."""
    parser = argparse.ArgumentParser(prog="clearing", description="confirms what it is sent")
    parser.add_argument("--port-file", type=Path, required=True, help="the port it listens on is written here")
    options = parser.parse_args(argv)
    with socket.create_server(("127.0.0.1", 0)) as server:
        options.port_file.write_text(str(server.getsockname()[1]))
        connection, _ = server.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                connection.sendall(b"ok " + line.split(b" ", 1)[0] + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
