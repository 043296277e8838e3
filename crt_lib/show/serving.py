"""One page over HTTP, to this machine alone."""

import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from crt_lib.files import InputError

ADDRESS = "127.0.0.1"  # never another: what is served is for who sits here


def server_of(page: str, port: int) -> ThreadingHTTPServer:
    """A server of `page` at /, of nothing else; port 0: any free one. To be closed by the caller.

    Raises InputError for a port that cannot be had.
    """
    body = page.encode()

    class Handler(BaseHTTPRequestHandler):
        """The page, or 404."""

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: who looks knows."""

    try:
        return ThreadingHTTPServer((ADDRESS, port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"port {port} cannot be had: {error}; choose another, or 0 for any free one"
        ) from error


def serve(page: str, port: int, browser: bool) -> None:
    """Serve `page` until interrupted (KeyboardInterrupt); prints its address."""
    with server_of(page, port) as server:
        address = f"http://{ADDRESS}:{server.server_port}/"
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        if browser:
            webbrowser.open(address)
        server.serve_forever()
