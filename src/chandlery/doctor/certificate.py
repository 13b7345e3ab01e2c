"""Until when a certificate is good, and for which host, as a client sees it: by a handshake in memory."""

import ssl
from pathlib import Path

# TLS needs two.
_ROUND_TRIPS = 5


class CertificateRefusedError(Exception):
    """A client would refuse the certificate; the text says why."""


def good_until(certificate: Path, key: Path, host: str = "") -> float:
    """Return when the certificate ends (seconds since 1970), to a client that trusts whoever signed it.

    With `host`, it is refused that it is for another. Raises `CertificateRefusedError`, and `ssl.SSLError` or
    `OSError` if the files can't be used.
    """
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # An empty password: OpenSSL asks for one at the terminal otherwise.
    server_context.load_cert_chain(certificate, key, password="")
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = bool(host)
    # What is in the file is taken for signed by somebody trusted, though it may be no authority's.
    client_context.load_verify_locations(certificate)
    client_context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client, server = _connected(client_context, server_context, host or None)
    for side in (client, server) * _ROUND_TRIPS:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            raise CertificateRefusedError(error.verify_message) from error
        if side is client:
            shown = client.getpeercert() or {}
            return ssl.cert_time_to_seconds(str(shown["notAfter"]))
    raise CertificateRefusedError("the handshake doesn't end")


def _connected(
    client: ssl.SSLContext, server: ssl.SSLContext, host: str | None
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    return (
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
