"""How the updater gets bytes: HTTPS with the fleet's own authority, or a folder. Signatures decide what they are worth.

A download that breaks is resumed by byte range, within a run and across runs.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import ssl
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from tuf.api.exceptions import DownloadError, DownloadHTTPError
from tuf.ngclient import FetcherInterface  # type: ignore[attr-defined]

from fl_core.contracts.errors import EnvironmentFault, InputError
from fl_core.contracts.names import is_loopback

CHUNK = 64 << 10
TIMEOUT_S = 30.0
ATTEMPTS = 4
PAUSE_S = 0.1
NOTHING_LEFT = http.client.REQUESTED_RANGE_NOT_SATISFIABLE
# Names of root, timestamp and snapshot metadata repeat from version to version; target names carry their hash.
RESUMABLE = re.compile(r".*/targets/.*/?[0-9a-f]{64}\.[^/]+")
BROKEN = (http.client.HTTPException, OSError)


def base_url(repository: str) -> str:
    """The repository's address without a slash at its end. Raises InputError for what is neither https nor a folder.

    Plain http is for this machine only: signatures protect the model, not who reads it.
    """
    parts = urllib.parse.urlsplit(repository)
    if parts.scheme in ("https", "http"):
        if not parts.hostname or parts.query or parts.fragment or parts.username:
            raise InputError(f"repository {repository!r} is not a plain URL", remedy="write https://HOST:PORT/PATH")
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            raise InputError(f"repository {repository!r}: http is for this machine only", remedy="use https://")
        return repository.rstrip("/")
    folder = Path(parts.path if parts.scheme == "file" else repository)
    if not folder.is_dir():
        raise InputError(f"repository {repository!r}: no such folder", remedy="name a folder or an https:// address")
    return f"file://{folder.resolve()}"


def tls_context(ca: Path | None) -> ssl.SSLContext:
    """Trusts ``ca`` only, or the system's authorities where it is None. Raises EnvironmentFault."""
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
    except (OSError, ssl.SSLError) as error:
        raise EnvironmentFault(f"{ca}: not a readable certificate: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class Fetcher(FetcherInterface):
    """``partial``: folder of unfinished downloads; ``deadline``: of time.monotonic(), for the whole run."""

    def __init__(self, context: ssl.SSLContext | None, partial: Path, deadline: float) -> None:
        self._context, self._partial, self._deadline = context, partial, deadline
        self._connection: http.client.HTTPConnection | None = None
        self._place = ("", "")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def part_of(self, url: str) -> Path:
        """Where the unfinished download of ``url`` lies; a target's name carries its hash, so no other has the place."""
        name = url.rpartition("/")[2]
        return self._partial / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.part"

    def forget(self) -> None:
        """Drop all unfinished downloads."""
        for path in self._partial.glob("*.part"):
            path.unlink(missing_ok=True)

    def _fetch(self, url: str) -> Iterator[bytes]:
        if url.startswith("file://"):
            return self._from_file(Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)))
        if RESUMABLE.fullmatch(url):
            return self._resumable(url, self.part_of(url))
        return self._whole(url)

    def _from_file(self, path: Path) -> Iterator[bytes]:
        if not path.is_file():
            raise DownloadHTTPError(f"{path}: no such file", 404)

        def chunks() -> Iterator[bytes]:
            with path.open("rb") as file:
                while data := file.read(CHUNK):
                    self._check_time()
                    yield data

        return chunks()

    def _whole(self, url: str) -> Iterator[bytes]:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                response = self._get(url, 0)
                break
            except BROKEN as error:
                self.close()
                if attempt == ATTEMPTS or isinstance(error, ssl.SSLCertVerificationError):
                    raise _unreachable(url, error) from None
                time.sleep(PAUSE_S * 2**attempt)
        return self._body(url, response)

    def _body(self, url: str, response: http.client.HTTPResponse) -> Iterator[bytes]:
        try:
            yield from self._chunks(response)
        except BROKEN as error:
            self.close()
            raise _unreachable(url, error) from None

    def _resumable(self, url: str, part: Path) -> Iterator[bytes]:
        """What is on disk first, then the rest; gives up after ``ATTEMPTS`` tries that brought nothing."""
        self._partial.mkdir(parents=True, exist_ok=True)
        done = failures = 0
        if part.is_file():
            with part.open("rb") as file:
                while data := file.read(CHUNK):
                    done += len(data)
                    yield data
        while True:
            before = done
            try:
                for data in self._rest(url, part, done):
                    done += len(data)
                    yield data
                return
            except BROKEN as error:
                self.close()
                failures = 1 if done > before else failures + 1
                if failures >= ATTEMPTS or isinstance(error, ssl.SSLCertVerificationError):
                    raise _unreachable(url, error) from None
                time.sleep(PAUSE_S * 2**failures)

    def _rest(self, url: str, part: Path, done: int) -> Iterator[bytes]:
        """From byte ``done`` on; every chunk is on disk before it is passed on."""
        try:
            response = self._get(url, done)
        except DownloadHTTPError as error:
            if error.status_code == NOTHING_LEFT and done:
                return
            raise
        if done and response.status == http.client.OK:
            self._skip(response, done)
        with part.open("ab") as file:
            for data in self._chunks(response):
                file.write(data)
                file.flush()
                yield data

    def _chunks(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        try:
            while data := response.read(CHUNK):
                self._check_time()
                yield data
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
        finally:
            if not response.isclosed():  # abandoned in the middle: the connection still holds the rest
                self.close()

    def _skip(self, response: http.client.HTTPResponse, count: int) -> None:
        """A server without byte ranges starts over: what we have is read and dropped."""
        while count > 0:
            self._check_time()
            data = response.read(min(CHUNK, count))
            if not data:
                raise http.client.IncompleteRead(b"", count)
            count -= len(data)

    def _get(self, url: str, start: int) -> http.client.HTTPResponse:
        self._check_time()
        parts = urllib.parse.urlsplit(url)
        if self._connection is None or self._place != (parts.scheme, parts.netloc):
            self.close()
            self._place = (parts.scheme, parts.netloc)
            self._connection = self._connect(parts)
        headers = {"Range": f"bytes={start}-"} if start else {}
        self._connection.request("GET", parts.path, headers={"Accept-Encoding": "identity", **headers})
        response = self._connection.getresponse()
        if response.status not in (200, 206) or (response.status == 206) != self._continues(response, start):
            response.read(CHUNK)
            self.close()
            raise DownloadHTTPError(f"{url}: status {response.status}", response.status)
        return response

    @staticmethod
    def _continues(response: http.client.HTTPResponse, start: int) -> bool:
        return start > 0 and response.getheader("Content-Range", "").startswith(f"bytes {start}-")

    def _connect(self, parts: urllib.parse.SplitResult) -> http.client.HTTPConnection:
        host = parts.hostname or ""
        if parts.scheme == "https":
            return http.client.HTTPSConnection(host, parts.port, timeout=TIMEOUT_S, context=self._context)
        return http.client.HTTPConnection(host, parts.port, timeout=TIMEOUT_S)

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise DownloadError("the download took longer than allowed")


def _unreachable(url: str, error: BaseException) -> DownloadError:
    reason = str(error) or type(error).__name__
    return DownloadError(f"{urllib.parse.urlsplit(url).netloc}: {reason}")
