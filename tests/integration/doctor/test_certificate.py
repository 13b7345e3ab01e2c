import subprocess
import time
from pathlib import Path

import pytest

from chandlery.doctor.certificate import CertificateRefusedError, good_until
from tests.support.certificates import Certificate, make_certificate


def expired(folder: Path) -> Certificate:
    """Make a certificate that ended in 2001; `openssl ca` alone can be told when."""
    made = make_certificate(folder, "old")
    request, database, configuration = folder / "old.csr", folder / "index.txt", folder / "ca.cnf"
    database.touch()
    (folder / "serial").write_text("01\n")
    configuration.write_text(
        "[ca]\ndefault_ca = it\n[it]\npolicy = any\n[any]\ncommonName = supplied\n"
        f"[it]\ndatabase = {database}\nserial = {folder / 'serial'}\nnew_certs_dir = {folder}\n"
    )
    key = ("-key", str(made.key))
    run = ("openssl", "req", "-new", *key, "-subj", "/CN=old", "-out", str(request))
    subprocess.run(run, check=True, capture_output=True)
    subprocess.run(
        [
            *("openssl", "ca", "-batch", "-selfsign", "-config", str(configuration), "-md", "sha256"),
            *("-keyfile", str(made.key), "-in", str(request), "-out", str(made.certificate), "-notext"),
            *("-startdate", "20010101000000Z", "-enddate", "20010201000000Z"),
        ],
        check=True,
        capture_output=True,
    )
    return made


def test_it_tells_until_when_a_certificate_is_good(tmp_path: Path) -> None:
    made = make_certificate(tmp_path, "good")
    end = good_until(made.certificate, made.key)
    assert end == pytest.approx(time.time() + 2 * 86400, abs=60)
    assert good_until(made.certificate, made.key, "127.0.0.1") == end


def test_one_that_has_ended_is_refused(tmp_path: Path) -> None:
    made = expired(tmp_path)
    with pytest.raises(CertificateRefusedError, match="expired"):
        good_until(made.certificate, made.key)


def test_one_for_another_host_is_refused(tmp_path: Path) -> None:
    made = make_certificate(tmp_path, "good")
    with pytest.raises(CertificateRefusedError, match="not valid for 'registry"):
        good_until(made.certificate, made.key, "registry.example.com")


def test_files_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    one, other = make_certificate(tmp_path, "one"), make_certificate(tmp_path, "other")
    with pytest.raises(OSError, match="KEY_VALUES_MISMATCH"):
        good_until(one.certificate, other.key)
