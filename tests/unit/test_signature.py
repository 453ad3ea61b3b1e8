"""Signatures are those of OpenSSF Model Signing, by a key in a file; nothing else is accepted."""

import base64
import json

import pytest

from compressor.errors import ArtefactMismatchError
from exporters.bundle.manifest import BundleError
from exporters.bundle.signature import check_signature, load_private_key, load_public_key, sign

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec, ed25519  # noqa: E402

MANIFEST = b'{"a":1}\n'
THEIR_KEY = b"""-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEDFJlbJSphFgdXm/T3ok9STw0q+BG
ibbzqS6/cS8gm2wMfj5svIvUUfxYYwsxKDAStv9eAhCK1JS9HMM7rf5nDQ==
-----END PUBLIC KEY-----
"""
THEIR_STATEMENT = b"""{
  "_type": "https://in-toto.io/Statement/v1",
  "subject": [
    {
      "name": "manifest.json",
      "digest": {
        "sha256": "1174e121f6acd43dff812f7365151d33484ab1f2e289999f7341f70df7a659db"
      }
    }
  ],
  "predicateType": "https://model_signing/signature/v1.0",
  "predicate": {
    "resources": [
      {
        "name": ".",
        "algorithm": "sha256",
        "digest": "e346432021b04179518d9614f3560ccd71354a4ee101ddcb893d6959a9d6301c"
      }
    ],
    "serialization": {
      "method": "files",
      "hash_type": "sha256",
      "allow_symlinks": false,
      "ignore_paths": [
        ".github",
        ".gitattributes",
        ".git",
        ".gitignore"
      ]
    }
  }
}"""
THEIR_SIGNATURE = (
    b"MEQCIDpl9/u9zmkhkyeDvmj3NOM8liCz4FfOQlYjf4s2Mm74AiB9ttNiB98j"
    b"g4yAfXDT6IdvenLTmUoTm3+N/gmVuqZChA=="
)
"""What model-signing 1.1.1 wrote: `model_signing sign key manifest.json --private_key key.pem`."""


def pem(key, *, password=None):
    lock = serialization.NoEncryption()
    if password is not None:
        lock = serialization.BestAvailableEncryption(password)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)


def public_pem(key):
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


@pytest.fixture(params=[ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def pair(request, tmp_path):
    key = ec.generate_private_key(request.param())
    (tmp_path / "key.pem").write_bytes(pem(key))
    (tmp_path / "key.pub.pem").write_bytes(public_pem(key))
    return load_private_key(tmp_path / "key.pem"), load_public_key(tmp_path / "key.pub.pem")


def test_a_signature_is_accepted_and_is_always_the_same(pair):
    private, public = pair
    signature = sign(MANIFEST, private)
    assert sign(MANIFEST, private) == signature
    check_signature(MANIFEST, signature, public, key_name="key.pub.pem")


def envelope(content, signature, **changes):
    """A Sigstore bundle as model-signing writes it."""
    inner = {
        "payload": base64.b64encode(content).decode(),
        "payloadType": "application/vnd.in-toto+json",
        "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
    }
    return json.dumps({"dsseEnvelope": inner | changes}).encode()


def test_what_model_signing_has_signed_is_accepted(tmp_path):
    (tmp_path / "key.pub.pem").write_bytes(THEIR_KEY)
    public = load_public_key(tmp_path / "key.pub.pem")
    signature = envelope(THEIR_STATEMENT, base64.b64decode(THEIR_SIGNATURE))
    check_signature(MANIFEST, signature, public, key_name="theirs")
    with pytest.raises(ArtefactMismatchError, match="of something else"):
        check_signature(MANIFEST + b" ", signature, public, key_name="theirs")


def test_our_statement_says_what_theirs_says(pair):
    """But for the paths that are left out, of which one file has none."""
    inner = json.loads(sign(MANIFEST, pair[0]))["dsseEnvelope"]
    ours, theirs = json.loads(base64.b64decode(inner["payload"])), json.loads(THEIR_STATEMENT)
    for statement in (ours, theirs):
        del statement["predicate"]["serialization"]["ignore_paths"]
    assert ours == theirs


def refusal(manifest, signature, public):
    with pytest.raises(ArtefactMismatchError) as caught:
        check_signature(manifest, signature, public, key_name="key.pub.pem")
    return str(caught.value)


def test_every_changed_byte_of_a_signature_is_noticed(pair):
    private, public = pair
    good = json.loads(sign(MANIFEST, private))["dsseEnvelope"]
    payload = base64.b64decode(good["payload"])
    raw = base64.b64decode(good["signatures"][0]["sig"])
    check_signature(MANIFEST, envelope(payload, raw), public, key_name="k")
    for content, place in ((payload, 0), (raw, 1)):
        for at in range(0, len(content), 7):
            changed = bytearray(content)
            changed[at] ^= 1
            parts = [payload, raw]
            parts[place] = bytes(changed)
            assert "was changed, or was not made" in refusal(MANIFEST, envelope(*parts), public)


def test_another_key_and_another_manifest_are_refused(pair, tmp_path):
    private, public = pair
    (tmp_path / "other.pem").write_bytes(public_pem(ec.generate_private_key(private.curve)))
    other = load_public_key(tmp_path / "other.pem")
    signature = sign(MANIFEST, private)
    assert "not made with the private key of key.pub.pem" in refusal(MANIFEST, signature, other)
    assert "of something else than this manifest.json" in refusal(b"{}", signature, public)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(predicateType="https://elsewhere/"),
        lambda s: s.update(_type="https://elsewhere/"),
        lambda s: s["predicate"]["resources"].append({"name": "x", "digest": "0" * 64}),
        lambda s: s["predicate"].update(resources=[]),
        lambda s: s["subject"].append(s["subject"][0]),
        lambda s: s["predicate"]["serialization"].update(hash_type="md5"),
        lambda s: s.clear(),
    ],
)
def test_a_good_signature_of_another_statement_is_refused(pair, change):
    """Whoever signs other things with this key has not signed this manifest."""
    private, public = pair
    statement = json.loads(THEIR_STATEMENT)
    change(statement)
    payload = json.dumps(statement).encode()
    kind = "application/vnd.in-toto+json"
    signed = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    algorithm = {256: "SHA256", 384: "SHA384", 521: "SHA512"}[private.curve.key_size]
    raw = private.sign(signed, ec.ECDSA(getattr(hashes, algorithm)()))
    assert "of something else" in refusal(MANIFEST, envelope(payload, raw), public)


def test_what_is_no_signature_is_refused(pair):
    private, public = pair
    good = json.loads(sign(MANIFEST, private))["dsseEnvelope"]
    payload = base64.b64decode(good["payload"])
    for content in (
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        envelope(payload, b"x", signatures=[]),
        envelope(payload, b"x", signatures=good["signatures"] * 2),
        envelope(payload, b"x", payloadType="text/plain"),
        envelope(payload, b"x", payload="not base64!"),
    ):
        assert "is damaged, or no signature" in refusal(MANIFEST, content, public)


@pytest.mark.parametrize("load", [load_private_key, load_public_key])
def test_files_that_hold_no_such_key_are_refused_and_never_shown(load, tmp_path):
    secret = pem(ed25519.Ed25519PrivateKey.generate())
    small = pem(ec.generate_private_key(ec.SECP256K1()))
    locked = pem(ec.generate_private_key(ec.SECP256R1()), password=b"secret")
    for place, content in enumerate((b"", b"\x00\xff", secret, small, locked, public_of(secret))):
        path = tmp_path / f"{place}.pem"
        path.write_bytes(content)
        with pytest.raises(BundleError) as caught:
            load(path)
        assert caught.value.exit_code == 4
        assert str(path) in str(caught.value)
        held = content.decode(errors="replace").splitlines()
        assert not any(line in str(caught.value) for line in held[1:-1])
    with pytest.raises(BundleError, match="cannot be read: No such file"):
        load(tmp_path / "absent.pem")
    with pytest.raises(BundleError, match="cannot be read: Is a directory"):
        load(tmp_path)


def public_of(content):
    return public_pem(serialization.load_pem_private_key(content, password=None))


def test_a_locked_key_says_so(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "key.pem").write_bytes(pem(key, password=b"secret"))
    with pytest.raises(BundleError, match="is locked with a password"):
        load_private_key(tmp_path / "key.pem")
