"""Signatures of files in OpenSSH's own format, by a key that its user has already: `ssh-keygen -Y
verify` takes them, and who trusts whom stands in an allowed_signers file.

A signature is over a digest of the file with a namespace, so that one made for mail or for commits
is none for a receipt. Keys are ed25519.

Source: https://github.com/openssh/openssh-portable/blob/master/PROTOCOL.sshsig, and the chapter on
allowed signers in ssh-keygen(1).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.text_files import NotAFile, read_bytes
from pipeline.errors import UserError, one_line

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

NAMESPACE = "receipt@model-efficiency-pipeline"
MAGIC, VERSION, HASH, KIND = b"SSHSIG", 1, b"sha512", b"ssh-ed25519"
BEGIN, END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
WIDTH = 70  # characters of a line between them
MAX_KEY, MAX_SIGNERS = 2**16, 2**20  # bytes
REMEDY = "give the file of an ed25519 key without a passphrase: ssh-keygen -t ed25519 -N '' -f KEY"


class NotSigned(ValueError):
    """A signature is none of this file; its text says why."""


def load_key(path: Path, setting: str) -> Ed25519PrivateKey:
    """Return a private key.

    Args:
        setting: That names it.

    Raises:
        UserError: If it cannot be read, has a passphrase, or is of another kind.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    shown = one_line(path, 200)
    try:
        content = read_bytes(path, limit=MAX_KEY)
    except NotAFile as error:
        raise UserError(setting, f"{shown} {error}", REMEDY) from None
    except OSError as error:
        raise UserError(setting, f"{shown}: {error.strerror}", REMEDY) from None
    try:
        key = load_ssh_private_key(content, password=None)
    except TypeError:
        raise UserError(setting, f"{shown} has a passphrase, and nobody to ask", REMEDY) from None
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(setting, f"{shown} is no private key of OpenSSH", REMEDY) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(setting, f"{shown} is a key of another kind", REMEDY)
    return key


def sign(content: bytes, key: Ed25519PrivateKey, namespace: str = NAMESPACE) -> str:
    """Return the signature of a file's content, as a file holds it."""
    public = _string(KIND) + _string(key.public_key().public_bytes_raw())
    signed = key.sign(_to_sign(content, namespace))
    blob = (
        MAGIC
        + struct.pack(">I", VERSION)
        + _string(public)
        + _string(namespace.encode())
        + _string(b"")
        + _string(HASH)
        + _string(_string(KIND) + _string(signed))
    )
    text = base64.b64encode(blob).decode()
    lines = [text[at : at + WIDTH] for at in range(0, len(text), WIDTH)]
    return "\n".join([BEGIN, *lines, END]) + "\n"


def signer_of(content: bytes, signature: str, namespace: str = NAMESPACE) -> bytes:
    """Return the public key, as OpenSSH has it, that a file's content was signed with.

    Raises:
        NotSigned: If the signature is none, or is not of this content.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    public, of, hashed, signed = _parts(signature)
    if of != namespace.encode():
        raise NotSigned(f"it is of namespace {one_line(of.decode(errors='replace'), 60)!r}")
    if hashed != HASH:
        raise NotSigned("it is over another digest than SHA-512")
    (kind, raw), (of_kind, bytes_of) = _strings(public, 2), _strings(signed, 2)
    if kind != KIND or of_kind != KIND:
        raise NotSigned("its key is not ed25519")
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(bytes_of, _to_sign(content, namespace))
    except (InvalidSignature, ValueError):
        raise NotSigned("it is not of this receipt") from None
    return public


def principal_of(public: bytes, signers: Path, namespace: str = NAMESPACE) -> str | None:
    """Return who signs with a public key by an allowed_signers file; None: nobody in it.

    Lines with options that are not understood (a certificate authority, times) allow nobody.

    Raises:
        UserError: If the file cannot be read.
    """
    remedy = "give lines of NAME ssh-ed25519 KEY, as ssh-keygen(1) says of ALLOWED SIGNERS"
    try:
        text = read_bytes(signers, limit=MAX_SIGNERS).decode()
    except NotAFile as error:
        raise UserError("--signers", f"{one_line(signers, 200)} {error}", remedy) from None
    except OSError as error:
        problem = f"{one_line(signers, 200)}: {error.strerror}"
        raise UserError("--signers", problem, remedy) from None
    except UnicodeDecodeError:
        problem = f"{one_line(signers, 200)} is no text"
        raise UserError("--signers", problem, remedy) from None
    for line in text.splitlines():
        words = line.split()
        if not words or words[0].startswith("#") or KIND.decode() not in words[1:3]:
            continue
        at = words.index(KIND.decode())
        if (
            len(words) > at + 1
            and _is_key(words[at + 1], public)
            and _allows(words[1:at], namespace)
        ):
            return one_line(words[0], 200)
    return None


def fingerprint(public: bytes) -> str:
    """Return a public key's fingerprint, as `ssh-keygen -l` shows it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(public).digest()).decode().rstrip("=")


def _is_key(text: str, public: bytes) -> bool:
    try:
        return base64.b64decode(text, validate=True) == public
    except binascii.Error:
        return False


def _allows(options: list[str], namespace: str) -> bool:
    """Whether the options of a line allow its key to sign in a namespace."""
    for option in options:
        name, _, value = option.partition("=")
        if name.lower() != "namespaces":
            return False
        if not any(fnmatchcase(namespace, each) for each in value.strip('"').split(",")):
            return False
    return True


def _to_sign(content: bytes, namespace: str) -> bytes:
    digest = hashlib.sha512(content).digest()
    parts = (namespace.encode(), b"", HASH, digest)
    return MAGIC + b"".join(_string(each) for each in parts)


def _parts(signature: str) -> tuple[bytes, bytes, bytes, bytes]:
    """Return public key, namespace, name of the digest, and signature of an armored signature."""
    begin, end = signature.find(BEGIN), signature.find(END)
    if begin < 0 or end < begin:
        raise NotSigned("it is no signature of OpenSSH")
    try:
        blob = base64.b64decode("".join(signature[begin + len(BEGIN) : end].split()), validate=True)
    except (binascii.Error, ValueError):
        raise NotSigned("it is no signature of OpenSSH") from None
    start = len(MAGIC) + 4
    if blob[: len(MAGIC)] != MAGIC or blob[len(MAGIC) : start] != struct.pack(">I", VERSION):
        raise NotSigned("it is a signature of another version")
    public, namespace, _, hashed, signed = _strings(blob[start:], 5)
    return public, namespace, hashed, signed


def _string(content: bytes) -> bytes:
    """Return bytes with their length before them, as SSH has strings (RFC 4251, section 5)."""
    return struct.pack(">I", len(content)) + content


def _strings(blob: bytes, count: int) -> list[bytes]:
    """Return the strings that a blob is made of.

    Raises:
        NotSigned: If it is not made of so many.
    """
    found: list[bytes] = []
    for _ in range(count):
        if len(blob) < 4:
            raise NotSigned("it is cut short")
        size = int.from_bytes(blob[:4], "big")
        if size > len(blob) - 4:
            raise NotSigned("it is cut short")
        found.append(blob[4 : 4 + size])
        blob = blob[4 + size :]
    if blob:
        raise NotSigned("it is longer than it says")
    return found
