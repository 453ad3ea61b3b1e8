"""Sign a manifest with a key in a file, and check such a signature; offline.

The format is that of OpenSSF Model Signing 1.0 for one file and an elliptic-curve key: an in-toto
statement in a DSSE envelope in a Sigstore bundle. So `model_signing verify key` checks it too, and
what `model_signing sign key` wrote is checked here. The package `cryptography` is enough for that;
`model-signing` itself brings network clients, and 1.1.1 does not import as it is installed.
"""

import base64
import binascii
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import ArtefactMismatchError, MissingDependencyError
from exporters.bundle.manifest import MANIFEST_FILE, SIGNATURE_FILE, BundleError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

MAX_SIGNATURE_BYTES = 1 << 20
_MAX_KEY_BYTES = 1 << 16
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_HOW = (
    "make a pair with: openssl ecparam -name prime256v1 -genkey -noout -out key.pem && "
    "openssl ec -in key.pem -pubout -out key.pub.pem"
)


def load_private_key(path: Path) -> "ec.EllipticCurvePrivateKey":
    """The key to sign with, of the curve P-256, P-384 or P-521, in a PEM file without a password.

    Raises:
        BundleError: if the file holds no such key; what it holds is never shown.
        MissingDependencyError: if `cryptography` is not installed.
    """
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _read_key(path)
    try:
        key = load_pem_private_key(content, password=None)
    except TypeError:
        raise BundleError(f"{path} is locked with a password; give a key without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise BundleError(f"{path} holds no private key in PEM; {_HOW}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise BundleError(f"{path} holds a key of another kind than P-256, P-384, P-521; {_HOW}")
    return key


def load_public_key(path: Path) -> "ec.EllipticCurvePublicKey":
    """The key to check signatures with, in a PEM file.

    Raises:
        BundleError: if the file holds no such key.
        MissingDependencyError: if `cryptography` is not installed.
    """
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read_key(path))
    except (ValueError, UnsupportedAlgorithm):
        raise BundleError(f"{path} holds no public key in PEM; {_HOW}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise BundleError(f"{path} holds a key of another kind than P-256, P-384, P-521; {_HOW}")
    return key


def sign(manifest: bytes, key: "ec.EllipticCurvePrivateKey") -> bytes:
    """What is written as `manifest.sig`: the same bytes for the same manifest and key.

    Raises:
        BundleError: if the OpenSSL of `cryptography` is too old.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec

    payload = json.dumps(_statement(manifest), indent=2).encode()
    try:
        # Deterministic (RFC 6979), so that a bundle made twice has the same bytes.
        algorithm = ec.ECDSA(_hash_of(key.curve), deterministic_signing=True)
        signature = key.sign(_to_be_signed(payload), algorithm)
    except (UnsupportedAlgorithm, TypeError):
        raise BundleError(
            "signing needs a later cryptography: pip install -U cryptography"
        ) from None
    table = {
        "mediaType": _BUNDLE_TYPE,
        "verificationMaterial": {
            "publicKey": {"hint": _key_hint(key.public_key())},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return (json.dumps(table) + "\n").encode()


def check_signature(
    manifest: bytes, signature: bytes, key: "ec.EllipticCurvePublicKey", *, key_name: str
) -> None:
    """Refuse a signature that is not that of this manifest by the owner of this key.

    Args:
        manifest: the bytes of `manifest.json`.
        signature: those of `manifest.sig`.
        key: the public one.
        key_name: for the message.

    Raises:
        ArtefactMismatchError: if it is damaged, by another key, or of another manifest.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec

    payload, raw_signature = _envelope(signature)
    try:
        key.verify(raw_signature, _to_be_signed(payload), ec.ECDSA(_hash_of(key.curve)))
    except InvalidSignature:
        raise ArtefactMismatchError(
            f"{SIGNATURE_FILE} was changed, or was not made with the private key of {key_name}; "
            "do not use this bundle"
        ) from None
    # Only from here on is the payload more than the claim of a stranger.
    if not _is_about(payload, manifest):
        raise ArtefactMismatchError(
            f"{SIGNATURE_FILE} is a good signature by {key_name}, but of something else than this "
            f"{MANIFEST_FILE}; do not use this bundle"
        )


def _envelope(signature: bytes) -> tuple[bytes, bytes]:
    """The signed bytes and the signature in a Sigstore bundle."""
    try:
        envelope = json.loads(signature)["dsseEnvelope"]
        (entry,) = envelope["signatures"]
        if envelope["payloadType"] != _PAYLOAD_TYPE:
            raise ValueError("another type of payload")
        return (
            base64.b64decode(envelope["payload"], validate=True),
            base64.b64decode(entry["sig"], validate=True),
        )
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        raise ArtefactMismatchError(
            f"{SIGNATURE_FILE} is damaged, or no signature of OpenSSF Model Signing; do not use "
            "this bundle"
        ) from None


def _is_about(payload: bytes, manifest: bytes) -> bool:
    try:
        found = json.loads(payload)
        predicate = found["predicate"]
        described = (found["_type"], found["predicateType"], predicate["resources"])
        subjects = [subject["digest"] for subject in found["subject"]]
        method = predicate["serialization"]["method"], predicate["serialization"]["hash_type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    wanted = _statement(manifest)
    (subject,) = wanted["subject"]
    resources = wanted["predicate"]["resources"]
    return (
        described == (_STATEMENT_TYPE, _PREDICATE_TYPE, resources)
        and subjects == [subject["digest"]]
        and method == ("files", "sha256")
    )


def _statement(manifest: bytes) -> dict[str, Any]:
    """What is signed: the hash of one file, in the words of Model Signing."""
    digest = hashlib.sha256(manifest).digest()
    return {
        "_type": _STATEMENT_TYPE,
        "subject": [
            {"name": MANIFEST_FILE, "digest": {"sha256": hashlib.sha256(digest).hexdigest()}}
        ],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [],
            },
            "resources": [{"name": ".", "algorithm": "sha256", "digest": digest.hex()}],
        },
    }


def _to_be_signed(payload: bytes) -> bytes:
    """The pre-authentication encoding of DSSE 1."""
    head = f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(payload)} "
    return head.encode() + payload


def _hash_of(curve: "ec.EllipticCurve") -> Any:  # noqa: ANN401 (a class of cryptography)
    from cryptography.hazmat.primitives import hashes

    return {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[curve.key_size]


def _key_hint(key: "ec.EllipticCurvePublicKey") -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401 (only whether it is here)
    except ImportError:
        raise MissingDependencyError(
            "signatures need the package cryptography: pip install 'robust-compress[signing]', or "
            "pip install cryptography"
        ) from None


def _read_key(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise BundleError(f"the key {path} cannot be read: {error.strerror}") from None
