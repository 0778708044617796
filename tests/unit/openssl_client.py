"""A TLS client that does what Python's cannot: it changes its keys as often as it likes (OpenSSL by ctypes)."""

import ctypes

_PIECE_BYTES = 1 << 16


class OpensslClient:
    """A client in memory, which trusts everybody and shows no certificate."""

    def __init__(self) -> None:
        self._ssl, self._crypto = ctypes.CDLL("libssl.so.3"), ctypes.CDLL("libcrypto.so.3")
        for library, names in (
            (self._ssl, ("TLS_client_method", "SSL_CTX_new", "SSL_new")),
            (self._crypto, ("BIO_s_mem", "BIO_new")),
        ):
            for name in names:
                getattr(library, name).restype = ctypes.c_void_p
        self._context = self._pointer(self._ssl.SSL_CTX_new(self._pointer(self._ssl.TLS_client_method())))
        self._connection = self._pointer(self._ssl.SSL_new(self._context))
        self._incoming, self._outgoing = (
            self._pointer(self._crypto.BIO_new(self._pointer(self._crypto.BIO_s_mem()))) for _ in range(2)
        )
        self._ssl.SSL_set_bio(self._connection, self._incoming, self._outgoing)
        self._ssl.SSL_set_connect_state(self._connection)

    def close(self) -> None:
        self._ssl.SSL_free(self._connection)
        self._ssl.SSL_CTX_free(self._context)

    def receive(self, data: bytes) -> None:
        if data:
            assert self._crypto.BIO_write(self._incoming, data, len(data)) == len(data)

    def shake_hands(self) -> bool:
        """One step; True once it is done."""
        return bool(self._ssl.SSL_do_handshake(self._connection) == 1)

    def change_keys(self, times: int, ask_the_peer_too: bool) -> None:
        for _ in range(times):
            assert self._ssl.SSL_key_update(self._connection, int(ask_the_peer_too)) == 1
            assert self.shake_hands()

    def write(self, data: bytes) -> None:
        assert self._ssl.SSL_write(self._connection, data, len(data)) == len(data)

    def sent(self) -> bytes:
        """What it has to say."""
        buffer = ctypes.create_string_buffer(_PIECE_BYTES)
        data = b""
        while (size_bytes := self._crypto.BIO_read(self._outgoing, buffer, _PIECE_BYTES)) > 0:
            data += buffer.raw[:size_bytes]
        return data

    @staticmethod
    def _pointer(address: int) -> ctypes.c_void_p:
        assert address
        return ctypes.c_void_p(address)
