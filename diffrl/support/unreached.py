"""Why another machine could not be asked, in plain words, of errors that libraries of the network raise.

They are known by the names of their classes, so that none of the libraries is imported.
"""

import errno
import re
import socket

from diffrl.support.errors import first_line, said_by

_LOST = {errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.ENETDOWN, errno.EHOSTDOWN}
"""What the system says where nothing answers."""
_AWAY = {
    *("ClientConnectorError", "ServerConnectionError", "ClientOSError"),  # aiohttp's
    *("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"),  # botocore's
    *("ConnectTimeout", "ReadTimeout", "TransportError"),
}
"""Classes of errors that say that nothing answers, or that the connection broke."""
_BEHIND = (502, 503, 504)
"""What a server answers that cannot reach what is behind it."""


def unreached(error: BaseException) -> bool:
    """Whether an error says that who was asked could not be reached: not that there is nothing, or that it refuses."""
    if _certificate(error):
        return False
    if getattr(error, "status", None) in _BEHIND or not _AWAY.isdisjoint(_kinds(error)):
        return True
    lost = isinstance(error, OSError) and error.errno in _LOST
    return lost or isinstance(error, ConnectionError | TimeoutError | socket.gaierror)


def why(error: BaseException) -> str:
    """What went wrong, half a sentence without a full stop; of an error that is not known here, what it says."""
    kinds, host, port = _kinds(error), getattr(error, "host", None), getattr(error, "port", None)
    whom = "the server" if host is None else str(host) if port is None else f"{host}:{port}"
    inner = getattr(error, "os_error", None) or error
    if _certificate(error):
        return f"the certificate of {whom} is not accepted"
    if "ClientConnectorDNSError" in kinds or isinstance(inner, socket.gaierror):
        return f"no machine called {host or 'so'} is found"
    if isinstance(inner, ConnectionRefusedError) or getattr(inner, "errno", None) == errno.ECONNREFUSED:
        return f"{whom} refuses the connection"
    if isinstance(error, TimeoutError):
        return f"{whom} does not answer in time"
    if "ClientConnectorError" in kinds:
        return f"{whom} cannot be reached ({first_line(inner).rstrip('.')})"
    if "ServerDisconnectedError" in kinds:
        return f"{whom} closed the connection without an answer"
    if "ClientPayloadError" in kinds:
        return "the download was cut off"
    if "ClientOSError" in kinds or isinstance(error, ConnectionError):
        return "the connection broke"
    if "ClientResponseError" in kinds:
        said = str(getattr(error, "message", "")).strip()
        return f"{whom} answers {getattr(error, 'status', '')} {said}".rstrip()
    return said_by(error).rstrip(".")


def received(error: BaseException) -> int | None:
    """How many bytes of a download had come that an error says was cut off; None where it does not say."""
    found = re.search(r"received (\d+) of \d+ bytes", str(error))
    return None if found is None else int(found[1])


def _certificate(error: BaseException) -> bool:
    return not {"ClientSSLError", "ClientConnectorCertificateError", "SSLError"}.isdisjoint(_kinds(error))


def _kinds(error: BaseException) -> set[str]:
    """The names of an error's class and of all that it is derived from."""
    return {kind.__name__ for kind in type(error).__mro__}
