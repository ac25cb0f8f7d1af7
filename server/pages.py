"""The playground and the API reference: static files, the same for everyone, under a strict Content-Security-Policy.

They are read once; a request's path only ever picks one of them by its whole name, so no path leads to another file.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "static"
ROOT_PATH = "/"  # where a browser begins; it is sent on to the playground
FILES = {
    "/playground": "playground.html",
    "/docs": "docs.html",
    "/static/style.css": "style.css",
    "/static/api.js": "api.js",
    "/static/heat.js": "heat.js",
    "/static/playground.js": "playground.js",
    "/static/docs.js": "docs.js",
}
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def load_pages() -> dict[str, tuple[bytes, str]]:
    """Path -> (content, media type)."""
    return {path: ((FOLDER / name).read_bytes(), MEDIA_TYPES[Path(name).suffix]) for path, name in FILES.items()}
