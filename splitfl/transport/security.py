"""Encryption and authentication of a connection: CURVE (https://rfc.zeromq.org/spec/26), and who may come in.

Three options must be set together or libzmq lets anybody in who knows the server's public key: `zap_domain`,
`ZAP_ENFORCE_DOMAIN` and an authenticator for that same domain. `Listener.self_test` finds out whether it works.
"""

import logging
from dataclasses import dataclass

import zmq
from zmq.auth.thread import ThreadAuthenticator

from splitfl.transport.keys import AllowList, KeyPair

_DOMAIN = "splitfl"

# pyzmq logs every key it lets in or not, which is more than a log should know.
logging.getLogger("zmq.auth").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSecurity:
    """The server's key pair, and whom it lets in."""

    key_pair: KeyPair
    allow_list: AllowList


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSecurity:
    """A client's key pair, and the one server it talks to."""

    key_pair: KeyPair
    server_public_key: str


class Doorkeeper:
    """Answers libzmq's question whether a key may come in (ZAP, https://rfc.zeromq.org/spec/27), in its own thread."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", security: ServerSecurity) -> None:
        self._allow_list = security.allow_list
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain=_DOMAIN, credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Tell whether a key is let in; called in the authenticator's thread."""
        name = key.decode("ascii", "replace")
        return domain == _DOMAIN and self._allow_list.client_of(name) is not None

    def stop(self) -> None:
        """End the thread; from then on nobody is let in."""
        self._authenticator.stop()


def secure_server(socket: "zmq.Socket[bytes]", security: ServerSecurity) -> None:
    """Set a server's options, before it binds."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt_string(zmq.CURVE_SECRETKEY, security.key_pair.secret)
    socket.setsockopt_string(zmq.ZAP_DOMAIN, _DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def secure_client(socket: "zmq.Socket[bytes]", security: ClientSecurity) -> None:
    """Set a client's options, before it connects."""
    socket.setsockopt_string(zmq.CURVE_SERVERKEY, security.server_public_key)
    socket.setsockopt_string(zmq.CURVE_PUBLICKEY, security.key_pair.public)
    socket.setsockopt_string(zmq.CURVE_SECRETKEY, security.key_pair.secret)
