"""What several versions of Nix were seen to say, and what is read from it."""

import pytest

from chandlery.errors import BuildError, BuildTimeoutError, DownloadError
from chandlery.nix.output import (
    DerivationMissingError,
    FetchPlan,
    FetchPlans,
    build_error,
    last_error,
    says_disk_full,
    says_no_namespaces,
    says_outdated,
)

HASH = "ibjy94xy9h2w0mkymqwpj0gf8k77bc0y"
P = f"/nix/store/{HASH}-p.drv"
MIB = 1 << 20


def said(*lines: str) -> str:
    return "".join(f"{line}\n" for line in lines)


# The second is Nix 2.26's, where what fetches is a process of its own.
DOWNLOADS = [
    said(
        f"building '{P}'...",
        "error: unable to download 'http://127.0.0.1:9/x.tar': HTTP error 404 ('')",
    ),
    said(
        f"building '{P}'...",
        "error:",
        "       … writing file '/nix/store/6l8x5qxsjbp0b294n4fhm8rfk0mwgm3i-x.tar'",
        "",
        "       error: unable to download 'http://127.0.0.1:9/x.tar': HTTP error 404",
        f"error: builder for '{P}' failed with exit code 1",
    ),
]


@pytest.mark.parametrize("text", DOWNLOADS)
def test_a_failed_download_names_the_address_and_why(text: str) -> None:
    error = build_error(text, [P])
    assert isinstance(error, DownloadError)
    assert "unable to download 'http://127.0.0.1:9/x.tar': HTTP error 404" in str(error)


def test_a_download_that_is_tried_again_has_not_failed() -> None:
    retried = "warning: error: unable to download 'http://x/y': HTTP error 502; retrying in 263 ms"
    error = build_error(said(retried, f"error: builder for '{P}' failed with exit code 3"), [P])
    assert not isinstance(error, DownloadError)
    assert "p could not be built: its builder failed with exit code 3" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        said(
            f"building '{P}'...",
            "error: executing '/bin/bash': No such file or directory",
            f"error: builder for '{P}' failed with exit code 1",
        ),
        said(f"error: builder for '{P}' failed: executing '/bin/bash': No such file or directory"),
    ],
)
def test_a_builder_that_is_not_there_is_named(text: str) -> None:
    error = build_error(text, [P])
    assert isinstance(error, BuildError)
    assert "executing '/bin/bash': No such file or directory" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        said(
            "building '/nix/store/x'...",
            "last words",
            f"error: builder for '{P}' failed with exit code 3;",
            "       last 1 log lines:",
            "error: 1 dependencies of derivation '/nix/store/0x1qk-app-1.drv' failed to build",
        ),
        # Nix 2.34
        said(
            "last words",
            f"error: Cannot build '{P}'.",
            "       Reason: builder failed with exit code 3.",
            "       Output paths:",
            f"         /nix/store/{HASH}-p",
            "       Last 1 log lines:",
            "       > last words",
            f"error: Cannot build '/nix/store/{HASH}-app-1.drv'.",
            "       Reason: 1 dependency failed.",
        ),
    ],
)
def test_of_what_failed_the_first_is_named_with_its_exit_code(text: str) -> None:
    error = build_error(text, [f"/nix/store/{HASH}-app-1.drv"])
    assert isinstance(error, BuildError)
    assert str(error).startswith("p could not be built: its builder failed with exit code 3")
    assert error.log_tail[:1] == ("last words",)
    assert not any("Output" in line or "last words" in line for line in error.log_tail[1:])


@pytest.mark.parametrize(
    "text",
    [
        f"error: building of '{P}!out' from .drv file timed out after 5 seconds",
        said("error: timed out after 5 seconds", f"error: Cannot build '{P}'."),
    ],
)
def test_what_took_too_long_is_told_as_that(text: str) -> None:
    error = build_error(text, [P])
    assert isinstance(error, BuildTimeoutError)
    assert str(error).startswith("p could not be built: it was stopped after 5 s")


@pytest.mark.parametrize(
    "text", [f"error: path '{P}' is not valid", f"error: path '{P}' does not exist and cannot be created"]
)
def test_what_is_gone_from_the_store_is_to_be_resolved_again(text: str) -> None:
    assert isinstance(build_error(text, [P]), DerivationMissingError)


@pytest.mark.parametrize(
    ("text", "outdated"),
    [
        (
            "warning: could not update local clone of Git repository 'x'; continuing",
            True,
        ),
        ("warning: error: unable to download 'https://x': HTTP error 503; using cached version", True),
        # Nix 2.26
        ("warning: could not get HEAD ref for repository 'x'; using expired cached ref 'refs/heads/a'", True),
        ("fatal: unable to access 'http://127.0.0.1:9/a.git/': Failed to connect to 127.0.0.1", True),
        ("warning: the group 'nixbld' specified in 'build-users-group' does not exist", False),
        ("warning: Git tree '/srv/fatal: tree' is dirty", False),
    ],
)
def test_what_is_outdated_is_told_from_what_is_fresh(text: str, outdated: bool) -> None:
    assert says_outdated(said("downloading", text)) == outdated


@pytest.mark.parametrize(
    ("text", "namespaces"),
    [
        ("error: cloning builder process: Operation not permitted", True),
        ("error: this system does not support the kernel namespaces that are required for sandboxing", True),
        ("error: setting up a private mount namespace: Operation not permitted", True),
        ("error: creating directory '/data/nix/x.drv.chroot/root/bin': No such file or directory", False),
        ("error: getting status of '/bin/bash': Permission denied", False),
    ],
)
def test_namespaces_are_blamed_only_if_nix_names_them(text: str, namespaces: bool) -> None:
    assert says_no_namespaces(text) == namespaces


def test_the_last_error_is_what_is_told_without_where_it_was() -> None:
    text = said(
        "error:",
        "       … while evaluating the attribute 'x'",
        "         at /nix/store/a/default.nix:1:1:",
        "",
        "       error: attribute 'y' missing",
        "       at /nix/store/a/default.nix:2:3:",
        "            1| {",
    )
    assert last_error(text) == "attribute 'y' missing"


def test_a_full_disk_is_found_in_what_nix_says() -> None:
    assert says_disk_full("error: writing to file: No space left on device")
    assert not says_disk_full("error: writing to file: Permission denied")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            # Nix 2.8
            "this derivation will be built:\n"
            "  /nix/store/00000000000000000000000000000000-image.drv\n"
            "these 2 paths will be fetched (1.50 MiB download, 4.25 MiB unpacked):\n",
            [FetchPlan(1, 3 * MIB // 2, 17 * MIB // 4)],
        ),
        (
            # Nix 2.24 and later
            "these 12 derivations will be built:\n"
            "this path will be fetched (512.0 KiB download, 2.0 GiB unpacked):\n",
            [FetchPlan(12, MIB // 2, 2048 * MIB)],
        ),
        ("this path will be fetched (0.00 MiB download, 3 B unpacked):\n", [FetchPlan(0, 0, 3)]),
        ("these 3 derivations will be built:\nbuilding '/nix/store/x.drv'...\n", []),
        # Builders may say anything.
        ("these 2 paths will be fetched (1.5.0 MiB download, 4.25 MiB unpacked):\n", []),
        (f"this path will be fetched (1 B download, {'9' * 400} MiB unpacked):\n", []),
        (f"these {'9' * 5000} derivations will be built:\n", []),
        ("a builder says: these 2 paths will be fetched (1.50 MiB download, 4.25 MiB unpacked):\n", []),
    ],
)
def test_nix_says_what_it_is_about_to_fetch(said: str, expected: list[FetchPlan]) -> None:
    plans: list[FetchPlan] = []
    take = FetchPlans(plans.append)
    for line in said.encode().splitlines(keepends=True):
        take(line)
    assert plans == expected
