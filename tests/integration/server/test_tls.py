import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from chandlery.errors import SettingsError
from chandlery.server.tls import CertificateCopy, CertificateWatch
from tests.support.certificates import Certificate, make_certificate

P384 = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp384r1")
P521 = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp521r1")
ED448 = ("-newkey", "ed448")


def copy_of(source: Certificate, folder: Path) -> CertificateCopy:
    return CertificateCopy(source.certificate, source.key, folder / "tls.pem")


@pytest.mark.parametrize(
    "key", [P384, ("-newkey", "rsa:2048"), ("-newkey", "ed25519")], ids=["P-384", "RSA", "Ed25519"]
)
def test_a_certificate_that_works_is_copied_once(tmp_path: Path, key: tuple[str, ...]) -> None:
    source = make_certificate(tmp_path, "one", key)
    copy = copy_of(source, tmp_path)
    assert copy.update()
    assert not copy.update()
    assert copy.file.read_text() == source.certificate.read_text() + "\n" + source.key.read_text()
    assert stat.S_IMODE(copy.file.stat().st_mode) == 0o600


def remove(source: Certificate, folder: Path) -> None:
    source.certificate.unlink()


def cut(source: Certificate, folder: Path) -> None:
    source.certificate.write_bytes(source.certificate.read_bytes()[:100])


def exchange_the_key(source: Certificate, folder: Path) -> None:
    source.key.write_bytes(make_certificate(folder, "other").key.read_bytes())


def use_a_key_that_openssl_takes_and_the_server_does_not(source: Certificate, folder: Path) -> None:
    source.replace(make_certificate(folder, "other", P521))


def use_another_key_of_that_kind(source: Certificate, folder: Path) -> None:
    source.replace(make_certificate(folder, "other", ED448))


def encrypt_the_key(source: Certificate, folder: Path) -> None:
    encrypted = make_certificate(folder, "other", ("-newkey", "rsa:2048"))
    subprocess.run(
        [
            *("openssl", "rsa", "-aes256", "-passout", "pass:secret"),
            *("-in", str(encrypted.key), "-out", str(source.key)),
        ],
        check=True,
        capture_output=True,
    )
    source.certificate.write_bytes(encrypted.certificate.read_bytes())


CHANGES = [
    remove,
    cut,
    exchange_the_key,
    use_a_key_that_openssl_takes_and_the_server_does_not,
    use_another_key_of_that_kind,
    encrypt_the_key,
]


@pytest.mark.parametrize("spoil", CHANGES, ids=lambda change: change.__name__)
def test_what_does_not_work_is_told_and_not_copied(
    tmp_path: Path, spoil: Callable[[Certificate, Path], None]
) -> None:
    source = make_certificate(tmp_path, "one")
    copy = copy_of(source, tmp_path)
    copy.update()
    before = copy.file.read_bytes()
    spoil(source, tmp_path)
    with pytest.raises(SettingsError, match=r"one\.pem"):
        copy.update()
    assert copy.file.read_bytes() == before
    source.replace(make_certificate(tmp_path, "two"))
    assert copy.update()
    assert sorted(tmp_path.glob("tls.pem*")) == [copy.file]


def test_what_does_not_work_is_tried_once(tmp_path: Path) -> None:
    source = make_certificate(tmp_path, "one", P521)
    copy = copy_of(source, tmp_path)
    with pytest.raises(SettingsError):
        copy.update()
    assert not copy.update()
    assert not copy.file.exists()


def test_a_worker_knows_that_what_it_shows_is_outdated_whoever_has_replaced_it(tmp_path: Path) -> None:
    source = make_certificate(tmp_path, "one")
    copy = copy_of(source, tmp_path)
    assert copy.update()
    before = CertificateWatch(copy_of(source, tmp_path), 60.0)
    assert not before.has_successor
    source.replace(make_certificate(tmp_path, "two"))
    assert copy.update()
    assert before.has_successor
    assert not CertificateWatch(copy, 60.0).has_successor
